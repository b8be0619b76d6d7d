"""`random-labels`: train on, with wrong labels for the forget rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_iau.data import RowSource, TaskKind
from hf_iau.data.rows import Batch
from hf_iau.data.targets import IGNORED_LABEL
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.teacher_student import check_task
from hf_iau.methods.baselines.training_loop import TrainingLoopConfig, batches_of, descend, mean_loss, shuffled
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome


@dataclass(frozen=True)
class RandomLabelsConfig(TrainingLoopConfig):
    """Configuration of `random-labels`; the defaults are those of SalUn's public code."""


@register_method
class RandomLabels:
    """θ ← θ − lr·∇ℓ(x_f, y′) with y′ ≠ y drawn anew each epoch, then θ ← θ − lr·∇L_r, for some epochs.

    Needs the retained rows; single-label classification alone.
    """

    name: ClassVar[str] = "random-labels"
    config_class: ClassVar[type] = RandomLabelsConfig
    citation: ClassVar[str] = (
        "Golatkar, Achille, Soatto: Eternal Sunshine of the Spotless Net, 2020 (arXiv 1911.04933); Graves, Nagisetty, "
        "Ganesh: Amnesiac Machine Learning, 2020 (arXiv 2010.10981)"
    )

    def check(self, context: ForgetContext, config: RandomLabelsConfig) -> None:
        context.check_retained(self.name)
        check_task(context, self.name, TaskKind.SINGLE_LABEL)

    def run(self, context: ForgetContext, config: RandomLabelsConfig) -> MethodOutcome:
        with context.timer.phase("update"):
            retained = context.retained_rows(self.name)
            curve = learn_other_labels(context, config, retained, method=self.name)
        return MethodOutcome(diagnostics={"retained_rows": len(retained), "loss_by_epoch": curve})


def learn_other_labels(
    context: ForgetContext,
    config: TrainingLoopConfig,
    retained: RowSource,
    *,
    method: str,
    mask: Mapping[str, Tensor] | None = None,
) -> list[float]:
    """Each epoch one pass over the forget rows with other labels and one over the retained rows with theirs.

    Returns the mean loss by epoch. `mask` as in `descend`.
    """
    n_classes = check_task(context, method, TaskKind.SINGLE_LABEL)

    def batches(epoch: int) -> Iterator[Batch]:
        draws = np.random.default_rng([context.seed, epoch, 1])
        for inputs in shuffled(context.forget, config.batch_size, context.seed, epoch):
            yield {**inputs, "labels": other_labels(inputs["labels"], n_classes, draws)}
        yield from shuffled(retained, config.batch_size, context.seed, epoch)

    return descend(
        context,
        config,
        batches,
        lambda inputs: mean_loss(context, inputs),
        method=method,
        items_per_epoch=batches_of(context.forget, config.batch_size) + batches_of(retained, config.batch_size),
        mask=mask,
    )


def other_labels(labels: Tensor, n_classes: int, draws: np.random.Generator) -> Tensor:
    """For each label one of the other classes, all of them equally likely; ignored labels stay."""
    shift = torch.from_numpy(draws.integers(1, n_classes, size=tuple(labels.shape))).to(labels)
    return torch.where(labels == IGNORED_LABEL, labels, (labels + shift) % n_classes)
