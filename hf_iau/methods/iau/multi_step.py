"""Forgetting in many short steps, for models that have memorised their rows.

Where a model is sure of a row, the row's gradient is next to nothing, and one step along the sum of gradients is a step
for the few rows that were not quite memorised: their loss explodes while the others' hardly moves. So a multi-step
update gives every forget row a target of its own and takes short steps towards all of them.

* **Target.** A forget row that is known better than a share u of the training rows is to be known as well as a held-out
  row that is known better than the same share u of the held-out rows: T = Q_held-out(F_training(ℓ)). The rank is
  looked up among retained rows, so the luck of a small draw of easy or hard rows stays as it is, as it would in
  retraining. Of rows with many targets every token has one, see `hf_iau.methods.iau.targets`.
* **Forget gradient.** The deficit of a row is s = max(q − q_T, 0), where q = σ(φ/τ) is its soft confidence and
  φ = log(p/(1−p)) are the log-odds of the truth, p = exp(−ℓ). With τ = 1 that is a difference of probabilities, which
  hardly sees the rows that are known for sure; for large τ one of log-odds, which sees nothing else. A row is moved
  along the gradient of its log-odds, ∇ℓ/(1−p), which does not vanish where the row is known for sure, with weight s;
  curvature C keeps the step away from what the other rows need.
* **Retain gradient.** What that does to retained rows all the same is undone: a sample of them, the retain reference,
  some at each step, is drawn back to what the model made of them before, along (C+λ)⁻¹ of the mean gradient of
  KL(before ‖ now). Their labels are not looked at, so nothing is trained further.

The last step is the one after which the distribution of the forget rows' q has come within a tenth of its way to the
targets', and with tokens the loss attack on whole rows as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_iau.curvature import Curvature
from hf_iau.data import RowPredictions, RowSource, predict_rows
from hf_iau.data.digests import sample_positions
from hf_iau.distributed import is_main_process
from hf_iau.methods.iau.multi_step_gradients import (
    REFERENCE_ROWS_PER_STEP,
    RetainReference,
    forget_gradient,
    weighted_gradient,
)
from hf_iau.methods.iau.step_search import MAX_HELD_OUT_RISE
from hf_iau.methods.iau.targets import ForgetTargets
from hf_iau.methods.step import Step, step_norm, weights_norm
from hf_iau.methods.weights import WeightSnapshot
from hf_iau.utils.vectors import storage_dtype

DAMPING = 0.1
"""λ of every step, relative to each layer's mean eigenvalue. Settled on image classifiers, see docs/methods.md."""
ARRIVED = 0.1
"""Share of the way to the targets that may remain: nearer is within the noise of a few hundred rows."""
TOO_COSTLY = 0.10
"""A rise of the held-out loss by more than this share of it is paid only by an update that arrives; it is also where
the verdict turns to "check"."""
MOST_STEPS = 40
"""After so many steps, those that were taken back among them, an update ends; in the benchmarks few came so far."""
USUAL_STEPS = 8
"""Median of the updates in the benchmarks, of 1 to 40 steps."""

# Held-out rows by which each step is checked: four times as many as are forgotten, in these bounds. With fewer the
# allowed rise would be within their noise; with more a small request would cost as much as a large one.
_FEWEST_ROWS_PER_STEP, _MOST_ROWS_PER_STEP = 256, 1000


@dataclass(frozen=True)
class MultiStepSettings:
    """How long the steps are, and when one is taken back or is the last.

    The values were settled on image classifiers, see docs/methods.md.

    Attributes:
        damping: λ, relative to each layer's mean eigenvalue.
        max_relative_step: farthest ‖Δ‖/‖θ‖ from the weights at the start.
        most_steps: after so many, those that were taken back among them, the update ends.
        step_size: ‖Δ‖/‖θ‖ of a step, before any was taken back.
        smallest_step_size: a step that is no longer than this is not taken back.
        largest_rise: a step that raises the held-out loss by more than this share of it went beyond what its gradients
            could see: it is taken back and the step size is halved.
        most_lengthened: what the retain gradient leaves of a step is made longer by no more than this: it is noisy.
        most_at_first, share_at_first: a first step that brings more than the former share of the way takes rows past
            their targets before they are looked at: it is taken back, and steps are made to bring the latter share. The
            few rows of a small request are soon brought so far.
        near_the_end: where the last step foretells that no more than so many times `ARRIVED` remain, a pass without
            gradients goes first; farther away the pass that takes the next gradient looks at the rows as well.
    """

    damping: float = DAMPING
    max_relative_step: float = 0.5
    most_steps: int = MOST_STEPS
    step_size: float = 0.03
    smallest_step_size: float = 0.002
    largest_rise: float = 0.02
    most_lengthened: float = 4.0
    most_at_first: float = 0.4
    share_at_first: float = 0.25
    near_the_end: float = 1.5


