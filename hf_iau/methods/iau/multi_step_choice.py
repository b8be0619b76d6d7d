"""The choice between one step and a walk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_iau.methods.context import ForgetContext
from hf_iau.methods.iau.config import IAUConfig
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.iau.final_state import FinalState, accuracy_lost
from hf_iau.methods.iau.initial_state import InitialState
from hf_iau.methods.iau.multi_step import ARRIVED, DAMPING, DEAR, MultiStep, run_multi_step
from hf_iau.methods.iau.reference import CalibrationReference
from hf_iau.methods.iau.step_search import Calibration
from hf_iau.methods.iau.targets import ForgetTargets
from hf_iau.methods.iau.verdict import TOO_MUCH_LOST

# A step after which more of the way to the held-out rows is left than this is followed by a look at a walk.
_LEFT = 0.15
# So is one that costs retained rows this much accuracy.
_SPARED = 0.03


@dataclass(frozen=True)
class MultiStepChoice:
    """Whether a request is walked.

    Attributes:
        path: the walk to be taken; None where the one step is.
        after: what was seen of the rows at the end of it or, else, of the one step.
        left: share of the way to the held-out rows that one step leaves; None where that was not looked at.
    """

    path: MultiStep | None
    after: FinalState
    left: float | None = None


def choose_multi_step(
    context: ForgetContext,
    config: IAUConfig,
    directions: Directions,
    calibration: Calibration,
    initial: InitialState,
    reference: CalibrationReference,
) -> MultiStepChoice:
    """Many short steps in place of one that does not arrive, or that costs the held-out rows too much.

    Args:
        context: the request.
        config: what was asked for.
        directions: of the forget rows; freed before a walk is tried.
        calibration: the one step.
        outset: the rows that are looked at.
        basis: what k and λ of that step rest on.
    """
    before, after = calibration.held_out_loss_before, calibration.held_out_loss
    place = (calibration.scale, calibration.damping, calibration.retain_weight)
    seen = FinalState(held_out=initial.held_out_at.get(place))
    if (
        not config.multi_step
        or config.scale is not None
        or config.retain_weight is not None
        or not reference.like_any_others
        or before is None
        or after is None
    ):
        return MultiStepChoice(None, seen)
    assert initial.retained_rows is not None and initial.held_out_rows is not None
    forget_targets = ForgetTargets.of(initial.forget, initial.retained, initial.held_out)
    runner = initial.trial_runner(directions, initial.forget_rows)
    (forget,) = runner.look((initial.forget_rows,), *place)
    seen = replace(seen, forget=forget)
    left = forget_targets.remaining(forget.target_losses)
    (retained,) = runner.look((initial.retained_rows,), *place)
    seen = replace(seen, retained=retained)
    lost = accuracy_lost(initial.retained, retained) or 0.0
    if calibration.reached and left <= _LEFT and after <= (1.0 + DEAR) * before and lost < _SPARED:
        return MultiStepChoice(None, seen, left)
    del runner
    everything = initial.every_forget_row()
    directions.clear()
    path = run_multi_step(
        context.model,
        directions.curvature,
        context.forget,
        initial.retained_rows.resized(context.forget.batch_size),
        initial.held_out_rows,
        ForgetTargets.of(everything, initial.retained, initial.held_out),
        names=list(directions.forget_sum),
        looked_at=context.forget_to_predict,
        known=initial.retained_rows,
        before=(everything, initial.held_out),
        damping=DAMPING if config.damping is None else config.damping,
        max_relative_step=config.max_relative_step,
        progress=context.progress,
        weights=context.weights,
    )
    # Arrived or nearer to the target, and no dearer than one step or than what may be paid. A step that ruins the retained
    # rows may be near to any target; then the walk need not be nearer, only less ruinous.
    nearer = path.reached or path.remaining < left
    if not nearer and lost >= TOO_MUCH_LOST and path.known is not None:
        nearer = (accuracy_lost(initial.retained, path.known) or 0.0) < lost
    better = nearer and path.held_out_loss <= max(after, (1.0 + DEAR) * before)
    if not path.steps or not better:
        return MultiStepChoice(None, seen, left)
    whole = initial.forget_rows is context.forget_to_predict
    seen = FinalState(path.forget if whole else None, retained=path.known, held_out=path.held_out)
    return MultiStepChoice(path, seen, left)


def calibration_of_multi_step(calibration: Calibration, path: MultiStep) -> Calibration:
    """What is reported of a step that was walked, in place of the one `calibration` that was not taken."""
    return replace(
        calibration,
        damping=path.damping,
        source="multi-step",
        reached=path.reached,
        criterion=path.remaining,
        tolerance=ARRIVED,
        standard_error=None,
        held_out_loss=path.held_out_loss,
        relative_step=path.relative_step,
        halvings=0,
        scales=[],  # of one step, which was not taken: their spread is no uncertainty of the walk
        step_curve=path.curve,
    )


def step_not_taken(calibration: Calibration) -> Mapping[str, Any]:
    """What is reported of the one step that a walk was taken instead of."""
    names = ("source", "scale", "damping", "retain_weight", "reached", "criterion", "held_out_loss", "relative_step")
    return {name: getattr(calibration, name) for name in names}
