"""Sums of row-loss gradients, exact to rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from hf_iau.data import RowLoss, RowSource, evaluation_mode
from hf_iau.data.precision import memory_device
from hf_iau.distributed import (
    all_gather_arrays,
    all_reduce_,
    inner_product,
    is_main_process,
    is_sharded,
    replicas,
    sharded_passes,
    sync_errors,
    to_local,
)
from hf_iau.errors import NonFiniteGradientError, UnsupportedModelError
from hf_iau.utils.vectors import GradientAccumulator, dot_on_device


@dataclass
class GradientSum:
    """Σ ∇ℓ over some rows.

    Attributes:
        tensors: parameter name → tensor of the parameter's shape, float32 (float64 for float64 parameters).
        n_rows: rows summed over.
        n_targets: targets (tokens of a language model) summed over.
        loss: Σ ℓ.
        rows_without_targets: rows that contributed nothing because all their labels are ignored.
        batches: `(rows, ‖batch sum‖²)` a batch, when asked for: what the standard error of a sample is made of.
    """

    tensors: dict[str, Tensor]
    n_rows: int
    n_targets: int
    loss: float = 0.0
    rows_without_targets: int = 0
    batches: list[tuple[int, float]] = field(default_factory=list)

    def norm(self) -> float:
        """Euclidean norm over all parameters."""
        return float(inner_product((t, t) for t in self.tensors.values()) ** 0.5)

    def minus(self, other: GradientSum) -> GradientSum:
        """The sum over the rows of this one that are not in `other`."""
        return GradientSum(
            {name: tensor - other.tensors[name].to(tensor) for name, tensor in self.tensors.items()},
            self.n_rows - other.n_rows,
            self.n_targets - other.n_targets,
            self.loss - other.loss,
        )


def trainable_parameters(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that gradients are taken for, in the model's order (tied ones once).

    Args:
        model: the bare model.
        names: exactly these parameters, whatever else is trainable; default: all with `requires_grad`.

    Raises:
        UnsupportedModelError: nothing is trainable, or a named parameter is frozen or absent.
    """
    parameters = dict(model.named_parameters())
    if names is None:
        chosen = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if not chosen:
            raise UnsupportedModelError(
                f"No parameter of {type(model).__name__} has requires_grad=True, so there is nothing that could "
                "forget. Unfreeze what was fine-tuned (for PEFT load the adapter with is_trainable=True)."
            )
        return chosen
    bad = [name for name in names if name not in parameters or not parameters[name].requires_grad]
    if bad:
        raise UnsupportedModelError(
            f"{len(bad)} parameters that the memory covers are absent or frozen here, e.g. {bad[0]!r}. Load the same "
            "architecture and set requires_grad=True on what was fine-tuned (PEFT: is_trainable=True)."
        )
    return {name: parameters[name] for name in names}


def sum_row_gradients(
    model: nn.Module,
    row_loss: RowLoss,
    source: RowSource,
    *,
    names: Sequence[str] | None = None,
    progress: bool = False,
    track_batches: bool = False,
) -> GradientSum:
    """Σ_{row in source} ∇ℓ(row) at the model's present weights, in one pass.

    Of several processes, each takes its share of the rows; all get the same sums, and all raise if one has to.

    Args:
        model: the bare model; left as it was found.
        row_loss: ℓ.
        source: the rows.
        names: parameters to take gradients for; default all trainable ones.
        progress: show a progress bar.
        track_batches: keep `‖batch sum‖²` of every batch, for a standard error.

    Returns:
        The sums, on each parameter's device or the memory device.

    Raises:
        NonFiniteGradientError: a row's loss or gradient is NaN or infinite; the message says which row.
    """
    what = f"the gradient sum over the {source.name}"
    with sync_errors(what), sharded_passes(model):
        parameters = trainable_parameters(model, names)
        sharded = is_sharded(model)
        result = _sum_rows(model, row_loss, source, parameters, progress and is_main_process(), track_batches)
        if _on_any_rank(not _is_finite(result), what, sharded):
            (_raise_for_sharded_row if sharded else _raise_for_row)(model, row_loss, source, parameters)
        _add_up(result, source.name, sharded)
        if _on_any_rank(not _is_finite(result), what, sharded):
            raise NonFiniteGradientError(
                f"The gradient sum over the {source.name} is not finite although each process's is: it overflowed."
            )
    return result


