"""An earlier request's answer: when it is trusted, and what is kept for later ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_iau.errors import MemoryFileError
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.iau.config import IAUConfig
from hf_iau.methods.iau.step_search import Calibration

# Weights may move by this share of their norm before an earlier answer is found anew: a fifth of what is allowed before
# the curvature, which the answer is for, is estimated anew.
_NEAR = 0.05
# An earlier answer may raise the held-out loss by this share, a fifth of what turns the verdict to "check": to find it
# anew costs less than a worse model.
_WITHIN_BUDGET = 0.02


def remembered_calibration(config: IAUConfig, memory: GradientMemory) -> Calibration | None:
    """An earlier answer, while the weights are still near to where it was found.

    Raises:
        MemoryFileError: the memory's calibration is malformed.
    """
    earlier = memory.calibration
    if earlier is None or config.recalibrate or not config.is_free:
        return None
    _check(earlier)
    low, high = config.damping_range
    if not low * 0.99 <= earlier.get("damping", low) <= high * 1.01:
        return None
    if config.calibrate_on not in ("auto", str(earlier.get("source", "")).replace(" ", "-")):
        return None
    if memory.relative_path - earlier.get("relative_path", 0.0) > _NEAR:
        return None
    fields = {name: earlier[name] for name in Calibration.__dataclass_fields__ if name in earlier}
    return Calibration(**{**fields, "source": "remembered"})


def is_too_costly(calibration: Calibration) -> bool:
    """Whether the step costs the held-out rows more than an earlier answer may; a step that was halved would have."""
    before, after = calibration.held_out_loss_before, calibration.held_out_loss
    if before is None or after is None:
        return False
    return calibration.halvings > 0 or not after <= before + _WITHIN_BUDGET * abs(before)


def calibration_to_remember(
    calibration: Calibration, config: IAUConfig, memory: GradientMemory, like_any_others: bool
) -> dict[str, Any] | None:
    """What holds for other requests too: found freely, and on rows like any others; else what the memory held before.

    Args:
        calibration: what was found, before the request's own c.
        config: what was asked for.
        memory: as the request finds it.
        like_any_others: whether the forget rows are like any other training rows.
    """
    general = calibration.source == "proxies" or (calibration.source == "forget rows" and like_any_others)
    if config.is_free and general and calibration.reached:
        return {**calibration.to_dict(), "relative_path": memory.relative_path}
    return memory.calibration


def _check(earlier: Mapping[str, Any]) -> None:
    """Raise `MemoryFileError` unless an earlier answer is one."""
    numbers: list[Any] = [earlier.get(name) for name in ("scale", "damping", "retain_weight")]
    scales = earlier.get("scales", [])
    numbers += [earlier.get("relative_path", 0.0), *(scales if isinstance(scales, list) else [None])]
    if not all(type(value) in (int, float) and abs(value) < 1e300 for value in numbers):
        raise MemoryFileError(
            f"The memory's calibration is malformed ({dict(earlier)!r}): it is corrupt. Pass "
            "IAUConfig(recalibrate=True)."
        )
