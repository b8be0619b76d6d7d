"""The rows that a request names: each once, and none that is out already or was never trained on."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from hf_iau.data import RowSource
from hf_iau.data.digests import row_digests
from hf_iau.data.rows import refuse_iterable, select_rows
from hf_iau.errors import RequestError, UnknownRowsError

# So many copies of training rows among held-out rows are no sign that they were trained on.
_FEW_COPIES, _SHARE_OF_COPIES = 2, 0.02

NUMBER_COLUMN = "hf_iau_row_number"
"""The column that carries row numbers through a trainer's own preparation of its training rows."""


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """The training rows as they are trained on, and as they were given to the trainer.

    A trainer may tokenise, filter, split or shuffle what it is given. Row numbers always name rows of what was given.

    Attributes:
        dataset: what is trained on, or None.
        given: what was given; the same object where the trainer left it alone.
        numbers: int64, `(rows of dataset,)`: each row's number in `given`; None where it is the same row for row, or
            not known.
        prepared_by: name of the trainer that made other rows of what it was given; None where it left them alone.
        cut: numbers of the given rows that it cut to a length, int64.
    """

    dataset: Any
    given: Any
    numbers: np.ndarray | None = None
    prepared_by: str | None = None
    cut: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @classmethod
    def of(cls, dataset: Any) -> TrainingRows:
        """Rows that are trained on as they were given."""
        return cls(dataset, dataset)

    @property
    def dropped(self) -> np.ndarray:
        """Numbers of the given rows that are not trained on, ascending (int64)."""
        if self.numbers is None:
            return np.zeros(0, dtype=np.int64)
        return np.setdiff1d(np.arange(len(self.given)), self.numbers)

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        """Where the given rows with these `numbers` are in `dataset`, in their order; dropped rows are nowhere.

        Raises:
            RequestError: it is not known.
        """
        if self.prepared_by is None:
            return numbers
        if self.numbers is None:
            raise RequestError(
                f"{self.prepared_by} made other rows of the train_dataset that it was given, and which came from which "
                "is not known, so row numbers may name other rows: pass rows of trainer.train_dataset as "
                "forget_dataset=, or give the trainer a datasets.Dataset, whose numbers can be carried along."
            )
        places = defaultdict(list)
        for position, number in enumerate(self.numbers.tolist()):
            places[number].append(position)
        return np.asarray([i for number in numbers.tolist() for i in places[number]], dtype=np.int64)

    def numbers_at(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the given rows that those at `positions` in `dataset` were made of (int64)."""
        return positions if self.numbers is None else self.numbers[positions]

    def numbers_of(self, rows: Any, out: Sequence[int] = ()) -> np.ndarray | None:
        """Numbers of rows that are given as they were before the trainer prepared them, found by their content.

        Args:
            rows: the rows of a request.
            out: numbers that are taken last, where there are copies.

        Returns:
            int64, `(m,)`; None where they are not of that form.

        Raises:
            UnknownRowsError: some of the rows are in the given data set and others are not, or less often.
        """
        if self.prepared_by is None or self.numbers is None:
            return None
        both = isinstance(self.given, datasets.Dataset) and isinstance(rows, datasets.Dataset)
        if not both or not set(self.given.column_names) <= set(rows.column_names):
            return None
        columns = set(self.given.column_names)
        last, places = set(out), defaultdict[bytes, deque[int]](deque)
        for number, digest in enumerate(row_digests(self.given, columns)):
            places[digest.tobytes()].append(number) if number in last else places[digest.tobytes()].appendleft(number)
        found, missing = [], []
        for i, digest in enumerate(row_digests(rows, columns)):
            free = places[digest.tobytes()]
            if free:
                found.append(free.popleft())
            else:
                missing.append(i)
        if missing:
            raise UnknownRowsError(
                f"{len(missing)} of the {len(rows)} rows of forget_dataset are not among the rows that the trainer was "
                f"given, or less often, e.g. the one at position {missing[0]}: they were never trained on. Leave them "
                "out."
            )
        return np.asarray(found, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class NamedRows:
    """The rows of a request, found and checked once; may be passed to `unlearn` as its forget_dataset.

    Attributes:
        dataset: the forget rows, as they were trained on.
        positions: where they are in the rows that are trained on, int64, `(m,)`, where they were named by number; else
            None.
        fingerprints: keyed fingerprints of their content, uint8, `(m, 16)`; None where they were not made yet.
        left_out: how many rows of the request were never trained on, and so are not among these.
        notes: sentences about them.
    """

    dataset: Any
    positions: np.ndarray | None = None
    fingerprints: np.ndarray | None = None
    left_out: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)


def requested_rows(
    train: TrainingRows, forget_dataset: Any, forget_indices: Any, visits: np.ndarray | None = None
) -> NamedRows:
    """The forget rows and, where they were named by number, their positions in the training rows.

    Args:
        train: the training rows.
        forget_dataset, forget_indices: as given to `unlearn`; one of them.
        visits: how often each row of `train.dataset` was trained on, `(rows,)`; None where it is not known.

    Raises:
        RequestError: neither or both were given; or numbers that are no training rows, or occur twice.
        UnknownRowsError: rows that the trainer was never given.
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
        numbers = train.numbers_of(forget_dataset)
        if numbers is None:
            return NamedRows(forget_dataset)
    else:
        if train.dataset is None:
            raise RequestError(
                "forget_indices= name rows of train_dataset, but the trainer has none: pass forget_dataset=."
            )
        refuse_iterable(train.dataset, "training rows")
        numbers = checked_numbers(forget_indices, len(train.given))
    return named_rows(train, numbers, visits)


def named_rows(train: TrainingRows, numbers: np.ndarray, visits: np.ndarray | None = None) -> NamedRows:
    """The training rows with these numbers, without those that were never trained on."""
    positions = train.positions(numbers)
    notes = []
    dropped = int(np.isin(numbers, train.dropped).sum())
    if dropped:
        notes.append(
            f"{dropped} of the {len(numbers)} requested rows were dropped by {train.prepared_by} when it prepared its "
            "training rows, so the model was never trained on them: there is nothing to forget of them, and they were "
            "left out."
        )
    cut = int(np.isin(numbers, train.cut).sum())
    if cut:
        notes.append(
            f"{cut} of the {len(numbers)} requested rows were cut by {train.prepared_by}, for they are longer than its "
            "longest row: the model was trained on what is left of them alone, and it is that which was forgotten."
        )
    unvisited = 0
    if visits is not None and len(visits) == len(train.dataset):
        visited = visits[positions] > 0
        unvisited = int((~visited).sum())
        positions = positions[visited]
    if unvisited:
        notes.append(_about_unvisited(unvisited, len(numbers)))
    return NamedRows(select_rows(train.dataset, positions), positions, None, dropped + unvisited, tuple(notes))


def only_visited(rows: NamedRows, visited: np.ndarray) -> NamedRows:
    """The rows that are `visited` (bool, `(m,)`): the others were never reached in training."""
    if visited.all():
        return rows
    kept = np.flatnonzero(visited)
    return NamedRows(
        select_rows(rows.dataset, kept),
        None if rows.positions is None else rows.positions[kept],
        None if rows.fingerprints is None else rows.fingerprints[kept],
        rows.left_out + len(rows) - len(kept),
        (*rows.notes, _about_unvisited(len(rows) - len(kept), len(rows))),
    )


def _about_unvisited(unvisited: int, asked: int) -> str:
    return (
        f"{unvisited} of the {asked} requested rows were never reached in training (it ended before they were drawn): "
        "there is nothing to forget of them, and they were left out."
    )


def unequal_visits(visits: np.ndarray | None) -> tuple[int, int] | None:
    """How often the least and the most visited row was met, where that is more than a last, broken epoch explains."""
    if visits is None or not (visits > 0).any():
        return None
    met = visits[visits > 0]
    return (int(met.min()), int(met.max())) if met.max() - met.min() > 1 else None


def without_targets(rows: NamedRows, empty: np.ndarray) -> NamedRows:
    """The rows but those that are `empty` (bool, `(m,)`): no label of theirs counts, so nothing was learned of them."""
    if not empty.any():
        return rows
    kept = np.flatnonzero(~empty)
    note = (
        f"{int(empty.sum())} of the {len(rows)} requested rows have no label that counts (all are -100), so the model "
        "learned nothing of them: they were left out."
    )
    return NamedRows(
        select_rows(rows.dataset, kept),
        None if rows.positions is None else rows.positions[kept],
        None if rows.fingerprints is None else rows.fingerprints[kept],
        rows.left_out + int(empty.sum()),
        (*rows.notes, note),
    )


def _refuse_numbers(forget_dataset: Any) -> None:
    """Raise `RequestError` where row numbers were given in place of rows."""
    listed = isinstance(forget_dataset, (list, tuple, range, np.ndarray, Tensor)) and len(forget_dataset) > 0
    if listed and isinstance(forget_dataset[0], (int, str, np.integer, Tensor)):
        raise RequestError(
            f"forget_dataset is a {type(forget_dataset).__name__} that begins with {forget_dataset[0]!r}, which is no "
            "row: give row numbers as forget_indices=."
        )


def checked_numbers(forget_indices: Any, n_rows: int) -> np.ndarray:
    """`forget_indices` as int64, `(m,)`, after checking every number.

    Args:
        forget_indices: whole numbers in a list, tuple, range, set, array, tensor or `datasets` column; or one boolean
            a row, which says whether it is to be forgotten.
        n_rows: how many rows there are.

    Raises:
        RequestError: they are something else, outside, or repeated.
    """
    given = forget_indices.cpu() if isinstance(forget_indices, Tensor) else forget_indices
    if isinstance(given, (set, frozenset)):
        given = sorted(given, key=str)
    listed = isinstance(given, (list, tuple, range, np.ndarray, Tensor)) or (
        hasattr(given, "__array__") or (hasattr(given, "__len__") and hasattr(given, "__getitem__"))
    )
    try:
        positions = np.asarray(given if hasattr(given, "__array__") else list(given)) if listed else None
    except (TypeError, ValueError):
        positions = None
    if positions is None or isinstance(given, (str, bytes, dict)):
        raise RequestError(
            f"forget_indices={forget_indices!r:.60} is a {type(forget_indices).__name__}: give a list of row numbers."
        )
    if positions.size == 0:
        return np.zeros(0, dtype=np.int64)
    if positions.ndim == 1 and positions.dtype == bool:
        if len(positions) != n_rows:
            raise RequestError(
                f"forget_indices is a mask of {len(positions)} booleans, and train_dataset has {n_rows} rows: give one "
                "a row, or row numbers."
            )
        return np.flatnonzero(positions).astype(np.int64)
    if positions.ndim != 1 or positions.dtype.kind not in "iu":
        raise RequestError(
            f"forget_indices has shape {positions.shape} and type {positions.dtype}: give a flat list of whole numbers."
        )
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
    return positions.astype(np.int64)


def refuse_repeated_rows(forget: RowSource, digests: np.ndarray, trained: Counter[bytes] | None) -> None:
    """Raise `RequestError` for a row that the request holds more often than the training set does.

    Args:
        forget: the rows of the request.
        digests: theirs, uint8, `(m, 32)`.
        trained: digests of all training rows, with how often each occurs; None where they are not at hand.
    """
    if isinstance(forget.dataset, Subset):
        numbers = [int(i) for i in forget.dataset.indices]
        twice = [number for number, count in Counter(numbers).items() if count > 1]
        if twice:
            raise RequestError(f"forget_dataset names row {twice[0]} more than once: name each row once.")
    asked = [row.tobytes() for row in digests]
    if trained is None:
        return
    for digest, count in Counter(asked).items():
        if count > max(trained[digest], 1):
            raise RequestError(
                f"forget_dataset holds the row at position {asked.index(digest)} {count} times but train_dataset only "
                f"{trained[digest]} times: name each row once."
            )


def forgotten_before(digests: Counter[bytes], forgotten: Counter[bytes], trained: Counter[bytes] | None) -> int:
    """How many rows of a request were forgotten earlier; a further copy of a forgotten row is not among them.

    Args:
        digests: of the request's rows, with how often each occurs.
        forgotten: the same of the rows that earlier requests took out.
        trained: the same of all training rows, where they are at hand.
    """
    shared = set(digests) & set(forgotten)
    if not shared or trained is None:
        return len(shared)
    return sum(digests[digest] + forgotten[digest] > trained[digest] for digest in shared)


def rows_apart(others: RowSource, digests: np.ndarray, trained: Counter[bytes], argument: str) -> tuple[RowSource, int]:
    """Rows that are to be ones that the model was never trained on, without chance copies of training rows.

    Args:
        others: held-out or test rows.
        digests: theirs, uint8, `(m, 32)`.
        trained: digests of all training rows, with how often each occurs.
        argument: by which others can be given, for the error.

    Returns:
        The rows that are no copies, and how many were.

    Raises:
        RequestError: more are training rows than chance explains: 2 rows or 2 %, and as many as the share of training
            rows that have a copy among themselves lets expect, with three standard deviations.
    """
    known = np.fromiter((row.tobytes() in trained for row in digests), dtype=bool, count=len(digests))
    shared, n = int(known.sum()), len(digests)
    if not shared:
        return others, 0
    copied = sum(count for count in trained.values() if count > 1) / max(trained.total(), 1)
    chance = n * copied + 3.0 * (n * copied * (1.0 - copied)) ** 0.5
    if shared > max(_FEW_COPIES, _SHARE_OF_COPIES * n) + chance or shared == n:
        raise RequestError(
            f"{shared} of the {n} {others.name} are training rows, which a model treats as known: what is measured on "
            f"them says nothing of rows that it never saw. Pass {argument}= with rows that were never trained on."
        )
    return others.select(np.flatnonzero(~known)), shared
