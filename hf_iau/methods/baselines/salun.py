"""`salun`: random labels, but only the weights that matter to the forget rows move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_iau.data import TaskKind
from hf_iau.memory.gradient_sum import sum_row_gradients
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.random_labels import learn_other_labels
from hf_iau.methods.baselines.teacher_student import check_task
from hf_iau.methods.baselines.training_loop import TrainingLoopConfig, trained_parameters
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.utils.config_checks import check_number


@dataclass(frozen=True)
class SalUnConfig(TrainingLoopConfig):
    """Configuration of `salun`.

    The paper and its public code forget 10 % of CIFAR-10 with a ResNet-18 in 10 epochs at lr 0.013, half of the weights
    salient.
    """

    lr: float = field(default=0.013, metadata={"help": "Learning rate."})
    salient_share: float = field(
        default=0.5,
        metadata={"help": "Share of the trainable weights that may move: those with the largest forget gradient."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "salient_share", above=0, at_most=1)


@register_method
class SalUn:
    """`random-labels` under the mask |Σ_f ∇ℓ| ≥ γ, γ such that a given share of the weights moves.

    Needs the retained rows; single-label classification alone. Weights outside of the mask stay, bit for bit.
    """

    name: ClassVar[str] = "salun"
    config_class: ClassVar[type] = SalUnConfig
    citation: ClassVar[str] = (
        "Fan, Liu, Zhang, Wong, Wei, Liu: SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency, "
        "2023 (arXiv 2310.12508)"
    )

    def check(self, context: ForgetContext, config: SalUnConfig) -> None:
        context.check_retained(self.name)
        check_task(context, self.name, TaskKind.SINGLE_LABEL)

    def run(self, context: ForgetContext, config: SalUnConfig) -> MethodOutcome:
        with context.timer.phase("gradient"):
            forget = sum_row_gradients(
                context.model,
                context.row_loss,
                context.forget,
                names=list(trained_parameters(context)),
                progress=context.progress,
            )
            mask = saliency_mask(forget.tensors, config.salient_share)
        with context.timer.phase("update"):
            retained = context.retained_rows(self.name)
            curve = learn_other_labels(context, config, retained, method=self.name, mask=mask)
        return MethodOutcome(
            forget_targets=forget.n_targets,
            diagnostics={
                "retained_rows": len(retained),
                "salient_weights": sum(int(chosen.sum()) for chosen in mask.values()),
                "loss_by_epoch": curve,
            },
        )


def saliency_mask(gradient: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """True at the `share` of all entries (at least one) with the largest absolute gradient, over all parameters."""
    magnitudes = torch.cat([tensor.abs().flatten() for tensor in gradient.values()])
    chosen = torch.zeros_like(magnitudes, dtype=torch.bool)
    chosen[magnitudes.topk(max(1, int(share * magnitudes.numel())), sorted=False).indices] = True
    parts = chosen.split([tensor.numel() for tensor in gradient.values()])
    return {name: part.view_as(gradient[name]) for name, part in zip(gradient, parts, strict=True)}
