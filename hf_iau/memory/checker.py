"""A public check that the gradient sums of *your* model and loss are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_iau.data import RowLoss, RowSource, evaluation_mode, probe_additivity
from hf_iau.data.precision import Precision, compute_settings, resolve_precision, rounds_to_half
from hf_iau.data.row_loss import UserLossFunction
from hf_iau.data.rows import Collator
from hf_iau.data.validation import check_adapters, check_placement
from hf_iau.distributed import get_world_size, inner_product, is_sharded, reshard
from hf_iau.distributed.wrappers import unwrap_model
from hf_iau.errors import IAUError
from hf_iau.memory.gathering import choose_row_loss, default_collator, keep_input_columns
from hf_iau.memory.gradient_sum import sum_row_gradients, trainable_parameters


@dataclass(frozen=True)
class GradientCheck:
    """Outcome of `check_row_gradients`.

    Attributes:
        relative_error: ‖fast − loop‖ / Σ‖∇ℓ_i‖, for each batch size.
        failing: parameter names whose own error exceeds the tolerance times Σ‖∇ℓ_i‖ at some batch size.
        tolerance: what was allowed.
        rows: how many rows were checked.
    """

    relative_error: dict[int, float]
    failing: tuple[str, ...]
    tolerance: float
    rows: int

    @property
    def passed(self) -> bool:
        """Whether every batch size is within the tolerance."""
        return not self.failing and all(error <= self.tolerance for error in self.relative_error.values())


def check_row_gradients(
    model: nn.Module,
    dataset: Any,
    *,
    data_collator: Collator | None = None,
    processing_class: Any = None,
    row_loss: UserLossFunction | RowLoss | None = None,
    compute_loss_func: Callable[..., Tensor] | None = None,
    label_smoothing_factor: float = 0.0,
    rows: int = 8,
    batch_sizes: tuple[int, ...] = (2, 3, 8),
    tolerance: float | None = None,
    precision: Precision = "auto",
) -> GradientCheck:
    """Compare batched gradient sums with a plain loop over batches of one row.

    Run it once on a model of your own before you trust its memory. All failing parameters are listed.

    Args:
        model: the model, in its final precision; left as it was found.
        dataset: a few training rows.
        data_collator, processing_class, row_loss, compute_loss_func, label_smoothing_factor: as for `gather`.
        rows: how many rows to check.
        batch_sizes: batch sizes to compare with the loop.
        tolerance: relative to Σ‖∇ℓ_i‖; default 1e-10 for float64 weights, 1e-5 for float32, 2e-2 below.
        precision: of the passes, as in `GatherConfig`: "bfloat16" for bf16 autocast, which attention kernels that
            refuse float32 need; "auto" is "float32" (without autocast), for no Trainer is known here.

    Returns:
        Whether it `passed`, and the parameters that are `failing`.

    Raises:
        CoupledRowsError: the loss couples the rows of a batch.
        IAUError: the loss cannot be read at all.
    """
    model = unwrap_model(model)
    check_adapters(model)
    check_placement(model)
    reshard(model)
    loss = choose_row_loss(
        row_loss=row_loss, compute_loss_func=compute_loss_func, label_smoothing_factor=label_smoothing_factor
    )
    source = RowSource(
        keep_input_columns(model, dataset, "rows"),
        data_collator or default_collator(processing_class),
        batch_size=1,
        device=next(model.parameters()).device,
    )
    if len(source) == 0:
        raise IAUError("check_row_gradients(): dataset is empty, pass a few rows.")
    source = source.sample(rows, seed=0)
    with compute_settings(resolve_precision(precision, None, None)):
        errors, failing, tolerance = _compare(model, loss, source, batch_sizes, tolerance)
    return GradientCheck(errors, tuple(failing), tolerance, len(source))


def _compare(
    model: nn.Module, loss: RowLoss, source: RowSource, batch_sizes: tuple[int, ...], tolerance: float | None
) -> tuple[dict[int, float], dict[str, None], float]:
    """Relative errors by batch size, the parameters that fail, and the tolerance."""
    probe_additivity(loss, model, source)
    parameters = trainable_parameters(model)
    if tolerance is None:
        double = all(p.dtype == torch.float64 for p in model.parameters())
        tolerance = 2e-2 if rounds_to_half(model) else 1e-10 if double else 1e-5
    reference, scale = _loop(model, loss, source, parameters)
    errors: dict[int, float] = {}
    failing: dict[str, None] = {}
    for batch_size in batch_sizes:
        fast = sum_row_gradients(model, loss, source.resized(batch_size)).tensors
        differences = {name: fast[name] - reference[name] for name in reference}
        distances = {name: inner_product([(d, d)]) ** 0.5 for name, d in differences.items()}
        errors[batch_size] = sum(d**2 for d in distances.values()) ** 0.5 / scale
        failing |= {name: None for name, distance in distances.items() if distance > tolerance * scale}
    return errors, failing, tolerance


def _loop(
    model: nn.Module, loss: RowLoss, source: RowSource, parameters: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], float]:
    """Σ∇ℓ_i, taken one row after the other, and Σ‖∇ℓ_i‖; every process does all rows."""
    sharded = is_sharded(model)
    reference = {name: torch.zeros_like(p, dtype=torch.float64).detach() for name, p in parameters.items()}
    scale = 0.0
    with evaluation_mode(model), torch.enable_grad():
        for _, inputs in source.passes_of_all(model):
            value, _ = loss(model, inputs)
            value.backward()
            of_row = {name: p.grad.double() for name, p in parameters.items() if p.grad is not None}
            for name, gradient in of_row.items():
                if sharded and isinstance(gradient, DTensor):  # as many copies were added up as there are processes
                    of_row[name] = gradient / get_world_size()
                reference[name] += of_row[name]
            scale += inner_product((g, g) for g in of_row.values()) ** 0.5
            for parameter in parameters.values():
                parameter.grad = None
    return reference, max(scale, 1e-300)
