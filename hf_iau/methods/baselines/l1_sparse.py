"""`l1-sparse`: fine-tuning on the retained rows with a fading pull of all weights towards zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_iau.data.rows import Batch
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.training_loop import (
    TrainingLoopConfig,
    batches_of,
    descend,
    mean_loss,
    shuffled,
    trained_parameters,
)
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.utils.config_checks import check_number


@dataclass(frozen=True)
class L1SparseConfig(TrainingLoopConfig):
    """Configuration of `l1-sparse`: epochs and lr of the public code; γ in the middle of SalUn's search range."""

    gamma: float = field(
        default=1e-5,
        metadata={"help": "γ, the weight of ‖θ‖₁ in the first epoch; it falls linearly to 0. 1e-6 to 1e-4."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "gamma", at_least=0)


@register_method
class L1Sparse:
    """θ ← θ − lr·∇(L_r + γ_t·‖θ‖₁), γ_t = γ·(1 − t/epochs). Needs the retained rows."""

    name: ClassVar[str] = "l1-sparse"
    config_class: ClassVar[type] = L1SparseConfig
    citation: ClassVar[str] = (
        "Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu: Model Sparsity Can Simplify Machine Unlearning, 2023 "
        "(arXiv 2304.04934)"
    )

    def check(self, context: ForgetContext, config: L1SparseConfig) -> None:
        context.check_retained(self.name)

    def run(self, context: ForgetContext, config: L1SparseConfig) -> MethodOutcome:
        parameters = list(trained_parameters(context).values())

        def batches(epoch: int) -> Iterator[tuple[float, Batch]]:
            weight = config.gamma * (1 - epoch / config.epochs)
            yield from ((weight, inputs) for inputs in shuffled(retained, config.batch_size, context.seed, epoch))

        def objective(item: tuple[float, Batch]) -> Tensor | None:
            weight, inputs = item
            loss = mean_loss(context, inputs)
            return None if loss is None else loss + weight * torch.stack([p.abs().sum() for p in parameters]).sum()

        with context.timer.phase("update"):
            retained = context.retained_rows(self.name)
            curve = descend(
                context,
                config,
                batches,
                objective,
                method=self.name,
                items_per_epoch=batches_of(retained, config.batch_size),
            )
        return MethodOutcome(diagnostics={"retained_rows": len(retained), "objective_by_epoch": curve})
