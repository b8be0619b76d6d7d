"""`iau`, the default: one curvature-aware step whose length is calibrated, or a walk of many short ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import ClassVar

from hf_iau.errors import MissingMemoryError
from hf_iau.methods.base import register_method
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.gradients import correction_sum, has_correction_sum, objective_sum
from hf_iau.methods.iau.config import IAUConfig
from hf_iau.methods.iau.curvature_renewal import with_near_curvature
from hf_iau.methods.iau.decision import decide
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.iau.duplicates import find_near_duplicates
from hf_iau.methods.iau.initial_state import InitialState
from hf_iau.methods.iau.plan import calibrate_on_proxies
from hf_iau.methods.iau.reference import choose_reference
from hf_iau.methods.iau.requirements import check_calibratable
from hf_iau.methods.iau.verdict import assess
from hf_iau.methods.outcome import MethodOutcome, StepRecord
from hf_iau.methods.step import weights_norm


@register_method
class IAU:
    """Δ = (C+λ)⁻¹(k·Σ_f − c·Σ_D)/n_r with remembered curvature C; k, λ and c calibrated without a retrained model.

    With k = c = 1 and C the Hessian of the retained rows this is the Newton step to their optimum. C is the EK-FAC
    approximation of the true Fisher (George et al. 2018; Grosse et al. 2023); a request costs one pass over its rows,
    and calibration 5 to 14 evaluations of a few thousand rows.
    """

    name: ClassVar[str] = "iau"
    moves_only_trained: ClassVar[bool] = True
    config_class: ClassVar[type] = IAUConfig
    works_on_shards: ClassVar[bool] = True
    citation: ClassVar[str] = (
        "after Liu et al. 2025 (arXiv 2507.23257), with EK-FAC curvature (George et al. 2018; Grosse et al. 2023)"
    )

    def check(self, context: ForgetContext, config: IAUConfig) -> None:
        memory = context.require_memory(self.name)
        memory.require_curvature(self.name)
        if config.retain_weight and not has_correction_sum(memory):
            raise MissingMemoryError(
                f"IAUConfig(retain_weight={config.retain_weight}) needs the gradient sum of the training rows, which "
                "this memory does not hold (or too noisily): gather with GatherConfig(gradient_sum='full'), or leave "
                "retain_weight out."
            )
        check_calibratable(context, config, memory)

    def run(self, context: ForgetContext, config: IAUConfig) -> MethodOutcome:
        memory = context.require_memory(self.name)
        memory.require_curvature(self.name)
        if not config.is_given:
            memory = with_near_curvature(context, memory, config.renew_curvature)
        curvature = memory.require_curvature(self.name)
        with context.timer.phase("calibration"):
            initial = InitialState(context, config.held_out_rows)
            duplicates = None
            if initial.retained_rows is not None:
                duplicates = find_near_duplicates(context.forget, initial.retained_rows, context.seed)
            reference = choose_reference(context, config, memory, initial)
            found = None
            if (
                reference.source == "proxies"
            ):  # before the request's own sum is made, so that one set of directions is held
                found = calibrate_on_proxies(context, config, memory, initial, reference)
        with context.timer.phase("gradient"):
            forget = objective_sum(context, context.forget)
            directions = Directions.of(memory, forget, correction_sum(context, memory), config.retain_damping)
        with context.timer.phase("calibration"):
            decision = decide(context, config, memory, directions, initial, reference, found)
        with context.timer.phase("update"):
            length = decision.apply(context, config, directions)
            del directions
        with context.timer.phase("calibration"):
            lost = decision.after.retained_accuracy_lost(context.model, initial)
            lead, attack = decision.after.beside_held_out(context.model, initial, decision.reference)
        calibration, coverage = decision.calibration, curvature.coverage()
        verdict, reasons = assess(
            calibration=calibration,
            relative_step=length / max(weights_norm(context.model, list(memory.parameters)), 1e-300),
            share_forgotten=(memory.forgotten_rows + len(context.forget)) / (memory.forgotten_rows + memory.n_rows),
            kronecker_share=coverage.get("kronecker", 0) / max(sum(coverage.values()), 1),
            whole_class=decision.reference.whole_class,
            retained_accuracy_lost=lost or 0.0,
            accuracy_lead=lead,
            attack=attack,
        )
        return MethodOutcome(
            forget_sum=forget.tensors,
            forget_targets=forget.n_targets,
            step=(
                StepRecord(
                    calibration.source, calibration.scale, calibration.damping, calibration.retain_weight, reasons
                )
                if decision.path is None
                else StepRecord(calibration.source, reasons=reasons)
            ),
            diagnostics={
                "forget_gradient_norm": forget.norm(),
                "calibration": calibration.to_dict(),
                "curvature": {
                    "kind": curvature.kind,
                    "rows": curvature.n_rows,
                    "parameters": coverage,
                    "renewed": memory is not context.memory,
                },
                "reasons": reasons,
                **decision.to_dict(),
                **({} if duplicates is None else {"near_duplicates": duplicates.to_dict()}),
                "retained_accuracy_lost": lost,
                "accuracy_lead_of_forget_rows": lead,
                "loss_attack_on_forget_rows": None if attack is None else asdict(attack),
            },
            calibrated=calibration.source != "uncalibrated",
            verdict=verdict,
            warnings=[*decision.reference.warnings, *(duplicates.warnings if duplicates is not None else ())],
            calibration=decision.to_remember(config, memory),
            memory=memory,
        )