@dataclass(frozen=True)
class MultiStepRows:
    """The rows of a multi-step update.

    Attributes:
        forget: the forget rows, like any other training rows, in batches that fit gradients.
        retained: retained rows to draw the reference from, in batches that fit gradients.
        held_out: rows never trained on, in batches that fit forward passes.
        forget_to_predict: the forget rows in batches that fit forward passes; default: in those of `held_out`.
        retained_to_predict: retained rows, in such batches, that are predicted once, at the end.
        before: predictions of all forget and all held-out rows at the start; made where None.
    """

    forget: RowSource
    retained: RowSource
    held_out: RowSource
    forget_to_predict: RowSource | None = None
    retained_to_predict: RowSource | None = None
    before: tuple[RowPredictions, RowPredictions] | None = None


@dataclass
class MultiStepResult:
    """The steps taken, and the point on their way that was chosen.

    Attributes:
        step: Δ from the weights at the start to that point.
        damping: λ of every step.
        steps: how many steps lead there.
        reached: whether no more than `ARRIVED` of the way to the targets remains there.
        share_remaining: the share that remains; 1 at the start.
        held_out_loss, relative_step: at that point.
        curve: a line for each step, also for those beyond that point.
        forget, held_out, retained: predictions there; None at the start, and where none were made.
    """

    step: Step
    damping: float
    steps: int
    reached: bool
    share_remaining: float
    held_out_loss: float
    relative_step: float
    curve: list[dict[str, Any]] = field(default_factory=list)
    forget: RowPredictions | None = None
    held_out: RowPredictions | None = None
    retained: RowPredictions | None = None


