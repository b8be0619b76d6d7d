"""Forgetting in short steps, for models that have memorised their rows.

Where a model is sure of a row, the row's gradient is next to nothing, and one step along the sum of gradients is a step
for the few rows that were not quite memorised: their loss explodes while the others' hardly moves. So the walk gives
every forget row a target of its own and takes short steps towards all of them.

* **Target.** A forget row that is known better than a share u of the training rows is to be known as well as a held-out
  row that is known better than the same share u of the held-out rows: T = Q_held-out(F_training(ℓ)). The rank is
  looked up among retained rows, so the luck of a small draw of easy or hard rows stays as it is, as it would in
  retraining.
  Of rows with many targets every token has one, see `hf_iau.methods.iau.targets`.
* **Push.** What is still missing is s = max(q − q_T, 0), where q = σ(φ/τ) and φ = log(p/(1−p)) are the log-odds of the
  truth, p = exp(−ℓ). With τ = 1 that is a difference of probabilities, which hardly sees the rows that are known for
  sure; for large τ one of log-odds, which sees nothing else. A row is pushed along the gradient of its log-odds,
  ∇ℓ/(1−p), which does not vanish where the row is known for sure, with weight s; curvature C keeps the push away from
  what the other rows need.
* **Anchor.** What the push does to retained rows all the same is undone: a sample of them, some at each step, is drawn
  back to what the model made of them before, along (C+λ)⁻¹ of the mean gradient of KL(before ‖ now). Their labels are
  not looked at, so nothing is trained further.

The walk ends where the distribution of the forget rows' q has come within a tenth of its way to the targets', and with
tokens the loss attack on whole rows as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from hf_iau.curvature import Curvature
from hf_iau.data import RowPredictions, RowSource, evaluation_mode, predict_rows, predicted_targets
from hf_iau.data.precision import copy_to_memory_device, memory_device
from hf_iau.data.predictions import stacked
from hf_iau.data.rows import sample_positions
from hf_iau.data.targets import Targets, TaskKind
from hf_iau.distributed import all_gather_arrays, all_reduce_, is_main_process, is_sharded, sync_errors, to_local
from hf_iau.methods.iau.step_search import MAX_DRIFT
from hf_iau.methods.iau.targets import ForgetTargets
from hf_iau.methods.step import Step, step_norm, weights_norm
from hf_iau.utils.vectors import GradientAccumulator, pieces, storage_dtype

DAMPING = 0.1
"""λ of a walk, relative to each layer's mean eigenvalue."""
ARRIVED = 0.1
"""Share of the way to the targets that may be left."""
DEAR = 0.10
"""More than this share of the held-out loss is paid only for a walk that arrives."""

_STRIDE, _SHORTEST_STRIDE = 0.03, 0.002
# What is left of a stride when the anchors have drawn back is made longer by no more than this factor: it is noisy.
_MOST_LENGTHENED = 4.0
MOST_STEPS = 40
"""After so many steps, those that were taken back among them, a walk ends."""
USUAL_STEPS = 8
"""Median of the walks in the benchmarks, of 1 to 40 steps."""
# A step that raises the held-out loss by more than this share of it went beyond what its gradients could see: it is
# taken back and the stride is halved.
_JUMP = 0.02
_ANCHOR_ROWS, _ANCHOR_ROWS_A_STEP = 2048, 256
# What is kept of them: for a large vocabulary a row's logits alone are many megabytes.
_ANCHOR_BYTES, _FEWEST_ANCHOR_ROWS = 256 * 2**20, 8
# Held-out rows by which each step is judged: four times as many as are forgotten, in these bounds.
_FEWEST_WATCHED_ROWS, _WATCHED_ROWS = 256, 1000
# A first step that brings more than `_TOO_MUCH` of the way takes rows past their targets before they are looked at: it is
# taken back, and steps are made to bring `_SHARE`. The few rows of a small request are soon brought so far.
_SHARE, _TOO_MUCH = 0.25, 0.4
# So near to the end, by the last step, a look that costs no gradient goes first.
_NEAR = 1.5


