"""Gathering anew at a trainer's present weights, from the rows that are still in."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from hf_iau.data import RowSource
from hf_iau.data.precision import compute_settings
from hf_iau.data.rows import select_rows
from hf_iau.data.trainer_rows import model_of, trainer_rows
from hf_iau.errors import MemoryFileError, MissingMemoryError
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.fingerprints import data_fingerprint, weights_fingerprint
from hf_iau.memory.gathering import build_memory, identify_rows
from hf_iau.memory.keys import find_key
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.row_identity import RowIdentity, keyed_fingerprints
from hf_iau.methods.context import remaining_positions

if TYPE_CHECKING:
    from hf_iau.trainer.unlearning_trainer import UnlearningTrainer

logger = logging.getLogger(__name__)


def gather_remaining(trainer: UnlearningTrainer, config: GatherConfig, dataset: Any) -> GradientMemory:
    """A memory of the trainer's present weights, from the rows of `dataset` that were not forgotten.

    Args:
        trainer: whose model, loss and optimizer it is.
        config: what to gather.
        dataset: all training rows.
    """
    source = trainer_rows(trainer, dataset, "training rows", config.batch_size)
    model = model_of(trainer)
    identity = _identity_of(trainer, model, source)
    kept = source
    if identity is not None and bool(identity.forgotten.any()):
        kept = source.select(np.flatnonzero(~identity.forgotten))
    elif trainer.unlearning_state.forgotten:
        kept = source.select(positions := _remaining(trainer, source))
        if identity is not None:
            identity = replace(identity, forgotten=~np.isin(np.arange(len(source)), positions))
    memory = build_memory(model, kept, trainer.row_loss, config, optimizer=trainer.optimizer)
    memory.row_identity = identity
    if len(kept) < len(source):
        # Row numbers still name rows of the whole training set.
        memory.data = data_fingerprint(model, source.dataset)
        with compute_settings(config.precision):
            memory.loss["probe"] = memory.probe_loss(model, trainer.row_loss, source)
        memory.forgotten_rows = len(source) - len(kept)
    return memory


def rows_still_in(trainer: UnlearningTrainer, positions: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Those of the training rows at `positions` that no request took out, and what is to be said about the others."""
    memory, key = trainer.memory, find_key(trainer.args.output_dir)
    forgotten = trainer.unlearning_state.forgotten
    identity = None if memory is None else memory.row_identity
    notes = []
    if identity is not None and key is not None:
        identity.check_key(key)
        asked = keyed_fingerprints(key, model_of(trainer), select_rows(trainer.train_dataset, positions))
        still = positions[identity.still_in(asked)]
    else:
        still = positions
        if forgotten:
            source = trainer_rows(trainer, trainer.train_dataset, "training rows")
            still = positions[np.isin(positions, _remaining(trainer, source))]
        unknown = 0 if memory is None else memory.forgotten_rows - forgotten.total()
        if unknown > 0:
            notes.append(
                f"{unknown} rows were forgotten before this trainer was made, and the memory, which was gathered "
                "without a key (HF_IAU_KEY), does not know which: rows of these ids that are among them were "
                "forgotten a second time. Then revert() it, and name the others by forget_indices=."
            )
    if len(still) < len(positions):
        notes.append(
            f"{len(positions) - len(still)} of the {len(positions)} rows of these ids were forgotten by an earlier "
            f"request: this one is of the other {len(still)}."
        )
    return still, notes


def _remaining(trainer: UnlearningTrainer, source: RowSource) -> list[int]:
    state = trainer.unlearning_state
    return remaining_positions(source, state.forgotten, likely=state.forgotten_positions)


def _identity_of(trainer: UnlearningTrainer, model: nn.Module, source: RowSource) -> RowIdentity | None:
    """The rows' identity in the memory of these weights, where that is of these rows; else a new one with a key."""
    with contextlib.suppress(MissingMemoryError, MemoryFileError):
        memory = trainer.memory
        known = None if memory is None else memory.row_identity
        if memory is not None and known is not None and memory.data == data_fingerprint(model, source.dataset):
            if memory.model["weights"] == weights_fingerprint(model):
                return known
            if known.forgotten.any():
                logger.warning(
                    "The memory that is there belongs to other weights; its %d forgotten rows are taken to have been "
                    "trained on again.",
                    int(known.forgotten.sum()),
                )
    return identify_rows(model, source.dataset, trainer.args.output_dir)
