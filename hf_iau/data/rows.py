"""Rows of a data set, collated into batches in a fixed order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from hf_iau.data.digests import content_seen, row_bytes, row_digests, sample_positions
from hf_iau.data.precision import memory_device
from hf_iau.distributed import get_world_size, is_distributed, is_sharded, shard_range, sync_errors
from hf_iau.errors import RequestError, UnsupportedModelError

Batch = dict[str, Any]
Collator = Callable[[list[Any]], Mapping[str, Any]]

STORED_BYTES = 64 * 2**20
"""The most that a source keeps of its batches: collating larger ones anew costs little beside passing them through."""

# Rows that are probed to tell whether rows differ in length at all.
_PROBED_LENGTHS = 32


class RowSource:
    """Rows in a fixed order, with the collator that turns them into the model's inputs.

    Iterating yields `(positions, inputs)`: `positions` is an int64 array with the rows' positions in this source and
    `inputs` the collated batch on `device`. Nothing is shuffled, dropped or duplicated, so the order of the numbers
    computed from a source is the order of its rows. `by_length()` and `passes()` put rows of similar length into a
    batch; there the positions say which rows those are.

    Args:
        dataset: a map-style `datasets.Dataset` or torch `Dataset` of rows that the collator accepts.
        collator: the function that builds a batch, usually the Trainer's `data_collator`.
        batch_size: rows a batch.
        device: where batches are moved.
        name: what the rows are called in messages ("forget rows", "held-out rows").
        num_workers: worker processes of the data loader.
        columns: those that count when rows are compared; None for all.

    Raises:
        UnsupportedModelError: for an `IterableDataset`, which has neither row numbers nor a length.
    """

    def __init__(
        self,
        dataset: Any,
        collator: Collator,
        *,
        batch_size: int = 32,
        device: torch.device | str = "cpu",
        name: str = "rows",
        num_workers: int = 0,
        columns: set[str] | None = None,
    ) -> None:
        refuse_iterable(dataset, name)
        if batch_size < 1:
            raise RequestError(f"batch_size={batch_size} for the {name}: give a whole number of at least 1.")
        self.dataset = dataset
        self.collator = collator
        self.batch_size = int(batch_size)
        self.device = torch.device(device)
        self.name = name
        self.num_workers = num_workers
        self.columns = columns
        self._batches: list[tuple[np.ndarray, Batch]] | None = None
        self._narrowed: set[str] = set()  # inputs that are int64, but are stored in a narrower type
        self._digests: dict[int, bytes] = {}
        self._share: tuple[RowSource, int] | None = None
        self._length_order: np.ndarray | None = None
        self._longest_first: RowSource | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[np.ndarray, Batch]]:
        if self._batches is not None and _is_identity(self.length_order()):
            yield from self.by_length()
            return
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_size=self.batch_size,
            shuffle=False,
            collate_fn=self.collator,
            num_workers=self.num_workers,
            # A loader draws a base seed from the global generator unless it has its own.
            generator=torch.Generator(),
        )
        start = 0
        for batch in loader:
            stop = min(start + self.batch_size, len(self))
            self._refuse_merged_rows(batch, stop - start)
            yield np.arange(start, stop), to_device(dict(batch), self.device)
            start = stop

    def _refuse_merged_rows(self, batch: Mapping[str, Any], n_rows: int) -> None:
        """Refuse a batch none of whose tensors has as many lines as there are rows, or a multiple of it."""
        if n_rows == 1:
            return
        shapes = [tuple(tensor.shape) for tensor in _tensors(batch) if tensor.dim()]
        if shapes and all(shape[0] % n_rows for shape in shapes):
            raise UnsupportedModelError(
                f"data_collator={getattr(self.collator, '__name__', type(self.collator).__name__)} makes tensors of "
                f"shapes {sorted(set(shapes))} of {n_rows} {self.name}: it packs, flattens or drops rows, which then "
                "cannot be told apart. Gather and unlearn with one that keeps them apart; for packed texts one that "
                "pads, e.g. DataCollatorForSeq2Seq, gives each row the same loss."
            )

    def length_order(self) -> np.ndarray:
        """The rows' positions from the longest row to the shortest; `row_lengths` says what is long.

        In their own order where rows have no length or all the same.
        """
        if self._length_order is None:
            lengths = row_lengths(self.dataset)
            self._length_order = np.arange(len(self)) if lengths is None else np.argsort(-lengths, kind="stable")
        return self._length_order

    def by_length(self, start: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        """Batches of rows of similar length, so that texts are hardly padded: `length_order()` from `start` on.

        The longest come first, so that what does not fit in memory is seen at once.
        """
        if self._batches is not None and start == 0:
            for positions, inputs in self._batches:
                whole = {name: v.to(torch.int64) if name in self._narrowed else v for name, v in inputs.items()}
                yield positions, to_device(whole, self.device)
            return
        order = self.length_order()
        if start:
            rows = self.select(order[start:])
        elif _is_identity(order):
            rows = self
        else:
            if self._longest_first is None:
                self._longest_first = self.select(order)
            rows = self._longest_first
        for positions, inputs in rows:
            yield order[start + positions], inputs

    def select(self, positions: Sequence[int] | np.ndarray, name: str | None = None) -> RowSource:
        """The rows at `positions` (int array, shape `(m,)`), in that order."""
        return RowSource(
            select_rows(self.dataset, positions),
            self.collator,
            batch_size=self.batch_size,
            device=self.device,
            name=name or self.name,
            num_workers=self.num_workers,
            columns=self.columns,
        )

    def resized(self, batch_size: int) -> RowSource:
        """The same rows in batches of another size."""
        return RowSource(
            self.dataset,
            self.collator,
            batch_size=batch_size,
            device=self.device,
            name=self.name,
            num_workers=self.num_workers,
            columns=self.columns,
        )

    def sample(self, size: int, seed: int, name: str | None = None) -> RowSource:
        """At most `size` distinct rows drawn with `seed`, in ascending order."""
        return self.select(sample_positions(len(self), size, seed), name)

    def digest(self, position: int) -> bytes:
        """`row_bytes` of what counts of the row at `position`, computed once."""
        if position not in self._digests:
            self._digests[position] = row_bytes(content_seen(self.dataset[position], self.columns))
        return self._digests[position]

    def digests(self) -> np.ndarray:
        """The same of all rows: uint8, `(rows, 32)`."""
        return row_digests(self.dataset, self.columns)

    def share(self) -> tuple[RowSource, int]:
        """The rows that fall to this process, and the position of the first of them here; all rows for one process."""
        if not is_distributed():
            return self, 0
        if self._share is None:
            positions = shard_range(len(self))
            self._share = self.select(positions), positions.start
        return self._share

    def passes(self, model: nn.Module, *, in_order: bool = False) -> Iterator[tuple[np.ndarray, Batch, bool]]:
        """The batches of this process's share that `model` has to go through, and whether each counts.

        Of rows of similar length (`by_length()`), or of neighbours if `in_order`. Where processes have to take the same
        passes (`is_sharded(model)`), those with fewer batches go through rows again that do not count; and where the
        rows of one cannot be read, all raise. Positions are those in the share.
        """
        own, _ = self.share()
        if not is_sharded(model):
            for positions, inputs in own if in_order else own.by_length():
                yield positions, inputs, True
            return
        most = max(len(shard_range(len(self), rank)) for rank in range(get_world_size()))
        batches = iter(own) if in_order else own.by_length()
        again: tuple[np.ndarray, Batch] | None = None
        for _ in range(-(-most // self.batch_size)):
            with sync_errors(f"a batch of the {self.name}"):
                batch = next(batches, None)
                again = batch or again or (np.zeros(1, dtype=np.int64), self.select([0]).first_batch())
            yield again[0], dict(again[1]), batch is not None

    def passes_of_all(self, model: nn.Module) -> Iterator[tuple[np.ndarray, Batch]]:
        """All batches, for every rank; where `model` is sharded and one rank cannot read them, all raise."""
        in_step, batches = is_sharded(model), iter(self)
        while True:
            with sync_errors(f"a batch of the {self.name}") if in_step else contextlib.nullcontext():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def keep_batches(self, max_bytes: int = STORED_BYTES) -> RowSource:
        """This source, with its collated batches kept for further passes as far as `max_bytes` allow (else unchanged).

        They are those of `by_length()`, kept on the memory device, where there is one. Of several processes, each keeps
        those of its share.
        """
        self.share()[0]._store_batches(max_bytes)
        return self

    def _store_batches(self, max_bytes: int) -> None:
        if self._batches is None and len(self):
            batches: list[tuple[np.ndarray, Batch]] = []
            size = 0
            for positions, inputs in self.by_length():
                size += sum(v.numel() * v.element_size() for v in inputs.values() if isinstance(v, torch.Tensor))
                if size > max_bytes:
                    return
                whole = {name for name, v in inputs.items() if isinstance(v, torch.Tensor) and v.dtype == torch.int64}
                small = {name: _narrow(v) if name in whole else v for name, v in inputs.items()}
                batches.append((positions, to_device(small, memory_device(self.device) or self.device)))
                self._narrowed |= whole
            self._batches = batches

    def first_batch(self) -> Batch:
        """The first batch, for probing."""
        _, inputs = next(iter(self))
        return inputs


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a batch, however they are nested."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    """Whole numbers (ids, masks, labels) in the narrowest type that holds them."""
    low, high = (int(bound) for bound in torch.aminmax(tensor)) if tensor.numel() else (0, 0)
    types = (torch.uint8, torch.int16, torch.int32)
    return tensor.to(next((t for t in types if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max), tensor.dtype))


def row_lengths(dataset: Any) -> np.ndarray | None:
    """Length of each row's longest list of numbers or text (tokens, samples, characters), `(rows,)` int.

    None where a few probed rows have none or are all of one length, as images, tables and texts of a fixed length are.
    """
    probed = np.unique(np.linspace(0, len(dataset) - 1, num=min(_PROBED_LENGTHS, len(dataset)), dtype=np.int64))
    few = {_row_length(dataset[int(position)]) for position in probed}
    if len(few) < 2 or None in few:
        return None
    return np.asarray([_row_length(dataset[position]) or 0 for position in range(len(dataset))])


def _row_length(row: Any) -> int | None:
    values = row.values() if isinstance(row, Mapping) else ()
    return max((len(value) for value in values if _is_sequence(value)), default=None)


def _is_sequence(value: Any) -> bool:
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return value.ndim == 1
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(map(np.isscalar, value[:1])))


def _is_identity(order: np.ndarray) -> bool:
    return bool((order == np.arange(len(order))).all())


def select_rows(dataset: Any, positions: Sequence[int] | np.ndarray) -> Any:
    """`dataset`'s rows at `positions`: `Dataset.select` where there is one, else a torch `Subset`."""
    indices = [int(i) for i in positions]
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(indices)
    return Subset(dataset, indices)


def refuse_iterable(dataset: Any, name: str) -> None:
    """Raise for data sets that have no row numbers."""
    if isinstance(dataset, (datasets.IterableDataset, IterableDataset)) or not (
        hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    ):
        raise UnsupportedModelError(
            f"The {name} are a {type(dataset).__name__}, which has no row numbers, so no row of it can be named or "
            "forgotten. Load them as a map-style data set, e.g. `load_dataset(..., streaming=False)` or "
            "`datasets.Dataset.from_generator(...)`."
        )


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor in it moved to `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value
