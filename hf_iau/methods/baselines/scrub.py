"""`scrub`: disobey the old model on the forget rows, obey it on the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from hf_iau.data import TaskKind
from hf_iau.data.rows import Batch
from hf_iau.errors import ConfigError
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.teacher_student import Student, Teacher, check_task, divergence
from hf_iau.methods.baselines.training_loop import TrainingLoopConfig, descend, shuffled
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.utils.config_checks import check_number


@dataclass(frozen=True)
class SCRUBConfig(TrainingLoopConfig):
    """Configuration of `scrub`; the defaults are those of the public code's large experiments.

    Raises:
        ConfigError: a value is out of range, or there are more max epochs than epochs.
    """

    epochs: int = field(default=5, metadata={"help": "Min passes, over the retained rows."})
    max_epochs: int = field(
        default=3, metadata={"help": "How many of the first epochs begin with a max pass, over the forget rows."}
    )
    lr: float = field(default=5e-4, metadata={"help": "Learning rate."})
    alpha: float = field(default=0.5, metadata={"help": "α, the weight of the KL divergence in a min step."})
    gamma: float = field(default=1.0, metadata={"help": "γ, the weight of the loss in a min step."})
    temperature: float = field(default=4.0, metadata={"help": "Softmax temperature of the KL divergence."})
    decay_epochs: tuple[int, ...] = field(
        default=(3, 5, 9), metadata={"help": "After these epochs the learning rate is multiplied by decay_rate."}
    )
    decay_rate: float = field(default=0.1, metadata={"help": "See decay_epochs."})
    forget_batch_size: int | None = field(
        default=None, metadata={"help": "Rows a batch of a max step; default: as of a min step."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "max_epochs", at_least=0, whole=True)
        if self.max_epochs > self.epochs:
            raise ConfigError(
                f"SCRUBConfig(max_epochs={self.max_epochs}, epochs={self.epochs}): a max pass is followed by a min "
                "pass, so give at least as many epochs."
            )
        for name in ("alpha", "gamma", "decay_rate"):
            check_number(self, name, at_least=0)
        check_number(self, "temperature", above=0)
        check_number(self, "forget_batch_size", at_least=1, whole=True, optional=True)

    def learning_rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.lr * self.decay_rate ** sum(epoch >= decay for decay in self.decay_epochs)


@register_method
class SCRUB:
    """Each epoch: θ ← θ + lr·∇KL(old ‖ θ) on D_f (the first ones), then θ ← θ − lr·∇(γ·L_r + α·KL(old ‖ θ)) on D_r.

    Needs the retained rows; single-label classification, and token classification or language models by target.
    """

    name: ClassVar[str] = "scrub"
    config_class: ClassVar[type] = SCRUBConfig
    citation: ClassVar[str] = (
        "Kurmanji, Triantafillou, Hayes, Triantafillou: Towards Unbounded Machine Unlearning, 2023 (arXiv 2302.09880)"
    )

    def check(self, context: ForgetContext, config: SCRUBConfig) -> None:
        context.check_retained(self.name)
        check_task(context, self.name, TaskKind.SINGLE_LABEL, TaskKind.TOKENS)

    def run(self, context: ForgetContext, config: SCRUBConfig) -> MethodOutcome:
        teacher, student = Teacher(context.model), Student(context)

        def passes(epoch: int) -> Iterator[tuple[bool, Batch]]:
            if epoch < config.max_epochs:
                size = config.forget_batch_size or config.batch_size
                yield from ((True, inputs) for inputs in shuffled(context.forget, size, context.seed, epoch))
            yield from ((False, inputs) for inputs in shuffled(retained, config.batch_size, context.seed, epoch))

        def objective(item: tuple[bool, Batch]) -> Tensor | None:
            disobey, inputs = item
            loss, targets = student.targets(inputs)
            if len(targets) == 0:
                return None
            distance = divergence(targets, teacher.targets(inputs), config.temperature)
            total = -distance if disobey else config.gamma * loss + config.alpha * distance
            return total / len(targets)

        with context.timer.phase("update"), student.watched():
            retained = context.retained_rows(self.name)
            curve = descend(context, config, passes, objective, method=self.name, learning_rate=config.learning_rate)
        return MethodOutcome(diagnostics={"retained_rows": len(retained), "objective_by_epoch": curve})
