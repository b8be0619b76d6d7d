"""In which precision passes over rows are run, and on which device what they add up is kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class _Settings:
    precision: Precision = "float32"
    memory_device: torch.device | None = None


_USUAL = _Settings()
_CURRENT: ContextVar[_Settings] = ContextVar("hf_iau_working", default=_USUAL)


@contextlib.contextmanager
def working(precision: Precision | None = None, memory_device: torch.device | str | None = None) -> Iterator[None]:
    """Inside the context, rows are passed through models in `precision`, and sums are kept on `memory_device`.

    Args:
        precision: "float32": without autocast, in the weights' own type. "bfloat16": under bf16 autocast, with sums,
            losses and factors still added up in float32 or float64. None: "float32".
        memory_device: of gradient sums and of what is computed from them; None: beside each parameter.
    """
    device = None if memory_device is None else torch.device(memory_device)
    token = _CURRENT.set(_Settings(precision or "float32", device))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def autocast_dtype() -> torch.dtype | None:
    """The type to autocast to, or None."""
    return torch.bfloat16 if _CURRENT.get().precision == "bfloat16" else None


def memory_device(default: torch.device | None) -> torch.device | None:
    """Where something that is kept should lie, if it would otherwise lie on `default`."""
    return _CURRENT.get().memory_device or default


def kept_copy(tensor: Tensor) -> Tensor:
    """A copy of a weight, where such copies are kept."""
    return tensor.detach().to(memory_device(tensor.device), copy=True)


def is_narrow(model: nn.Module) -> bool:
    """Whether passes through `model` round to half precision: by its weights, quantised ones among them, or by autocast."""
    if autocast_dtype() is not None or getattr(model, "is_quantized", False):
        return True
    return any(p.dtype.itemsize < 4 for p in model.parameters())
