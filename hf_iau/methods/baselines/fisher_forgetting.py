"""`fisher-forgetting`: noise on every weight, the more the less the retained rows care."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.diagonal_fisher import fisher_diagonal
from hf_iau.methods.baselines.training_loop import trained_parameters
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.utils.config_checks import check_number

_SMALLEST_FISHER = 1e-8


@dataclass(frozen=True)
class FisherForgettingConfig:
    """Configuration of `fisher-forgetting`.

    Raises:
        ConfigError: a value is out of range.
    """

    alpha: float = field(
        default=1e-7, metadata={"help": "α, the scale of the noise; SalUn searches 1e-9 to 1e-6, and so should you."}
    )
    largest_inverse: float = field(
        default=1e3, metadata={"help": "1/F is cut off here, as in the public code, for weights that do not matter."}
    )

    def __post_init__(self) -> None:
        check_number(self, "alpha", at_least=0)
        check_number(self, "largest_inverse", above=0)


@register_method
class FisherForgetting:
    """θ_i ← θ_i + √(α·min(1/F_i, cut)) · N(0, 1), with F the diagonal Fisher matrix of D_r. Needs the retained rows."""

    name: ClassVar[str] = "fisher-forgetting"
    config_class: ClassVar[type] = FisherForgettingConfig
    citation: ClassVar[str] = "Golatkar, Achille, Soatto: Eternal Sunshine of the Spotless Net, 2020 (arXiv 1911.04933)"

    def check(self, context: ForgetContext, config: FisherForgettingConfig) -> None:
        context.check_retained(self.name)

    def run(self, context: ForgetContext, config: FisherForgettingConfig) -> MethodOutcome:
        with context.timer.phase("fisher"):
            retained = context.retained_rows(self.name)
            fisher, _ = fisher_diagonal(context, retained, "true")
        draws = torch.Generator().manual_seed(context.seed)
        total = 0.0
        with context.timer.phase("update"), torch.no_grad():
            for name, parameter in trained_parameters(context).items():
                inverse = (1.0 / (fisher[name].double() + _SMALLEST_FISHER)).clamp(max=config.largest_inverse)
                noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float64).to(parameter.device)
                parameter.copy_(parameter.double() + (config.alpha * inverse).sqrt() * noise)
                total += float(config.alpha * inverse.sum())
        return MethodOutcome(diagnostics={"retained_rows": len(retained), "noise_norm": total**0.5})
