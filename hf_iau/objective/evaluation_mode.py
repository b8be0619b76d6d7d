"""Asking a model for gradients without leaving a trace on it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_iau.parallel import whole_parameters


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` in the one state in which every number of this package is computed, then undo all of it.

    Inside the context

    * every module is in `eval()`: dropout is off and BatchNorm uses its running statistics, so rows are separable;
    * `use_cache` is off in the model's configuration;
    * parameters that `fully_shard` has spread over processes are whole in each (see `whole_parameters`);
    * the autocast wrapper that Accelerate puts around `forward` under bf16/fp16 is set aside, so that the training
      process and a fresh process compute the same numbers.

    On the way out, also after an exception, each module's train/eval flag, the configuration, the wrapper, the
    parameters' `.grad` and the random states of Python, NumPy, the CPU and the model's CUDA devices are what they were.

    Args:
        model: the bare model (not wrapped by DDP, FSDP1 or `DataParallel`).

    Yields:
        The same model.
    """
    with whole_parameters(model), _evaluation_mode(model):
        yield model


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training_flags = {module: module.training for module in model.modules()}
    caching = [(config, config.use_cache) for config in _configurations(model) if hasattr(config, "use_cache")]
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    own_forward = model.__dict__.get("forward")
    random_state = RandomState(model)
    try:
        model.eval()
        for config, _ in caching:
            config.use_cache = False
        if own_forward is not None and "_original_forward" in model.__dict__:
            model.__dict__["forward"] = model.__dict__["_original_forward"]
        for parameter in gradients:
            parameter.grad = None
        device = next((p.device.type for p in gradients), "cpu")
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for module, flag in training_flags.items():
            module.training = flag
        for config, value in caching:
            config.use_cache = value
        if own_forward is not None:
            model.__dict__["forward"] = own_forward
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        random_state.restore()


def _configurations(model: nn.Module) -> list[Any]:
    """The distinct configuration objects of a model and its submodules."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, dict):
            found[id(config)] = config
    return list(found.values())


class RandomState:
    """A snapshot of every random generator that a forward pass could advance."""

    def __init__(self, model: nn.Module) -> None:
        self.python = random.getstate()
        self.numpy = np.random.get_state()
        self.cpu = torch.get_rng_state()
        devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
