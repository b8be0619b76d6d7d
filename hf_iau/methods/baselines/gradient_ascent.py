"""`gradient-ascent`: training run backwards on the forget rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from hf_iau.data.rows import Batch
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.training_loop import TrainingLoopConfig, batches_of, descend, mean_loss, shuffled
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome


@dataclass(frozen=True)
class GradientAscentConfig(TrainingLoopConfig):
    """Configuration of `gradient-ascent`.

    SalUn runs it for 5 epochs with a learning rate searched in [1e-6, 1e-3]; the default is in the middle.
    """

    epochs: int = field(default=5, metadata={"help": "Passes over the forget rows."})
    lr: float = field(default=1e-4, metadata={"help": "Learning rate; the method is sensitive to it."})


@register_method
class GradientAscent:
    """θ ← θ + lr·∇L_f, for some epochs. Needs the forget rows alone."""

    name: ClassVar[str] = "gradient-ascent"
    config_class: ClassVar[type] = GradientAscentConfig
    citation: ClassVar[str] = (
        "Thudi, Deza, Chandrasekaran, Papernot: Unrolling SGD, 2021 (arXiv 2109.13398); Graves, Nagisetty, Ganesh: "
        "Amnesiac Machine Learning, 2020 (arXiv 2010.10981)"
    )

    def check(self, context: ForgetContext, config: GradientAscentConfig) -> None:
        pass

    def run(self, context: ForgetContext, config: GradientAscentConfig) -> MethodOutcome:
        def negative(inputs: Batch) -> Tensor | None:
            loss = mean_loss(context, inputs)
            return None if loss is None else -loss

        with context.timer.phase("update"):
            curve = descend(
                context,
                config,
                lambda epoch: shuffled(context.forget, config.batch_size, context.seed, epoch),
                negative,
                method=self.name,
                items_per_epoch=batches_of(context.forget, config.batch_size),
            )
        return MethodOutcome(diagnostics={"forget_loss_by_epoch": [-value for value in curve]})
