"""Models whose parameters `torch.distributed.fsdp.fully_shard` (FSDP2) has sharded over the ranks.

There are two ways to use one. Inside `full_parameters` each rank holds all of it and works for itself. Elsewhere the
model is run as it is: FSDP2 gathers the parameters of one module at a time, and every rank has to run the same
passes; see `sharded_passes`. Vectors of such a model (its gradient sums) are DTensors of the parameters' placement.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from hf_iau.distributed.processes import all_reduce_, sync_errors
from hf_iau.errors import UnsupportedModelError
from hf_iau.utils.vectors import dot

_FSDP2 = ("torch.distributed.fsdp.", "torch.distributed._composable.")


# Models inside `full_parameters`.
_UNSHARDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# What `sharded_passes` changes of a group of parameters that FSDP2 gathers together, and puts back.
_OF_GROUP = (
    "gradient_divide_factor",
    "force_sum_reduction_for_comms",
    "reduce_grads",
    "all_reduce_grads",
    "reshard_after_backward",
    "unshard_in_backward",
    "post_forward_mesh_info",
    "mp_policy",
)


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are sharded over the ranks, so that all of these have to run the same passes."""
    if not dist.is_initialized() or model in _UNSHARDED:
        return False
    reshard(model)
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: nn.Module) -> None:
    """Give back what FSDP2 has gathered: after a forward pass the outermost module is still whole."""
    if dist.is_initialized() and model not in _UNSHARDED:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def class_name(model: nn.Module) -> str:
    """Name of the model's class; `fully_shard` puts FSDP before it."""
    name = type(model).__name__
    return name.removeprefix("FSDP") if isinstance(model, FSDPModule) else name


@contextlib.contextmanager
def full_parameters(model: nn.Module) -> Iterator[None]:
    """Give every rank the full parameters of a model under `fully_shard`, and shard them again afterwards.

    Inside, the model is a plain one on each rank, in its parameters' own precision, and its forward and backward
    passes wait for nobody: ranks may take different numbers of batches. What was changed is kept in the shards. The
    parameter objects themselves, their gradients and the optimizer's state are left alone. To be entered by all
    ranks; other models are left as they are.

    Raises:
        UnsupportedModelError: parameters sharded by something else (tensor parallelism).
    """
    if not is_sharded(model):
        yield
        return
    places: dict[DTensor, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                _refuse_other_sharding(model, parameter, name)
                places.setdefault(parameter, []).append((module, name))
    whole = {shards: _full_parameter(shards) for shards in places}
    with _without_fsdp_hooks(model):
        try:
            _UNSHARDED.add(model)
            for shards, users in places.items():
                for module, name in users:
                    module._parameters[name] = whole[shards]
            yield
        finally:
            _UNSHARDED.discard(model)
            for shards, users in places.items():
                for module, name in users:
                    module._parameters[name] = shards  # type: ignore[assignment]
                _copy_to_shards(whole[shards], shards)


@contextlib.contextmanager
def sharded_passes(model: nn.Module) -> Iterator[None]:
    """Let FSDP2 run a sharded model for this package: exact sums, in the parameters' own precision.

    Inside, a backward pass leaves in `.grad` of each sharded parameter this rank's shard of the gradient's *sum* over
    the ranks (FSDP2's default is the mean), in whatever precision `MixedPrecisionPolicy` asks for otherwise, and no
    module stays whole after its own pass. Every rank runs the same number of passes. Afterwards, also after an
    exception, all settings are what they were. Other models, and those inside `full_parameters`, are left as they are.

    Raises:
        UnsupportedModelError: parameters sharded by something else or over some of the processes only, gradients that
            are not yet reduced, or a PyTorch whose FSDP2 lacks a setting.
    """
    if not is_sharded(model):
        yield
        return
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            _refuse_other_sharding(model, parameter, name)
            if parameter.device_mesh.size() != dist.get_world_size():
                raise UnsupportedModelError(
                    f"Parameter {name!r} is sharded over {parameter.device_mesh.size()} of {dist.get_world_size()} "
                    "processes. Give fully_shard a mesh of all processes."
                )
    states = {id(state): state for state in (m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule))}
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()  # else the first pass would do so, and change settings again
    groups = [group for state in states.values() for group in _groups(state)]
    missing = [name for name in _OF_GROUP if any(not hasattr(group, name) for group in groups)]
    missing += [] if hasattr(FSDPModule, "reset_iter_state") else ["reset_iter_state"]
    if missing:
        raise UnsupportedModelError(
            f"fully_shard of PyTorch {torch.__version__} has no {missing[0]!r}, which exact sums need. Install PyTorch "
            "2.13, or use DDP."
        )
    if any(_holds_gradients(parameter) for group in groups for parameter in group.fsdp_params):
        raise UnsupportedModelError(
            "The model holds gradients that its processes have not reduced yet (set_requires_gradient_sync(False)). "
            "Finish the training step, or call zero_grad(), first."
        )
    before = [{name: getattr(group, name) for name in _OF_GROUP} for group in groups]
    policies = {key: state._mp_policy for key, state in states.items()}
    try:
        for group in groups:
            group.gradient_divide_factor = 1.0
            group.force_sum_reduction_for_comms = True
            group.reduce_grads = group.all_reduce_grads = group.reshard_after_backward = True
            group.unshard_in_backward = True
            group.post_forward_mesh_info = group.mesh_info
            _set_policy(group, MixedPrecisionPolicy())
        for state in states.values():
            state._mp_policy = MixedPrecisionPolicy()
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule) and module._get_fsdp_state()._is_root:
                module.reset_iter_state()  # after an exception in the middle of a pass
        for parameter in (parameter for group in groups for parameter in group.fsdp_params):
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):
                parameter._unsharded_param.grad = None
        for group, settings in zip(groups, before, strict=True):
            _set_policy(group, settings.pop("mp_policy"))
            for name, value in settings.items():
                setattr(group, name, value)
        for key, state in states.items():
            state._mp_policy = policies[key]