@dataclass
class MultiStep:
    """A path and the point on it that was chosen.

    Attributes:
        step: Δ from the old weights to that point.
        damping: λ of every step.
        steps: how many steps lead there.
        reached: whether no more than `ARRIVED` of the way to the targets is left there.
        remaining: the share that is left; 1 at the start.
        held_out_loss, relative_step: at that point.
        curve: a line for each step of the whole path.
        forget, held_out, known: what is made there of the forget, the held-out and the `known` rows; None at the start, and
            where that was not looked at.
    """

    step: Step
    damping: float
    steps: int
    reached: bool
    remaining: float
    held_out_loss: float
    relative_step: float
    curve: list[dict[str, Any]] = field(default_factory=list)
    forget: RowPredictions | None = None
    held_out: RowPredictions | None = None
    known: RowPredictions | None = None


def run_multi_step(
    model: nn.Module,
    curvature: Curvature,
    forget: RowSource,
    retained: RowSource,
    held_out: RowSource,
    forget_targets: ForgetTargets,
    *,
    names: Sequence[str],
    looked_at: RowSource | None = None,
    known: RowSource | None = None,
    before: tuple[RowPredictions, RowPredictions] | None = None,
    damping: float = DAMPING,
    max_relative_step: float,
    progress: bool = False,
    weights: Mapping[str, Tensor] | None = None,
) -> MultiStep:
    """Walk from the model's weights until the forget rows are known as held-out rows are; the weights are put back.

    Args:
        model: the bare model.
        curvature: C at these weights.
        forget: the forget rows, like any other training rows, in batches that fit gradients.
        retained: retained rows to draw anchors from, in batches that fit gradients.
        held_out: rows never trained on, in batches that fit forward passes.
        shortfall: the forget rows' targets, made at these weights.
        names: the parameters that move.
        looked_at: the forget rows in batches that fit forward passes.
        known: retained rows, in such batches, to be looked at once, where the walk ends.
        before: what is made of all forget and all held-out rows at these weights, where that is known.
        damping: λ, relative to each layer's mean eigenvalue.
        max_relative_step: farthest ‖Δ‖/‖θ‖ allowed.
        progress: show a progress bar.
        weights: copies of the parameters as they are, by name; made here if None.
    """
    weights = {name: weights[name] if weights else copy_to_memory_device(model.get_parameter(name)) for name in names}
    norm = max(weights_norm(model, list(names)), 1e-300)
    moved: Step = {name: torch.zeros_like(value, dtype=storage_dtype(value.dtype)) for name, value in weights.items()}
    chosen = sample_positions(len(held_out), watched_rows(len(forget)), 0)
    watched = held_out.select(chosen).keep_batches() if len(chosen) < len(held_out) else held_out.keep_batches()
    looked_at = (looked_at or forget.resized(held_out.batch_size)).keep_batches()
    pushed = forget.keep_batches()
    losses_at_start = (before[0] if before else predict_rows(model, looked_at)).target_losses
    at_start = (before[1].select(chosen) if before else predict_rows(model, watched)).mean_loss
    anchors = _Anchors(model, retained)
    best = MultiStep(dict(moved), damping, 0, False, forget_targets.remaining(losses_at_start), at_start, 0.0)
    losses: np.ndarray | None = losses_at_start
    curve: list[dict[str, Any]] = []
    stride, last, length, left, expected = _STRIDE, at_start, 0.0, best.remaining, best.remaining
    push: Step | None = None

    def arrive(losses: np.ndarray, seen: RowPredictions | None) -> bool:
        """Note what the last step brought; whether it was the last one."""
        nonlocal best, left, expected
        remaining = forget_targets.remaining(losses)
        left, expected = remaining, 2.0 * remaining - left
        relative = step_norm(moved) / norm
        curve.append(
            {
                "damping": damping,
                "stride": stride,
                "relative_step": relative,
                "criterion": remaining,
                "held_out_loss": last,
            }
        )
        arrived = remaining <= ARRIVED
        if arrived or (remaining < best.remaining and last <= at_start + DEAR * abs(at_start)):
            best = MultiStep(moved, damping, len(curve), arrived, remaining, last, relative, forget=seen)
        return arrived or not last <= at_start + MAX_DRIFT * abs(at_start)

    try:
        for number in tqdm(range(MOST_STEPS), desc="walking", disable=not (progress and is_main_process())):
            if push is None:  # a step that was taken back leaves it as it was
                if losses is None:
                    gradient, losses = push_gradient(model, pushed, forget_targets, names)
                    if arrive(losses, None):
                        losses = None
                        break
                else:
                    gradient = weighted_gradient(model, pushed, forget_targets.weights(losses), names)
                push = curvature.solve(gradient, damping)
                del gradient
                length = step_norm(push)
                if not length > 0 or not np.isfinite(length):
                    break
            further = {name: moved[name] + (stride * norm / length) * push[name].to(moved[name]) for name in names}
            if curve:  # else nothing has moved that could be drawn back
                pull = curvature.solve(anchors.drift_gradient(model, number, names), damping)
                # Newton's step back, but no longer than the push.
                back = min(1.0, stride * norm / max(step_norm(pull), 1e-300))
                for name, place in further.items():
                    place -= back * pull[name].to(place)
                del pull
                _lengthen(further, moved, stride * norm)
            if step_norm(further) / norm > max_relative_step:
                break
            _place(model, weights, further)
            now = predict_rows(model, watched).mean_loss
            if not now <= last + _JUMP * abs(at_start) and stride > _SHORTEST_STRIDE:
                stride *= 0.5
                _place(model, weights, moved)
                continue
            ruined = not now <= at_start + MAX_DRIFT * abs(at_start)
            seen: RowPredictions | None = None
            if not curve or ruined or expected <= _NEAR * ARRIVED or number == MOST_STEPS - 1:
                # The first step, or perhaps the last. Elsewhere the pass that takes the next gradient looks as well.
                seen = predict_rows(model, looked_at)
                brought = 1.0 - forget_targets.share_left(seen.target_losses)
                if not curve and brought > _TOO_MUCH and stride > _SHORTEST_STRIDE:
                    stride = max(stride * _SHARE / brought, _SHORTEST_STRIDE)
                    _place(model, weights, moved)
                    continue
            moved, last, push, losses = further, now, None, None
            if seen is not None:
                losses = seen.target_losses
                if arrive(losses, seen):
                    break
        if best.steps:  # the whole held-out sample, for comparison with one step
            _place(model, weights, best.step)
            best.held_out = predict_rows(model, held_out)
            best.held_out_loss = best.held_out.mean_loss
            best.known = None if known is None else predict_rows(model, known)
    finally:
        _place(model, weights, None)
    best.curve = curve
    return best


