"""KLoM as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_iau.evaluation.intervals import RESAMPLES
from hf_iau.metrics.inputs import matrix
from hf_iau.metrics.model_sets import klom

_DESCRIPTION = """
KL divergence of margins: how far is the distribution of a row's margin under unlearned models from its distribution
under retrained models, row by row?
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: for each row its margins under the unlearned models, `(rows, models)`.
    references: for each row its margins under the retrained models, `(rows, models)`.
        A margin is log(p / (1 − p)) of the label's probability p; `hf_iau.metrics.model_sets.margins` computes it from
        logits.
    estimator: "histogram" (the paper's, for about 100 models a set) or "gaussian" (for fewer).
    permutations: random exchanges of models for the values at chance; 0 for none.
    bootstrap: resamples, of rows, for the mean's interval; 0 for none.
    seed: of both.
Returns:
    `mean` (with interval), `median` and `percentile_95` over the rows of KL(unlearned ‖ retrained) in nats; lower is
    closer. `chance_mean` and `chance_percentile_95` are what retrained models would have, `p_value` the share of random
    exchanges with a mean at least as large.
"""

_CITATION = """\
@article{georgiev2024attribute,
  title = {Attribute-to-Delete: Machine Unlearning via Datamodel Matching},
  author = {Georgiev, Kristian and Rinberg, Roy and Park, Sung Min and Garg, Shivam and Ilyas, Andrew and
            Madry, Aleksander and Neel, Seth},
  journal = {arXiv preprint arXiv:2410.23232}, year = {2024}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class KLoM(evaluate.Metric):
    """KL divergence of margins between sets of models; see `hf_iau.metrics.model_sets`."""

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

    def _compute(
        self,
        predictions: Any,
        references: Any,
        estimator: str = "histogram",
        permutations: int = 200,
        bootstrap: int = RESAMPLES,
        seed: int = 0,
    ) -> dict[str, Any]:
        unlearned, retrained = matrix("predictions", predictions), matrix("references", references)
        return klom(unlearned, retrained, estimator, permutations, bootstrap, seed).to_dict()  # type: ignore[arg-type]
