"""`influence-cg`: one Newton step to the optimum without the forget rows, solved by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from hf_iau.data import ModelRowLoss, RowSource, SmoothedRowLoss, evaluation_mode, predicted_targets
from hf_iau.data.rows import Batch
from hf_iau.errors import ConfigError, UnsupportedModelError
from hf_iau.memory.gradient_sum import sum_row_gradients
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.training_loop import trained_parameters
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.methods.step import apply_step, step_norm
from hf_iau.utils.config_checks import check_choice, check_number


@dataclass(frozen=True)
class InfluenceCGConfig:
    """Configuration of `influence-cg`.

    Raises:
        ConfigError: a value is out of range.
    """

    damping: float = field(
        default=0.01, metadata={"help": "λ, added to the curvature; Koh and Liang use 0.01 for neural networks."}
    )
    scale: float = field(
        default=1.0,
        metadata={"help": "The step is taken this often; 1 is the influence function's. SalUn tries 1 to 20."},
    )
    curvature: str = field(
        default="gauss-newton",
        metadata={"help": "'gauss-newton' (never negative), or 'hessian' (any loss; needs enough damping)."},
    )
    curvature_rows: int | None = field(
        default=1024, metadata={"help": "Retained rows that the curvature is a mean over; None: all of them."}
    )
    iterations: int = field(default=100, metadata={"help": "Most products with the curvature."})
    tolerance: float = field(
        default=1e-3, metadata={"help": "Stop where the residual is this small, relative to the gradient."}
    )

    def __post_init__(self) -> None:
        check_number(self, "damping", at_least=0)
        check_number(self, "scale", at_least=0)
        check_choice(self, "curvature", ("gauss-newton", "hessian"))
        check_number(self, "curvature_rows", at_least=1, whole=True, optional=True)
        check_number(self, "iterations", at_least=1, whole=True)
        check_number(self, "tolerance", at_least=0)


@register_method
class InfluenceCG:
    """θ ← θ + scale·(H_r + λ)⁻¹ Σ_f ∇ℓ / n_r, with H_r the curvature of the mean loss of the retained rows.

    Needs the retained rows. Gauss-Newton products are for the plain losses of the models (cross-entropy with or without
    smoothing, binary cross-entropy, squared error); for a loss of your own choose the Hessian.
    """

    name: ClassVar[str] = "influence-cg"
    config_class: ClassVar[type] = InfluenceCGConfig
    citation: ClassVar[str] = (
        "Koh, Liang: Understanding Black-box Predictions via Influence Functions, 2017 (arXiv 1703.04730); conjugate "
        "gradients on curvature products: Martens: Deep Learning via Hessian-free Optimization, 2010"
    )

    def check(self, context: ForgetContext, config: InfluenceCGConfig) -> None:
        context.check_retained(self.name)
        if config.curvature == "gauss-newton" and not isinstance(context.row_loss, (ModelRowLoss, SmoothedRowLoss)):
            raise UnsupportedModelError(
                f"method={self.name!r} knows no Gauss-Newton matrix of the loss "
                f"{context.row_loss.fingerprint()['kind']}: set InfluenceCGConfig(curvature='hessian')."
            )

    def run(self, context: ForgetContext, config: InfluenceCGConfig) -> MethodOutcome:
        names = list(trained_parameters(context))
        with context.timer.phase("gradient"):
            forget = sum_row_gradients(
                context.model, context.row_loss, context.forget, names=names, progress=context.progress
            )
        with context.timer.phase("solve"):
            retained = context.retained_rows(self.name)
            rows = retained if config.curvature_rows is None else retained.sample(config.curvature_rows, context.seed)
            product = CurvatureProduct(context, rows, config.curvature)
            right = torch.cat([forget.tensors[name].flatten().double() for name in names]) / product.scale_of(retained)
            solution, iterations, residual = conjugate_gradients(
                lambda vector: product(vector) + config.damping * vector,
                right,
                iterations=config.iterations,
                tolerance=config.tolerance,
                progress=context.progress,
            )
        with context.timer.phase("update"):
            parts = (config.scale * solution).split([forget.tensors[name].numel() for name in names])
            step = {name: part.view_as(forget.tensors[name]) for name, part in zip(names, parts, strict=True)}
            apply_step(context.model, step)
        warnings = []
        if residual > config.tolerance:
            warnings.append(
                f"Conjugate gradients stopped after {iterations} iterations at a relative residual of {residual:.2g} "
                f"(tolerance {config.tolerance:g}): raise iterations or damping for the exact step."
            )
        return MethodOutcome(
            forget_sum=forget.tensors,
            forget_targets=forget.n_targets,
            warnings=warnings,
            diagnostics={
                "step_norm": step_norm(step),
                "retained_rows": len(retained),
                "curvature_rows": len(rows),
                "iterations": iterations,
                "relative_residual": residual,
            },
        )


class CurvatureProduct:
    """v ↦ H·v with H the curvature of the mean loss by target of some rows, one pass over them a product.

    Args:
        context: of the request.
        source: the rows.
        kind: "gauss-newton" (H = Σ Jᵀ H_out J) or "hessian".
    """

    def __init__(self, context: ForgetContext, source: RowSource, kind: str) -> None:
        self.context = context
        self.source = source.keep_batches()
        self.parameters = list(trained_parameters(context).values())
        self.targets = 0
        self._of_batch = self._gauss_newton if kind == "gauss-newton" else self._hessian

    def scale_of(self, rows: RowSource) -> float:
        """Targets of `rows`, estimated from those of the source by the number of rows."""
        with evaluation_mode(self.context.model), torch.no_grad():
            self.targets = sum(
                self.context.row_loss(self.context.model, inputs)[1] for _, inputs in self.source.by_length()
            )
        return self.targets * len(rows) / len(self.source)

    def __call__(self, vector: Tensor) -> Tensor:
        """H·`vector`, float64, both flat over all trained parameters."""
        sizes = [p.numel() for p in self.parameters]
        parts = [v.view_as(p).to(p) for v, p in zip(vector.split(sizes), self.parameters, strict=True)]
        total = torch.zeros_like(vector)
        # The fused attention kernels cannot be differentiated twice; the plain one can.
        with evaluation_mode(self.context.model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for _, inputs in self.source.by_length():
                products = self._of_batch(inputs, parts)
                if products is not None:
                    total += torch.cat([product.detach().double().flatten() for product in products])
        return total / self.targets

    def _hessian(self, inputs: Batch, vector: list[Tensor]) -> tuple[Tensor, ...] | None:
        loss, targets = self.context.row_loss(self.context.model, inputs)
        if targets == 0:
            return None
        gradients = self._gradients(loss, create_graph=True)
        along = sum(((g * v).sum() for g, v in zip(gradients, vector, strict=True)), torch.zeros(()).to(loss))
        return self._gradients(along) if along.requires_grad else None

    def _gauss_newton(self, inputs: Batch, vector: list[Tensor]) -> tuple[Tensor, ...] | None:
        targets = predicted_targets(self.context.model, inputs)
        if len(targets) == 0:
            return None
        logits = targets.logits
        # J·v by differentiating the linear map w ↦ Jᵀ·w.
        weights = torch.zeros_like(logits, requires_grad=True)
        transposed = self._gradients(logits, weights, create_graph=True)
        (pushed,) = torch.autograd.grad(transposed, weights, vector)
        outputs = logits.detach().requires_grad_()
        (slope,) = torch.autograd.grad(replace(targets, logits=outputs).losses().sum(), outputs, create_graph=True)
        (bent,) = torch.autograd.grad(slope, outputs, pushed)
        return self._gradients(logits, bent)

    def _gradients(
        self, output: Tensor, weights: Tensor | None = None, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            output,
            self.parameters,
            weights,
            create_graph=create_graph,
            retain_graph=True if weights is not None else None,
            allow_unused=True,
            materialize_grads=True,
        )


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Tensor,
    *,
    iterations: int,
    tolerance: float,
    progress: bool = False,
) -> tuple[Tensor, int, float]:
    """x with `product`(x) = `right`, for a symmetric positive definite product (Hestenes and Stiefel 1952).

    Returns:
        x, the iterations taken, and ‖right − product(x)‖ / ‖right‖ as the recursion has it.

    Raises:
        ConfigError: the product is not positive definite.
    """
    solution, residual = torch.zeros_like(right), right.clone()
    direction, size = residual.clone(), float(residual @ residual)
    start, done = size, 0
    for _ in tqdm(range(iterations), desc="conjugate gradients", disable=not progress):
        if size <= tolerance**2 * start:
            break
        image = product(direction)
        bend = float(direction @ image)
        if not bend > 0:
            raise ConfigError(
                f"The damped curvature is not positive definite (vᵀHv = {bend:.3g}): raise damping, or choose "
                "curvature='gauss-newton'."
            )
        length = size / bend
        solution += length * direction
        residual -= length * image
        previous, size = size, float(residual @ residual)
        direction = residual + size / previous * direction
        done += 1
    return solution, done, (size / start) ** 0.5 if start > 0 else 0.0
