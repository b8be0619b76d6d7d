"""The step or the walk that a request takes in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from hf_iau.distributed import broadcast_object
from hf_iau.errors import RequestError
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.iau.config import IAUConfig
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.iau.final_state import FinalState, accuracy_lost
from hf_iau.methods.iau.initial_state import InitialState
from hf_iau.methods.iau.multi_step import MultiStep
from hf_iau.methods.iau.multi_step_choice import calibration_of_multi_step, choose_multi_step, step_not_taken
from hf_iau.methods.iau.plan import calibrate_on_proxies, calibrate_on_request
from hf_iau.methods.iau.reference import CalibrationReference, choose_reference
from hf_iau.methods.iau.remembered import calibration_to_remember, is_dear
from hf_iau.methods.iau.step_search import MOST_HALVINGS, Calibration, finish
from hf_iau.methods.iau.trial import TrialRunner
from hf_iau.methods.iau.verdict import TOO_MUCH_LOST
from hf_iau.methods.step import apply_step, step_norm, weights_norm


@dataclass
class Decision:
    """What calibration of one request came to.

    Attributes:
        found: k and λ, as they may serve other requests.
        step: the request's own step: the same with c, and shortened where it had to be.
        basis: what k and λ rest on.
        path: the walk that is taken instead of that step, if one is.
        after: what was seen of the rows at the weights that this leads to.
        left: share of the way to the held-out rows that one step leaves; None where that was not looked at.
        spared: whether that step was halved for the sake of the retained rows.
    """

    found: Calibration
    step: Calibration
    reference: CalibrationReference
    path: MultiStep | None = None
    after: FinalState = field(default_factory=FinalState)
    left: float | None = None
    spared: bool = False

    @property
    def calibration(self) -> Calibration:
        """Of what is taken."""
        return self.step if self.path is None else calibration_of_multi_step(self.step, self.path)

    def to_remember(self, config: IAUConfig, memory: GradientMemory) -> dict[str, Any] | None:
        """What to remember for later requests; one that had to be walked says nothing about one step for the next, and one
        whose step was too long for the retained rows nothing good."""
        if self.path is not None:
            return memory.calibration
        if self.spared:
            return None
        return calibration_to_remember(self.found, config, memory, self.reference)

    def to_dict(self) -> dict[str, Any]:
        """What the report tells of it beside `calibration`, plain JSON."""
        told = self.reference.to_dict()
        if self.left is not None:
            told["left_after_one_step"] = self.left
        if self.path is not None:
            told["multi_step"] = {"steps": self.path.steps, "one_step": step_not_taken(self.step)}
        return told

    def apply(self, context: ForgetContext, config: IAUConfig, directions: Directions) -> float:
        """Move the model's weights; returns ‖Δ‖.

        Raises:
            RequestError: the step is not finite.
        """
        if self.path is not None:
            apply_step(context.model, self.path.step)
            return step_norm(self.path.step)
        wanted = self.step.scale
        _bound(context, config, directions, self.step)
        if self.step.scale != wanted:
            self.after = FinalState()
        return directions.apply(context.model, self.step.scale, self.step.damping, self.step.retain_weight)


def decide(
    context: ForgetContext,
    config: IAUConfig,
    memory: GradientMemory,
    directions: Directions,
    initial: InitialState,
    reference: CalibrationReference,
    found: Calibration | None = None,
) -> Decision:
    """k, λ and c of the request's step, or the walk that is to be taken instead.

    An earlier answer that would cost the held-out rows too much is found anew.

    Args:
        context: the request.
        config: what was asked for.
        memory: what was gathered.
        directions: of the forget rows.
        outset: the rows that are looked at.
        basis: what k and λ rest on.
        found: k and λ, where they were found before the directions were made.
    """
    if found is None:
        found = calibrate_on_request(context, config, memory, directions, initial, reference)
    decision = Decision(found, found, reference)
    if initial.held_out_rows is not None and not config.is_given:
        decision.step = _finish(config, directions, found, initial, reference)
        if decision.step.source == "remembered" and is_dear(decision.step):
            decision = _find_anew(context, replace(config, recalibrate=True), memory, directions, initial)
        chosen = choose_multi_step(context, config, directions, decision.step, initial, decision.reference)
        decision.path, decision.after, decision.left = chosen.path, chosen.after, chosen.left
        if decision.path is None and config.scale is None and config.retain_weight is None:
            _spare_retained(decision, directions, initial)
    step = decision.step
    step.scale, step.damping, step.retain_weight = broadcast_object(
        [step.scale, step.damping, step.retain_weight], "k, λ and c"
    )
    return decision


def _spare_retained(decision: Decision, directions: Directions, initial: InitialState) -> None:
    """Halve the one step, up to four times in all, while it costs the retained rows too much accuracy.

    A model that knows its rows by heart may be very wrong about the held-out rows, and nothing that is done to it makes them
    dearer: they do not tell that it is ruined.
    """
    rows, step = initial.retained_rows, decision.step
    if rows is None:
        return
    runner = _runner_of_the_step(directions, initial, decision.reference)
    retained = decision.after.retained
    if retained is None:
        (retained,) = runner.look((rows,), step.scale, step.damping, step.retain_weight)
        decision.after = replace(decision.after, retained=retained)
    while (accuracy_lost(initial.retained, retained) or 0.0) >= TOO_MUCH_LOST and step.halvings < MOST_HALVINGS:
        trial = runner.run(0.5 * step.scale, step.damping, 0.5 * step.retain_weight)
        step = replace(
            step,
            scale=trial.scale,
            retain_weight=trial.retain_weight,
            halvings=step.halvings + 1,
            reached=False,
            held_out_loss=trial.held_out_loss,
            relative_step=trial.relative_step,
            step_curve=[*step.step_curve, trial.to_dict()],
        )
        (retained,) = runner.look((rows,), step.scale, step.damping, step.retain_weight)
        held_out = initial.held_out_at[step.scale, step.damping, step.retain_weight]
        decision.after = FinalState(retained=retained, held_out=held_out)
        decision.step, decision.left, decision.spared = step, None, True


def _find_anew(
    context: ForgetContext, config: IAUConfig, memory: GradientMemory, directions: Directions, initial: InitialState
) -> Decision:
    reference = choose_reference(context, config, memory, initial)
    found = (
        calibrate_on_proxies(context, config, memory, initial, reference)
        if reference.source == "proxies"
        else calibrate_on_request(context, config, memory, directions, initial, reference)
    )
    return Decision(found, _finish(config, directions, found, initial, reference), reference)


def _finish(
    config: IAUConfig,
    directions: Directions,
    calibration: Calibration,
    initial: InitialState,
    reference: CalibrationReference,
) -> Calibration:
    """c for the request's own step, and a look at what it does to the held-out rows."""
    runner = _runner_of_the_step(directions, initial, reference)
    return finish(
        runner,
        calibration,
        before=runner.baseline_trial(None, initial.held_out),
        retain_weights=tuple(sorted(w for w in config.retain_weights if w > 0)) if directions.correction_sum else (),
        max_relative_step=config.max_relative_step,
        retain_weight=config.retain_weight,
        keep_scale=config.scale is not None,
    )


def _runner_of_the_step(directions: Directions, initial: InitialState, reference: CalibrationReference) -> TrialRunner:
    """Tries the request's own step on the held-out rows that are to stay as they are."""
    kept = None if reference.whole_class is None else initial.held_out.label != reference.whole_class
    return initial.trial_runner(directions, None, criterion=lambda *_: 0.0, kept=kept)


def _bound(context: ForgetContext, config: IAUConfig, directions: Directions, calibration: Calibration) -> None:
    """Shorten the calibrated step to what is allowed."""
    allowed = config.max_relative_step * weights_norm(context.model, list(directions.forget_sum))
    scale = directions.norm(calibration.scale, calibration.damping, calibration.retain_weight)
    if not math.isfinite(scale):
        raise RequestError("The step is not finite: the curvature or a gradient is. Gather the memory anew.")
    if scale > allowed * (1 + 1e-6):
        share = allowed / scale
        calibration.scale *= share
        calibration.retain_weight *= share
        calibration.reached = False
