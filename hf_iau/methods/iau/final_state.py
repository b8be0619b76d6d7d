"""What the model makes of calibration's rows once the weights have moved."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from hf_iau.data import RowPredictions, predict_rows
from hf_iau.methods.iau.initial_state import InitialState
from hf_iau.methods.iau.reference import CalibrationReference
from hf_iau.methods.iau.step_search import standard_error_of_auc
from hf_iau.methods.iau.trial import auc_distance


@dataclass(frozen=True)
class FinalState:
    """What was made of calibration's rows at the weights that the request ends with, where that was looked at."""

    forget: RowPredictions | None = None
    retained: RowPredictions | None = None
    held_out: RowPredictions | None = None

    def retained_accuracy_lost(self, model: nn.Module, initial: InitialState) -> float | None:
        """Accuracy on retained rows, before minus after; None where that is not known, or the task has no accuracy.

        Args:
            model: at the moved weights.
            outset: the rows, and what was made of them before.
        """
        if initial.retained_rows is None:
            return None
        return accuracy_lost(initial.retained, self.retained or predict_rows(model, initial.retained_rows))

    def beside_held_out(
        self, model: nn.Module, initial: InitialState, reference: CalibrationReference
    ) -> tuple[float | None, LossAttack | None]:
        """Accuracy on the forget rows minus that on held-out rows, and the loss attack that tells the two apart.

        Each is None where the forget rows are not like any others, or the task or the rows do not allow it.

        Args:
            model: at the moved weights.
            outset: the rows, and what was made of them before.
            basis: whether the forget rows are like any others.
        """
        if not reference.like_any_others or initial.held_out_rows is None:
            return None, None
        forget = self.forget or predict_rows(model, initial.forget_rows)
        held_out = self.held_out or predict_rows(model, initial.held_out_rows)
        return accuracy_lost(forget, held_out), LossAttack.of(forget, held_out, initial, reference)


@dataclass(frozen=True)
class LossAttack:
    """The loss attack on forget rows against held-out rows at the end of a request, where the former are like any others.

    Attributes:
        auc: its AUC.
        expected: that of a retrained model: one half, but for the luck of the draw. What the forget rows' AUC exceeds that
            of a large sample of training rows by, before the request, is no matter of remembering.
        standard_error: of an AUC near one half, by chance, for so many rows.
    """

    auc: float
    expected: float
    standard_error: float

    @classmethod
    def of(
        cls, forget: RowPredictions, held_out: RowPredictions, initial: InitialState, reference: CalibrationReference
    ) -> LossAttack | None:
        """From what is made of the rows at the end and at the outset; None with fewer than 2 rows of a loss on a side."""
        sizes = [int((rows.targets > 0).sum()) for rows in (forget, held_out)]
        if min(sizes) < 2:
            return None
        luck = (
            0.0 if reference.advantage is None else auc_distance(initial.forget, initial.held_out) - reference.advantage
        )
        return cls(0.5 + auc_distance(forget, held_out), 0.5 + luck, standard_error_of_auc(*sizes))


def accuracy_lost(first: RowPredictions, second: RowPredictions) -> float | None:
    """Accuracy of the first minus that of the second; None where the task has none."""
    lost = first.accuracy - second.accuracy
    return lost if math.isfinite(lost) else None
