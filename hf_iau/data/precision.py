"""The precision of passes over rows, and the device of the sums that they make."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["auto", "float32", "bfloat16"]
PassPrecision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class _ComputeSettings:
    precision: PassPrecision = "float32"
    memory_device: torch.device | None = None


_DEFAULT = _ComputeSettings()
_CURRENT: ContextVar[_ComputeSettings] = ContextVar("hf_iau_compute_settings", default=_DEFAULT)


@contextlib.contextmanager
def compute_settings(
    precision: PassPrecision | None = None, memory_device: torch.device | str | None = None
) -> Iterator[None]:
    """Inside the context, rows are passed through models in `precision`, and sums are kept on `memory_device`.

    Args:
        precision: "float32": without autocast, in the weights' own type. "bfloat16": under bf16 autocast, with sums,
            losses and factors still added up in float32 or float64. None: "float32".
        memory_device: of gradient sums and of what is computed from them; None: beside each parameter.
    """
    device = None if memory_device is None else torch.device(memory_device)
    token = _CURRENT.set(_ComputeSettings(precision or "float32", device))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def resolve_precision(asked: Precision, mixed_precision: str | None, device: torch.device | None) -> PassPrecision:
    """What "auto" comes to: the autocast of training.

    fp16 autocast has no use here: a row's gradient, of a row that is known well above all, lies below fp16's smallest
    number, and training's loss scale, which is found by overflowing now and then, is no part of a sum that must be
    exact. bf16 has float32's range, and kernels that refuse float32 take it too. Devices without bf16 (which no such
    kernel runs on) work in float32.

    Args:
        asked: as in `GatherConfig`.
        mixed_precision: as Accelerate names it ("no", "bf16", "fp16", "fp8"); None where nothing is known of training.
        device: of the model.
    """
    if asked != "auto":
        return asked
    if mixed_precision == "bf16":
        return "bfloat16"
    if mixed_precision in ("fp16", "fp8"):
        return "bfloat16" if _has_bfloat16(device) else "float32"
    return "float32"


def _has_bfloat16(device: torch.device | None) -> bool:
    """Whether the device computes in bf16 itself."""
    if device is None or device.type != "cuda":
        return True
    return torch.cuda.is_bf16_supported(including_emulation=False)


def mixed_precision_of(args: Any) -> str:
    """The mixed precision of a Trainer's passes ("no", "bf16", "fp16", "fp8"), from its `TrainingArguments`."""
    named = getattr(args, "mixed_precision", None)  # what `accelerate launch --mixed_precision` asks for, too
    if named is not None:
        return str(named)
    return "bf16" if getattr(args, "bf16", False) else "fp16" if getattr(args, "fp16", False) else "no"


def autocast_dtype() -> torch.dtype | None:
    """The type to autocast to, or None."""
    return torch.bfloat16 if _CURRENT.get().precision == "bfloat16" else None


def memory_device(default: torch.device | None) -> torch.device | None:
    """The device of sums and copies of weights that would otherwise lie on `default`."""
    return _CURRENT.get().memory_device or default


def copy_to_memory_device(tensor: Tensor) -> Tensor:
    """A copy of a weight on the memory device; beside the weight where there is none."""
    return tensor.detach().to(memory_device(tensor.device), copy=True)


def rounds_to_half(model: nn.Module) -> bool:
    """Whether passes through `model` round to half precision: by its (perhaps quantised) weights, or by autocast."""
    if autocast_dtype() is not None or getattr(model, "is_quantized", False):
        return True
    return any(p.dtype.itemsize < 4 for p in model.parameters())


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Inside the context, float32 matrices and images are multiplied and convolved in float32.

    A GPU rounds them to TF32 first (10 bits of mantissa instead of 23): in convolutions unless it is told not to, in
    matrix products where that was switched on (`tf32=True` of `TrainingArguments`, torch.compile through it). Sums of
    gradients are then good to about 1e-3, and a rounded eigenbasis lets large eigenvalues leak into directions that are
    divided by small ones. The settings are the process's, so the backward pass's own threads see them; afterwards,
    also after an exception, they are what they were.
    """
    backends: Any = torch.backends
    owners = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    before = {
        owner: owner.fp32_precision for owner in owners if hasattr(backends, "fp32_precision")
    }  # from PyTorch 2.9
    with contextlib.ExitStack() as undo:
        undo.callback(_put_back, before)
        # Of PyTorch's two interfaces to these settings the older one raises where the newer one disagrees with it. So
        # the older is set where it can be read, and the newer where that was not enough.
        _switch_off(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", undo)
        _switch_off(lambda: backends.cudnn.allow_tf32, _allow_tf32_in_cudnn, False, undo)
        for owner in before:
            if owner.fp32_precision not in ("none", "ieee"):
                owner.fp32_precision = "ieee"
        yield


def _switch_off(read: Callable[[], Any], write: Callable[[Any], None], off: Any, undo: contextlib.ExitStack) -> None:
    try:
        before = read()
    except RuntimeError:
        return
    if before != off:
        write(off)
        undo.callback(write, before)


def _allow_tf32_in_cudnn(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed


def _put_back(before: dict[Any, str]) -> None:
    for owner, value in before.items():
        owner.fp32_precision = "none"  # then it is what `torch.backends.fp32_precision` says
        if owner.fp32_precision != value:
            owner.fp32_precision = value
