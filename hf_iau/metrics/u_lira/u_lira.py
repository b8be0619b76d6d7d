"""U-LiRA as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_iau.metrics.inputs import matrix
from hf_iau.metrics.model_sets import u_lira

_DESCRIPTION = """
Can models that unlearned the forget rows be told from models that never saw them? For each row two normal
distributions are fitted to its margins under either set of models, and models left out of the fit are judged by the
ratio of the likelihoods (U-LiRA).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each forget row its margins under the unlearned models, `(rows, models)`.
    references: for each forget row its margins under the retrained models, `(rows, models)`.
        A margin is log(p / (1 − p)) of the label's probability p; `hf_iau.metrics.model_sets.margins` computes it from
        logits.
    folds: parts that the models are dealt into; each is judged by fits to the others.
    seed: of the dealing.
Returns:
    `accuracy` and `auc` with their 95 % intervals over models; 0.5 is chance and the aim, 1 says always told apart.
"""

_CITATION = """\
@article{hayes2024inexact,
  title = {Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy},
  author = {Hayes, Jamie and Shumailov, Ilia and Triantafillou, Eleni and Khalifa, Amr and Papernot, Nicolas},
  journal = {arXiv preprint arXiv:2403.01218}, year = {2024}
}
@inproceedings{kurmanji2023towards,
  title = {Towards Unbounded Machine Unlearning},
  author = {Kurmanji, Meghdad and Triantafillou, Peter and Hayes, Jamie and Triantafillou, Eleni},
  booktitle = {NeurIPS}, year = {2023}
}
@inproceedings{carlini2022membership,
  title = {Membership Inference Attacks From First Principles},
  author = {Carlini, Nicholas and Chien, Steve and Nasr, Milad and Song, Shuang
    and Terzis, Andreas and Tramèr, Florian},
  booktitle = {IEEE Symposium on Security and Privacy}, year = {2022}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ULiRA(evaluate.Metric):
    """Likelihood-ratio attack between sets of models; see `hf_iau.metrics.model_sets`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Sequence(datasets.Value("float64")),
                }
            ),
        )

    def _compute(self, predictions: Any, references: Any, folds: int = 5, seed: int = 0) -> dict[str, Any]:
        unlearned, retrained = matrix("predictions", predictions), matrix("references", references)
        return u_lira(unlearned, retrained, folds, seed).to_dict()
