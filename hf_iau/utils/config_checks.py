"""Checks of configurations, one style: each raises a `ConfigError` that names class, field, value and remedy."""

from __future__ import annotations

import math
from typing import Any

import torch

from hf_iau.errors import ConfigError


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float; a whole number may be too large for one."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def check_number(
    config: Any,
    name: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    whole: bool = False,
    optional: bool = False,
) -> None:
    """Raise `ConfigError` unless the field `name` of `config` is a finite number in the given range.

    Args:
        config: a dataclass.
        name: of the field.
        at_least, above, at_most, below: the range.
        whole: the number has to be an int.
        optional: None is allowed.
    """
    value = getattr(config, name)
    if value is None and optional:
        return
    kind = int if whole else (int, float)
    fits = (
        isinstance(value, kind)
        and not isinstance(value, bool)
        and is_finite(value)
        and at_least <= value <= at_most
        and above < value < below
    )
    if fits:
        return
    bounds = [
        f"{sign} {bound:g}"
        for sign, bound in ((">=", at_least), (">", above), ("<=", at_most), ("<", below))
        if math.isfinite(bound)
    ]
    wanted = f"give a {'whole' if whole else 'finite'} number {' and '.join(bounds)}".rstrip()
    raise ConfigError(f"{type(config).__name__}({name}={value!r}): {wanted}.")


def check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless the field `name` of `config` is one of `choices`."""
    value = getattr(config, name)
    if value not in choices:
        raise ConfigError(f"{type(config).__name__}({name}={value!r}): choose one of {', '.join(map(repr, choices))}.")


def check_device(config: Any, name: str) -> None:
    """Raise `ConfigError` unless the field `name` of `config` names a kind of device that PyTorch knows, or is None."""
    value = getattr(config, name)
    try:
        torch.device(value or "cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(config).__name__}({name}={value!r}): give a device, e.g. 'cpu' or 'cuda:0'."
        ) from error
