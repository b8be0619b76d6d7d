"""Agreement of two models' predictions as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_iau.data import RowPredictions
from hf_iau.evaluation.intervals import RESAMPLES
from hf_iau.evaluation.model_agreement import agreement
from hf_iau.metrics.inputs import matrix

_DESCRIPTION = """
How alike do an unlearned and a retrained model predict the same rows? Share of rows with the same predicted class, and
mean Jensen-Shannon divergence of the predicted distributions.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the unlearned model's predicted probabilities for each row, `(rows, classes)`.
    references: the retrained model's, for the same rows.
    bootstrap: resamples for the divergence's interval; 0 for no intervals.
    seed: of the resampling.
Returns:
    `agreement`, 0 to 1, higher is closer; `jensen_shannon` in nats, 0 to 0.693, lower is closer; their intervals.
"""

_CITATION = """\
@inproceedings{chundawat2023bad,
  title = {Can Bad Teaching Induce Forgetting? Unlearning in Deep Networks Using an Incompetent Teacher},
  author = {Chundawat, Vikram S and Tarun, Ayush K and Mandal, Murari and Kankanhalli, Mohan},
  booktitle = {AAAI}, year = {2023}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PredictionAgreement(evaluate.Metric):
    """Likeness of two models' predictions; see `hf_iau.evaluation.model_agreement`."""

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

    def _compute(self, predictions: Any, references: Any, bootstrap: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
        ours = RowPredictions.from_probabilities(matrix("predictions", predictions))
        theirs = RowPredictions.from_probabilities(matrix("references", references))
        return agreement(ours, theirs, bootstrap, seed).to_dict()
