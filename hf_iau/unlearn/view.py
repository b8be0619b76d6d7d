"""What a request uses of the trainer that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from hf_iau.data import RowLoss
from hf_iau.data.trainer_rows import model_of
from hf_iau.errors import MissingMemoryError
from hf_iau.memory.memory import GradientMemory
from hf_iau.report.card import UnlearningCard
from hf_iau.unlearn.rows import TrainingRows
from hf_iau.unlearn.state import UnlearningState


@dataclass(frozen=True)
class TrainerView:
    """A trainer, as narrow as a request sees it.

    Attributes:
        trainer: for its collator and columns, and for methods that train anew with its settings.
        row_loss: ℓ.
        state: what the trainer knows of its requests; a request changes it.
        read_memory: gives the memory in force, or None; may raise where it cannot be read.
        read_card: gives what the model card tells of the present weights.
        rows: the training rows, as they are trained on and as they were given.
        why_no_memory: why gathering after training was not possible, where nobody had asked for it; else None.
    """

    trainer: Trainer
    row_loss: RowLoss
    state: UnlearningState
    read_memory: Callable[[], GradientMemory | None]
    read_card: Callable[[], UnlearningCard]
    rows: TrainingRows
    why_no_memory: Exception | None = None

    @property
    def args(self) -> TrainingArguments:
        """The trainer's arguments."""
        return self.trainer.args

    @property
    def model(self) -> nn.Module:
        """The bare model."""
        return model_of(self.trainer)

    @property
    def eval_dataset(self) -> Any:
        """The held-out rows, where the request brings none; or None."""
        return self.trainer.eval_dataset

    def missing_memory(self, error: MissingMemoryError) -> MissingMemoryError:
        """`error`, with the reason why there is no memory where that is known."""
        if self.why_no_memory is None:
            return error
        return MissingMemoryError(
            f"{error} Gathering after training was not possible: {self.why_no_memory} Mend that and call "
            "trainer.gather()."
        )
