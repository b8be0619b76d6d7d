"""`bad-teacher`: learn the forget rows from a network that knows nothing, the others from the old model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from transformers import set_seed

from hf_iau.data import RowSource, TaskKind, evaluation_mode
from hf_iau.data.rows import Batch
from hf_iau.errors import UnsupportedModelError
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.teacher_student import Student, Teacher, check_task, divergence
from hf_iau.methods.baselines.training_loop import TrainingLoopConfig, descend, fitting_batch_size
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.utils.config_checks import check_number


@dataclass(frozen=True)
class BadTeacherConfig(TrainingLoopConfig):
    """Configuration of `bad-teacher`; the defaults are those of the public code."""

    epochs: int = field(default=1, metadata={"help": "Passes over the forget rows and the drawn retained rows."})
    lr: float = field(default=1e-4, metadata={"help": "Learning rate."})
    optimizer: str = field(default="adamw", metadata={"help": "'adamw', or 'sgd'."})
    weight_decay: float = field(default=0.0, metadata={"help": "Weight decay of the optimizer."})
    retain_share: float = field(default=0.3, metadata={"help": "Share of the retained rows that is drawn, once."})
    temperature: float = field(default=1.0, metadata={"help": "Softmax temperature of the KL divergence."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "retain_share", above=0, at_most=1)
        check_number(self, "temperature", above=0)


@register_method
class BadTeacher:
    """θ ← θ − lr·∇ mean[KL(random ‖ θ) on D_f, KL(old ‖ θ) on D_r], rows of both mixed in each batch.

    Needs the retained rows; single-label classification, and token classification or language models by target. The
    teacher that knows nothing is the model with every module's parameters drawn anew.
    """

    name: ClassVar[str] = "bad-teacher"
    config_class: ClassVar[type] = BadTeacherConfig
    citation: ClassVar[str] = (
        "Chundawat, Tarun, Mandal, Kankanhalli: Can Bad Teaching Induce Forgetting?, 2022 (arXiv 2205.08096)"
    )

    def check(self, context: ForgetContext, config: BadTeacherConfig) -> None:
        context.check_retained(self.name)
        check_task(context, self.name, TaskKind.SINGLE_LABEL, TaskKind.TOKENS)

    def run(self, context: ForgetContext, config: BadTeacherConfig) -> MethodOutcome:
        good, bad, student = Teacher(context.model), ignorant_teacher(context), Student(context)

        def batches(epoch: int) -> Iterator[tuple[Tensor, Batch]]:
            order = np.random.default_rng([context.seed, epoch]).permutation(len(mixed))
            for positions, inputs in mixed.select(order).resized(size):
                yield torch.from_numpy(order[positions] < len(context.forget)), inputs

        def objective(item: tuple[Tensor, Batch]) -> Tensor | None:
            is_forget, inputs = item
            _, targets = student.targets(inputs)
            if len(targets) == 0:
                return None
            taught, untaught = good.targets(inputs), bad.targets(inputs)
            chosen = is_forget.to(targets.rows.device)[targets.rows][:, None]
            wanted = replace(taught, logits=torch.where(chosen, untaught.logits, taught.logits))
            # The paper's loss has no factor T².
            return divergence(targets, wanted, config.temperature) / config.temperature**2 / len(targets)

        with context.timer.phase("update"), student.watched():
            retained = context.retained_rows(self.name)
            drawn = retained.sample(max(1, int(config.retain_share * len(retained))), context.seed)
            mixed = RowSource(
                ConcatDataset([context.forget.dataset, drawn.dataset]),
                context.forget.collator,
                batch_size=config.batch_size or context.forget.batch_size,
                device=context.forget.device,
                name="forget and retained rows",
                num_workers=context.forget.num_workers,
            )
            size = fitting_batch_size(len(mixed), mixed.batch_size)
            curve = descend(
                context, config, batches, objective, method=self.name, items_per_epoch=-(-len(mixed) // size)
            )
        return MethodOutcome(
            diagnostics={"retained_rows": len(retained), "drawn_rows": len(drawn), "divergence_by_epoch": curve}
        )


def ignorant_teacher(context: ForgetContext) -> Teacher:
    """The model with the parameters of every module drawn anew, as when it was made.

    Raises:
        UnsupportedModelError: no module can do that.
    """
    teacher = Teacher(context.model)
    drawn = 0
    with evaluation_mode(context.model):  # puts the generators back
        set_seed(context.seed)
        for module in teacher.model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                drawn += 1
    if not drawn:
        raise UnsupportedModelError(
            f"method='bad-teacher' draws the parameters of {type(context.model).__name__} anew, and none of its "
            "modules has reset_parameters()."
        )
    return teacher