def to_local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, sharing its memory; any other tensor as it is. Without gradient."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on the device of its shards; any other tensor as it is. Called by every rank."""
    if not isinstance(tensor, DTensor):
        return tensor
    with sync_errors("a whole tensor"):
        pass  # what has failed in one process is told before anything is sent
    with torch.no_grad():
        where = tensor.to_local().device
        on_mesh: Any = tensor.detach().to(tensor.device_mesh.device_type)
        full: Tensor = on_mesh.full_tensor()
        if full.data_ptr() == tensor.to_local().data_ptr():  # a mesh of one process
            full = full.clone()
    return full.to(where)


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """`whole`, which every rank has, sharded like `like`; as it is where that is not sharded. Nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    on_mesh = whole.detach().to(like.device_mesh.device_type)
    found = distribute_tensor(on_mesh, like.device_mesh, like.placements, src_data_rank=None)
    own = found.to_local().clone()  # else the whole tensor would stay alive
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    ).to(whole.device)


def replicas(tensor: Tensor) -> int:
    """How many ranks hold a copy of each shard of a tensor."""
    if not isinstance(tensor, DTensor):
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if isinstance(placement, Replicate))


def inner_product(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Σ a·b in float64 over pairs of tensors, the shards of sharded ones from all ranks; the same bits on each."""
    total, of_shards, mesh_device = 0.0, 0.0, None
    for one, other in pairs:
        product = dot(to_local(other), to_local(one))
        if isinstance(one, DTensor):
            of_shards, mesh_device = of_shards + product / replicas(one), one.device
        else:
            total += product
        del one, other  # which may be made as they are asked for
    if mesh_device is not None:
        shared = torch.tensor([of_shards], dtype=torch.float64, device=mesh_device)
        all_reduce_([shared], "an inner product")
        total += float(shared)
    return total


def _groups(state: Any) -> list[Any]:
    """The groups of parameters that one call of `fully_shard` has made."""
    found = getattr(state, "_fsdp_param_groups", None)
    return list(found) if found is not None else [g for g in (state._fsdp_param_group,) if g is not None]


def _holds_gradients(parameter: Any) -> bool:
    unsharded = getattr(parameter, "_unsharded_param", None)
    return parameter.unsharded_accumulated_grad is not None or getattr(unsharded, "grad", None) is not None


def _set_policy(group: Any, policy: MixedPrecisionPolicy) -> None:
    """Change the precision in which a group is gathered and reduced; buffers of another type are made anew."""
    types = [parameter.param_dtype for parameter in group.fsdp_params]
    group.mp_policy = policy
    group._init_mp_dtypes()
    for parameter, before in zip(group.fsdp_params, types, strict=True):
        if parameter.param_dtype != before:
            parameter.all_gather_outputs = []
            if hasattr(parameter, "_unsharded_param"):
                del parameter._unsharded_param


def _full_parameter(shards: DTensor) -> nn.Parameter:
    return nn.Parameter(full_tensor(shards), requires_grad=shards.requires_grad)


def _copy_to_shards(whole: Tensor, shards: DTensor) -> None:
    """Copy this rank's shard of `whole`; nothing is sent, for all ranks have the same."""
    with torch.no_grad():
        found = distribute_tensor(whole.detach(), shards.device_mesh, shards.placements, src_data_rank=None)
        local = shards.to_local()
        local.copy_(found.to_local())


def _refuse_other_sharding(model: nn.Module, parameter: DTensor, name: str) -> None:
    by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    split = [placement for placement in parameter.placements if type(placement) is not Replicate]
    if not by_fsdp or len(split) > 1 or any(type(placement) is not Shard for placement in split):
        raise UnsupportedModelError(
            f"Parameter {name!r} is sharded as {parameter.placements}, which is not what fully_shard (FSDP2) alone "
            "does: tensor parallelism is not supported. Load the model without tp_plan=, or shard it with fully_shard."
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
