"""What the model makes of calibration's rows before anything is changed, and once the weights have moved."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hf_iau.data import RowPredictions, RowSource, predict_rows
from hf_iau.data.digests import sample_positions
from hf_iau.data.targets import TaskKind
from hf_iau.methods.context import ROWS_LOOKED_AT, ForgetContext
from hf_iau.methods.iau.config import ENOUGH_FORGET_ROWS
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.iau.label_support import LabelSupport, find_label_support
from hf_iau.methods.iau.trial import TrialRunner

# The report's retained rows are drawn with the request's own seed: calibration does not choose by the rows that it is
# measured on.
_RETAINED_SEED = 7


class InitialState:
    """The rows that calibration looks at, and their predictions at the old weights; each predicted once.

    Args:
        context: the request.
        held_out_rows: most held-out rows to look at.

    Attributes:
        forget_rows: at most as many forget rows as there are held-out rows in the sample.
        forget_positions: where these are among all forget rows, int64, `(rows,)`.
        held_out_rows: a sample of the held-out rows, or None.
        retained_rows: a sample of the retained rows, or None.
        held_out_at: (k, λ, c) → predictions of the held-out rows after that step of the request.
    """

    def __init__(self, context: ForgetContext, held_out_rows: int) -> None:
        self._context = context
        retained = context.retained_to_predict(ROWS_LOOKED_AT, context.seed + _RETAINED_SEED)
        held_out = context.held_out_sample(held_out_rows)
        self.retained_rows = None if retained is None else retained.keep_batches()
        self.held_out_rows = None if held_out is None else held_out.keep_batches()
        self.held_out_at: dict[tuple[float, float, float], RowPredictions] = {}
        self._every_row = context.forget_to_predict
        size = max(len(held_out) if held_out is not None else 0, ENOUGH_FORGET_ROWS)
        self.forget_positions = sample_positions(len(self._every_row), size, 0)
        self.forget_rows = self._every_row if size >= len(self._every_row) else self._every_row.sample(size, 0)
        self.forget_rows.keep_batches()
        # Every request looks at them again at the end; later than now the weights may have moved.
        self._retained = None if self.retained_rows is None else self._predict(self.retained_rows)

    def _predict(self, rows: RowSource) -> RowPredictions:
        if rows not in self._context.predicted:
            self._context.predicted[rows] = predict_rows(self._context.model, rows)
        return self._context.predicted[rows]

    @functools.cached_property
    def forget(self) -> RowPredictions:
        """Of `forget_rows`."""
        return self._predict(self.forget_rows)

    def every_forget_row(self) -> RowPredictions:
        """Of all forget rows."""
        return self._predict(self._every_row)

    def label_support(self, reason: str | None) -> LabelSupport | None:
        """Which forget rows have a label that nothing else supports; None where that cannot be told.

        Args:
            reason: what the caller says of the rows; None to find out.
        """
        if self.retained_rows is None or self.held_out_rows is None or reason == "random":
            return None
        model, forget = self._context.model, self.every_forget_row()
        if forget.kind is not TaskKind.SINGLE_LABEL:
            return None
        held_out = predict_rows(model, self.held_out_rows, keep_probabilities=True)
        if reason == "wrong-label":
            return LabelSupport.told(forget, held_out)
        rows = (self._every_row, self.retained_rows, self.held_out_rows)
        return find_label_support(model, rows, (forget, self.retained, held_out))

    @property
    def retained(self) -> RowPredictions:
        """Of `retained_rows`."""
        assert self._retained is not None
        return self._retained

    @functools.cached_property
    def held_out(self) -> RowPredictions:
        """Of `held_out_rows`."""
        assert self.held_out_rows is not None
        return self._predict(self.held_out_rows)

    def trial_runner(
        self,
        directions: Directions,
        target: RowSource | None,
        *,
        criterion: Callable[[RowPredictions | None, RowPredictions], float] | None = None,
        kept: np.ndarray | None = None,
    ) -> TrialRunner:
        """To try steps of the request's own `directions`; the other arguments are those of `TrialRunner`."""
        assert self.held_out_rows is not None
        return TrialRunner(
            self._context.model,
            directions,
            target,
            self.held_out_rows,
            criterion=criterion,
            kept=kept,
            held_out_at=self.held_out_at,
            weights=self._context.weights,
        )


@dataclass(frozen=True)
class FinalState:
    """Predictions of calibration's rows at the weights that the request ends with, where they were made."""

    forget: RowPredictions | None = None
    retained: RowPredictions | None = None
    held_out: RowPredictions | None = None


def accuracy_difference(first: RowPredictions, second: RowPredictions) -> float | None:
    """Accuracy of the first minus that of the second; None where the task has none."""
    difference = first.accuracy - second.accuracy
    return difference if math.isfinite(difference) else None
