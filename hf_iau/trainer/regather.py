"""Gathering anew at a trainer's present weights, from the rows that are still in."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import numpy as np

from hf_iau.data import RowSource
from hf_iau.data.precision import mixed_precision_of
from hf_iau.data.trainer_rows import trainer_rows
from hf_iau.errors import MemoryFileError, MissingMemoryError
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.fingerprints import data_fingerprint, weights_fingerprint
from hf_iau.memory.gathering import gather_without, identify_rows
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.row_identity import RowIdentity
from hf_iau.methods.context import remaining_positions
from hf_iau.unlearn.view import TrainerView

logger = logging.getLogger(__name__)


def gather_remaining(
    view: TrainerView, config: GatherConfig, dataset: Any, out: np.ndarray | None = None
) -> GradientMemory:
    """A memory of the trainer's present weights, from the rows of `dataset` that were not forgotten.

    Args:
        view: of the trainer whose model, loss and optimizer it is.
        config: what to gather.
        dataset: all training rows.
        out: which of them are known to be out, for where no memory tells: bool, `(rows,)`.
    """
    config = config.resolved(mixed_precision_of(view.args), view.args.device)
    source = trainer_rows(view.trainer, dataset, "training rows", config.batch_size)
    model = view.model
    identity = _identity_of(view, source)
    forgotten = np.zeros(len(source), dtype=bool) if identity is None else identity.forgotten
    if not forgotten.any() and view.state.forgotten:
        forgotten = ~np.isin(np.arange(len(source)), remaining_rows(view, source))
    if not forgotten.any() and out is not None:
        forgotten = out
    memory = gather_without(model, source, identity, forgotten, view.row_loss, config, view.trainer.optimizer)
    with contextlib.suppress(MissingMemoryError, MemoryFileError):
        before = view.read_memory()
        if before is not None and before.data == memory.data:
            memory.visits = before.visits
    return memory


def remaining_rows(view: TrainerView, source: RowSource) -> list[int]:
    """Numbers of the rows of `source` that the requests of this trainer left in."""
    return remaining_positions(source, view.state.forgotten, likely=view.state.forgotten_positions)


def _identity_of(view: TrainerView, source: RowSource) -> RowIdentity | None:
    """The rows' identity in the memory of these weights, where that is of these rows; else a new one with a key."""
    model = view.model
    with contextlib.suppress(MissingMemoryError, MemoryFileError):
        memory = view.read_memory()
        identity = None if memory is None else memory.row_identity
        if memory is not None and identity is not None and memory.data == data_fingerprint(model, source.dataset):
            if memory.model["weights"] == weights_fingerprint(model):
                return identity
            if identity.forgotten.any():
                logger.warning(
                    "The memory that is there belongs to other weights; its %d forgotten rows are taken to have been "
                    "trained on again.",
                    int(identity.forgotten.sum()),
                )
    return identify_rows(model, source.dataset, view.args.output_dir)
