"""How far the first-order picture still holds after many requests, and when to stop trusting it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_iau.evaluation.figures import Figures
from hf_iau.memory.fingerprints import data_fingerprint
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.iau.verdict import (
    CHECK,
    DRIFT,
    LONG_STEP,
    OK,
    RETRAIN,
    TOO_LARGE_SHARE,
    TOO_LONG_STEP,
    TOO_MUCH_DRIFT,
)

FEWEST_ROWS = 16
"""Requests of fewer rows are better run together: see `DeletionService.queue`."""

# What first order leaves unexplained of a step's effect, as a share of it. From a half on, it is no longer first order
# that says what a step does.
_TOO_MUCH_UNEXPLAINED = 0.5
_SEVERITY = (OK, CHECK, RETRAIN)


@dataclass(frozen=True)
class Budget:
    """What has been used up since the memory was gathered.

    The path starts anew where the curvature is estimated anew (`IAUConfig(renew_curvature=…)`). A long path alone is a
    reason to check, and to gather anew. That the first-order picture has ended is said where what was measured agrees,
    or was not measured.

    Attributes:
        relative_path: summed length of all steps since gathering, relative to the weights' norm.
        path_since_curvature: of those since the curvature was estimated.
        held_out_drift: rise of the held-out loss since gathering, as a share of it; None where it is not known.
        forecast_error: how far the measured rise of the forget rows' loss was from what their gradient foresaw for the
            last step (Σ_f·Δ a target), as a share of the measured one; None where either is not known.
        share_forgotten: of all training rows.
        advice: "go on", "rebase" (gather anew at the present weights) or "retrain".
        reasons: for anything but "go on".
    """

    relative_path: float
    path_since_curvature: float
    held_out_drift: float | None
    forecast_error: float | None
    share_forgotten: float
    advice: str = "go on"
    reasons: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, memory: GradientMemory, held_out_loss: float | None = None, forecast_error: float | None = None
    ) -> Budget:
        """The budget after the requests that `memory` has seen.

        Args:
            memory: after the request.
            held_out_loss: at the present weights, on the rows of `memory.held_out`.
            forecast_error: of the last step, see the attributes.
        """
        share = memory.forgotten_rows / max(memory.forgotten_rows + memory.n_rows, 1)
        drift = None
        if held_out_loss is not None and memory.held_out is not None:
            then = float(memory.held_out["loss"])
            drift = (held_out_loss - then) / max(abs(then), 1e-12)
        to_retrain, to_check = [], []
        length = memory.path_since_curvature
        path = f"the steps since the curvature was estimated add up to {length:.0%} of the weights' norm"
        signs = _signs(drift, forecast_error)
        if length >= TOO_LONG_STEP and signs:
            to_retrain.append(f"{path}, beyond a first-order picture: {' and '.join(signs)}")
        elif length >= LONG_STEP:
            to_check.append(path)
        if drift is not None and not drift < TOO_MUCH_DRIFT:
            to_retrain.append(f"the held-out loss has risen by {drift:.0%} since gathering")
        elif drift is not None and drift >= DRIFT:
            to_check.append(f"the held-out loss has risen by {drift:.0%} since gathering")
        if share >= TOO_LARGE_SHARE:
            to_retrain.append(f"{share:.0%} of the training rows are forgotten")
        advice = "retrain" if to_retrain else "rebase" if to_check else "go on"
        return cls(memory.relative_path, length, drift, forecast_error, share, advice, to_retrain + to_check)

    def sentence(self) -> str | None:
        """The advice in words; None for "go on"."""
        reasons = "; ".join(self.reasons)
        if self.advice == "retrain":
            return f"Retrain now: {reasons}."
        if self.advice == "rebase":
            return f"Gather anew at the present weights (trainer.rebase()): {reasons}."
        return None

    def to_dict(self) -> dict[str, Any]:
        """The budget as plain JSON."""
        return asdict(self)


def _signs(drift: float | None, forecast_error: float | None) -> list[str]:
    """What was measured, or was not, that agrees with a long path in that first order says little by now."""
    signs = []
    if drift is None:
        signs.append("what it did to the held-out loss is not known")
    elif not drift < DRIFT:
        signs.append(f"the held-out loss has risen by {drift:.0%}")
    if forecast_error is None:
        signs.append("there was no forecast of the last step")
    elif not forecast_error < _TOO_MUCH_UNEXPLAINED:
        signs.append(f"the gradient foresaw the effect of the last step with an error of {forecast_error:.0%}")
    return signs


def few_rows_warning(rows: int) -> str | None:
    """What is to be said of a request of so few rows; None for one that is large enough."""
    if rows >= FEWEST_ROWS:
        return None
    return (
        f"The request has {rows} rows, fewer than {FEWEST_ROWS}: who has the weights or the memory before and after it "
        "can work out the rows from the difference. Collect small requests with DeletionService(trainer).queue(...), "
        "and keep neither version of the other."
    )


def budget_after(
    context: ForgetContext,
    memory: GradientMemory | None,
    before: Figures,
    after: Figures,
    forecast_forget_loss_rise: float | None,
) -> Budget | None:
    """The budget after a request; None without a memory.

    Args:
        context: the request, with the memory before it.
        memory: after it; learns the held-out loss at gathering, if this is the first request since.
        before, after: figures of the model.
        forecast_forget_loss_rise: that the forget rows' gradient foresaw of the step, where it was known.
    """
    if memory is None or context.memory is None:
        return None
    at_gathering, now = _finite(before.held_out_loss), None
    if context.held_out is not None and at_gathering is not None:
        content = data_fingerprint(context.model, context.held_out.dataset)["content"]
        if context.memory.held_out is None and context.memory.relative_path == 0.0:
            memory.held_out = {"loss": at_gathering, "content": content}
        if memory.held_out is not None and memory.held_out["content"] == content:
            now = _finite(after.held_out_loss)
    return Budget.of(memory, now, _forecast_error(before, after, _finite(forecast_forget_loss_rise)))


def judged(verdict: str | None, reasons: list[str], budget: Budget | None) -> tuple[str | None, list[str]]:
    """The verdict of method and budget together, with its reasons.

    Args:
        verdict: the method's; None where it judges nothing, and then the budget does not either.
        reasons: for it.
        budget: after the request.
    """
    if budget is None or budget.advice == "go on" or verdict is None:
        return verdict, reasons
    advised = RETRAIN if budget.advice == "retrain" else CHECK
    if _SEVERITY.index(advised) < _SEVERITY.index(verdict):
        return verdict, reasons
    return advised, [*budget.reasons, *([] if verdict == OK else reasons)]


def _forecast_error(before: Figures, after: Figures, forecast: float | None) -> float | None:
    losses = _finite(before.forget_loss), _finite(after.forget_loss)
    if forecast is None or losses[0] is None or losses[1] is None:
        return None
    rise = losses[1] - losses[0]
    return abs(rise - forecast) / max(abs(rise), 1e-12)


def _finite(value: float | None) -> float | None:
    """A figure, or None where it is not known or the model has diverged."""
    return value if value is not None and math.isfinite(value) else None
