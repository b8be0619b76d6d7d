"""Where a model's parameters lie: which places no gradient sum can be made in."""

from __future__ import annotations

from torch import nn

from hf_iau.errors import UnsupportedModelError

WITHOUT_FLOAT64 = ("mps",)
"""Kinds of devices that have no float64, in which norms and inner products are added up."""


def check_placement(model: nn.Module) -> None:
    """Refuse parameters that are not at hand, or lie where there is no float64.

    Raises:
        UnsupportedModelError: a parameter is offloaded (on the device "meta" between its uses), or on such a device.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"Parameter {name!r} is on the device 'meta': it was offloaded to the CPU or disk (device_map=), or never "
                "loaded, and has no gradient. Load the model whole: on one device, or with a device_map of accelerators "
                "that have room for all of it."
            )
        refuse_device(parameter.device.type)


def refuse_device(kind: str) -> None:
    """Raise `UnsupportedModelError` for a kind of device that has no float64."""
    if kind in WITHOUT_FLOAT64:
        raise UnsupportedModelError(
            f"Device {kind!r} has no float64, in which this package adds up. Use the CPU: model.to('cpu'), "
            "TrainingArguments(use_cpu=True), or --cpu on the command line."
        )
