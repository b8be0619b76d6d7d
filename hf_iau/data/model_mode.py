"""Asking a model for gradients without leaving a trace on it."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_to_fp32
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_iau.data.precision import autocast_dtype, full_float32
from hf_iau.distributed import sharded_passes
from hf_iau.utils.devices import generator_state, set_generator_state


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put `model` in the one state in which every number of this package is computed, then undo all of it.

    Inside the context

    * every module is in `eval()`: dropout is off and BatchNorm uses its running statistics, so rows are separable;
    * `use_cache` is off in the model's configuration;
    * parameters that `fully_shard` has sharded are gathered a module at a time, and gradients are summed
      exactly (see `sharded_passes`); all processes take the same passes;
    * the autocast wrapper that Accelerate puts around `forward` under bf16/fp16 is set aside, so that the training
      process and a fresh process compute the same numbers; `compute_settings(precision=…)` alone decides. Under
      autocast the model returns float32, as in that wrapper;
    * layers with gradient checkpointing still recompute their activations, which Transformers does in training only;
    * code compiled in place (`model.compile()`) is not used;
    * float32 is not rounded to TF32 (see `full_float32`).

    On the way out, also after an exception, each module's train/eval flag, the configuration, the wrapper, the
    parameters' `.grad` and the random states of Python, NumPy, the CPU and the model's devices are what they were.

    Args:
        model: the bare model (not wrapped by DDP, FSDP1 or `DataParallel`).

    Yields:
        The same model.
    """
    with sharded_passes(model), _evaluation_mode(model):
        yield model


@contextlib.contextmanager
def placed_on(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """Have a whole model on `device`; afterwards, also after an exception, each of its modules is where it was.

    Yields:
        The same model.
    """
    homes: dict[nn.Module, torch.device] = {}
    for module in model.modules():
        own = next(iter([*module.parameters(recurse=False), *module.buffers(recurse=False)]), None)
        if own is not None:
            homes[module] = own.device
    try:
        yield model.to(device)
    finally:
        for module, home in homes.items():  # outer modules first, and then those inside that lie elsewhere
            module.to(home)


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
        dtype = autocast_dtype()
        # Casts of weights are not kept, for the context outlasts changes of the weights.
        autocast = torch.autocast(device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
        # Compiled code would be compiled anew for these few passes, and does not call hooks that come later.
        in_float32 = contextlib.nullcontext() if dtype is None else _returning_float32(model)
        with autocast, full_float32(), torch.compiler.set_stance("force_eager"), _recomputing(model), in_float32:
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


@contextlib.contextmanager
def _returning_float32(model: nn.Module) -> Iterator[None]:
    """Let a model return its loss and logits in float32, as Accelerate does it under autocast."""
    handle = model.register_forward_hook(lambda module, inputs, outputs: convert_to_fp32(outputs))
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    """Let layers with gradient checkpointing recompute though they are in evaluation mode.

    A layer's `training` flag would do it too, but some layers have dropout of their own that looks at it.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = _recomputed(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Nothing is drawn at random in evaluation mode, so there is no random state to keep.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def _configurations(model: nn.Module) -> list[Any]:
    """The distinct configuration objects of a model and its submodules."""
    configurations: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, dict):
            configurations[id(config)] = config
    return list(configurations.values())


class RandomState:
    """A snapshot of every random generator that a forward pass could advance."""

    def __init__(self, model: nn.Module) -> None:
        self.python = random.getstate()
        self.numpy = np.random.get_state()
        self.cpu = torch.get_rng_state()
        self.devices = {device: generator_state(device) for device in {p.device for p in model.parameters()}}

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            if state is not None:
                set_generator_state(device, state)


@contextlib.contextmanager
def preserved_random_state(model: nn.Module) -> Iterator[None]:
    """Afterwards, also after an exception, every generator that a forward pass could advance is where it was."""
    state = RandomState(model)
    try:
        yield
    finally:
        state.restore()
