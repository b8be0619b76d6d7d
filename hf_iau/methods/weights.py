"""Copies of a model's weights, to put them back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hf_iau.data.precision import copy_to_memory_device
from hf_iau.distributed import to_local
from hf_iau.utils.vectors import pieces


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; expanded constants, which nothing can write to, are left out."""
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if not any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), buffer.shape, strict=True))
    }
    return {**dict(model.named_parameters()), **buffers}


class WeightSnapshot:
    """What some parameters and buffers of a model were.

    Args:
        model: the bare model.
        copies: their values by name, which nothing may change; of a sharded model, each process's part.
    """

    def __init__(self, model: nn.Module, copies: Mapping[str, Tensor]) -> None:
        self.model = model
        self.copies = copies

    @classmethod
    def of(cls, model: nn.Module, names: Iterable[str], copies: Mapping[str, Tensor] | None = None) -> WeightSnapshot:
        """Of the named parameters as they are.

        Args:
            model: the bare model.
            names: of its parameters.
            copies: of the parameters as they are, where there are such copies already; made here if None.
        """
        parameters = dict(model.named_parameters())
        return cls(
            model, {name: copy_to_memory_device(parameters[name]) if copies is None else copies[name] for name in names}
        )

    def restore(self) -> None:
        """Put every value back, bit for bit."""
        state = model_state(self.model)
        with torch.no_grad():
            for name, copy in self.copies.items():
                to_local(state[name]).copy_(to_local(copy))

    def move(self, step: Mapping[str, Tensor]) -> None:
        """θ ← θ₀ + Δ from the values kept, in float64 before rounding to each parameter's own dtype.

        Args:
            step: Δ, for every name that is kept.
        """
        state = model_state(self.model)
        with torch.no_grad():
            for name, copy in self.copies.items():
                before = to_local(copy)
                for part, old, change in pieces(to_local(state[name]), before, to_local(step[name]).to(before.device)):
                    part.copy_(old.double() + change)
