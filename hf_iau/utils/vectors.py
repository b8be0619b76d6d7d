"""Vectors as large as the trained weights: in which type they are kept, and sums over them without a float64 copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

PIECE = 2**16
"""Scalars of which a float64 copy is made at a time on the CPU, in whose cache it then stays."""

ACCELERATOR_PIECE = 2**20
"""The same on an accelerator, where each piece costs a few launches of kernels."""

# Batches whose gradients are added up by autograd itself before they are moved to the sum. Eight float32 additions lose
# less than one part in a million, and the sum costs an eighth.
_BATCHES_PER_FLUSH = 8


def storage_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which what belongs to a weight of `dtype` is kept: float64 for float64 weights, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def piece(device: torch.device) -> int:
    """Scalars of which a float64 copy is made at a time on `device`."""
    return PIECE if device.type == "cpu" else ACCELERATOR_PIECE


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape, side by side, of about `piece(device)` scalars each."""
    first = tensors[0]
    size = piece(first.device)
    if first.numel() <= size or first.dim() == 0:
        yield tensors
        return
    length = max(1, size * first.shape[0] // first.numel())
    yield from zip(*(tensor.split(length) for tensor in tensors), strict=True)


def dot(one: Tensor, other: Tensor) -> float:
    """Σ one·other over the scalars of two tensors of one shape, added up in float64."""
    return float(dot_on_device(one, other))


def dot_on_device(one: Tensor, other: Tensor) -> Tensor:
    """`dot` as a tensor without dimensions, on the device of `other`: an accelerator is not waited for."""
    products = [_dot(a.to(b.device), b) for a, b in pieces(one.detach(), other.detach())]
    return torch.stack(products).sum()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.double().reshape(-1), b.double().reshape(-1))


class GradientAccumulator:
    """Adds up the `.grad` of parameters, and keeps no more than the sum beside them.

    Where sum and gradient are of one type and on one device, what a sum's rounding loses is put back as the parameter's
    `.grad`, to which autograd adds the next gradient (compensated summation, Kahan 1965); the sum is then as exact as
    one in twice the precision. Elsewhere it is made in float64. There is no sum beside `.grad` for the first few
    batches, and with sums on another device no `.grad` between batches.

    Args:
        parameters: by name; the caller takes care of their `.grad` before and after.
        device: where the sums are kept; beside each parameter if None.
        compensated: False makes all sums in float64.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], device: torch.device | None = None, *, compensated: bool = True
    ) -> None:
        self.parameters = parameters
        self.pending = 0  # batches in `.grad`
        stays = {name: device is None or is_same_device(p.device, device) for name, p in parameters.items()}
        self._compensated = {
            name: compensated and p.dtype == storage_dtype(p.dtype) and stays[name] for name, p in parameters.items()
        }
        # Half precision is too coarse for several batches; and the next forward pass may need a moved gradient's room.
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in parameters.values())
        self._at_once = half or not all(stays.values())
        self._device = device
        self._sums: dict[str, Tensor] = {}

    @property
    def is_full(self) -> bool:
        """Whether the next `add` empties `.grad`."""
        return self._at_once or self.pending + 1 == _BATCHES_PER_FLUSH

    def add(self, *, at_once: bool = False) -> None:
        """Take account of a batch whose gradients autograd has added to `.grad`.

        Args:
            at_once: empty `.grad` now, and not after a few batches.
        """
        now = at_once or self.is_full
        self.pending += 1
        if now:
            self._flush()

    @torch.no_grad()
    def _flush(self) -> None:
        self.pending = 0
        for name, parameter in self.parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            parameter.grad = None
            if name not in self._sums:  # the first batches' sum is autograd's
                gradient = gradient.to_dense() if gradient.is_sparse else gradient
                dtype = gradient.dtype if self._compensated[name] else torch.float64
                self._sums[name] = gradient.to(self._device or gradient.device, dtype)
                continue
            total = self._sums[name]
            if not self._compensated[name] or gradient.is_sparse:
                total += gradient.to(total.device)
                continue
            for part, added in pieces(total, gradient):
                new = part + added
                added -= new.sub(part)
                part.copy_(new)
            parameter.grad = gradient

    def finish(self) -> dict[str, Tensor]:
        """The sums by parameter name, in the type in which they are kept; clears every `.grad`."""
        self._flush()
        sums = {}
        for name, parameter in self.parameters.items():
            parameter.grad = None
            dtype = storage_dtype(parameter.dtype)
            if name in self._sums:
                sums[name] = self._sums.pop(name).to(dtype)
            else:
                nothing = torch.zeros_like(parameter, dtype=dtype).detach()
                sums[name] = nothing.to(self._device or parameter.device)
        return sums


def is_same_device(one: torch.device, other: torch.device) -> bool:
    """Whether a tensor on `one` lies on `other`, whose number may be left out."""
    return one == other or (one.type == other.type and other.index is None)