@dataclass(frozen=True)
class MultiStepWork:
    """What a walk does, counted in rows.

    Attributes:
        gradients: rows whose gradient is taken.
        forwards: rows that are only looked at.
        solves: divisions by the curvature.
    """

    gradients: int
    forwards: int
    solves: int

    @classmethod
    def of(cls, steps: int, *, forget: int, held_out: int, known: int, anchors: int) -> MultiStepWork:
        """The work of `steps` steps, and of what is looked at before and after them.

        Args:
            steps: how many.
            forget, held_out: rows of the request and of the held-out sample.
            known: rows of the sample of retained rows, which one step is judged by before.
            anchors: rows of it that are kept as anchors, see `anchor_rows`.
        """
        pulls = max(steps - 1, 0)
        return cls(
            gradients=steps * forget + pulls * min(anchors, _ANCHOR_ROWS_A_STEP),
            forwards=steps * min(held_out, watched_rows(forget)) + 3 * forget + known + anchors + held_out,
            solves=steps + pulls,
        )


def watched_rows(forget: int) -> int:
    """How many held-out rows, where there are so many, each step of a walk is judged by.

    Args:
        forget: rows of the request.
    """
    return min(max(4 * forget, _FEWEST_WATCHED_ROWS), _WATCHED_ROWS)


def anchor_rows(model: nn.Module, retained: RowSource) -> int:
    """How many of the retained rows a walk keeps as anchors: no more than are affordable, but at least 8."""
    affordable = max(int(_ANCHOR_BYTES / _kept_bytes(model, retained)), _FEWEST_ANCHOR_ROWS)
    return min(_ANCHOR_ROWS, affordable, len(retained))


