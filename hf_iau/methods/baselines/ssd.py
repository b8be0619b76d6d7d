"""`ssd`: dampen the weights that matter much more to the forget rows than to the training rows. No training at all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.diagonal_fisher import fisher_diagonal
from hf_iau.methods.baselines.training_loop import trained_parameters
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.utils.config_checks import check_number


@dataclass(frozen=True)
class SSDConfig:
    """Configuration of `ssd`. The defaults are those of the public code.

    Raises:
        ConfigError: a value is not positive.
    """

    selection: float = field(
        default=10.0,
        metadata={"help": "α: a weight is dampened where its importance to D_f is above α times that to D."},
    )
    dampening: float = field(default=1.0, metadata={"help": "λ: the weight is multiplied by min(λ·F_D/F_f, 1)."})

    def __post_init__(self) -> None:
        check_number(self, "selection", above=0)
        check_number(self, "dampening", at_least=0)


@register_method
class SSD:
    """θ_i ← min(λ·F_D,i / F_f,i, 1)·θ_i where F_f,i > α·F_D,i, with the diagonals of the empirical Fisher matrix.

    D is the forget rows and the retained rows together. Needs the retained rows, one pass over them.
    """

    name: ClassVar[str] = "ssd"
    config_class: ClassVar[type] = SSDConfig
    citation: ClassVar[str] = (
        "Foster, Schoepf, Brintrup: Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening, "
        "2023 (arXiv 2308.07707)"
    )

    def check(self, context: ForgetContext, config: SSDConfig) -> None:
        context.check_retained(self.name)

    def run(self, context: ForgetContext, config: SSDConfig) -> MethodOutcome:
        with context.timer.phase("fisher"):
            retained = context.retained_rows(self.name)
            of_forget, n_forget = fisher_diagonal(context, context.forget)
            of_retained, n_retained = fisher_diagonal(context, retained)
        dampened = 0
        with context.timer.phase("update"), torch.no_grad():
            for name, parameter in trained_parameters(context).items():
                of_all = (n_forget * of_forget[name] + n_retained * of_retained[name]) / (n_forget + n_retained)
                factor = dampening_factor(of_forget[name], of_all, config.selection, config.dampening)
                parameter.copy_(parameter.double() * factor.double())
                dampened += int((factor < 1).sum())
        warnings = []
        if not dampened:
            most = (n_forget + n_retained) / n_forget
            warnings.append(
                f"No weight was dampened: no importance to the forget rows is above selection={config.selection:g} "
                f"times that to all rows. {most:.3g}, rows by forget rows, is the most that it can be."
            )
        return MethodOutcome(
            forget_targets=n_forget,
            warnings=warnings,
            diagnostics={"retained_rows": len(retained), "dampened_weights": dampened},
        )


def dampening_factor(of_forget: Tensor, of_all: Tensor, selection: float, dampening: float) -> Tensor:
    """min(λ·F_D/F_f, 1) where F_f > α·F_D, else 1."""
    chosen = of_forget > selection * of_all
    ratio = (dampening * of_all / of_forget.where(chosen, torch.ones_like(of_forget))).clamp(max=1.0)
    return ratio.where(chosen, torch.ones_like(ratio))
