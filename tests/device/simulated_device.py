"""A simulated accelerator, so that what goes wrong on a GPU only goes wrong without one too.

Its tensors report the device `simulated:0`, are held in ordinary CPU memory and computed with by the CPU's kernels, so
results are those of the CPU. As on CUDA,

* an operation that mixes them with CPU tensors raises "Expected all tensors to be on the same device" (exceptions, as
  there: copies, CPU tensors without dimensions in elementwise operations, CPU tensors as indices);
* `.numpy()`, and so `numpy.asarray`, raises;
* a generator of the CPU is refused;
* what is drawn at random comes from a generator of the device's own;
* the backward pass runs in a thread of the device;
* the bytes of its tensors are counted (`torch.simulated.memory_allocated` and so on, as in `torch.cuda`). What a kernel
  needs while it runs is not.

It is PyTorch's "PrivateUse1" backend, renamed, with a wrapper subclass. `on_both` runs something on the CPU and on it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from torch.utils import backend_registration

Result = TypeVar("Result")

NAME = "simulated"
DEVICE = f"{NAME}:0"
_WITHOUT_DEVICE = {int, float, bool, str, type(None), torch.dtype, torch.layout, torch.memory_format, torch.device}
_CHOICE = "ACCELERATE_TORCH_DEVICE"  # by which Accelerate and the Trainer can be told their device

aten = torch.ops.aten

# Elementwise operations, in which CUDA takes a CPU tensor without dimensions for a number.
_TAKE_CPU_NUMBERS = re.compile(
    r"(add|sub|rsub|mul|div|true_divide|floor_divide|remainder|fmod|pow|maximum|minimum|fmax|fmin|eq|ne|lt|le|gt|ge"
    r"|(logical|bitwise)_(and|or|xor)|where|masked_fill|fill|xlogy|atan2|index_put|_index_put_impl|_foreach_(add|mul|div))_?"
)
_TAKE_CPU_INDICES = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class _Module:
    """`torch.simulated`: what `torch.cuda` is to CUDA."""

    def __init__(self) -> None:
        self.in_use = False
        self._random: Tensor | None = None
        self._holders: dict[int, list[int]] = {}  # storage → [tensors that hold it, bytes]
        self.held = self.peak = 0
        self.highest = 0  # as `peak`, but for tests alone: a request puts its counter back at each phase

    def is_available(self) -> bool:
        return self.in_use

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def synchronising(self, op: str) -> None:
        """Called where the CPU would wait for the device: a number, or a tensor, is read from it."""

    # --- random numbers -----------------------------------------------------------------------------------------------

    def manual_seed_all(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed).get_state()

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = None) -> Tensor:
        if self._random is None:
            self.manual_seed_all(0)
        assert self._random is not None
        return self._random.clone()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        self._random = state.clone()

    @contextlib.contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        of_cpu = torch.get_rng_state()
        torch.set_rng_state(self.get_rng_state())
        try:
            yield
        finally:
            self.set_rng_state(torch.get_rng_state())
            torch.set_rng_state(of_cpu)

    # --- memory -------------------------------------------------------------------------------------------------------

    def memory_allocated(self, device: Any = None) -> int:
        return self.held

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        self.peak = self.held

    def hold(self, pointer: int, size: int) -> None:
        holders = self._holders.setdefault(pointer, [0, size])
        holders[0] += 1
        if holders[0] == 1:
            self.held += size
            self.peak, self.highest = max(self.peak, self.held), max(self.highest, self.held)

    def let_go(self, pointer: int) -> None:
        holders = self._holders[pointer]
        holders[0] -= 1
        if holders[0] == 0:
            self.held -= holders[1]
            del self._holders[pointer]


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    def has_primary_context(self, index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _Holder:
    """Counts the memory that one tensor holds, for as long as that tensor lives."""

    def __init__(self, held: Tensor) -> None:
        storage = held.untyped_storage()
        self.pointer, size = storage.data_ptr(), storage.nbytes()
        if self.pointer:
            MODULE.hold(self.pointer, size)

    def __del__(self) -> None:
        if self.pointer:
            MODULE.let_go(self.pointer)


class SimulatedTensor(Tensor):
    """A tensor that says it is on the simulated device, around a CPU tensor."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> SimulatedTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(DEVICE),
        )
        tensor.held = held
        tensor.holder = _Holder(held)
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **settings: Any) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.held})"

    def numpy(self, **settings: Any) -> Any:  # type: ignore[override]
        raise TypeError(
            f"can't convert {DEVICE} device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        copied = SimulatedTensor(self.held.clone())
        copied.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        if self.grad is not None:
            copied.grad = self.grad.clone()
        memo[id(self)] = copied
        return copied

    @property
    def data(self) -> Any:  # type: ignore[override]
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, SimulatedTensor):
            raise NotImplementedError("the simulation cannot move a tensor to another device by setting `.data`")
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.held, self.holder = other.held, other.holder


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation with at least one tensor of the device among its arguments."""
    base = func.overloadpacket.__name__
    if base == "_fused_sdp_choice":
        return 0  # what the composite implementation of attention is called, which runs on any device
    asked = kwargs.get("device")
    to_cpu = asked is not None and torch.device(asked).type == "cpu"
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu") if torch.device(asked).type == NAME else asked}
    kwargs.pop("pin_memory", None)
    if base == "copy_":
        args[0].held.copy_(_plain(args[1])) if isinstance(args[0], SimulatedTensor) else args[0].copy_(args[1].held)
        return args[0]
    if base in ("_local_scalar_dense", "equal", "nonzero") or to_cpu:
        MODULE.synchronising(base)
    wrappers: dict[int, SimulatedTensor] = {}
    others: list[Any] = []
    plain_args, plain_kwargs = _unwrapped(args, wrappers, others), _unwrapped(kwargs, wrappers, others)
    if others:
        _check_devices(func, base, args, kwargs)
    with MODULE.own_random_numbers() if torch.Tag.nondeterministic_seeded in func.tags else contextlib.nullcontext():
        result = func(*plain_args, **plain_kwargs)
    for wrapper in wrappers.values() if func._schema.is_mutable else ():
        if wrapper.size() != wrapper.held.size():
            raise NotImplementedError(f"the simulation does not know how {func} changes a tensor's shape in place")
    return result if to_cpu else _wrapped(result, wrappers)


def _plain(tensor: Any) -> Any:
    return tensor.held if isinstance(tensor, SimulatedTensor) else tensor


def _unwrapped(value: Any, wrappers: dict[int, SimulatedTensor], others: list[Any]) -> Any:
    """`value` with CPU tensors in place of the device's; what else has a device is noted in `others`."""
    kind = type(value)
    if kind is SimulatedTensor or (kind not in _WITHOUT_DEVICE and isinstance(value, SimulatedTensor)):
        wrappers[id(value.held)] = value
        return value.held
    if kind in _WITHOUT_DEVICE:
        return value
    if isinstance(value, (list, tuple)):
        return kind(_unwrapped(item, wrappers, others) for item in value)
    if isinstance(value, dict):
        return {key: _unwrapped(item, wrappers, others) for key, item in value.items()}
    if isinstance(value, (Tensor, torch.Generator)):
        others.append(value)
    return value