class _Anchors:
    """Retained rows with what the model made of them at the start, in groups that take turns.

    Of several processes, each holds its share of every group.

    Args:
        model: at the weights to be drawn back to.
        retained: rows to choose from; as many are kept as `_ANCHOR_ROWS` and `_ANCHOR_BYTES` allow (at least 8).
    """

    def __init__(self, model: nn.Module, retained: RowSource) -> None:
        rows = retained.sample(anchor_rows(model, retained), 1, "anchor rows")
        self.groups: list[RowSource] = []
        self.outputs: list[list[Tensor]] = []
        turns = math.ceil(len(rows) / _ANCHOR_ROWS_A_STEP)
        for turn in range(turns):
            # From all over the training rows, which may be sorted by class.
            group = rows.select(np.arange(turn, len(rows), turns)).keep_batches()
            with evaluation_mode(model), torch.no_grad():
                found = [
                    copy_to_memory_device(targets.logits) for _, targets, counts in _targets_of(model, group) if counts
                ]
            self.groups.append(group)
            self.outputs.append(found)

    def drift_gradient(self, model: nn.Module, number: int, names: Sequence[str]) -> dict[str, Tensor]:
        """∇ of the mean drift of the group whose turn it is at step `number`."""
        turn = number % len(self.groups)

        def losses() -> Iterator[tuple[Tensor, int]]:
            before = iter(self.outputs[turn])
            for _, now, counts in _targets_of(model, self.groups[turn]):
                yield (drift(now, next(before).to(now.logits.device)), len(now)) if counts else _nothing(now)

        total, targets = _gradient(model, losses(), names, "the drift of the anchor rows")
        return {name: gradient / max(targets, 1) for name, gradient in total.items()}


def _kept_bytes(model: nn.Module, rows: RowSource) -> float:
    """Bytes of inputs and outputs an anchor row, by a look at a few; each alone, so that no batch's padding counts."""
    few = rows.sample(_FEWEST_ANCHOR_ROWS, 0).resized(1)
    held = 0
    with evaluation_mode(model), torch.no_grad():
        for _, inputs in few.passes_of_all(model):
            tensors = (*inputs.values(), predicted_targets(model, inputs).logits)
            held += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    return max(held, 1) / len(few)


def drift(now: Targets, before: Tensor) -> Tensor:
    """Σ over targets of how far the predictions have moved, a scalar whose Hessian at no move is the Fisher matrix.

    KL(before ‖ now) for classes and tokens, its mean over the labels of a multi-label row, and the mean squared
    difference of a regression's outputs.

    Args:
        now: of the present weights.
        before: the logits (or predicted values) of the same targets before, of the same shape.
    """
    if now.kind is TaskKind.REGRESSION:
        return (now.logits - before).square().mean(dim=1).sum()
    if now.kind is TaskKind.MULTI_LABEL:
        moved = F.binary_cross_entropy_with_logits(now.logits, before.sigmoid(), reduction="none")
        return moved.mean(dim=1).sum()
    return F.kl_div(now.logits.log_softmax(1), before.log_softmax(1), reduction="sum", log_target=True)


def weighted_gradient(
    model: nn.Module, source: RowSource, weights: np.ndarray, names: Sequence[str]
) -> dict[str, Tensor]:
    """Σ_rows w·∇ℓ with ℓ each row's plain loss, a mean over its targets.

    Args:
        model: the bare model.
        source: the rows; of several processes, each takes its share.
        weights: `(rows,)`, w of each row of `source`; or `(rows, most tokens of a row)`, of each token.
        names: parameters to take gradients for.

    Returns:
        Tensors by parameter name.
    """

    _, start = source.share()

    def losses() -> Iterator[tuple[Tensor, int]]:
        for positions, targets, counts_here in _targets_of(model, source):
            if not counts_here:
                yield _nothing(targets)
                continue
            yield (targets.losses() * _of_targets(targets, weights[start + positions])).sum(), len(targets)

    return _gradient(model, losses(), names, f"the weighted gradient of the {source.name}")[0]


