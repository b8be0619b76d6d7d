"""The rows that a request names: each once, and none that is out already."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from hf_iau.data import RowSource
from hf_iau.data.rows import refuse_iterable, row_bytes, select_rows
from hf_iau.errors import RequestError


@dataclass(frozen=True, eq=False)
class NamedRows:
    """The rows of a request, found and checked once; may be passed to `unlearn` as its forget_dataset.

    Attributes:
        dataset: the forget rows.
        positions: their numbers in the training set, int64, `(m,)`, where they were named so; else None.
        fingerprints: keyed fingerprints of their content, uint8, `(m, 16)`; None where they were not made yet.
    """

    dataset: Any
    positions: np.ndarray | None = None
    fingerprints: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.dataset)


def requested_rows(train_dataset: Any, forget_dataset: Any, forget_indices: Any) -> NamedRows:
    """The forget rows and, where they were named by number, their positions in `train_dataset`.

    Args:
        train_dataset: the training rows, or None.
        forget_dataset, forget_indices: as given to `unlearn`; one of them.

    Raises:
        RequestError: neither or both were given; or numbers that are no rows of `train_dataset`, or occur twice.
        UnsupportedModelError: rows without numbers.
    """
    if (forget_dataset is None) == (forget_indices is None):
        given = "neither" if forget_dataset is None else "both"
        raise RequestError(f"unlearn() was given {given}: pass either forget_dataset= or forget_indices=.")
    if isinstance(forget_dataset, NamedRows):
        return forget_dataset
    if forget_dataset is not None:
        _refuse_numbers(forget_dataset)
        refuse_iterable(forget_dataset, "forget rows")
        return NamedRows(forget_dataset)
    if train_dataset is None:
        raise RequestError(
            "forget_indices= name rows of train_dataset, but the trainer has none: pass forget_dataset=."
        )
    refuse_iterable(train_dataset, "training rows")
    return NamedRows(*_checked_positions(train_dataset, forget_indices))


def _refuse_numbers(forget_dataset: Any) -> None:
    """Raise `RequestError` where row numbers were given in place of rows."""
    listed = isinstance(forget_dataset, (list, tuple, range, np.ndarray, Tensor)) and len(forget_dataset) > 0
    if listed and isinstance(forget_dataset[0], (int, str, np.integer, Tensor)):
        raise RequestError(
            f"forget_dataset is a {type(forget_dataset).__name__} that begins with {forget_dataset[0]!r}, which is no "
            "row: give row numbers as forget_indices=."
        )


def _checked_positions(train_dataset: Any, forget_indices: Any) -> tuple[Any, np.ndarray]:
    """The rows of `train_dataset` that `forget_indices` name, after checking every number."""
    positions = np.asarray(forget_indices.cpu() if isinstance(forget_indices, Tensor) else forget_indices)
    if positions.size == 0:
        return select_rows(train_dataset, []), np.zeros(0, dtype=np.int64)
    if positions.ndim != 1 or positions.dtype.kind not in "iu":
        raise RequestError(
            f"forget_indices has shape {positions.shape} and type {positions.dtype}: give a flat list of whole numbers."
        )
    n_rows = len(train_dataset)
    outside = positions[(positions < 0) | (positions >= n_rows)]
    if outside.size:
        raise RequestError(
            f"forget_indices holds {outside.size} numbers outside 0..{n_rows - 1}, e.g. {int(outside[0])}: "
            f"train_dataset has {n_rows} rows."
        )
    values, counts = np.unique(positions, return_counts=True)
    if (counts > 1).any():
        raise RequestError(
            f"forget_indices names {int((counts > 1).sum())} rows more than once, e.g. row "
            f"{int(values[counts > 1][0])}: name each row once."
        )
    return select_rows(train_dataset, positions), positions.astype(np.int64)


def refuse_repeated_rows(forget: RowSource, digests: Counter[bytes], train: RowSource | None) -> None:
    """Raise `RequestError` for a row that the request holds more often than the training set does."""
    repeated = {digest: count for digest, count in digests.items() if count > 1}
    if isinstance(forget.dataset, Subset):
        numbers = [int(i) for i in forget.dataset.indices]
        twice = [number for number, count in Counter(numbers).items() if count > 1]
        if twice:
            raise RequestError(f"forget_dataset names row {twice[0]} more than once: name each row once.")
    if not repeated or train is None:
        return
    trained = Counter(d for i in range(len(train)) if (d := row_bytes(train.dataset[i])) in repeated)
    for digest, count in repeated.items():
        if count > trained[digest]:
            position = next(i for i in range(len(forget)) if row_bytes(forget.dataset[i]) == digest)
            raise RequestError(
                f"forget_dataset holds the row at position {position} {count} times but train_dataset only "
                f"{trained[digest]} times: name each row once."
            )


def forgotten_before(digests: Counter[bytes], forgotten: Counter[bytes], train: RowSource | None) -> int:
    """How many rows of a request were forgotten earlier; a further copy of a forgotten row is not among them.

    Args:
        digests: of the request's rows, with how often each occurs.
        forgotten: the same of the rows that earlier requests took out.
        train: all training rows, where they are at hand.
    """
    shared = set(digests) & set(forgotten)
    if not shared or train is None:
        return len(shared)
    trained = Counter(d for i in range(len(train)) if (d := row_bytes(train.dataset[i])) in shared)
    return sum(digests[digest] + forgotten[digest] > trained[digest] for digest in shared)
