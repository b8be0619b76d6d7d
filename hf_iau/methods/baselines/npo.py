"""`npo`: negative preference optimization, gradient ascent that leaves a row alone once it has become improbable."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_iau.data import Targets, TaskKind
from hf_iau.data.rows import Batch
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.teacher_student import Student, Teacher, check_task
from hf_iau.methods.baselines.training_loop import TrainingLoopConfig, batches_of, descend, endless, mean_loss, shuffled
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.utils.config_checks import check_number


@dataclass(frozen=True)
class NPOConfig(TrainingLoopConfig):
    """Configuration of `npo`; the defaults are those of the paper on TOFU, with the retain term ("NPO+RT").

    Raises:
        ConfigError: a value is out of range.
    """

    epochs: int = field(default=10, metadata={"help": "Passes over the forget rows."})
    lr: float = field(default=1e-5, metadata={"help": "Learning rate."})
    optimizer: str = field(default="adamw", metadata={"help": "'adamw', or 'sgd'."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of the optimizer."})
    beta: float = field(
        default=0.1, metadata={"help": "β: the lower, the longer a row is changed; towards 0 it is gradient ascent."}
    )
    alpha: float = field(default=1.0, metadata={"help": "Weight of the retained rows' loss; 0 for none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "beta", above=0)
        check_number(self, "alpha", at_least=0)


@register_method
class NPO:
    """θ ← θ − lr·∇(2/β · mean_f log(1 + (P(row)/P_old(row))^β) + α·L_r), a batch of each a step.

    P(row) is the probability of all of a row's targets: of the whole answer, for a language model. Needs the retained
    rows unless α is 0; single-label classification, token classification and language models.
    """

    name: ClassVar[str] = "npo"
    config_class: ClassVar[type] = NPOConfig
    citation: ClassVar[str] = (
        "Zhang, Lin, Bai, Mei: Negative Preference Optimization, 2024 (arXiv 2404.05868), equation 3"
    )

    def check(self, context: ForgetContext, config: NPOConfig) -> None:
        if config.alpha:
            context.check_retained(self.name)
        check_task(context, self.name, TaskKind.SINGLE_LABEL, TaskKind.TOKENS)

    def run(self, context: ForgetContext, config: NPOConfig) -> MethodOutcome:
        teacher, student = Teacher(context.model), Student(context)

        def objective(pair: tuple[Batch, Batch | None]) -> Tensor | None:
            forget_inputs, retain_inputs = pair
            _, targets = student.targets(forget_inputs)
            if len(targets) == 0:
                return None
            ratio = log_likelihood(targets) - log_likelihood(teacher.targets(forget_inputs))
            counted = torch.bincount(targets.rows, minlength=targets.n_rows) > 0
            loss = -2.0 / config.beta * F.logsigmoid(-config.beta * ratio[counted]).mean()
            retain_loss = None if retain_inputs is None else mean_loss(context, retain_inputs)
            return loss if retain_loss is None else loss + config.alpha * retain_loss

        with context.timer.phase("update"), student.watched():
            retained = context.retained_rows(self.name) if config.alpha else None
            beside: Iterable[Batch | None] = (
                itertools.repeat(None) if retained is None else endless(retained, config.batch_size, context.seed)
            )

            def pairs(epoch: int) -> Iterable[tuple[Batch, Batch | None]]:
                return zip(shuffled(context.forget, config.batch_size, context.seed, epoch), beside, strict=False)

            curve = descend(
                context,
                config,
                pairs,
                objective,
                method=self.name,
                items_per_epoch=batches_of(context.forget, config.batch_size),
            )
        n_retained = 0 if retained is None else len(retained)
        return MethodOutcome(diagnostics={"retained_rows": n_retained, "objective_by_epoch": curve})


def log_likelihood(targets: Targets) -> Tensor:
    """Σ over each row's targets of log p(label), `(rows,)`; 0 for a row without targets."""
    log_p = -F.cross_entropy(targets.logits, targets.labels, reduction="none")
    return log_p.new_zeros(targets.n_rows).index_add(0, targets.rows, log_p)