def push_gradient(
    model: nn.Module, source: RowSource, forget_targets: ForgetTargets, names: Sequence[str]
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Σ_rows s/(1−p)·∇ℓ, s and p by each row's loss at the weights as they are: one pass for both. For tokens the mean
    over a row's tokens, each with an s and p of its own.

    Args:
        model: the bare model.
        source: the rows of `shortfall`; of several processes, each takes its share.
        shortfall: their targets.
        names: parameters to take gradients for.

    Returns:
        Tensors by parameter name; and `RowPredictions.target_losses` of all rows.
    """
    _, start = source.share()
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def losses() -> Iterator[tuple[Tensor, int]]:
        for positions, targets, counts_here in _targets_of(model, source):
            if not counts_here:
                yield _nothing(targets)
                continue
            each = targets.losses()
            found = targets.in_rows(each.detach()).cpu().numpy()
            seen.append((positions, found if targets.kind is TaskKind.TOKENS else found[:, 0]))
            weights = forget_targets.weights(seen[-1][1], start + positions)
            yield (each * _of_targets(targets, weights)).sum(), len(targets)

    what = f"the push of the {source.name}"
    gradient, _ = _gradient(model, losses(), names, what)
    own = {}
    if seen:
        own["loss"] = stacked([found for _, found in seen])[np.argsort(np.concatenate([rows for rows, _ in seen]))]
    return gradient, stacked([arrays["loss"] for arrays, _ in all_gather_arrays(own, {}, what) if arrays])


def _of_targets(targets: Targets, weights: np.ndarray) -> Tensor:
    """`weights` of the batch's rows, or of their tokens, over the number of targets of their row, `(targets,)`."""
    counts = torch.bincount(targets.rows, minlength=targets.n_rows)
    found = torch.from_numpy(weights).to(targets.logits)
    each = found[targets.rows] if found.ndim == 1 else found[targets.rows, targets.order]
    return each / counts[targets.rows]


def _targets_of(model: nn.Module, source: RowSource) -> Iterator[tuple[np.ndarray, Targets, bool]]:
    """Positions in this process's share, targets, and whether they count, of each batch that it has to go through."""
    for positions, inputs, counts in source.passes(model):
        yield positions, predicted_targets(model, inputs), counts


def _nothing(targets: Targets) -> tuple[Tensor, int]:
    """A loss without a gradient, from a batch that does not count."""
    return targets.logits.sum() * 0.0, 0


def _gradient(
    model: nn.Module, losses: Iterable[tuple[Tensor, int]], names: Sequence[str], what: str
) -> tuple[dict[str, Tensor], int]:
    """Σ ∇loss, and the number of targets, in evaluation mode and over all processes."""
    parameters = {name: model.get_parameter(name) for name in names}
    with sync_errors(what):
        counted = 0
        with evaluation_mode(model), torch.enable_grad():
            accumulator = GradientAccumulator(parameters, memory_device(None), compensated=not is_sharded(model))
            for loss, targets in losses:
                loss.backward()
                counted += targets
                accumulator.add()
            sums = accumulator.finish()
        count = torch.tensor([counted], dtype=torch.float64, device=next(iter(sums.values())).device)
        # FSDP2 has summed what it shards.
        all_reduce_([*(total for total in sums.values() if not isinstance(total, DTensor)), count], what)
    return sums, round(float(count))


def _lengthen(further: Step, moved: Step, least: float) -> None:
    """Make the way from `moved` to `further` at least `least` long, in place.

    Late in a walk push and pull go nearly the same way, and what they leave of a stride is in the right direction but short.
    """
    length = math.hypot(*(step_norm({name: place - moved[name]}) for name, place in further.items()))
    if 0.0 < length < least:
        factor = min(least / length, _MOST_LENGTHENED)
        for name, place in further.items():
            place.sub_(moved[name]).mul_(factor).add_(moved[name])


def _place(model: nn.Module, weights: Mapping[str, Tensor], moved: Step | None) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            parameter, before = to_local(model.get_parameter(name)), to_local(value)
            if moved is None:
                parameter.copy_(before)
                continue
            for part, old, change in pieces(parameter, before, to_local(moved[name]).to(before.device)):
                part.copy_(old.double() + change)
