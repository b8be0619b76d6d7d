"""A model's outputs beside its loss: for methods that relabel rows or learn from a teacher."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_iau.data import Targets, TaskKind, evaluation_mode, labels_of, predicted_targets, read_targets
from hf_iau.data.rows import Batch
from hf_iau.errors import UnsupportedModelError
from hf_iau.methods.context import ForgetContext


def check_task(context: ForgetContext, method: str, *kinds: TaskKind) -> int:
    """The number of classes (or tokens) that the model chooses among.

    Raises:
        UnsupportedModelError: the rows' task is none of `kinds`.
    """
    model = context.model
    with evaluation_mode(model), torch.no_grad():
        inputs = context.forget.select([0]).first_batch()
        targets = predicted_targets(model, inputs)
    if targets.kind not in kinds:
        raise UnsupportedModelError(
            f"method={method!r} serves {' and '.join(kinds)}, not {targets.kind}: its update has no meaning there. "
            "Choose another method, e.g. 'iau' or 'neggrad-plus'."
        )
    return int(targets.logits.shape[1])


class Teacher:
    """A frozen copy of a model, in evaluation mode.

    Args:
        model: the bare model, as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        with evaluation_mode(model):
            self.model = copy.deepcopy(model).requires_grad_(False)

    def targets(self, inputs: Batch) -> Targets:
        """What the teacher predicts for a batch, without gradients."""
        with torch.no_grad():
            return predicted_targets(self.model, inputs)


class Student:
    """Reads the targets that a model predicts while its row loss is computed, so that one forward pass serves both.

    Args:
        context: of the request; its model is the student.
    """

    def __init__(self, context: ForgetContext) -> None:
        self.context = context
        self._outputs: list[Any] = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[Student]:
        """While inside, `targets` may be called."""
        handle = self.context.model.register_forward_hook(lambda module, args, outputs: self._outputs.append(outputs))
        try:
            yield self
        finally:
            handle.remove()
            self._outputs.clear()

    def targets(self, inputs: Batch) -> tuple[Tensor, Targets]:
        """Summed row loss of a batch and its targets, both with gradients."""
        self._outputs.clear()
        loss, _ = self.context.row_loss(self.context.model, inputs)
        if not self._outputs:
            raise UnsupportedModelError("The row loss does not call the model itself, so its outputs cannot be read.")
        return loss, read_targets(self.context.model, self._outputs[-1], labels_of(inputs))


def divergence(student: Targets, teacher: Targets, temperature: float) -> Tensor:
    """Σ over targets of T²·KL(teacher ‖ student) at softmax temperature T (Hinton et al. 2015)."""
    ours, theirs = (F.log_softmax(targets.logits / temperature, dim=1) for targets in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, reduction="sum", log_target=True)
