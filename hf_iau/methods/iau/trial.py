"""Trying a step: apply it, look at some rows, put the weights back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from hf_iau.data import RowPredictions, RowSource, predict_rows
from hf_iau.evaluation.attacks import attack_auc
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.step import step_norm, weights_norm
from hf_iau.methods.weights import WeightSnapshot


@dataclass(frozen=True)
class Trial:
    """What one tried step did.

    Attributes:
        scale, damping, retain_weight: k, λ (relative to each layer's mean eigenvalue) and c.
        relative_step: ‖Δ‖ / ‖θ‖.
        criterion: signed distance to the target; positive: forgets too little, negative: too much.
        held_out_loss: mean plain loss of the held-out rows that are to stay as they are.
        target_loss: mean plain loss of the rows that the step forgets.
    """

    scale: float
    damping: float
    retain_weight: float
    relative_step: float
    criterion: float
    held_out_loss: float
    target_loss: float

    def to_dict(self) -> dict[str, float]:
        """Plain JSON."""
        return asdict(self)


class TrialRunner:
    """Tries steps on a model and counts them; the weights are put back after each, bit for bit.

    Args:
        model: the bare model.
        directions: of the rows that the steps forget.
        target: those rows.
        held_out: rows that were never trained on.
        criterion: signed distance to the target from (target rows, held-out rows); default: the loss attack's AUC
            minus one half.
        offset: subtracted from the criterion. The calibration rows are a small draw: they are a little easier or
            harder than training rows are on average, and a retrained model would find them so too. What their AUC
            exceeds that of a large sample of training rows by, before any step, is that luck of the draw, and it is
            not to be forgotten.
        kept: bool array over the held-out rows: those whose loss must not rise (all of them by default).
        held_out_at: (k, λ, c) → what was made of the held-out rows there. Runners of the same directions and held-out
            rows may share it, so that no step is looked at twice.
        weights: copies of the parameters as they are, by name; made here if None.
    """

    def __init__(
        self,
        model: nn.Module,
        directions: Directions,
        target: RowSource | None,
        held_out: RowSource,
        *,
        criterion: Callable[[RowPredictions | None, RowPredictions], float] | None = None,
        kept: np.ndarray | None = None,
        offset: float = 0.0,
        held_out_at: dict[tuple[float, float, float], RowPredictions] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.directions = directions
        self.target = None if target is None else target.keep_batches()
        self.held_out = held_out.keep_batches()
        self.offset = offset
        self.criterion = criterion or auc_distance
        self.kept = kept
        self.trials: list[Trial] = []
        self.held_out_at = {} if held_out_at is None else held_out_at
        self._names = list(directions.forget_sum)
        self._weights_norm = weights_norm(model, self._names)
        self._before = WeightSnapshot.of(model, self._names, weights)

    @property
    def n_target(self) -> int:
        """How many rows the criterion rests on."""
        return len(self.target) if self.target is not None else len(self.held_out)

    def longest(self, damping: float, relative_step: float) -> float:
        """The k at which ‖Δ‖/‖θ‖ reaches `relative_step` (with c = 0)."""
        return relative_step * self._weights_norm / max(step_norm(self.directions.at(damping)), 1e-300)

    def baseline_trial(
        self, target: RowPredictions | None, held_out: RowPredictions, advantage: float | None = None
    ) -> Trial:
        """The trial of no step at all, from predictions already made at the weights as they are.

        Args:
            target: of the rows that the steps forget.
            held_out: of the held-out rows.
            advantage: the criterion that a large sample of training rows has; `offset` is set from it.
        """
        start = self._describe(0.0, 1.0, 0.0, 0.0, target, held_out)
        if advantage is not None:
            self.offset += start.criterion - advantage
            start = replace(start, criterion=advantage)
        self.trials.append(start)
        return start

    def look(
        self, sources: Sequence[RowSource], scale: float, damping: float, retain_weight: float = 0.0
    ) -> list[RowPredictions]:
        """Apply the step, look at some rows, and undo it."""
        try:
            self.directions.apply(self.model, scale, damping, retain_weight)
            return [predict_rows(self.model, source) for source in sources]
        finally:
            self._before.restore()

    def run(self, scale: float, damping: float, retain_weight: float = 0.0) -> Trial:
        """Apply the step, look, and undo it."""
        place = (scale, damping, retain_weight)
        target, held_out = None, self.held_out_at.get(place)
        if self.target is not None or held_out is None:
            try:
                size = self.directions.apply(self.model, *place)
                target = None if self.target is None else predict_rows(self.model, self.target)
                if held_out is None:  # many of them are kept, and no criterion looks at single tokens
                    held_out = replace(predict_rows(self.model, self.held_out), token_losses=None)
            finally:
                self._before.restore()
        else:
            size = self.directions.norm(*place)
        self.held_out_at[place] = held_out
        relative = size / max(self._weights_norm, 1e-300)
        self.trials.append(self._describe(scale, damping, retain_weight, relative, target, held_out))
        return self.trials[-1]

    def _describe(
        self,
        scale: float,
        damping: float,
        retain_weight: float,
        relative_step: float,
        target: RowPredictions | None,
        held_out: RowPredictions,
    ) -> Trial:
        kept = held_out if self.kept is None else held_out.select(self.kept)
        return Trial(
            scale=scale,
            damping=damping,
            retain_weight=retain_weight,
            relative_step=relative_step,
            criterion=self.criterion(target, held_out) - self.offset,
            held_out_loss=_loss_or_infinity(kept),
            target_loss=float("nan") if target is None else _loss_or_infinity(target),
        )


def auc_distance(target: RowPredictions | None, held_out: RowPredictions) -> float:
    """AUC of the loss attack on the forgotten rows against held-out rows, minus one half."""
    if target is None or not _losses_are_finite(target) or not _losses_are_finite(held_out):
        return -0.5  # the step destroyed the model: far too long
    return float(attack_auc(target, held_out, "loss")) - 0.5


def class_share_distance(label: int) -> Callable[[RowPredictions | None, RowPredictions], float]:
    """Criterion for the removal of a class: its predicted share on its own held-out rows minus that on the others."""

    def distance(target: RowPredictions | None, held_out: RowPredictions) -> float:
        own = held_out.label == label
        if not _losses_are_finite(held_out):
            return -1.0
        return float(np.mean(held_out.predicted[own] == label) - np.mean(held_out.predicted[~own] == label))

    return distance


def _losses_are_finite(predictions: RowPredictions) -> bool:
    """Rows without a target have no loss, and do not count."""
    return bool(np.isfinite(predictions.loss[predictions.targets > 0]).all())


def _loss_or_infinity(predictions: RowPredictions) -> float:
    loss: Any = predictions.mean_loss
    return float(loss) if np.isfinite(loss) else float("inf")
