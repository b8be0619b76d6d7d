"""What the tests of the baselines share: plain restatements of their parts."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_models import Row, rows_of
from torch import Tensor, nn
from unlearning_trainers import FORGET, ROWS, make_trainer

from hf_iau import UnlearningTrainer

KEPT = [i for i in range(ROWS) if i not in FORGET]


def exact_trainer(folder: Path, family: str = "plain", **kwargs: Any) -> UnlearningTrainer:
    """A trainer of a float64 model, so that restatements agree to many digits."""
    return make_trainer(folder, family, dtype=torch.float64, **kwargs)


def row_batches(numbers: Iterable[int], size: int, seed: int, epoch: int, family: str = "plain") -> list[list[Row]]:
    """The rows with these numbers, in the order in which `epochs.shuffled` reads them.

    `size` must leave no single row over.
    """
    rows = rows_of(family, ROWS)
    chosen = [rows[i] for i in numbers]
    order = np.random.default_rng([seed, epoch]).permutation(len(chosen))
    return [[chosen[i] for i in order[start : start + size]] for start in range(0, len(chosen), size)]


def loss_of(trainer: UnlearningTrainer, model: nn.Module, rows: list[Row]) -> Tensor:
    """The model's own mean loss of a batch."""
    return model(**trainer.data_collator([dict(row) for row in rows]))["loss"]


def copy_in_training(trainer: UnlearningTrainer) -> nn.Module:
    """A copy of the trainer's model in training mode."""
    return copy.deepcopy(trainer.model).train()


def assert_close(model: nn.Module, expected: nn.Module, tolerance: float = 1e-12) -> None:
    """Every parameter and buffer agrees."""
    ours = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    theirs = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=name)
