"""The gap to a retrained model as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_iau.data import RowPredictions
from hf_iau.evaluation.intervals import RESAMPLES
from hf_iau.evaluation.retraining_gap import gap
from hf_iau.metrics.inputs import matrix, measurement

_DESCRIPTION = """
How far are a model's figures from a retrained model's? Differences of the accuracies on retained (RA), forget (FA) and
test rows (TA) and of the loss attack's AUC (MIA), in percentage points, and the mean of their absolute values: the
"average gap" of SalUn's tables.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the unlearned model's predicted probabilities for each row, `(rows, classes)`.
    retrained_predictions: the same of a model trained without the forget rows.
    references: each row's class, `(rows,)`.
    splits: what each row is: "forget", "retain", "test" or "held_out".
    bootstrap: resamples for the AUC's interval; 0 for no intervals.
    seed: of the resampling.
Returns:
    `mean_absolute` (lower is better; 0 is retraining itself), the signed differences unlearned − retrained,
    `intervals` of them, and the figures of both models under `unlearned` and `retrained`.
"""

_CITATION = """\
@inproceedings{fan2024salun,
  title = {SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency},
  author = {Fan, Chongyu and Liu, Jiancheng and Zhang, Yihua and Wong, Eric and Wei, Dennis and Liu, Sijia},
  booktitle = {ICLR}, year = {2024}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class UnlearningGap(evaluate.Metric):
    """Distance of a model's figures from a retrained model's; see `hf_iau.evaluation.retraining_gap`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "retrained_predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                    "splits": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self,
        predictions: Any,
        retrained_predictions: Any,
        references: Any,
        splits: list[str],
        bootstrap: int = RESAMPLES,
        seed: int = 0,
    ) -> dict[str, Any]:
        given = {"predictions": predictions, "retrained_predictions": retrained_predictions}
        ours, theirs = (
            measurement(RowPredictions.from_probabilities(matrix(name, p), references), splits).figures(
                bootstrap=bootstrap, seed=seed
            )
            for name, p in given.items()
        )
        values = gap(ours, theirs).to_dict()
        for name, figures in (("unlearned", ours), ("retrained", theirs)):
            values[name] = {key: value for key, value in figures.to_dict().items() if not key.startswith("attacks")}
        return values
