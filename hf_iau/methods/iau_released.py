"""The update of the IAU paper's released code, which differs from the published one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hf_iau.methods.base import check_gradient_difference, forget_and_retain_sums, register_method
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.methods.step import apply_step, step_norm
from hf_iau.utils.config_checks import check_number

_ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class IAUReleasedConfig:
    """Configuration of `iau-released`.

    Raises:
        ConfigError: lr is negative or not finite.
    """

    lr: float = field(default=1e-3, metadata={"help": "Learning rate of the one Adam step, as in the released code."})

    def __post_init__(self) -> None:
        check_number(self, "lr", at_least=0)


@register_method
class IAUReleased:
    """One step of a fresh Adam on mean_r ∇ℓ − mean_f ∇ℓ.

    With empty moments the step is −lr·g/(|g| + ε): the sign of the gradient, whatever its length.
    """

    name: ClassVar[str] = "iau-released"
    moves_only_trained: ClassVar[bool] = True
    config_class: ClassVar[type] = IAUReleasedConfig
    citation: ClassVar[str] = "Liu, Wu, Lian, Chen: Efficient Machine Unlearning via Influence Approximation, 2025"

    def check(self, context: ForgetContext, config: IAUReleasedConfig) -> None:
        check_gradient_difference(context, self.name)

    def run(self, context: ForgetContext, config: IAUReleasedConfig) -> MethodOutcome:
        forget, retain = forget_and_retain_sums(context, self.name)
        with context.timer.phase("update"):
            step = {}
            for name, gradient in forget.tensors.items():
                g = retain.tensors[name].to(gradient.device) / retain.n_targets - gradient / forget.n_targets
                step[name] = -config.lr * g / (g.abs() + _ADAM_EPSILON)
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
