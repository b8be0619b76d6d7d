"""What a method answers: how it moved the weights, in types that others read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from hf_iau.memory.memory import GradientMemory


@dataclass(frozen=True)
class StepRecord:
    """One preconditioned step, or the many that were taken in its place.

    Attributes:
        source: what the step size rests on, see `hf_iau.methods.iau.step_search.Calibration`.
        scale, damping, retain_weight: k, λ and c of the one step; None where many were taken, which these do not
            describe.
        reasons: for a verdict other than "ok", in words.
    """

    source: str
    scale: float | None = None
    damping: float | None = None
    retain_weight: float | None = None
    reasons: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, float] | None:
        """k, λ and c by name; None where they do not describe what was done."""
        found = {"scale": self.scale, "damping": self.damping, "retain_weight": self.retain_weight}
        return None if None in found.values() else {name: value for name, value in found.items() if value is not None}


@dataclass
class MethodOutcome:
    """What a method tells about its work, beside the changed weights.

    Attributes:
        forget_sum: Σ_f at the old weights, float64, where the method took one step along it. Without it the gradient
            sum of the memory is dropped: it cannot be moved along with the weights.
        forget_targets: targets of the forget rows; counted by the caller where None.
        keeps_memory: False where the weights were made anew, so that no memory describes them.
        step: of methods that take a curvature-aware step.
        diagnostics: further figures for the report, plain JSON, which nothing else reads.
        calibrated: whether the step was calibrated; None for methods that do not calibrate.
        verdict: "ok", "check" or "retrain", where the method assesses what it did.
        warnings: sentences for people.
        calibration: what to remember for later requests.
        memory: of the weights that the request found, where the method renewed it; else None.
    """

    forget_sum: dict[str, Tensor] | None = None
    forget_targets: int | None = None
    keeps_memory: bool = True
    step: StepRecord | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    calibrated: bool | None = None
    verdict: str | None = None
    warnings: list[str] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    memory: GradientMemory | None = None
