"""Models whose parameters `torch.distributed.fsdp.fully_shard` (FSDP2) has spread over the processes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_iau.errors import UnsupportedModelError

P = ParamSpec("P")
T = TypeVar("T")

_FSDP2 = ("torch.distributed.fsdp.", "torch.distributed._composable.")


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def class_name(model: nn.Module) -> str:
    """Name of the model's class; `fully_shard` puts FSDP before it."""
    name = type(model).__name__
    return name.removeprefix("FSDP") if isinstance(model, FSDPModule) else name


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Give every process the whole parameters of a model under `fully_shard`, and spread them again afterwards.

    Inside, the model is a plain one in each process, in its parameters' own precision, and its forward and backward
    passes wait for nobody: processes may take different numbers of batches. What was changed is kept in the shards. The
    parameter objects themselves, their gradients and the optimizer's state are left alone. To be entered by all
    processes; other models are left as they are.

    Raises:
        UnsupportedModelError: parameters sharded by something else (tensor parallelism).
    """
    if not is_sharded(model) and not any(isinstance(module, FSDPModule) for module in model.modules()):
        yield
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass the outermost one is still whole
    places: dict[DTensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                _refuse_other_sharding(model, parameter, name)
                places.setdefault(parameter, []).append((module, name))
    whole = {shards: _gathered(shards) for shards in places}
    with _without_fsdp_hooks(model):
        try:
            for shards, users in places.items():
                for module, name in users:
                    module._parameters[name] = whole[shards]
            yield
        finally:
            for shards, users in places.items():
                for module, name in users:
                    module._parameters[name] = shards  # type: ignore[assignment]
                _spread(whole[shards], shards)


def on_whole_parameters(function: Callable[Concatenate[nn.Module, P], T]) -> Callable[Concatenate[nn.Module, P], T]:
    """Decorator: call `function(model, ...)` inside `whole_parameters(model)`."""

    @functools.wraps(function)
    def wrapped(model: nn.Module, *args: P.args, **kwargs: P.kwargs) -> T:
        with whole_parameters(model):
            return function(model, *args, **kwargs)

    return wrapped


def _gathered(shards: DTensor) -> nn.Parameter:
    with torch.no_grad():
        where = shards.to_local().device
        on_mesh: Any = shards.detach().to(shards.device_mesh.device_type)
        full: Tensor = on_mesh.full_tensor()
        if full.data_ptr() == shards.to_local().data_ptr():  # a mesh of one process
            full = full.clone()
    return nn.Parameter(full.to(where), requires_grad=shards.requires_grad)


def _spread(whole: Tensor, shards: DTensor) -> None:
    """Each process keeps its part; nothing is sent, for all have the same."""
    with torch.no_grad():
        found = distribute_tensor(whole.detach(), shards.device_mesh, shards.placements, src_data_rank=None)
        local = shards.to_local()
        local.copy_(found.to_local())


def _refuse_other_sharding(model: nn.Module, parameter: DTensor, name: str) -> None:
    by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    split = [placement for placement in parameter.placements if type(placement) is not Replicate]
    if not by_fsdp or len(split) > 1 or any(type(placement) is not Shard for placement in split):
        raise UnsupportedModelError(
            f"Parameter {name!r} is sharded as {parameter.placements}, which is not what fully_shard (FSDP2) alone does: "
            "tensor parallelism is not supported. Load the model without tp_plan=, or shard it with fully_shard."
        )


@contextlib.contextmanager
def _without_fsdp_hooks(model: nn.Module) -> Iterator[None]:
    """Take out the hooks by which `fully_shard` gathers parameters around each forward pass."""
    taken: list[tuple[Any, dict[int, Any]]] = []
    try:
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                taken.append((hooks, dict(hooks)))
                for number, hook in list(hooks.items()):
                    if str(getattr(hook, "__module__", "")).startswith(_FSDP2):
                        del hooks[number]
        yield
    finally:
        for hooks, before in taken:
            hooks.clear()
            hooks.update(before)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for a model in `nn.DataParallel`, FSDP1 or DeepSpeed."""
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(
            "The model is wrapped in nn.DataParallel, which splits batches behind the Trainer's back. Use one device, "
            "or launch one process a GPU with `accelerate launch`."
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedModelError(
            "The model is wrapped in FullyShardedDataParallel (FSDP1), which flattens its parameters. Use DDP, or "
            "torch.distributed.fsdp.fully_shard (FSDP2)."
        )
    if type(model).__module__.startswith("deepspeed") or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise UnsupportedModelError(
            "The model belongs to DeepSpeed, whose parameters and gradients are not visible. Use DDP, or "
            "torch.distributed.fsdp.fully_shard (FSDP2)."
        )
