"""What the model makes of calibration's rows once the weights have moved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from hf_iau.calibrate.basis import Basis
from hf_iau.calibrate.outset import Outset
from hf_iau.objective import RowPredictions, predict_rows


@dataclass(frozen=True)
class Aftermath:
    """What was made of calibration's rows at the weights that the request ends with, where that was looked at."""

    forget: RowPredictions | None = None
    retained: RowPredictions | None = None
    held_out: RowPredictions | None = None

    def retained_accuracy_lost(self, model: nn.Module, outset: Outset) -> float | None:
        """Accuracy on retained rows, before minus after; None where that is not known, or the task has no accuracy.

        Args:
            model: at the moved weights.
            outset: the rows, and what was made of them before.
        """
        if outset.retained_rows is None:
            return None
        return accuracy_lost(outset.retained, self.retained or predict_rows(model, outset.retained_rows))

    def accuracy_lead(self, model: nn.Module, outset: Outset, basis: Basis) -> float | None:
        """Accuracy on the forget rows minus that on held-out rows, where the former are like any others; else None.

        Args:
            model: at the moved weights.
            outset: the rows.
            basis: whether the forget rows are like any others.
        """
        if not basis.like_any_others or outset.held_out_rows is None:
            return None
        forget = self.forget or predict_rows(model, outset.forget_rows)
        return accuracy_lost(forget, self.held_out or predict_rows(model, outset.held_out_rows))


def accuracy_lost(first: RowPredictions, second: RowPredictions) -> float | None:
    """Accuracy of the first minus that of the second; None where the task has none."""
    lost = first.accuracy - second.accuracy
    return lost if math.isfinite(lost) else None
