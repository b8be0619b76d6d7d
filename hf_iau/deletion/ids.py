"""Rows named by the ids of the people they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from hf_iau.data.rows import refuse_iterable, select_rows
from hf_iau.data.trainer_rows import trainer_rows
from hf_iau.errors import AlreadyForgottenError, RequestError
from hf_iau.memory.fingerprints import data_fingerprint
from hf_iau.memory.keys import Key, process_key
from hf_iau.memory.row_identity import keyed_fingerprints
from hf_iau.trainer.regather import remaining_rows
from hf_iau.unlearn.view import TrainerView


def rows_of_ids(dataset: Any, column: str | None, ids: Sequence[Any]) -> np.ndarray:
    """Numbers of the rows of `dataset` whose `column` holds one of `ids`: int64, ascending.

    Args:
        dataset: the training rows, with a column of ids (a `datasets.Dataset`, or a torch one whose rows are mappings).
        column: its name.
        ids: what is looked for; each must be there.

    Raises:
        RequestError: no column of that name, or ids that no row has.
    """
    if column is None:
        raise RequestError('ids name rows by a column: give DeletionService(trainer, id_column="user_id").')
    if dataset is None:
        raise RequestError("ids name rows of train_dataset, but the trainer has none: give it one.")
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise RequestError(f"ids is a {type(ids).__name__}: give a list of ids.")
    refuse_iterable(dataset, "training rows")
    try:
        wanted = {_plain(value) for value in ids}
    except TypeError as error:
        raise RequestError(f"ids holds something that is no id ({error}): give numbers or texts.") from error
    held = _values(dataset, column)
    chosen = [i for i, value in enumerate(held) if value in wanted]
    missing = wanted - {held[i] for i in chosen}
    if missing:
        # Not the id itself: errors end up in logs.
        place = next(i for i, value in enumerate(ids) if _plain(value) in missing)
        known = type(held[0]).__name__ if held else "nothing"
        raise RequestError(
            f"{len(missing)} of {len(wanted)} ids are in no training row, e.g. the one at position {place} (a "
            f"{type(_plain(ids[place])).__name__}; column {column!r} holds {known}): they were never trained on, or "
            "are written differently."
        )
    return np.asarray(chosen, dtype=np.int64)


def rows_still_in(view: TrainerView, numbers: np.ndarray, key: Key | None) -> tuple[np.ndarray, list[str]]:
    """Those of the training rows with these `numbers` that no request took out, and what is to be said of the others.

    With a key the memory tells which rows are out, without one only the trainer that ran the requests does.

    Args:
        view: of the trainer.
        numbers: of rows of the data set that the trainer was given, int64, `(m,)`.
        key: that the memory's row fingerprints were made with, or None.
    """
    memory, forgotten = view.read_memory(), view.state.forgotten
    identity = None if memory is None else memory.row_identity
    out = np.zeros(len(numbers), dtype=bool)
    notes = []
    if identity is not None and identity.of_process:
        key = process_key()
    if memory is not None and identity is not None and key is not None:
        identity.check_key(key)
        model, dataset = view.model, view.rows.dataset
        if memory.data == data_fingerprint(model, trainer_rows(view.trainer, dataset, "training rows").dataset):
            out = np.isin(numbers, view.rows.numbers_at(np.flatnonzero(identity.forgotten)))
        else:  # other rows than were gathered from: it is their content that counts
            at = [view.rows.positions(number[None]) for number in numbers]
            asked = keyed_fingerprints(key, model, select_rows(dataset, np.concatenate(at)))
            still = identity.still_in(asked)
            ends = np.cumsum([len(places) for places in at])
            out = np.asarray([len(part) > 0 and not part.any() for part in np.split(still, ends[:-1])], dtype=bool)
    else:
        if forgotten:
            source = trainer_rows(view.trainer, view.rows.dataset, "training rows")
            out = ~np.isin(numbers, view.rows.numbers_at(np.asarray(remaining_rows(view, source), dtype=np.int64)))
            out &= ~np.isin(numbers, view.rows.dropped)
        unknown = 0 if memory is None else memory.forgotten_rows - forgotten.total()
        if unknown > 0:
            notes.append(
                f"{unknown} rows were forgotten before this trainer was made, and the memory, which was gathered "
                "without a key (HF_IAU_KEY), does not know which: rows of these ids that are among them were "
                "forgotten a second time. Then revert() it, and name the others by forget_indices=."
            )
    if out.any():
        notes.append(
            f"{int(out.sum())} of the {len(numbers)} rows of these ids were forgotten by an earlier request: this one "
            f"is of the other {len(numbers) - int(out.sum())}."
        )
    return numbers[~out], notes


def all_forgotten(rows: int) -> AlreadyForgottenError:
    """The error for ids that have `rows` rows, all of which are out."""
    return AlreadyForgottenError(
        f"All {rows} rows of these ids were already forgotten by an earlier request: there is nothing left to do."
    )


def _values(dataset: Any, column: str) -> list[Any]:
    if isinstance(dataset, datasets.Dataset):
        if column not in dataset.column_names:
            raise RequestError(f"id_column={column!r} is no column of train_dataset: it has {dataset.column_names}.")
        return list(dataset.with_format(None)[column])
    found = []
    for i in range(len(dataset)):
        row = dataset[i]
        if not isinstance(row, Mapping) or column not in row:
            columns = sorted(row) if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise RequestError(f"id_column={column!r} is not in row {i} of train_dataset: it has {columns}.")
        found.append(_plain(row[column]))
    return found


def _plain(value: Any) -> Any:
    """A number or text that can be compared and hashed, from whatever holds it."""
    return value.item() if hasattr(value, "item") else value
