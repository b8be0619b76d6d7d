"""Distance of an unlearned model's figures from a retrained model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from hf_iau.evaluation.figures import Figures
from hf_iau.evaluation.intervals import Interval, difference_interval

_ACCURACIES = ("retain_accuracy", "forget_accuracy", "test_accuracy")
_LOSSES = ("retain_loss", "forget_loss", "test_loss")


@dataclass(frozen=True)
class Gap:
    """Signed differences, unlearned minus retrained; 0 is the aim. None where one of the two models lacks the figure.

    Attributes:
        mean_absolute: mean of the absolute differences named in `compared`: of RA, FA, TA and MIA in percentage points
            for models with an accuracy; for a regression, of the three losses in percent of the retrained model's loss
            and of MIA in percentage points. Lower is better, and below the distance between two retrained models of
            different seeds (the noise floor) nothing can be told apart.
        retain_accuracy: RA, in percentage points; above 0 keeps more than retraining does.
        forget_accuracy: FA (accuracy on the forget rows), in percentage points; above 0 forgot too little, below 0 too
            much.
        test_accuracy: TA, in percentage points.
        mia_auc: MIA (AUC × 100), in points; above 0 still remembered, below 0 over-forgotten.
        retain_loss: difference of the loss relative to the retrained model's loss, in percent.
        forget_loss: the same; below 0 forgot too little.
        test_loss: the same; above 0 lost utility.
        based_on: `"accuracy"` or `"loss"`.
        compared: names of the differences that `mean_absolute` averages, so that a missing set of rows shows.
        intervals: 95 % intervals, `(low, high)` in points, of the differences of accuracies and AUC of which both
            models have one; None for none at all. Both models are measured on the same rows, but are taken as
            independent here, which makes the intervals rather too wide than too narrow. What another training seed
            would change is not in them.
    """

    mean_absolute: float | None
    retain_accuracy: float | None
    forget_accuracy: float | None
    test_accuracy: float | None
    mia_auc: float | None
    retain_loss: float | None
    forget_loss: float | None
    test_loss: float | None
    based_on: Literal["accuracy", "loss"]
    compared: tuple[str, ...]
    intervals: dict[str, Interval] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary."""
        return asdict(self) | {"compared": list(self.compared)}


def gap(figures: Figures | Mapping[str, Any], retrained: Figures | Mapping[str, Any]) -> Gap:
    """How far a model's figures are from a retrained model's.

    The mean of the absolute differences of RA, FA, TA and MIA in percentage points is the "average gap" of SalUn's
    tables (arXiv 2310.12508), with the loss attack's AUC as MIA. Both models must be measured on the same rows.

    Args:
        figures: of the model in question, as `Figures` or the dictionary of one; fractions of 1, losses in the task's
            unit.
        retrained: of a model trained without the forget rows.
    """
    ours = figures if isinstance(figures, Figures) else Figures.from_dict(figures)
    theirs = retrained if isinstance(retrained, Figures) else Figures.from_dict(retrained)
    points: dict[str, float | None] = {}
    for name in (*_ACCURACIES, "mia_auc"):
        a, b = getattr(ours, name), getattr(theirs, name)
        points[name] = None if a is None or b is None else 100 * (a - b)
    relative: dict[str, float | None] = {}
    for name in _LOSSES:
        a, b = getattr(ours, name), getattr(theirs, name)
        relative[name] = None if a is None or b is None or not b > 0 else 100 * (a - b) / b
    based_on: Literal["accuracy", "loss"] = (
        "accuracy" if any(points[name] is not None for name in _ACCURACIES) else "loss"
    )
    averaged = points if based_on == "accuracy" else relative | {"mia_auc": points["mia_auc"]}
    found = {name: value for name, value in averaged.items() if value is not None}
    return Gap(
        mean_absolute=float(np.mean(np.abs(list(found.values())))) if found else None,
        **points,
        **relative,
        based_on=based_on,
        compared=tuple(found),
        intervals=_intervals(ours, theirs) or None,
    )


def _intervals(ours: Figures, theirs: Figures) -> dict[str, Interval]:
    both = (ours.intervals or {}).keys() & (theirs.intervals or {}).keys()
    found = {}
    for name in (*_ACCURACIES, "mia_auc"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if name in both and a is not None and b is not None and ours.intervals and theirs.intervals:
            low, high = difference_interval(a, ours.intervals[name], b, theirs.intervals[name])
            found[name] = (100 * low, 100 * high)
    return found
