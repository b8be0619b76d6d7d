"""An earlier request's answer: when it is trusted, and what is kept for later ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hf_iau.errors import MemoryFileError
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.iau.config import IAUConfig
from hf_iau.methods.iau.step_search import Calibration

if TYPE_CHECKING:
    from hf_iau.methods.iau.reference import CalibrationReference

# Memories may be moved this far, relative to the weights, before an earlier calibration is not trusted any more.
_RANGE = 0.05
# An earlier calibration whose step raises the held-out loss by more than this share is not trusted either.
_COST = 0.02


def remembered_calibration(config: IAUConfig, memory: GradientMemory) -> Calibration | None:
    """An earlier answer, while the weights are still near to where it was found.

    Raises:
        MemoryFileError: the memory's calibration is malformed.
    """
    known = memory.calibration
    if known is None or config.recalibrate or not config.is_free:
        return None
    _check(known)
    low, high = config.damping_range
    if not low * 0.99 <= known.get("damping", low) <= high * 1.01:
        return None
    if config.calibrate_on not in ("auto", str(known.get("source", "")).replace(" ", "-")):
        return None
    if memory.relative_path - known.get("relative_path", 0.0) > _RANGE:
        return None
    fields = {name: known[name] for name in Calibration.__dataclass_fields__ if name in known}
    return Calibration(**{**fields, "source": "remembered"})


def is_dear(calibration: Calibration) -> bool:
    """Whether the step costs the held-out rows more than an earlier calibration may; so does a step that was halved."""
    before, after = calibration.held_out_loss_before, calibration.held_out_loss
    if before is None or after is None:
        return False
    return calibration.halvings > 0 or not after <= before + _COST * abs(before)


def calibration_to_remember(
    calibration: Calibration, config: IAUConfig, memory: GradientMemory, reference: CalibrationReference
) -> dict[str, Any] | None:
    """What holds for other requests too: found freely, and on rows like any others; else what the memory knew before."""
    usual = calibration.source == "proxies" or (calibration.source == "forget rows" and reference.like_any_others)
    if config.is_free and usual and calibration.reached:
        return {**calibration.to_dict(), "relative_path": memory.relative_path}
    return memory.calibration


def _check(known: Mapping[str, Any]) -> None:
    """Raise `MemoryFileError` unless an earlier answer is one."""
    numbers: list[Any] = [known.get(name) for name in ("scale", "damping", "retain_weight")]
    scales = known.get("scales", [])
    numbers += [known.get("relative_path", 0.0), *(scales if isinstance(scales, list) else [None])]
    if not all(type(value) in (int, float) and abs(value) < 1e300 for value in numbers):
        raise MemoryFileError(
            f"The memory's calibration is malformed ({dict(known)!r}): it is corrupt. Pass IAUConfig(recalibrate=True)."
        )
