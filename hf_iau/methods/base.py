"""The protocol of a method and the names they are found by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from hf_iau.data.row_loss import describe_function
from hf_iau.errors import ConfigError, MissingMemoryError, RequestError
from hf_iau.memory.gradient_sum import GradientSum, sum_row_gradients
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.gradients import add_weight_decay
from hf_iau.methods.outcome import MethodOutcome


@runtime_checkable
class UnlearningMethod(Protocol):
    """One way to forget. A new method is one file with a class of this shape and `@register_method` above it.

    A class that also has `moves_only_trained = True` promises to leave frozen parameters alone; a request then keeps no
    copy of them. One that has `works_on_shards = True` is given the parameters of a model under `fully_shard` as they
    are, as DTensors, with a memory that is spread over the processes; others are given whole parameters. One that has
    `makes_weights_anew = True` may be asked for rows that were forgotten before.
    """

    name: ClassVar[str]
    config_class: ClassVar[type]
    citation: ClassVar[str]

    def check(self, context: ForgetContext, config: Any) -> None:
        """Raise a clear error when something that the method needs is missing, before compute is spent."""
        ...

    def run(self, context: ForgetContext, config: Any) -> MethodOutcome:
        """Change `context.model` in place. The caller undoes everything if this raises."""
        ...


def makes_weights_anew(method: UnlearningMethod) -> bool:
    """Whether a method trains from the beginning on the rows that are left, so that rows forgotten before may be asked
    for again."""
    return bool(getattr(method, "makes_weights_anew", False))


_METHODS: dict[str, UnlearningMethod] = {}


def register_method(method: type[Any]) -> type[Any]:
    """Class decorator: make a method available as `trainer.unlearn(method=<its name>)`."""
    instance = method()
    if not isinstance(instance, UnlearningMethod):
        raise ConfigError(
            f"{method.__name__} lacks name, config_class, citation, check() or run(): see UnlearningMethod."
        )
    _METHODS[instance.name] = instance
    return method


def available_methods() -> list[str]:
    """Names that `trainer.unlearn(method=…)` knows."""
    return sorted(_METHODS)


def find_method(name: str, config: Any) -> tuple[UnlearningMethod, Any]:
    """The method of that name and its configuration (the default one for `config=None`).

    Raises:
        ConfigError: unknown name, a configuration of another class, or one that has no defaults.
    """
    if name not in _METHODS:
        raise ConfigError(f"method={name!r} is unknown: choose one of {', '.join(available_methods())}.")
    method = _METHODS[name]
    if config is None:
        try:
            config = method.config_class()
        except TypeError as error:
            raise ConfigError(
                f"method={name!r} has no default configuration ({error}): "
                f"pass config={method.config_class.__name__}(…)."
            ) from error
    if not isinstance(config, method.config_class):
        raise ConfigError(
            f"config is a {type(config).__name__} but method={name!r} takes a {method.config_class.__name__}."
        )
    return method, config


def method_config(name: str, values: Mapping[str, Any]) -> Any:
    """The configuration of the method of that name, from plain values (JSON).

    Raises:
        ConfigError: unknown name, unknown or missing settings, or one that is out of range.
    """
    if name not in _METHODS:
        find_method(name, None)  # raises, and tells which there are
    try:
        return _METHODS[name].config_class(**values)
    except TypeError as error:
        raise ConfigError(f"The settings {dict(values)!r} do not fit method={name!r} ({error}).") from error


def config_values(config: Any) -> dict[str, Any]:
    """A configuration as plain values, with functions by name: their `repr` is another in each process."""
    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
    return {name: describe_function(v)["function"] if callable(v) else v for name, v in values.items()}


def check_gradient_difference(context: ForgetContext, name: str) -> None:
    """What both published forms need: an exact Σ_D in memory, or the retained rows themselves."""
    if context.retain is None:
        if context.memory is None:
            raise MissingMemoryError(
                f"method={name!r} needs the gradient sum of the retained rows: there is neither a memory nor "
                "retain_dataset=. Gather with IAUCallback(GatherConfig(gradient_sum='full')) or pass retain_dataset=."
            )
        context.memory.require_full_sum(name)


def forget_and_retain_sums(context: ForgetContext, name: str) -> tuple[GradientSum, GradientSum]:
    """Σ_f in one pass over the forget rows, and Σ_r = Σ_D − Σ_f (or in a pass over `retain_dataset`)."""
    names = list(context.memory.parameters) if context.memory is not None else None
    with context.timer.phase("gradient"):
        forget = sum_row_gradients(
            context.model, context.row_loss, context.forget, names=names, progress=context.progress
        )
        if context.retain is not None:
            retain = sum_row_gradients(
                context.model, context.row_loss, context.retain, names=names, progress=context.progress
            )
        else:
            memory = context.require_memory(name)
            total = GradientSum(dict(memory.require_full_sum(name)), memory.n_rows, memory.n_targets)
            retain = total.minus(_on_device_of(total.tensors, forget))
        for targets, rows in ((forget.n_targets, "forget rows"), (retain.n_targets, "retained rows")):
            if targets <= 0:
                raise RequestError(f"The {rows} hold no targets (all labels are ignored), so they have no gradient.")
        add_weight_decay(context, forget)
        add_weight_decay(context, retain)
    return forget, retain


def _on_device_of(reference: dict[str, Tensor], gradient_sum: GradientSum) -> GradientSum:
    moved = {name: tensor.to(reference[name].device) for name, tensor in gradient_sum.tensors.items()}
    return GradientSum(moved, gradient_sum.n_rows, gradient_sum.n_targets, gradient_sum.loss)
