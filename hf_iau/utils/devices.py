"""What PyTorch has for each kind of accelerator, each in a module of its own: `torch.cuda`, `torch.xpu` and so on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def device_module(device: torch.device | str) -> Any | None:
    """The module of the device's kind; None for "cpu", "meta" and kinds without one."""
    kind = torch.device(device).type
    if kind in ("cpu", "meta"):
        return None
    try:
        return torch.get_device_module(kind)
    except RuntimeError:
        return None


def memory_counters(device: torch.device | str) -> Any | None:
    """The module, where it counts what its allocator holds (`max_memory_allocated` and others); else None."""
    module = device_module(device)
    needed = ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats")
    return module if all(hasattr(module, name) for name in needed) else None


def synchronise(device: torch.device | str) -> None:
    """Wait until the device has done what it was given."""
    wait = getattr(device_module(device), "synchronize", None)
    if wait is None:
        return
    wait() if torch.device(device).type == "mps" else wait(device)


def generator_state(device: torch.device) -> Tensor | None:
    """The state of the device's random generator; None where it has none that can be read."""
    read = getattr(device_module(device), "get_rng_state", None)
    if read is None:
        return None
    return read() if device.type == "mps" else read(device)


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Put back what `generator_state` gave."""
    write = getattr(device_module(device), "set_rng_state")  # noqa: B009
    write(state) if device.type == "mps" else write(state, device)
