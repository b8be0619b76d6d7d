"""Gradient restriction (GR): train with ℓ + α‖∇θ ℓ‖ so that no deletion asked for later is a large step.

Source: Liu et al., *Efficient Machine Unlearning via Influence Approximation*, arXiv 2507.23257; the norm is not
squared. The finite difference follows Zhao et al. 2022 and Karakida et al. 2023.

Scale. With accumulation or token normalisation the Trainer's loss of a micro-batch is L = s·ℓ, where ℓ is the
micro-batch's mean loss and s > 0 a factor that does not depend on θ. The term that belongs to it is s·α‖∇ℓ‖ = α‖∇L‖:
an un-squared norm is homogeneous of degree one, so restricting L as it comes is the same as restricting ℓ and scaling
the sum. No one has to know s, and the sum over the micro-batches of a step is their weighted mean of ℓ + α‖∇ℓ‖.

What the norm is of. It is the norm of *one micro-batch's* gradient *on one process*, so restricted training depends on
the micro-batch size and on the number of processes by definition: the mean of norms is not the norm of the mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hf_iau.data.model_mode import RandomState
from hf_iau.errors import ConfigError, UnsupportedModelError

_MODES = ("none", "exact", "finite-difference")
_NORMS = ("whole", "per-tensor")

# What torch says when a backward pass has no derivative of its own.
_NOT_TWICE_DIFFERENTIABLE = (
    "derivative for",
    "once_differentiable",
    "double backward",
    "incompatible with .grad()",
    "not compatible with .grad()",
)


@dataclass(frozen=True)
class RestrictionConfig:
    """Parameters that control gradient restriction, the term α‖∇θ ℓ‖ of the training loss.

    Raises:
        ConfigError: when a value is out of range.
    """

    mode: Literal["none", "exact", "finite-difference"] = field(
        default="none",
        metadata={
            "help": "How the term's gradient is computed. 'none' trains on the plain loss. 'exact' differentiates "
            "twice: slow, and impossible through fused attention kernels. 'finite-difference' runs one more forward "
            "and backward pass at perturbed parameters and works with every kernel and with checkpointing. The two "
            "agree on smooth networks; on ReLU networks they differ, since the finite difference also sees the kinks."
        },
    )
    alpha: float = field(
        default=0.005,
        metadata={"help": "Weight α of the gradient norm, at least 0. The released code uses 0.005."},
    )
    every: int = field(
        default=1,
        metadata={
            "help": "Apply the term on every k-th micro-batch only, i.e. on each k-th call of `training_step`, not of "
            "the optimizer. The other micro-batches cost one plain pass. α is not multiplied to make up for it."
        },
    )
    norm: Literal["whole", "per-tensor"] = field(
        default="whole",
        metadata={
            "help": "'whole' is the Euclidean norm over all trainable parameters together, 'per-tensor' the sum of "
            "the norms of the parameter tensors, as in the released code."
        },
    )
    epsilon: float | None = field(
        default=None,
        metadata={
            "help": "Step of the finite difference, relative to the norm of the trainable parameters: they are moved "
            "by epsilon·‖θ‖ in all. Too small a step drowns in rounding, too large a one is no derivative. None takes "
            "1e-3, and 1e-2 under bf16 or fp8 autocast, which would round a smaller step away. Not used by the other "
            "modes."
        },
    )

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"mode={self.mode!r} is no gradient restriction: give one of {', '.join(_MODES)}.")
        if self.norm not in _NORMS:
            raise ConfigError(f"norm={self.norm!r} is no gradient norm: give one of {', '.join(_NORMS)}.")
        if not _is_number(self.alpha) or not math.isfinite(self.alpha) or self.alpha < 0:
            raise ConfigError(
                f"alpha={self.alpha!r} cannot weight the gradient norm: give a finite number of at least 0, "
                "e.g. 0.005 (0 trains on the plain loss)."
            )
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ConfigError(
                f"every={self.every!r} is no interval of micro-batches: give a whole number of at least 1 "
                "(1 restricts each of them; mode='none' restricts none)."
            )
        if self.epsilon is not None and (
            not _is_number(self.epsilon) or not math.isfinite(self.epsilon) or self.epsilon <= 0
        ):
            raise ConfigError(
                f"epsilon={self.epsilon!r} is no step of a finite difference: give a finite number above 0, "
                "relative to the parameters' norm, e.g. 1e-3, or None."
            )


class GradientRestriction:
    """The backward pass of ℓ + α‖∇θ ℓ‖, in the place of the plain one of a training step.

    θ are the parameters that require a gradient at the time of the call; frozen ones are neither counted in the norm
    nor touched. A wrapper around the model is allowed if it is `DistributedDataParallel`.

    Args:
        config: which term is added, and how.
        model: the model to be trained, bare or wrapped; it is only inspected here.
        mixed_precision: Accelerate's `accelerator.mixed_precision` ("no", "bf16", "fp16", "fp8"); "fp16" is refused,
            because its unscaled gradients, of which the norm is made, underflow. It also sets the default of
            `config.epsilon`.

    Attributes:
        calls: number of calls of `backward` so far. It decides which micro-batches are restricted when
            `config.every > 1`; set it to the number of micro-batches already seen when training is resumed.
        epsilon: the relative step of the finite difference in use.

    Raises:
        ConfigError: when the configuration contradicts the model or its precision (fused attention, re-entrant
            checkpointing or fp16 with a mode that cannot serve it).
        UnsupportedModelError: for a model sharded by FSDP or DeepSpeed, for `nn.DataParallel`, and for a finite
            difference on trainable parameters in half precision.
    """

    def __init__(self, config: RestrictionConfig, model: nn.Module, *, mixed_precision: str | None = None) -> None:
        self.config = config
        self.calls = 0
        self.epsilon = config.epsilon if config.epsilon is not None else _default_epsilon(mixed_precision)
        self._checked: nn.Module | None = None
        if self._active:
            if mixed_precision is not None and str(mixed_precision) == "fp16":
                raise _half_precision_scaling(config)
            self._check(model)

    def backward(
        self, model: nn.Module, compute_loss: Callable[[], Tensor], backward: Callable[[Tensor], None]
    ) -> Tensor:
        """Add ∇L + α∇‖∇L‖ of the current micro-batch to each trainable parameter's `.grad`.

        Existing `.grad`s are added to, so micro-batches accumulate as usual. On every process the gradient is reduced
        exactly once, in the last backward pass, so DDP averages the processes' restricted gradients.

        The passes cost, beside the plain one: 'exact' a double backward; 'finite-difference' a second forward and
        backward, and two copies of the trainable parameters. In its second pass the random states of Python, NumPy
        and torch are those of the first, so dropout masks are the same; the model's buffers (BatchNorm's running
        statistics among them) are set back before it and afterwards are what *one* forward pass makes of them; the
        parameters are put back bit for bit, also after an exception.

        Args:
            model: the model to run, wrapped as the Trainer wraps it. Its mode (train or eval) is left alone.
            compute_loss: runs a forward pass on the micro-batch and returns the scalar loss L as it would be given to
                `backward`: already divided for accumulation. It may be called twice and must do the same both times
                (`Trainer.compute_loss` takes the labels out of the dictionary it is given: pass a copy).
            backward: adds the gradient of a scalar to the `.grad`s, e.g. `accelerator.backward`. Called once. It may
                scale its argument by a constant.

        Returns:
            The plain loss L, without the added term: detached, shape `()`.

        Raises:
            ConfigError, UnsupportedModelError: as the constructor, when the model has changed since.
        """
        self.calls += 1
        if not self._active or self.calls % self.config.every:
            loss = compute_loss()
            backward(loss)
            return loss.detach()
        if self._checked is not model:
            # Here too, for the Trainer wraps the model and switches checkpointing on after it was constructed.
            self._check(model)
            self._checked = model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.config.mode == "exact":
            return self._exact(parameters, compute_loss, backward)
        return self._finite_difference(model, parameters, compute_loss, backward)

    @property
    def _active(self) -> bool:
        return self.config.mode != "none" and self.config.alpha > 0

    def _exact(
        self, parameters: list[nn.Parameter], compute_loss: Callable[[], Tensor], backward: Callable[[Tensor], None]
    ) -> Tensor:
        loss = compute_loss()
        try:
            # Leaves `.grad` and DDP's hooks alone; both are reached once, by the backward pass of the total.
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            total = loss + self.config.alpha * self._norm([g for g in gradients if g is not None], loss)
            backward(total)
        except RuntimeError as error:
            if any(words in str(error) for words in _NOT_TWICE_DIFFERENTIABLE):
                raise UnsupportedModelError(
                    f"restriction='exact': the model cannot be differentiated twice ({error}). Load it with "
                    "attn_implementation='eager', use no torch.compile and no re-entrant gradient checkpointing, or "
                    "train with restriction='finite-difference', which needs no second derivative."
                ) from error
            raise
        return loss.detach()

    def _norm(self, gradients: list[Tensor], loss: Tensor) -> Tensor:
        """The norm of the gradient, shape `()`, on the loss's device. Its derivative at 0 is taken as 0."""
        if not gradients:
            return torch.zeros_like(loss)
        norms = torch.stack([_tensor_norm(gradient).to(loss.device) for gradient in gradients])
        return norms.sum() if self.config.norm == "per-tensor" else torch.linalg.vector_norm(norms)

    def _finite_difference(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        compute_loss: Callable[[], Tensor],
        backward: Callable[[Tensor], None],
    ) -> Tensor:
        """∇L(θ) + α(∇L(θ + εu) − ∇L(θ))/ε, u the gradient's direction: ∇‖g‖ = H g/‖g‖, a Hessian-vector product.

        With the norm per tensor, u stacks each tensor's own unit vector; one product still serves the whole sum.
        """
        _refuse_optimizer_in_backward(parameters)
        buffers_before = _buffer_copies(model)
        state_before = RandomState(model)
        with _own_gradients(parameters), _unsynchronised(model):
            loss = compute_loss()
            # Not the caller's `backward`: only a direction is wanted, and that has no scale.
            loss.backward()
            gradients = [parameter.grad for parameter in parameters]
        state_after = RandomState(model)
        buffers_after = _buffer_copies(model)
        plain_loss = loss.detach()
        # Its graph must not outlive the weights it was made with.
        del loss
        if any(gradient is not None and gradient.layout is not torch.strided for gradient in gradients):
            raise UnsupportedModelError(
                "restriction='finite-difference': a parameter has a sparse gradient. Build its embedding with "
                "sparse=False, or train with restriction='none'."
            )

        used = [
            (parameter, gradient)
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        ]
        copies = [(parameter, parameter.detach().clone()) for parameter, _ in used]
        step, factors = self._step([copy for _, copy in copies], [gradient for _, gradient in used], plain_loss)
        weight = self.config.alpha / step
        try:
            state_before.restore()
            _write(buffers_before)
            # Inside an outer autocast the half-precision copies of the first pass's weights would be used again.
            torch.clear_autocast_cache()
            with torch.no_grad():
                for (parameter, gradient), factor in zip(used, factors, strict=True):
                    parameter.add_(gradient * factor.to(gradient))
            total = weight * compute_loss()
            # A linear function with gradient (1 − α/ε)·∇L(θ): so `.grad` receives the whole sum in one backward pass,
            # and DDP averages it over the processes like any other gradient.
            for parameter, gradient in used:
                total = total + (parameter * (gradient * (1 - weight).to(gradient))).sum().to(total)
            backward(total)
        finally:
            _write(copies)
            torch.clear_autocast_cache()
            _write(buffers_after)
            state_after.restore()
        return plain_loss

    def _step(self, parameters: list[Tensor], gradients: list[Tensor], loss: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The step ε, shape `()`, and for each tensor the factor that makes its gradient a perturbation.

        Where a gradient is 0 its factor is 0 too, so both passes are at the same point there and the term vanishes.
        """
        if not gradients:
            return torch.ones_like(loss), []
        norms = torch.stack([_tensor_norm(gradient).to(loss.device) for gradient in gradients])
        length = torch.linalg.vector_norm(torch.stack([_tensor_norm(p).to(loss.device) for p in parameters]))
        step = self.epsilon * torch.where(length > 0, length, torch.ones_like(length))
        if self.config.norm == "per-tensor":
            # As many unit vectors as tensors with a gradient: together they are this much longer than one.
            step = step / (norms > 0).sum().clamp(min=1).sqrt()
        else:
            norms = torch.linalg.vector_norm(norms).expand(len(gradients))
        factors = torch.where(norms > 0, step / torch.where(norms > 0, norms, torch.ones_like(norms)), 0.0)
        return step, list(factors)

    def _check(self, model: nn.Module) -> None:
        """Raise for everything that this configuration cannot train correctly."""
        _refuse_wrappers(model)
        if self.config.mode == "exact":
            _refuse_fused_attention(model)
            _refuse_reentrant_checkpointing(model)
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64):
                raise UnsupportedModelError(
                    f"restriction='finite-difference': the trainable parameter {name!r} is {parameter.dtype}, too "
                    "coarse for the small perturbation. Load the model with dtype=torch.float32 (and train with "
                    "bf16=True for speed: autocast keeps the parameters in float32), or use restriction='exact'."
                )


@contextmanager
def _own_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the context `.grad` starts empty; on the way out it is what it was before."""
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _unsynchronised(model: nn.Module) -> AbstractContextManager[None]:
    """The context in which a backward pass stays on its process."""
    if isinstance(model, DistributedDataParallel):
        context: AbstractContextManager[None] = model.no_sync()
        return context
    return nullcontext()


def _buffer_copies(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each buffer that a forward pass could write to, with a copy of its content; expanded constants it cannot."""
    return [
        (buffer, buffer.detach().clone())
        for buffer in model.buffers()
        if not any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
    ]


@torch.no_grad()
def _write(copies: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put each copy's content back into the tensor it was made of."""
    for tensor, copy in copies:
        tensor.copy_(copy)


def _tensor_norm(tensor: Tensor) -> Tensor:
    """The Euclidean norm in at least single precision, shape `()`."""
    return torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _default_epsilon(mixed_precision: str | None) -> float:
    return 1e-3 if mixed_precision is None or str(mixed_precision) == "no" else 1e-2


def _half_precision_scaling(config: RestrictionConfig) -> ConfigError:
    return ConfigError(
        f"mixed_precision='fp16' with restriction={config.mode!r}: the norm is taken of the unscaled gradient, which "
        "underflows in fp16. Train with bf16=True or in full precision, or with restriction='none'."
    )


def _refuse_wrappers(model: nn.Module) -> None:
    """Raise where a process does not hold the whole gradient of its own micro-batch."""
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    sharded = kinds & {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
    sharded |= {"DTensor"} & {type(parameter.data).__name__ for parameter in model.parameters()}
    if sharded:
        raise UnsupportedModelError(
            f"Gradient restriction on a model sharded across processes ({', '.join(sorted(sharded))}): no process "
            "holds the gradient whose norm is restricted. Train with DDP, or with restriction='none'."
        )
    if isinstance(model, DataParallel):
        raise UnsupportedModelError(
            "Gradient restriction on a model in nn.DataParallel, whose replicas share one micro-batch. Start one "
            "process per GPU (`torchrun` or `accelerate launch`), show it one GPU (CUDA_VISIBLE_DEVICES=0), or use "
            "restriction='none'."
        )


def _refuse_fused_attention(model: nn.Module) -> None:
    """Raise unless every attention implementation named by the model's configurations is the eager one.

    "sdpa" is refused as well, although one of its kernels can be differentiated twice: torch chooses the kernel at
    run time, by device, shape and mask. Configurations of models without attention say "eager".
    """
    for name, config in _configurations(model):
        implementation = getattr(config, "_attn_implementation", None)
        if isinstance(implementation, str) and implementation not in ("eager", "paged|eager"):
            raise ConfigError(
                f"restriction='exact' with attn_implementation={implementation!r} ({name}): fused attention cannot be "
                "differentiated twice. Load the model with attn_implementation='eager', or train with "
                "restriction='finite-difference', which works with every kernel."
            )


def _configurations(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Each distinct configuration of the model, its submodules and their sub-configurations, with its class's name."""
    waiting: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in seen:
            continue
        seen.add(id(config))
        yield type(config).__name__, config
        waiting.extend(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())


def _refuse_reentrant_checkpointing(model: nn.Module) -> None:
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) is not True or not isinstance(function, functools.partial):
            continue
        if function.keywords.get("use_reentrant", True):
            raise ConfigError(
                f"restriction='exact' with re-entrant gradient checkpointing (use_reentrant=True in {name or 'model'}):"
                " it cannot be differentiated twice. Give gradient_checkpointing_kwargs={'use_reentrant': False}, or "
                "train with restriction='finite-difference'."
            )


def _refuse_optimizer_in_backward(parameters: list[nn.Parameter]) -> None:
    """Raise for optimizers that step inside the backward pass: they would step in the pass for the direction too."""
    if any(getattr(parameter, "_post_accumulate_grad_hooks", None) for parameter in parameters):
        raise UnsupportedModelError(
            "restriction='finite-difference' with hooks that use a gradient as soon as it is accumulated (layer-wise "
            "optimizers such as optim='galore_adamw_layerwise'): its first pass is no gradient to step with. Use the "
            "optimizer that is not layer-wise, or restriction='exact'."
        )