class MultiStep:
    """Steps from a model's weights until the forget rows are known as held-out rows are.

    Args:
        start: the weights to start from, of the parameters that are to move; they are put back in the end.
        curvature: C at these weights.
        rows: what is forgotten, retained and watched.
        forget_targets: what the forget rows are to reach, made at these weights.
        settings: see there.
        progress: show a progress bar.
    """

    def __init__(
        self,
        start: WeightSnapshot,
        curvature: Curvature,
        rows: MultiStepRows,
        forget_targets: ForgetTargets,
        settings: MultiStepSettings | None = None,
        *,
        progress: bool = False,
    ) -> None:
        self.start, self.curvature, self.rows, self.forget_targets = start, curvature, rows, forget_targets
        self.settings, self.progress = settings or MultiStepSettings(), progress
        self.model, self.names = start.model, list(start.copies)
        self._norm = max(weights_norm(self.model, self.names), 1e-300)
        # Where the weights are, and what is known of that place.
        self._moved: Step = {n: torch.zeros_like(v, dtype=storage_dtype(v.dtype)) for n, v in start.copies.items()}
        self._losses: np.ndarray | None = None
        self._direction: Step | None = None
        self._direction_norm = 0.0
        self._step_size = self.settings.step_size
        self._curve: list[dict[str, Any]] = []
        self._batches()
        self._predict_at_start()
        self._reference = RetainReference(self.model, rows.retained)

    def _batches(self) -> None:
        held_out = self.rows.held_out
        self._watched_positions = sample_positions(len(held_out), rows_per_step(len(self.rows.forget)), 0)
        some = len(self._watched_positions) < len(held_out)
        self._watched = (held_out.select(self._watched_positions) if some else held_out).keep_batches()
        forget_to_predict = self.rows.forget_to_predict or self.rows.forget.resized(held_out.batch_size)
        self._forget_to_predict = forget_to_predict.keep_batches()
        self._forget = self.rows.forget.keep_batches()

    def _predict_at_start(self) -> None:
        before = self.rows.before
        forget = before[0] if before else predict_rows(self.model, self._forget_to_predict)
        watched = before[1].select(self._watched_positions) if before else predict_rows(self.model, self._watched)
        self._losses = forget.target_losses
        self._held_out_loss = self._loss_at_start = watched.mean_loss
        self._remaining = self._expected = self.forget_targets.share_remaining(self._losses)
        self._best = MultiStepResult(
            dict(self._moved), self.settings.damping, 0, False, self._remaining, self._loss_at_start, 0.0
        )

    def run(self) -> MultiStepResult:
        """Take the steps, and tell of the best point on their way; the weights are put back."""
        hidden = not (self.progress and is_main_process())
        try:
            for number in tqdm(range(self.settings.most_steps), desc="multi-step", disable=hidden):
                if not self._take_step(number):
                    break
            if self._best.steps:
                self._predict_best()
        finally:
            self.start.restore()
        self._best.curve = self._curve
        return self._best

    def _take_step(self, number: int) -> bool:
        """One step, perhaps taken back; whether there is to be another."""
        if self._direction is None and not self._find_direction():
            return False
        moved = self._next_point(number)
        if step_norm(moved) / self._norm > self.settings.max_relative_step:
            return False
        self.start.move(moved)
        held_out_loss = predict_rows(self.model, self._watched).mean_loss
        if self._rises_too_much(held_out_loss):
            return self._take_back(0.5 * self._step_size)
        seen = self._look_at_forget_rows(number, held_out_loss)
        shorter = None if seen is None else self._shorter_first_step(seen)
        if shorter is not None:
            return self._take_back(shorter)
        self._moved, self._held_out_loss, self._direction, self._losses = moved, held_out_loss, None, None
        if seen is None:
            return True
        self._losses = seen.target_losses
        return not self._is_last(self._losses, seen)

    def _find_direction(self) -> bool:
        """(C+λ)⁻¹ of the forget gradient, and what the last step brought, if that is not known; False at the end."""
        if self._losses is None:
            gradient, self._losses = forget_gradient(self.model, self._forget, self.forget_targets, self.names)
            if self._is_last(self._losses, None):
                return False
        else:
            weights = self.forget_targets.weights(self._losses)
            gradient = weighted_gradient(self.model, self._forget, weights, self.names)
        self._direction = self.curvature.solve(gradient, self.settings.damping)
        self._direction_norm = step_norm(self._direction)
        return bool(self._direction_norm > 0 and np.isfinite(self._direction_norm))

    def _next_point(self, number: int) -> Step:
        """Δ after another step: along the forget direction, less what the retain gradient undoes."""
        assert self._direction is not None
        step_size = self._step_size * self._norm
        moved = {
            name: here + (step_size / self._direction_norm) * self._direction[name].to(here)
            for name, here in self._moved.items()
        }
        if not self._curve:  # nothing has moved that could be drawn back
            return moved
        retain = self.curvature.solve(self._reference.gradient(self.model, number, self.names), self.settings.damping)
        # Newton's step back, but no longer than the step itself.
        share = min(1.0, step_size / max(step_norm(retain), 1e-300))
        for name, place in moved.items():
            place -= share * retain[name].to(place)
        lengthen(moved, self._moved, step_size, self.settings.most_lengthened)
        return moved

    def _rises_too_much(self, held_out_loss: float) -> bool:
        allowed = self._held_out_loss + self.settings.largest_rise * abs(self._loss_at_start)
        return not held_out_loss <= allowed and self._step_size > self.settings.smallest_step_size

    def _take_back(self, step_size: float) -> bool:
        self._step_size = step_size
        self.start.move(self._moved)
        return True

    def _look_at_forget_rows(self, number: int, held_out_loss: float) -> RowPredictions | None:
        """After the first step and where this may be the last; elsewhere the next gradient's pass looks as well."""
        near_the_end = self._expected <= self.settings.near_the_end * ARRIVED
        last = number == self.settings.most_steps - 1
        if self._curve and not (self._is_ruined(held_out_loss) or near_the_end or last):
            return None
        return predict_rows(self.model, self._forget_to_predict)

    def _is_ruined(self, held_out_loss: float) -> bool:
        return not held_out_loss <= self._loss_at_start + MAX_HELD_OUT_RISE * abs(self._loss_at_start)

    def _shorter_first_step(self, seen: RowPredictions) -> float | None:
        """A step size instead of that of the first step, where it brought too much."""
        if self._curve or self._step_size <= self.settings.smallest_step_size:
            return None
        brought = 1.0 - self.forget_targets.deficit_share(seen.target_losses)
        if not brought > self.settings.most_at_first:
            return None
        return max(self._step_size * self.settings.share_at_first / brought, self.settings.smallest_step_size)

    def _is_last(self, losses: np.ndarray, seen: RowPredictions | None) -> bool:
        """Note what the last step brought; whether there is to be no further one."""
        remaining = self.forget_targets.share_remaining(losses)
        self._remaining, self._expected = remaining, 2.0 * remaining - self._remaining
        relative_step = step_norm(self._moved) / self._norm
        self._curve.append(
            {
                "damping": self.settings.damping,
                "step_size": self._step_size,
                "relative_step": relative_step,
                "criterion": remaining,
                "held_out_loss": self._held_out_loss,
            }
        )
        arrived = remaining <= ARRIVED
        within_budget = self._held_out_loss <= self._loss_at_start + TOO_COSTLY * abs(self._loss_at_start)
        if arrived or (remaining < self._best.share_remaining and within_budget):
            self._best = MultiStepResult(
                self._moved,
                self.settings.damping,
                len(self._curve),
                arrived,
                remaining,
                self._held_out_loss,
                relative_step,
                forget=seen,
            )
        return arrived or self._is_ruined(self._held_out_loss)

    def _predict_best(self) -> None:
        """The whole held-out sample, for comparison with one step, and the retained rows."""
        best, retained = self._best, self.rows.retained_to_predict
        self.start.move(best.step)
        best.held_out = predict_rows(self.model, self.rows.held_out)
        best.held_out_loss = best.held_out.mean_loss
        best.retained = None if retained is None else predict_rows(self.model, retained)