def _wrapped(value: Any, wrappers: dict[int, SimulatedTensor]) -> Any:
    if isinstance(value, Tensor) and value.device.type == "cpu":
        return wrappers[id(value)] if id(value) in wrappers else SimulatedTensor(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_wrapped(item, wrappers) for item in value)
    return value


def _check_devices(func: Any, base: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what CUDA raises when tensors of the CPU take part."""
    names = [argument.name for argument in func._schema.arguments]
    given = [*zip(names, args, strict=False), *kwargs.items()]
    for position, (name, value) in enumerate(given):
        if isinstance(value, torch.Generator) and value.device.type != NAME:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{value.device}'")
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if not isinstance(tensor, Tensor) or isinstance(tensor, SimulatedTensor):
                continue
            changed = name == "out" or (position == 0 and base.endswith("_"))
            if not changed and tensor.dim() == 0 and _TAKE_CPU_NUMBERS.fullmatch(base):
                continue
            if name == "indices" and base in _TAKE_CPU_INDICES and isinstance(args[0], SimulatedTensor):
                continue
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {DEVICE} and "
                f"{tensor.device}! ({func}, argument {name!r})"
            )


def _register_factories() -> torch.library.Library:
    """Operations that make tensors of the device out of none."""
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = name.partition("::")
        packet, _, overload = rest.partition(".")
        if namespace != "aten" or not torch._C._dispatch_has_kernel_for_dispatch_key(name, "BackendSelect"):
            continue
        try:
            schema = torch._C._get_schema(f"aten::{packet}", overload)
        except RuntimeError:
            continue
        if any("Tensor" in str(argument.type) for argument in schema.arguments):
            continue
        op = getattr(getattr(aten, packet), overload or "default")
        library.impl(rest, _factory(op))
    library.impl("_copy_from", _copy_from)
    return library


def _register_autocast() -> list[torch.library.Library]:
    """Autocast rounds what goes into products of matrices, and leaves the rest as it is."""
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    products = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for op in (aten.linear.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.conv2d.default):
        products.impl(op.name().removeprefix("aten::").removesuffix(".default"), _in_autocast(op))
    return [others, products]


def _in_autocast(op: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            dtype = torch.get_autocast_dtype(NAME)
            cast = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
            return op(*cast, **kwargs)

    return run


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    """What `torch.tensor(…, device=…)` calls beneath the subclass."""
    _plain(to).copy_(_plain(source))
    return to


def _factory(op: Any) -> Callable[..., SimulatedTensor]:
    def make(*args: Any, device: Any = None, pin_memory: Any = None, generator: Any = None, **kwargs: Any) -> Any:
        if generator is not None and generator.device.type != NAME:
            raise RuntimeError(f"Expected a '{NAME}' device type for generator but found '{generator.device}'")
        with MODULE.own_random_numbers() if torch.Tag.nondeterministic_seeded in op.tags else contextlib.nullcontext():
            return SimulatedTensor(op(*args, device=torch.device("cpu"), **kwargs))

    return make


MODULE = _Module()
# Autograd starts its threads, one for each device that it knows, at the first backward pass of a process: so this is
# done on import, when tests are collected.
backend_registration._setup_privateuseone_for_python_backend(NAME, MODULE, _Hook())
_library = _register_factories()
_autocast = _register_autocast()


@contextlib.contextmanager
def simulated_device() -> Iterator[torch.device]:
    """The device, which Accelerate and the Trainer choose inside the context."""
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # a module's parameter becomes one of another class
    MODULE.in_use = True
    chosen = os.environ.get(_CHOICE)
    os.environ[_CHOICE] = DEVICE
    _forget_accelerate()
    try:
        yield torch.device(DEVICE)
    finally:
        if chosen is None:
            del os.environ[_CHOICE]
        else:
            os.environ[_CHOICE] = chosen
        _forget_accelerate()
        MODULE.in_use = False
        torch.__future__.set_swap_module_params_on_conversion(swapped)


def _forget_accelerate() -> None:
    """Have the next Accelerator look for its device anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def on_both(work: Callable[[torch.device], Result]) -> tuple[Result, Result]:
    """What `work` returns on the CPU and on the simulated device, from the same seed."""
    torch.manual_seed(0)
    on_cpu = work(torch.device("cpu"))
    with simulated_device() as device:
        torch.manual_seed(0)
        return on_cpu, work(device)
