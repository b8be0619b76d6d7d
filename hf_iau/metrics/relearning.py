"""Relearn time: how soon does plain fine-tuning on the forget rows bring back what the model knew of them?

What was only hidden comes back in a few steps; what was forgotten takes as long as it takes a retrained model (Golatkar
et al. 2020, arXiv 1911.04933; Tarun et al. 2021, arXiv 2111.08947; the ratio of the two times is the anamnesis index of
Chundawat et al. 2023, arXiv 2201.05629).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hf_iau.data.model_mode import preserved_random_state
from hf_iau.data.predictions import predict_rows
from hf_iau.data.row_loss import ModelRowLoss, RowLoss
from hf_iau.data.rows import RowSource
from hf_iau.errors import ConfigError, RequestError


@dataclass(frozen=True)
class RelearnTime:
    """How long a model took to relearn the forget rows.

    Attributes:
        reached: whether it did, within the steps allowed.
        steps: optimizer steps until it was first *seen* to be there; None if it never was.
        epochs: the same in passes over the forget rows.
        measured_at: the steps after which the forget rows were measured, the first being 0.
        losses: mean plain loss a target of the forget rows at those steps.
        accuracies: their accuracy at those steps; NaN for regression.
    """

    reached: bool
    steps: int | None
    epochs: float | None
    measured_at: tuple[int, ...]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def relearn_time(
    model: nn.Module,
    forget: RowSource,
    *,
    target_loss: float | None = None,
    target_accuracy: float | None = None,
    learning_rate: float = 1e-4,
    max_epochs: int = 30,
    measure_every: int | None = None,
    row_loss: RowLoss | None = None,
    seed: int = 0,
) -> RelearnTime:
    """Fine-tune a copy of `model` on the forget rows until it knows them as well as before the request.

    Args:
        model: the bare model; it is left as it is.
        forget: the forget rows, in batches of the size to train with.
        target_loss: mean loss of the forget rows *before* they were forgotten.
        target_accuracy: their accuracy before, 0 to 1. Give one of the two, or both: then both must be reached.
        learning_rate: of AdamW, constant, without weight decay.
        max_epochs: passes over the forget rows to give up after.
        measure_every: steps between two measurements; default: one pass over the rows.
        row_loss: what is trained; default: the loss that the model itself returns.
        seed: of the rows' order and of dropout.

    The number means little alone: it depends on the learning rate. Compare it with that of a retrained model, found
    with the same arguments.

    Raises:
        ConfigError: without a target, or for arguments that are not positive.
        RequestError: without rows, or for a model of which nothing is trained.
    """
    if target_loss is None and target_accuracy is None:
        raise ConfigError(
            "Neither target_loss nor target_accuracy was given: give the forget rows' loss or accuracy before the "
            "request, e.g. `result.report.before['forget_loss']`."
        )
    if not learning_rate > 0 or max_epochs < 1 or (measure_every is not None and measure_every < 1):
        raise ConfigError(
            f"learning_rate={learning_rate}, max_epochs={max_epochs}, measure_every={measure_every}: give numbers "
            "above 0."
        )
    if not len(forget):
        raise RequestError("forget holds no rows: there is nothing to relearn.")
    learner = copy.deepcopy(model)
    parameters = [p for p in learner.parameters() if p.requires_grad]
    if not parameters:
        raise RequestError("No parameter of the model is trained (requires_grad), so it cannot relearn anything.")
    row_loss = row_loss or ModelRowLoss()
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    steps_per_epoch = math.ceil(len(forget) / forget.batch_size)
    every = measure_every or steps_per_epoch
    measured_at: list[int] = []
    losses: list[float] = []
    accuracies: list[float] = []

    def arrived(step: int) -> bool:
        found = predict_rows(learner, forget)
        measured_at.append(step)
        losses.append(found.mean_loss)
        accuracies.append(found.accuracy)
        return (target_loss is None or losses[-1] <= target_loss) and (
            target_accuracy is None or accuracies[-1] >= target_accuracy
        )

    step, reached = 0, arrived(0)
    with preserved_random_state(learner):
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        learner.train()
        for _ in range(max_epochs):
            if reached or not math.isfinite(losses[-1]):
                break
            for _, inputs in forget.select(torch.randperm(len(forget), generator=order).numpy()):
                total, targets = row_loss(learner, inputs)
                optimizer.zero_grad()
                (total / max(targets, 1)).backward()
                optimizer.step()
                step += 1
                if step % every == 0:
                    reached = arrived(step)
                    if reached or not math.isfinite(losses[-1]):
                        break
    return RelearnTime(
        reached=reached,
        steps=step if reached else None,
        epochs=step / steps_per_epoch if reached else None,
        measured_at=tuple(measured_at),
        losses=tuple(losses),
        accuracies=tuple(accuracies),
    )


def first_reached(curve: Sequence[float], target: float, *, higher_is_better: bool = False) -> int | None:
    """First position at which a curve of losses (or accuracies) is as good as `target`; None if it never is."""
    for position, value in enumerate(curve):
        if value >= target if higher_is_better else value <= target:
            return position
    return None