@dataclass(frozen=True)
class MultiStepWork:
    """What a multi-step update does, counted in rows.

    Attributes:
        gradients: rows whose gradient is taken.
        forwards: rows that are only predicted.
        solves: divisions by the curvature.
    """

    gradients: int
    forwards: int
    solves: int

    @classmethod
    def of(cls, steps: int, *, forget: int, held_out: int, retained: int, reference: int) -> MultiStepWork:
        """The work of `steps` steps, and of what is predicted before and after them.

        Args:
            steps: how many.
            forget, held_out: rows of the request and of the held-out sample.
            retained: rows of the sample of retained rows, on which the one step is looked at before.
            reference: rows of it that are kept as retain reference, see `reference_size`.
        """
        retain_steps = max(steps - 1, 0)
        return cls(
            gradients=steps * forget + retain_steps * min(reference, REFERENCE_ROWS_PER_STEP),
            forwards=steps * min(held_out, rows_per_step(forget)) + 3 * forget + retained + reference + held_out,
            solves=steps + retain_steps,
        )


def rows_per_step(forget: int) -> int:
    """How many held-out rows, where there are so many, each step is checked by.

    Args:
        forget: rows of the request.
    """
    return min(max(4 * forget, _FEWEST_ROWS_PER_STEP), _MOST_ROWS_PER_STEP)


def lengthen(moved: Step, start: Mapping[str, Tensor], least: float, most_lengthened: float) -> None:
    """Make the way from `start` to `moved` at least `least` long, in place; at most `most_lengthened` times longer.

    Late in an update the forget and the retain direction nearly cancel; what they leave of a step is in the right
    direction but short.
    """
    length = math.hypot(*(step_norm({name: place - start[name]}) for name, place in moved.items()))
    if 0.0 < length < least:
        factor = min(least / length, most_lengthened)
        for name, place in moved.items():
            place.sub_(start[name]).mul_(factor).add_(start[name])
