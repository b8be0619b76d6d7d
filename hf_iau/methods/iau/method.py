"""`iau`, the default: one curvature-aware step whose size is calibrated, or many short ones."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from hf_iau.data.duplicates import DuplicateSearch, find_near_duplicates
from hf_iau.errors import MissingMemoryError
from hf_iau.methods.base import register_method
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.gradients import correction_sum, has_correction_sum, objective_sum
from hf_iau.methods.iau.config import IAUConfig
from hf_iau.methods.iau.curvature_renewal import with_near_curvature
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.iau.plan import CalibrationPlan
from hf_iau.methods.iau.reference import check_calibratable
from hf_iau.methods.iau.run import CalibrationRun
from hf_iau.methods.iau.verdict import Observations, assess
from hf_iau.methods.outcome import MethodOutcome
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
        with context.timer.phase("calibration"):
            plan = CalibrationPlan(context, config, memory)
            duplicates = _near_duplicates(plan)
            plan.calibrate_on_proxies()
        with context.timer.phase("gradient"):
            forget = objective_sum(context, context.forget)
            run = CalibrationRun(
                plan, Directions.of(memory, forget, correction_sum(context, memory), config.retain_damping)
            )
        with context.timer.phase("calibration"):
            run.search()
            run.multi_step()
        with context.timer.phase("update"):
            step_length = run.apply()
        with context.timer.phase("calibration"):
            observed = _observations(run, step_length)
        verdict, reasons = assess(run.calibration, observed)
        return MethodOutcome(
            forget_sum=forget.tensors,
            forget_targets=forget.n_targets,
            step=run.step_record(reasons),
            diagnostics={
                "forget_gradient_norm": forget.norm(),
                "reasons": reasons,
                **_diagnostics(run, observed),
                **({} if duplicates is None else {"near_duplicates": duplicates.to_dict()}),
            },
            calibrated=run.calibration.source != "uncalibrated",
            verdict=verdict,
            warnings=[*run.plan.reference.warnings, *(duplicates.warnings if duplicates is not None else ())],
            calibration=run.to_remember(),
            memory=memory,
        )


def _near_duplicates(plan: CalibrationPlan) -> DuplicateSearch | None:
    """Rows that stay and are like forget rows; None where there are no retained rows to look at."""
    retained, context = plan.initial.retained_rows, plan.context
    return None if retained is None else find_near_duplicates(context.forget, retained, context.seed)


def _observations(run: CalibrationRun, step_length: float) -> Observations:
    """What the verdict rests on, beside the calibration."""
    context, memory = run.context, run.plan.memory
    coverage = memory.require_curvature("iau").coverage()
    retained_accuracy_lost = run.retained_accuracy_lost()
    accuracy_gap, attack = run.gaps_to_held_out()
    return Observations(
        relative_step=step_length / max(weights_norm(context.model, list(memory.parameters)), 1e-300),
        share_forgotten=(memory.forgotten_rows + len(context.forget)) / (memory.forgotten_rows + memory.n_rows),
        kronecker_share=coverage.get("kronecker", 0) / max(sum(coverage.values()), 1),
        whole_class=run.plan.reference.whole_class,
        retained_accuracy_lost=retained_accuracy_lost,
        accuracy_gap=accuracy_gap,
        attack=attack,
        recited=run.recited(),
    )


def _diagnostics(run: CalibrationRun, observed: Observations) -> dict[str, Any]:
    """What the report tells of calibration and curvature, plain JSON."""
    memory = run.plan.memory
    curvature = memory.require_curvature("iau")
    return {
        "calibration": run.calibration.to_dict(),
        "curvature": {
            "kind": curvature.kind,
            "rows": curvature.n_rows,
            "parameters": curvature.coverage(),
            "renewed": memory is not run.context.memory,
        },
        **run.to_dict(),
        "retained_accuracy_lost": observed.retained_accuracy_lost,
        "accuracy_gap_to_held_out": observed.accuracy_gap,
        "unsupported_labels_recited": observed.recited,
        "loss_attack_on_forget_rows": None if observed.attack is None else asdict(observed.attack),
    }
