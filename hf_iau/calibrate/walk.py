"""Forgetting in many short steps, for models that have memorised their rows.

Where a model is sure of a row, the row's gradient is next to nothing, and one step along the sum of gradients is a step
for the few rows that were not quite memorised: their loss explodes while the others' hardly moves. So the walk takes
short steps, looks at the rows' gradients anew before each, and counts only those rows that are still treated better
than held-out rows are: sorted by loss, the forget rows are laid beside the held-out rows' loss distribution (as it was
before), quantile by quantile, and a row takes part while its loss is below its partner's. Were the two distributions equal, half
of the rows would be below by chance: there the walk ends, or where the loss attack cannot tell them apart. What is remembered of the
other rows pulls back: their gradient at the moved weights is Σ_D + n·C·Δ to first order, without a look at them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_iau.calibrate.calibration import MAX_DRIFT
from hf_iau.calibrate.trial import Directions, auc_distance
from hf_iau.forget.step import Step, step_norm, weights_norm
from hf_iau.gather.gradient_sum import sum_row_gradients
from hf_iau.objective import RowLoss, RowSource, predict_rows
from hf_iau.objective.working import kept_copy

_STRIDE, _SHORTEST_STRIDE = 0.03, 0.002
_MOST_STEPS = 48
# A step that raises the held-out loss by more than this share went beyond what its gradients could see: it is taken
# back and the stride is halved.
_JUMP = 0.03
DEAR = 0.10
"""More than this share of the held-out loss is paid only for a walk that arrives."""
_PULL = 0.03


@dataclass
class Walk:
    """A path and the point on it that was chosen.

    Attributes:
        step: Δ from the old weights to that point, float64.
        damping: λ of every step.
        steps: how many steps lead there.
        reached: whether the criterion was met before the held-out rows suffered.
        criterion, held_out_loss, relative_step: at that point.
        curve: a line for each step of the whole path.
    """

    step: Step
    damping: float
    steps: int
    reached: bool
    criterion: float
    held_out_loss: float
    relative_step: float
    curve: list[dict[str, Any]] = field(default_factory=list)

    def better_than(self, other: Walk) -> bool:
        """The target met first, the held-out loss second."""
        if self.reached != other.reached:
            return self.reached
        return self.held_out_loss < other.held_out_loss if self.reached else self.criterion < other.criterion


def walk(
    model: nn.Module,
    row_loss: RowLoss,
    directions: Directions,
    forget: RowSource,
    held_out: RowSource,
    *,
    damping: float,
    offset: float = 0.0,
    max_relative_step: float,
    pull: float = _PULL,
) -> Walk:
    """Walk from the model's weights until the forget rows look held-out; the weights are put back, bit for bit.

    Args:
        model: the bare model.
        row_loss: ℓ.
        directions: of the forget rows at the present weights; its curvature and Σ_D are used.
        forget: the forget rows, exchangeable with the held-out ones, in batches that fit gradients.
        held_out: rows never trained on, in batches that fit forward passes.
        damping: λ, relative to each layer's mean eigenvalue.
        offset: see `TrialRunner`.
        max_relative_step: farthest ‖Δ‖/‖θ‖ allowed.
        pull: c, the weight of the other rows' remembered gradient.
    """
    names = list(directions.forget_sum)
    weights = {name: kept_copy(model.get_parameter(name)) for name in names}
    norm = max(weights_norm(model, names), 1e-300)
    moved: Step = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in weights.items()}
    before = predict_rows(model, held_out)
    best = Walk(dict(moved), damping, 0, False, float("inf"), before.mean_loss, 0.0)
    curve: list[dict[str, Any]] = []
    looked_at = forget.resized(held_out.batch_size).keep_batches()
    known = _still_known(predict_rows(model, looked_at).loss, before.loss)
    stride, last_loss = _STRIDE, before.mean_loss
    try:
        for _ in range(_MOST_STEPS):
            if len(known) == 0:
                break
            gradients = sum_row_gradients(model, row_loss, forget.select(known), names=names).tensors
            direction = directions.curvature.solve(_with_pull(gradients, directions, moved, pull), damping)
            length = step_norm(direction)
            if not length > 0 or not np.isfinite(length):
                break
            scale = stride * norm / length
            further = {name: moved[name] + scale * direction[name].to(moved[name]) for name in names}
            relative = step_norm(further) / norm
            if relative > max_relative_step:
                break
            _place(model, weights, further)
            after = predict_rows(model, held_out)
            if not after.mean_loss <= last_loss + _JUMP * before.mean_loss and stride > _SHORTEST_STRIDE:
                stride *= 0.5
                _place(model, weights, moved)
                continue
            moved, last_loss = further, after.mean_loss
            treated = predict_rows(model, looked_at)
            point = {
                "damping": damping,
                "rows_still_known": len(known),
                "stride": stride,
                "relative_step": relative,
                "criterion": auc_distance(treated, after) - offset,
                "held_out_loss": after.mean_loss,
            }
            curve.append(point)
            if not point["held_out_loss"] <= (1.0 + MAX_DRIFT) * before.mean_loss:
                break
            if point["criterion"] < best.criterion and point["held_out_loss"] <= (1.0 + DEAR) * before.mean_loss:
                best = Walk(moved, damping, len(curve), False, point["criterion"], point["held_out_loss"], relative)
            known = _still_known(treated.loss, before.loss)
            if point["criterion"] <= 0.0 or 2 * len(known) <= len(forget):
                best = Walk(moved, damping, len(curve), True, point["criterion"], point["held_out_loss"], relative)
                break
    finally:
        _place(model, weights, None)
    best.curve = curve
    return best


def _still_known(losses: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Positions of the rows whose loss is below the held-out loss of the same rank."""
    ranks = np.argsort(np.argsort(losses, kind="stable"), kind="stable")
    partners = np.quantile(held_out, (ranks + 0.5) / len(losses))
    return np.flatnonzero(losses < partners)


def _with_pull(gradients: Mapping[str, Tensor], directions: Directions, moved: Step, pull: float) -> dict[str, Tensor]:
    """Σ_f − c·(Σ_D + n·C·Δ), float64."""
    bent = directions.curvature.multiply(moved)
    pulled = {}
    for name, gradient in gradients.items():
        rest = directions.remaining * bent[name].to(gradient)
        if directions.finish_sum is not None:
            rest = rest + directions.finish_sum[name].to(gradient)
        pulled[name] = gradient - pull * rest
    return pulled


def _place(model: nn.Module, weights: Mapping[str, Tensor], moved: Step | None) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            parameter = model.get_parameter(name)
            parameter.copy_(value if moved is None else value.double() + moved[name].to(value.device))