def _sum_rows(
    model: nn.Module,
    row_loss: RowLoss,
    source: RowSource,
    parameters: dict[str, nn.Parameter],
    progress: bool,
    track_batches: bool,
) -> GradientSum:
    """Σ over this process's share of the rows; of a sharded model, this process's part of Σ over all of them."""
    sharded = is_sharded(model)
    sums = GradientAccumulator(parameters, memory_device(None), compensated=not sharded)
    result = GradientSum({}, 0, 0)
    total: Tensor | None = None

    with evaluation_mode(model), torch.enable_grad():
        own, _ = source.share()
        batches = tqdm(
            # Sums of batches say something about the error only if their rows are drawn alike.
            source.passes(model, in_order=track_batches),
            total=-(-len(own) // own.batch_size),
            desc=source.name,
            disable=not progress,
        )
        for positions, inputs, counts in batches:
            loss, n_targets = row_loss(model, inputs)
            counted = len(positions) if counts else 0
            result.n_rows += counted
            result.n_targets += n_targets if counts else 0
            if n_targets == 0:
                result.rows_without_targets += counted
                if not sharded:
                    if track_batches:  # sampled like any other, with a gradient of zero
                        result.batches.append((counted, 0.0))
                    continue
            # All processes of a sharded model pass through it backward too, whether or not they have something to add.
            matters = counts and n_targets > 0
            (loss if matters else loss * 0.0).backward()
            if matters:
                added = loss.detach().double()
                total = added if total is None else total + added
            if sums.is_full or track_batches:
                if sharded:
                    _add_up_whole_gradients(parameters, source.name)
                if track_batches:
                    result.batches.append((counted, _squared_gradients(parameters, sharded)))
            sums.add(at_once=track_batches)
        if sharded and sums.pending:
            _add_up_whole_gradients(parameters, source.name)
        result.tensors = sums.finish()
    result.loss = 0.0 if total is None else float(total)
    return result


def _squared_gradients(parameters: Mapping[str, nn.Parameter], sharded: bool) -> float:
    """‖batch sum‖² as far as this process holds it; of what several hold, each counts its share."""
    squared: list[Tensor] = []
    for parameter in parameters.values():
        if parameter.grad is not None:
            part = to_local(parameter.grad)
            own = dot_on_device(part, part) / (replicas(parameter.grad) if sharded else 1)
            squared.append(own.to(squared[0].device) if squared else own)
    return float(torch.stack(squared).sum()) if squared else 0.0  # an accelerator is waited for once a batch


def _add_up_whole_gradients(parameters: dict[str, nn.Parameter], name: str) -> None:
    """Sum over the ranks what FSDP2 leaves alone in a sharded model: gradients of unsharded parameters."""
    left = [parameter for parameter in parameters.values() if not isinstance(parameter, DTensor)]
    for parameter in left:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if left:
        gradients = [p.grad.contiguous() for p in left if p.grad is not None]
        all_reduce_(gradients, f"whole gradients of the {name}")
        for parameter, gradient in zip(left, gradients, strict=True):
            parameter.grad = gradient


def _on_any_rank(flag: bool, what: str, sharded: bool) -> bool:
    """`flag` of this rank; of a sharded model, where each rank sees its shards only, whether any rank has it set."""
    if not sharded:
        return flag
    count = torch.tensor([float(flag)])
    all_reduce_([count], what)
    return bool(count > 0)


def _is_finite(result: GradientSum) -> bool:
    return math.isfinite(result.loss) and all(
        bool(to_local(tensor).isfinite().all()) for tensor in result.tensors.values()
    )


def _add_up(result: GradientSum, name: str, sharded: bool) -> None:
    """The sums of this process's share become those of all rows; tensors of a sharded model are so already."""
    counts = [result.n_rows, result.n_targets, result.rows_without_targets, result.loss]
    totals = torch.tensor(counts, dtype=torch.float64)
    tensors = [] if sharded else list(result.tensors.values())
    all_reduce_([*tensors, totals], f"the gradient sum over the {name}")
    result.n_rows, result.n_targets, result.rows_without_targets = (round(total) for total in totals.tolist()[:3])
    result.loss = float(totals[3])
    own = {"batches": np.asarray(result.batches, dtype=np.float64).reshape(-1, 2)}
    every = [arrays["batches"] for arrays, _ in all_gather_arrays(own, {}, f"batches of the {name}")]
    # A pass through a sharded model is one batch of all processes, of whose sum each has squared its part.
    batches = np.sum(every, axis=0) if sharded else np.concatenate(every)
    result.batches = [(round(rows), squared) for rows, squared in batches.tolist()]


def _raise_for_sharded_row(
    model: nn.Module, row_loss: RowLoss, source: RowSource, parameters: dict[str, nn.Parameter]
) -> None:
    """As `_raise_for_row`, with all processes at one row at a time, since each sees a part of its gradient only."""
    with evaluation_mode(model), torch.enable_grad():
        for positions, inputs in source.resized(1).passes_of_all(model):
            loss, n_targets = row_loss(model, inputs)
            loss.backward()
            bad = ""
            for name, parameter in parameters.items():
                if not bad and parameter.grad is not None and not bool(to_local(parameter.grad).isfinite().all()):
                    bad = name
                parameter.grad = None
            by_rank = all_gather_arrays({}, {"bad": bad, "loss": float(loss.detach())}, f"a row of the {source.name}")
            names = [about["bad"] for _, about in by_rank if about["bad"]]
            if names or (n_targets and not math.isfinite(by_rank[0][1]["loss"])):
                raise _bad_row(int(positions[0]), source.name, names[0] if names else None, by_rank[0][1]["loss"])
    raise _overflowed(source.name)


def _raise_for_row(model: nn.Module, row_loss: RowLoss, source: RowSource, parameters: dict[str, nn.Parameter]) -> None:
    """Find the first row of this process whose loss or gradient is not finite, and say so."""
    own, start = source.share()
    with evaluation_mode(model), torch.enable_grad():
        for positions, inputs in own.resized(1):
            loss, n_targets = row_loss(model, inputs)
            if n_targets == 0:
                continue
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            bad = [
                name
                for name, gradient in zip(parameters, gradients, strict=True)
                if gradient is not None and not bool(torch.isfinite(gradient).all())
            ]
            if bad or not bool(torch.isfinite(loss)):
                raise _bad_row(start + int(positions[0]), source.name, bad[0] if bad else None, float(loss.detach()))
    raise _overflowed(source.name)


def _bad_row(position: int, name: str, parameter: str | None, loss: float) -> NonFiniteGradientError:
    where = "loss" if parameter is None else f"gradient of {parameter!r}"
    return NonFiniteGradientError(
        f"Row {position} of the {name} has a non-finite {where} (loss {loss:.4g}). "
        "Mend or drop that row, or check the weights for NaN."
    )


def _overflowed(name: str) -> NonFiniteGradientError:
    return NonFiniteGradientError(
        f"The gradient sum over the {name} is not finite although every row's gradient is: the sum overflowed."
    )
