"""The step of curvature-aware forgetting, and what a step does to the memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hf_iau.curvature import Curvature
from hf_iau.distributed import inner_product, to_local
from hf_iau.utils.vectors import pieces

Step = dict[str, Tensor]


def apply_step(model: nn.Module, step: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """θ ← θ + scale · step, in float64 before rounding to each parameter's own dtype."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in step.items():
            for part, added in pieces(to_local(parameters[name]), to_local(change)):
                part.copy_(part.double() + scale * added.to(part.device, torch.float64))


def step_norm(step: Mapping[str, Tensor]) -> float:
    """Euclidean length of a step."""
    return float(inner_product(map(_with_itself, step.values())) ** 0.5)


def _with_itself(tensor: Tensor) -> tuple[Tensor, Tensor]:
    return tensor, tensor


def weights_norm(model: nn.Module, names: list[str]) -> float:
    """Euclidean norm of the named parameters."""
    parameters = dict(model.named_parameters())
    return float(inner_product((parameters[name], parameters[name]) for name in names) ** 0.5)


def first_order_rise(gradient_sum: Mapping[str, Tensor], step: Mapping[str, Tensor], targets: int) -> float:
    """Rise of the mean loss a target of some rows that their gradient foresees for a step: Σ·Δ / targets."""
    pairs = ((change, gradient_sum[name]) for name, change in step.items() if name in gradient_sum)
    return inner_product(pairs) / max(targets, 1)


def corrected_step(forget: Step, correction: Step | None, scale: float, retain_weight: float) -> Step:
    """k·forget − c·correction: the two preconditioned directions put together."""
    if correction is None or retain_weight == 0.0:
        return {name: scale * change for name, change in forget.items()}
    return {name: scale * change - retain_weight * correction[name] for name, change in forget.items()}


def moved_gradient_sum(
    gradient_sum: Mapping[str, Tensor],
    forget_sum: Mapping[str, Tensor],
    curvature: Curvature,
    step: Mapping[str, Tensor],
    remaining_targets: int,
) -> dict[str, Tensor]:
    """Σ′_D = Σ_D − Σ_f + n_r·C·Δ: the gradient sum of the retained rows at the moved weights, to first order.

    Args:
        gradient_sum: Σ_D before the step.
        forget_sum: Σ_f before the step.
        curvature: C, of the mean row loss.
        step: Δ.
        remaining_targets: n_r.
    """
    moved: dict[str, Tensor] = {}
    for block in curvature.blocks.values():  # one at a time, for Δ may be made as it is asked for
        product = curvature.multiply(
            {name: step[name].to(gradient_sum[name].dtype) for name in block.shapes if name in gradient_sum}
        )
        for name, bent in product.items():
            moved[name] = torch.empty_like(gradient_sum[name])
            tensors = (moved[name], gradient_sum[name], forget_sum[name], bent)
            for new, *old in pieces(*map(to_local, tensors)):
                total, forget, change = (tensor.to(new.device, torch.float64) for tensor in old)
                new.copy_(total - forget + remaining_targets * change)
    return {name: moved[name] for name in gradient_sum}
