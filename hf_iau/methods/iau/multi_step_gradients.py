"""The two gradients of a multi-step update: of the forget rows, and of retained rows that are to stay as they were."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_iau.data import RowSource, evaluation_mode, predicted_targets
from hf_iau.data.precision import copy_to_memory_device, memory_device
from hf_iau.data.predictions import stacked
from hf_iau.data.targets import Targets, TaskKind
from hf_iau.distributed import all_gather_arrays, all_reduce_, is_sharded, sync_errors
from hf_iau.methods.iau.targets import ForgetTargets
from hf_iau.utils.vectors import GradientAccumulator

REFERENCE_ROWS_PER_STEP = 256
"""Retained rows whose gradient a step takes: a batch or a few, so that retaining costs about what forgetting does."""
_REFERENCE_ROWS = 2048  # eight groups that take turns
# For a large vocabulary a row's logits alone are many megabytes; fewer rows than these would tell nothing.
_REFERENCE_BYTES, _FEWEST_REFERENCE_ROWS = 256 * 2**20, 8


def reference_size(model: nn.Module, retained: RowSource, most_bytes: int = _REFERENCE_BYTES) -> int:
    """How many of the retained rows are kept as reference: no more than fit into `most_bytes`, but at least 8."""
    affordable = max(int(most_bytes / _bytes_per_row(model, retained)), _FEWEST_REFERENCE_ROWS)
    return min(_REFERENCE_ROWS, affordable, len(retained))


class RetainReference:
    """Retained rows with what the model made of them at the start, in groups that take turns.

    Of several processes, each holds its share of every group.

    Args:
        model: at the weights whose predictions are to be kept.
        retained: rows to choose from, in batches that fit gradients.
        most_bytes: what the rows' inputs and outputs may take.
    """

    def __init__(self, model: nn.Module, retained: RowSource, most_bytes: int = _REFERENCE_BYTES) -> None:
        rows = retained.sample(reference_size(model, retained, most_bytes), 1, "retain reference rows")
        self.groups: list[RowSource] = []
        self.outputs: list[list[Tensor]] = []
        turns = math.ceil(len(rows) / REFERENCE_ROWS_PER_STEP)
        for turn in range(turns):
            # From all over the training rows, which may be sorted by class.
            group = rows.select(np.arange(turn, len(rows), turns)).keep_batches()
            with evaluation_mode(model), torch.no_grad():
                outputs = [
                    copy_to_memory_device(targets.logits) for _, targets, counts in _targets_of(model, group) if counts
                ]
            self.groups.append(group)
            self.outputs.append(outputs)

    def gradient(self, model: nn.Module, number: int, names: Sequence[str]) -> dict[str, Tensor]:
        """∇ of the mean divergence per target, over the group whose turn it is at step `number`.

        Args:
            model: at the present weights.
            number: of the step.
            names: parameters to take gradients for.
        """
        turn = number % len(self.groups)

        def losses() -> Iterator[tuple[Tensor, int]]:
            before = iter(self.outputs[turn])
            for _, now, counts in _targets_of(model, self.groups[turn]):
                if counts:
                    yield prediction_divergence(now, next(before).to(now.logits.device)), len(now)
                else:
                    yield _nothing(now)

        total, targets = _gradient(model, losses(), names, "the gradient of the retain reference rows")
        return {name: gradient / max(targets, 1) for name, gradient in total.items()}


def _bytes_per_row(model: nn.Module, rows: RowSource) -> float:
    """Bytes of inputs and outputs, measured on a few rows; each alone, so that no batch's padding counts."""
    few = rows.sample(_FEWEST_REFERENCE_ROWS, 0).resized(1)
    held = 0
    with evaluation_mode(model), torch.no_grad():
        for _, inputs in few.passes_of_all(model):
            tensors = (*inputs.values(), predicted_targets(model, inputs).logits)
            held += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    return max(held, 1) / len(few)


def prediction_divergence(now: Targets, before: Tensor) -> Tensor:
    """Σ over targets of how far predictions have moved, a scalar whose Hessian at no move is the Fisher matrix.

    KL(before ‖ now) for classes and tokens, its mean over the labels of a multi-label row, and the mean squared
    difference of a regression's outputs.

    Args:
        now: of the present weights.
        before: the logits (or predicted values) of the same targets before, of the same shape.
    """
    if now.kind is TaskKind.REGRESSION:
        return (now.logits - before).square().mean(dim=1).sum()
    if now.kind is TaskKind.MULTI_LABEL:
        divergence = F.binary_cross_entropy_with_logits(now.logits, before.sigmoid(), reduction="none")
        return divergence.mean(dim=1).sum()
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
        for positions, targets, counts in _targets_of(model, source):
            if not counts:
                yield _nothing(targets)
                continue
            yield (targets.losses() * _per_target(targets, weights[start + positions])).sum(), len(targets)

    return _gradient(model, losses(), names, f"the weighted gradient of the {source.name}")[0]


def forget_gradient(
    model: nn.Module, source: RowSource, forget_targets: ForgetTargets, names: Sequence[str]
) -> tuple[dict[str, Tensor], np.ndarray]:
    """Σ_rows s/(1−p)·∇ℓ, s and p by each row's loss at the present weights: one pass for both. For tokens the mean
    over a row's tokens, each with an s and p of its own.

    Args:
        model: the bare model.
        source: the rows of `forget_targets`; of several processes, each takes its share.
        forget_targets: what the rows are to reach.
        names: parameters to take gradients for.

    Returns:
        Tensors by parameter name; and `RowPredictions.target_losses` of all rows.
    """
    _, start = source.share()
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def losses() -> Iterator[tuple[Tensor, int]]:
        for positions, targets, counts in _targets_of(model, source):
            if not counts:
                yield _nothing(targets)
                continue
            target_losses = targets.losses()
            by_row = targets.in_rows(target_losses.detach()).cpu().numpy()
            seen.append((positions, by_row if targets.kind is TaskKind.TOKENS else by_row[:, 0]))
            weights = forget_targets.weights(seen[-1][1], start + positions)
            yield (target_losses * _per_target(targets, weights)).sum(), len(targets)

    what = f"the forget gradient of the {source.name}"
    gradient, _ = _gradient(model, losses(), names, what)
    own = {}
    if seen:
        own["loss"] = stacked([by_row for _, by_row in seen])[np.argsort(np.concatenate([rows for rows, _ in seen]))]
    return gradient, stacked([arrays["loss"] for arrays, _ in all_gather_arrays(own, {}, what) if arrays])


def _per_target(targets: Targets, weights: np.ndarray) -> Tensor:
    """`weights` of the batch's rows, or of their tokens, over the number of targets of their row, `(targets,)`."""
    counts = torch.bincount(targets.rows, minlength=targets.n_rows)
    by_row = torch.from_numpy(weights).to(targets.logits)
    each = by_row[targets.rows] if by_row.ndim == 1 else by_row[targets.rows, targets.order]
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
