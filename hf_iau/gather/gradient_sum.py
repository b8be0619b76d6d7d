"""Sums of row-loss gradients, exact to rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_iau.errors import NonFiniteGradientError, UnsupportedModelError
from hf_iau.objective import RowLoss, RowSource, evaluation_mode
from hf_iau.objective.working import memory_device
from hf_iau.parallel import gather_arrays, is_main_process, sum_over_processes, together, whole_parameters
from hf_iau.vectors import GradientAccumulator, norm


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
        return norm(self.tensors.values())

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
    found = dict(model.named_parameters())
    if names is None:
        chosen = {name: parameter for name, parameter in found.items() if parameter.requires_grad}
        if not chosen:
            raise UnsupportedModelError(
                f"No parameter of {type(model).__name__} has requires_grad=True, so there is nothing that could "
                "forget. Unfreeze what was fine-tuned (for PEFT load the adapter with is_trainable=True)."
            )
        return chosen
    bad = [name for name in names if name not in found or not found[name].requires_grad]
    if bad:
        raise UnsupportedModelError(
            f"{len(bad)} parameters that the memory covers are absent or frozen here, e.g. {bad[0]!r}. Load the same "
            "architecture and set requires_grad=True on what was fine-tuned (PEFT: is_trainable=True)."
        )
    return {name: found[name] for name in names}


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
    with together(f"the gradient sum over the {source.name}"), whole_parameters(model):
        parameters = trainable_parameters(model, names)
        own, start = source.share()
        result = _sum_own_rows(model, row_loss, own, parameters, progress and is_main_process(), track_batches)
        if not _is_finite(result):
            _raise_for_row(model, row_loss, own, start, parameters)
        _add_up(result, source.name)
        if not _is_finite(result):
            raise NonFiniteGradientError(
                f"The gradient sum over the {source.name} is not finite although each process's is: it overflowed."
            )
    return result


def _sum_own_rows(
    model: nn.Module,
    row_loss: RowLoss,
    source: RowSource,
    parameters: dict[str, nn.Parameter],
    progress: bool,
    track_batches: bool,
) -> GradientSum:
    sums = GradientAccumulator(parameters, memory_device(None))
    result = GradientSum({}, 0, 0)
    losses: list[Tensor] = []

    with evaluation_mode(model), torch.enable_grad():
        batches = tqdm(source, total=-(-len(source) // source.batch_size), desc=source.name, disable=not progress)
        for positions, inputs in batches:
            loss, n_targets = row_loss(model, inputs)
            result.n_rows += len(positions)
            result.n_targets += n_targets
            if n_targets == 0:
                result.rows_without_targets += len(positions)
                if track_batches:  # sampled like any other, with a gradient of zero
                    result.batches.append((len(positions), 0.0))
                continue
            loss.backward()
            losses.append(loss.detach())
            if track_batches:
                found = (parameter.grad for parameter in parameters.values() if parameter.grad is not None)
                result.batches.append((len(positions), norm(found) ** 2))
            sums.add(at_once=track_batches)
        result.tensors = sums.finish()
    result.loss = float(torch.stack(losses).double().sum()) if losses else 0.0
    return result


def _is_finite(result: GradientSum) -> bool:
    return math.isfinite(result.loss) and all(bool(tensor.isfinite().all()) for tensor in result.tensors.values())


def _add_up(result: GradientSum, name: str) -> None:
    """The sums of this process's share become those of all rows."""
    counts = [result.n_rows, result.n_targets, result.rows_without_targets, result.loss]
    totals = torch.tensor(counts, dtype=torch.float64, device=next(iter(result.tensors.values())).device)
    sum_over_processes([*result.tensors.values(), totals], f"the gradient sum over the {name}")
    result.n_rows, result.n_targets, result.rows_without_targets = (round(total) for total in totals.tolist()[:3])
    result.loss = float(totals[3])
    own = {"batches": np.asarray(result.batches, dtype=np.float64).reshape(-1, 2)}
    every = [arrays["batches"].tolist() for arrays, _ in gather_arrays(own, {}, f"batches of the {name}")]
    result.batches = [(int(rows), squared) for batches in every for rows, squared in batches]


def _raise_for_row(
    model: nn.Module, row_loss: RowLoss, source: RowSource, start: int, parameters: dict[str, nn.Parameter]
) -> None:
    """Find the first row whose loss or gradient is not finite, and say so."""
    with evaluation_mode(model), torch.enable_grad():
        for positions, inputs in source.resized(1):
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
                where = f"gradient of {bad[0]!r}" if bad else "loss"
                raise NonFiniteGradientError(
                    f"Row {start + int(positions[0])} of the {source.name} has a non-finite {where} (loss {float(loss.detach()):.4g}). "
                    "Mend or drop that row, or check the weights for NaN."
                )
    raise NonFiniteGradientError(
        f"The gradient sum over the {source.name} is not finite although every row's gradient is: the sum overflowed."
    )
