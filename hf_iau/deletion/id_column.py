"""Rows named by the ids of the people they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from hf_iau.data.rows import refuse_iterable
from hf_iau.errors import RequestError


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
        raise RequestError('ids name rows by a column: give UnlearningTrainer(id_column="user_id").')
    if dataset is None:
        raise RequestError("ids name rows of train_dataset, but the trainer has none.")
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise RequestError(f"ids={ids!r} is a {type(ids).__name__}: give a list of ids.")
    refuse_iterable(dataset, "training rows")
    wanted = {_plain(value) for value in ids}
    held = _values(dataset, column)
    chosen = [i for i, value in enumerate(held) if value in wanted]
    missing = wanted - {held[i] for i in chosen}
    if missing:
        example = sorted(missing, key=str)[0]
        known = type(held[0]).__name__ if held else "nothing"
        raise RequestError(
            f"{len(missing)} of {len(wanted)} ids are in no training row, e.g. {example!r} (a "
            f"{type(example).__name__}; column {column!r} holds {known}): they were never trained on, or are written "
            "differently."
        )
    return np.asarray(chosen, dtype=np.int64)


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
