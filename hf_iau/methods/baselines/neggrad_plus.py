"""`neggrad-plus`: descend on the retained rows and ascend on the forget rows, in the same step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from hf_iau.data.rows import Batch
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.training_loop import TrainingLoopConfig, batches_of, descend, endless, mean_loss, shuffled
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.utils.config_checks import check_number


@dataclass(frozen=True)
class NegGradPlusConfig(TrainingLoopConfig):
    """Configuration of `neggrad-plus`.

    The public code of SCRUB runs it with plain SGD at lr 0.01 and α 0.95 (small data, 10 epochs) or 0.9999 (5 epochs).
    """

    alpha: float = field(default=0.95, metadata={"help": "α, the weight of the retained rows; 1 is fine-tuning."})
    momentum: float = field(default=0.0, metadata={"help": "Momentum of 'sgd' (first β of 'adamw')."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the optimizer."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "alpha", at_least=0, at_most=1)


@register_method
class NegGradPlus:
    """θ ← θ − lr·∇(α·L_r − (1−α)·L_f), a batch of each a step, for epochs of the retained rows. Needs those."""

    name: ClassVar[str] = "neggrad-plus"
    config_class: ClassVar[type] = NegGradPlusConfig
    citation: ClassVar[str] = (
        "Kurmanji, Triantafillou, Hayes, Triantafillou: Towards Unbounded Machine Unlearning, 2023 (arXiv 2302.09880)"
    )

    def check(self, context: ForgetContext, config: NegGradPlusConfig) -> None:
        context.check_retained(self.name)

    def run(self, context: ForgetContext, config: NegGradPlusConfig) -> MethodOutcome:
        def difference(pair: tuple[Batch, Batch]) -> Tensor | None:
            retain_loss, forget_loss = (mean_loss(context, inputs) for inputs in pair)
            if retain_loss is None or forget_loss is None:
                return None
            return config.alpha * retain_loss - (1 - config.alpha) * forget_loss

        with context.timer.phase("update"):
            retained = context.retained_rows(self.name)
            of_forget = endless(context.forget, config.batch_size, context.seed)

            def pairs(epoch: int) -> Iterable[tuple[Batch, Batch]]:
                return zip(shuffled(retained, config.batch_size, context.seed, epoch), of_forget, strict=False)

            curve = descend(
                context,
                config,
                pairs,
                difference,
                method=self.name,
                items_per_epoch=batches_of(retained, config.batch_size),
            )
        return MethodOutcome(diagnostics={"retained_rows": len(retained), "loss_by_epoch": curve})
