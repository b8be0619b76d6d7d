"""What a request came to, in types that others read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import StepRecord
from hf_iau.report.card import UnlearningCard
from hf_iau.report.report import UnlearningReport
from hf_iau.unlearn.budget import Budget


@dataclass(frozen=True)
class StepEffect:
    """How far the weights moved.

    Attributes:
        step_norm: ‖Δ‖ over the trained parameters.
        relative_step_norm: ‖Δ‖ / ‖θ‖ after the step.
        forecast_forget_loss_rise: Σ_f·Δ a target: the rise of the forget rows' loss that their gradient foresees; None
            where the method took no single step along it.
    """

    step_norm: float
    relative_step_norm: float
    forecast_forget_loss_rise: float | None = None


@dataclass(frozen=True)
class UnlearnRecord:
    """What a request did and measured.

    Attributes:
        method: its name.
        config: its settings as plain values.
        seed: of the request.
        effect: how far the weights moved.
        step: of methods that take a curvature-aware step; None for others.
        before, after: measured figures by name; those that are single numbers.
        calibrated: whether the step was calibrated; None for methods that do not calibrate.
        verdict: "ok", "check" or "retrain", of the method and of the budget; None for methods that judge nothing.
        reasons: for a verdict other than "ok".
        budget: of all requests since gathering; None without a memory.
        versions: of Python and of the packages that did it.
    """

    method: str
    config: dict[str, Any]
    seed: int
    effect: StepEffect
    step: StepRecord | None = None
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    calibrated: bool | None = None
    verdict: str | None = None
    reasons: list[str] = field(default_factory=list)
    budget: Budget | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FinishedRequest:
    """What `commit=` is given: a request that is done in memory, while its weights are whole and not yet final.

    Attributes:
        context: the request; `context.model` has the changed weights, `context.fingerprints` names the rows.
        memory: of the changed weights; None where there is none, and on processes other than the main one.
        record: what was done and measured.
        report: the same for people.
        card: what the model card tells of it.
    """

    context: ForgetContext
    memory: GradientMemory | None
    record: UnlearnRecord
    report: UnlearningReport
    card: UnlearningCard


Commit = Callable[[FinishedRequest], None]
"""Called once, by every process, before the changed weights are final; what it raises undoes the request."""
