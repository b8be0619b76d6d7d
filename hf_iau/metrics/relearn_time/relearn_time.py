"""Relearn time as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_iau.errors import RequestError
from hf_iau.metrics.relearning import first_reached

_DESCRIPTION = """
How soon does fine-tuning on the forget rows bring back what was known of them, next to a model that never saw them?
From the forget rows' losses (or accuracies) while both models are fine-tuned alike.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: loss of the forget rows while the unlearned model is fine-tuned on them: before the first step, then
        after equal numbers of steps; from `hf_iau.metrics.relearning.relearn_time(...).losses`. Pad the shorter curve
        with NaN.
    references: the same of the retrained model, with the same settings.
    target: loss of the forget rows before they were forgotten.
    higher_is_better: whether the curves are accuracies.
Returns:
    `relearned_at` and `retrained_at`: first position in each curve that is as good as the target, None where none is;
    `ratio` of the two: 1 is the aim, below 1 the rows were only hidden, None where it is not defined.
"""

_CITATION = """\
@article{tarun2021fast,
  title = {Fast Yet Effective Machine Unlearning},
  author = {Tarun, Ayush K and Chundawat, Vikram S and Mandal, Murari and Kankanhalli, Mohan},
  journal = {arXiv preprint arXiv:2111.08947}, year = {2021}
}
@article{chundawat2023zero,
  title = {Zero-Shot Machine Unlearning},
  author = {Chundawat, Vikram S and Tarun, Ayush K and Mandal, Murari and Kankanhalli, Mohan},
  journal = {IEEE Transactions on Information Forensics and Security}, year = {2023}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class RelearnTime(evaluate.Metric):
    """Relearning of two models compared; see `hf_iau.metrics.relearning`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(
        self, predictions: Any, references: Any, target: float | None = None, higher_is_better: bool = False
    ) -> dict[str, Any]:
        if target is None:
            raise RequestError("target=None: give the forget rows' loss before they were forgotten.")
        ours, theirs = (
            first_reached(curve, target, higher_is_better=higher_is_better) for curve in (predictions, references)
        )
        return {
            "relearned_at": ours,
            "retrained_at": theirs,
            "ratio": None if ours is None or not theirs else ours / theirs,
        }
