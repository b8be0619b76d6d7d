"""Calibration of one request, from k and λ to the step, or the many steps, that are taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hf_iau.data import predict_rows
from hf_iau.distributed import broadcast_object
from hf_iau.errors import RequestError
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.iau.multi_step import (
    ARRIVED,
    DAMPING,
    TOO_COSTLY,
    MultiStep,
    MultiStepResult,
    MultiStepRows,
    MultiStepSettings,
)
from hf_iau.methods.iau.plan import CalibrationPlan
from hf_iau.methods.iau.remembered import calibration_to_remember, is_too_costly
from hf_iau.methods.iau.states import FinalState, accuracy_difference
from hf_iau.methods.iau.step_search import MOST_HALVINGS, Calibration, add_retain_correction
from hf_iau.methods.iau.targets import ForgetTargets
from hf_iau.methods.iau.trial import TrialRunner, auc_distance
from hf_iau.methods.iau.verdict import TOO_MUCH_LOST, LossAttack
from hf_iau.methods.outcome import StepRecord
from hf_iau.methods.step import apply_step, step_norm, weights_norm
from hf_iau.methods.weights import WeightSnapshot

MOST_REMAINING = 0.15
"""Many steps are tried where one leaves more than this of the way to the held-out rows. They themselves may leave a
tenth; so near to that a single step is not worth replacing. Settled on image classifiers, see docs/methods.md."""
SOME_ACCURACY_LOST = 0.03
"""So they are where one step costs retained rows this much accuracy: more than chance among 2,000 rows, and before the
verdict asks to check."""


class CalibrationRun:
    """What one request comes to: search, perhaps many steps instead of one, and what is told of them.

    Args:
        plan: what k and λ rest on.
        directions: of the forget rows; freed by `apply`.

    Attributes:
        found: k and λ, as they may serve other requests.
        step: the request's own step: the same with c, and shortened where it had to be.
        many: the steps that are taken instead of that one, if they are.
        final: predictions of calibration's rows at the weights that this leads to.
        share_remaining: of the way to the held-out rows, after the one step; None where that was not measured.
        halved_for_retained: whether the one step was halved for the sake of the retained rows.
    """

    def __init__(self, plan: CalibrationPlan, directions: Directions) -> None:
        self.plan = plan
        self.context, self.config, self.initial = plan.context, plan.config, plan.initial
        self._directions: Directions | None = directions
        self.found: Calibration
        self.step: Calibration
        self.many: MultiStepResult | None = None
        self.final = FinalState()
        self.share_remaining: float | None = None
        self.halved_for_retained = False

    @property
    def directions(self) -> Directions:
        """Of the forget rows."""
        assert self._directions is not None, "apply() has freed the directions"
        return self._directions

    @property
    def is_tried(self) -> bool:
        """Whether the request's step is looked at before it is taken."""
        return self.initial.held_out_rows is not None and not self.config.is_given

    # --- the one step -------------------------------------------------------------------------------------------------

    def search(self) -> None:
        """Find k, λ and c of the request's own step. An earlier answer that would cost too much is found anew."""
        self.step = self.found = self.plan.calibrate(self.directions)
        if not self.is_tried:
            return
        self.step = self._with_retain_correction()
        if self.step.source == "remembered" and is_too_costly(self.step):
            self.plan = self.plan.anew()
            self.found = self.plan.calibrate(self.directions)
            self.step = self._with_retain_correction()

    def _with_retain_correction(self) -> Calibration:
        """c for the request's own step, and a look at what that does to the held-out rows."""
        runner, config = self._step_runner(), self.config
        return add_retain_correction(
            runner,
            self.found,
            before=runner.baseline_trial(None, self.initial.held_out),
            retain_weights=(
                tuple(sorted(w for w in config.retain_weights if w > 0)) if self.directions.correction_sum else ()
            ),
            max_relative_step=config.max_relative_step,
            retain_weight=config.retain_weight,
            keep_scale=config.scale is not None,
        )

    def _step_runner(self) -> TrialRunner:
        """Tries the request's own step on the held-out rows that are to stay as they are."""
        label = self.plan.reference.whole_class
        kept = None if label is None else self.initial.held_out.label != label
        return self.initial.trial_runner(self.directions, None, criterion=lambda *_: 0.0, kept=kept)

    # --- many steps instead -------------------------------------------------------------------------------------------

    def multi_step(self) -> None:
        """Take many short steps in place of one that does not arrive, or that costs too much; if that is better.

        Where there are no such steps, the one step is halved while it costs the retained rows too much accuracy.
        """
        if not self.is_tried:
            return
        self.final = FinalState(held_out=self.initial.held_out_at.get(self._place))
        if self._may_take_many():
            self._look_after_one_step()
            if not self._one_step_is_enough():
                self._try_many()
        if self.many is None and self.config.scale is None and self.config.retain_weight is None:
            self._spare_retained_rows()

    @property
    def _place(self) -> tuple[float, float, float]:
        return self.step.scale, self.step.damping, self.step.retain_weight

    def _may_take_many(self) -> bool:
        free = self.config.scale is None and self.config.retain_weight is None
        reference = self.plan.reference
        return self.config.multi_step and free and (reference.like_any_others or reference.has_unsupported)

    def _look_after_one_step(self) -> None:
        initial = self.initial
        assert initial.retained_rows is not None
        support, positions = self.plan.reference.support, initial.forget_positions
        targets = ForgetTargets.of(initial.forget, initial.retained, initial.held_out, support, positions)
        runner = initial.trial_runner(self.directions, initial.forget_rows)
        (forget,) = runner.look((initial.forget_rows,), *self._place)
        self.share_remaining = targets.share_remaining(forget.target_losses)
        (retained,) = runner.look((initial.retained_rows,), *self._place)
        self.final = replace(self.final, forget=forget, retained=retained)

    def _one_step_is_enough(self) -> bool:
        assert self.share_remaining is not None
        before, after = self._held_out_losses
        within_budget = after <= (1.0 + TOO_COSTLY) * before and self._accuracy_lost() < SOME_ACCURACY_LOST
        return self.step.reached and self.share_remaining <= MOST_REMAINING and within_budget

    @property
    def _held_out_losses(self) -> tuple[float, float]:
        """Without and with the one step."""
        before, after = self.step.held_out_loss_before, self.step.held_out_loss
        assert before is not None and after is not None
        return before, after

    def _accuracy_lost(self) -> float:
        """By the retained rows, with what is to be taken; 0 where the task has none."""
        assert self.final.retained is not None
        return accuracy_difference(self.initial.retained, self.final.retained) or 0.0

    def _try_many(self) -> None:
        result = self._take_many()
        if not result.steps or not self._is_better(result):
            return
        self.many = result
        whole = self.initial.forget_rows is self.context.forget_to_predict
        self.final = FinalState(result.forget if whole else None, retained=result.retained, held_out=result.held_out)

    def _take_many(self) -> MultiStepResult:
        context, config, initial, directions = self.context, self.config, self.initial, self.directions
        assert initial.retained_rows is not None and initial.held_out_rows is not None
        forget = initial.every_forget_row()
        directions.clear()
        return MultiStep(
            WeightSnapshot.of(context.model, directions.forget_sum, context.weights),
            directions.curvature,
            MultiStepRows(
                context.forget,
                initial.retained_rows.resized(context.forget.batch_size),
                initial.held_out_rows,
                forget_to_predict=context.forget_to_predict,
                retained_to_predict=initial.retained_rows,
                before=(forget, initial.held_out),
            ),
            ForgetTargets.of(forget, initial.retained, initial.held_out, self.plan.reference.support),
            MultiStepSettings(DAMPING if config.damping is None else config.damping, config.max_relative_step),
            progress=context.progress,
        ).run()

    def _is_better(self, result: MultiStepResult) -> bool:
        """Arrived or nearer to the target than the one step, and no more costly than that or than is within budget.

        A step that ruins the retained rows may be near to any target; then it is enough to ruin them less.
        """
        assert self.share_remaining is not None
        nearer, lost = result.reached or result.share_remaining < self.share_remaining, self._accuracy_lost()
        if not nearer and lost >= TOO_MUCH_LOST and result.retained is not None:
            nearer = (accuracy_difference(self.initial.retained, result.retained) or 0.0) < lost
        before, after = self._held_out_losses
        return nearer and result.held_out_loss <= max(after, (1.0 + TOO_COSTLY) * before)

    # --- the one step after all ---------------------------------------------------------------------------------------

    def _spare_retained_rows(self) -> None:
        """Halve the one step, up to four times in all, while it costs the retained rows too much accuracy.

        A model that knows its rows by heart may be very wrong about the held-out rows, and nothing that is done to it
        raises their loss: it does not tell that the model is ruined.
        """
        if self.initial.retained_rows is None:
            return
        runner = self._step_runner()
        if self.final.retained is None:
            self._look_at_retained_rows(runner)
        while self._accuracy_lost() >= TOO_MUCH_LOST and self.step.halvings < MOST_HALVINGS:
            self._halve(runner)
            self.final = FinalState(held_out=self.initial.held_out_at[self._place])
            self._look_at_retained_rows(runner)
            self.share_remaining, self.halved_for_retained = None, True

    def _look_at_retained_rows(self, runner: TrialRunner) -> None:
        assert self.initial.retained_rows is not None
        (retained,) = runner.look((self.initial.retained_rows,), *self._place)
        self.final = replace(self.final, retained=retained)

    def _halve(self, runner: TrialRunner) -> None:
        step = self.step
        trial = runner.run(0.5 * step.scale, step.damping, 0.5 * step.retain_weight)
        self.step = replace(
            step,
            scale=trial.scale,
            retain_weight=trial.retain_weight,
            halvings=step.halvings + 1,
            reached=False,
            held_out_loss=trial.held_out_loss,
            relative_step=trial.relative_step,
            step_curve=[*step.step_curve, trial.to_dict()],
        )

    # --- taken --------------------------------------------------------------------------------------------------------

    def apply(self) -> float:
        """Move the model's weights, alike in all processes; returns ‖Δ‖.

        Raises:
            RequestError: the step is not finite.
        """
        # What the processes found may differ in the last bits: all take the step of the first.
        place = broadcast_object(list(self._place), "k, λ and c")
        self.step.scale, self.step.damping, self.step.retain_weight = place
        if self.many is not None:
            self._directions = None
            apply_step(self.context.model, self.many.step)
            return step_norm(self.many.step)
        self._shorten_to_what_is_allowed()
        length = self.directions.apply(self.context.model, *self._place)
        self._directions = None
        return length

    def _shorten_to_what_is_allowed(self) -> None:
        allowed = self.config.max_relative_step * weights_norm(self.context.model, list(self.directions.forget_sum))
        length = self.directions.norm(*self._place)
        if not math.isfinite(length):
            raise RequestError("The step is not finite: the curvature or a gradient is. Gather the memory anew.")
        if length > allowed * (1 + 1e-6):
            share = allowed / length
            self.step.scale *= share
            self.step.retain_weight *= share
            self.step.reached = False
            self.final = FinalState()

    # --- told ---------------------------------------------------------------------------------------------------------

    @property
    def calibration(self) -> Calibration:
        """Of what is taken."""
        return self.step if self.many is None else _calibration_of(self.many, self.step)

    def step_record(self, reasons: list[str]) -> StepRecord:
        """What others are told of the step, with the reasons of the verdict."""
        if self.many is not None:
            return StepRecord(self.calibration.source, reasons=reasons)
        return StepRecord(self.step.source, *self._place, reasons)

    def to_remember(self) -> dict[str, Any] | None:
        """What to remember for later requests; one that took many steps says nothing about one step for the next, and
        one whose step was too long for the retained rows nothing good."""
        if self.many is not None:
            return self.plan.memory.calibration
        if self.halved_for_retained:
            return None
        # The configuration that was given: an answer found anew is as free as the first.
        return calibration_to_remember(self.found, self.config, self.plan.memory, self.plan.reference.like_any_others)

    def to_dict(self) -> dict[str, Any]:
        """What the report tells beside `calibration`, plain JSON."""
        told = self.plan.reference.to_dict()
        if self.share_remaining is not None:
            told["share_remaining_after_one_step"] = self.share_remaining
        if self.many is not None:
            told["multi_step"] = {"steps": self.many.steps, "one_step": _step_not_taken(self.step)}
        return told

    # --- looked at once more ------------------------------------------------------------------------------------------

    def retained_accuracy_lost(self) -> float | None:
        """Accuracy on retained rows, before minus after; None where there are none, or the task has no accuracy."""
        rows = self.initial.retained_rows
        if rows is None:
            return None
        after = self.final.retained or predict_rows(self.context.model, rows)
        return accuracy_difference(self.initial.retained, after)

    def recited(self) -> float | None:
        """Share of the labels that nothing else supports that are still predicted; None without any."""
        support = self.plan.reference.support
        if support is None or not support.unsupported.any():
            return None
        forget = self.final.forget
        if forget is None or len(forget) < len(support.unsupported):
            forget = predict_rows(self.context.model, self.context.forget_to_predict)
        return float(forget.correct[support.unsupported].mean())

    def gaps_to_held_out(self) -> tuple[float | None, LossAttack | None]:
        """Accuracy on the forget rows minus that on held-out rows, and the loss attack that tells the two apart.

        Each is None where the forget rows are not like any others, or the task or the rows do not allow it.
        """
        initial, reference = self.initial, self.plan.reference
        if not reference.like_any_others or initial.held_out_rows is None:
            return None, None
        forget = self.final.forget or predict_rows(self.context.model, initial.forget_rows)
        held_out = self.final.held_out or predict_rows(self.context.model, initial.held_out_rows)
        luck = 0.0
        if reference.advantage is not None:
            luck = auc_distance(initial.forget, initial.held_out) - reference.advantage
        return accuracy_difference(forget, held_out), LossAttack.of(forget, held_out, luck)


def _calibration_of(many: MultiStepResult, step: Calibration) -> Calibration:
    """What is reported of many steps, in place of the one `step` that was not taken."""
    return replace(
        step,
        damping=many.damping,
        source="multi-step",
        reached=many.reached,
        criterion=many.share_remaining,
        tolerance=ARRIVED,
        standard_error=None,
        held_out_loss=many.held_out_loss,
        relative_step=many.relative_step,
        halvings=0,
        scales=[],  # of one step, which was not taken: their spread is no uncertainty of many
        step_curve=many.curve,
    )


def _step_not_taken(step: Calibration) -> Mapping[str, Any]:
    """What is reported of the one step that many were taken instead of."""
    names = ("source", "scale", "damping", "retain_weight", "reached", "criterion", "held_out_loss", "relative_step")
    return {name: getattr(step, name) for name in names}
