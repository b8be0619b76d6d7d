"""The update of the IAU paper, as published."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hf_iau.methods.base import check_gradient_difference, forget_and_retain_sums, register_method
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.methods.step import apply_step, step_norm
from hf_iau.utils.config_checks import check_number


@dataclass(frozen=True)
class IAUPaperConfig:
    """Configuration of `iau-paper`.

    Raises:
        ConfigError: a value is not a finite number, or eta is negative.
    """

    eta: float = field(metadata={"help": "Learning rate η of the one step. There is no safe default."})
    retain_weight: float = field(
        default=1.0, metadata={"help": "w, the weight of the retained rows' gradient sum (gradient correction)."}
    )

    def __post_init__(self) -> None:
        check_number(self, "eta", at_least=0)  # a negative rate would learn the forget rows
        check_number(self, "retain_weight")


@register_method
class IAUPaper:
    """θ ← θ + η (Σ_f ∇ℓ − w·Σ_r ∇ℓ): incremental approximation with gradient correction (arXiv 2507.23257)."""

    name: ClassVar[str] = "iau-paper"
    moves_only_trained: ClassVar[bool] = True
    config_class: ClassVar[type] = IAUPaperConfig
    citation: ClassVar[str] = "Liu, Wu, Lian, Chen: Efficient Machine Unlearning via Influence Approximation, 2025"

    def check(self, context: ForgetContext, config: IAUPaperConfig) -> None:
        check_gradient_difference(context, self.name)

    def run(self, context: ForgetContext, config: IAUPaperConfig) -> MethodOutcome:
        forget, retain = forget_and_retain_sums(context, self.name)
        with context.timer.phase("update"):
            step = {
                name: config.eta * (gradient - config.retain_weight * retain.tensors[name].to(gradient.device))
                for name, gradient in forget.tensors.items()
            }
            apply_step(context.model, step)
        return MethodOutcome(
            forget_sum=forget.tensors,
            forget_targets=forget.n_targets,
            diagnostics={
                "step_norm": step_norm(step),
                "forget_gradient_norm": forget.norm(),
                "retain_gradient_norm": retain.norm(),
            },
        )
