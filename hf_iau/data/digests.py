"""Digests of rows' content: which rows are the same, in every process and data-set format."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import datasets
import numpy as np
import torch

LABEL_COLUMNS = frozenset({"label", "labels", "label_ids"})
DIGEST_BYTES = 32
# Digests that are remembered of a `datasets.Dataset`, which cannot change, by its own fingerprint: 8 million rows.
_REMEMBERED_BYTES = 256 * 2**20
_REMEMBERED: OrderedDict[tuple[str, ...], tuple[np.ndarray, list[str]]] = OrderedDict()
# Of other objects, with the columns that count. So many rows are read again before their digests are believed.
_OF_OBJECTS: weakref.WeakKeyDictionary[Any, tuple[set[str] | None, np.ndarray, list[str]]] = weakref.WeakKeyDictionary()
_ROWS_READ_AGAIN = 256


def row_bytes(row: Any) -> bytes:
    """A digest of a row's content: equal content gives equal bytes in every process and data-set format.

    Mappings are taken in the order of their keys; numbers by value (integers as int64, floats as float32) whether they
    come as lists, arrays or tensors; images by mode, size and pixels.
    """
    digest = hashlib.blake2b(digest_size=32)
    _feed(digest, row)
    return digest.digest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        digest.update(b"{")
        for key in sorted(value, key=str):
            digest.update(repr(str(key)).encode())
            _feed(digest, value[key])
        digest.update(b"}")
        return
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # a PIL image
        digest.update(f"I{value.mode}{value.size}".encode() + value.tobytes())
        return
    if isinstance(value, bytes):
        digest.update(b"B" + value)
        return
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().to(torch.float32 if value.is_floating_point() else torch.int64).numpy()
    if isinstance(value, (bool, int, float, list, tuple, np.ndarray, np.generic)):
        array = _numbers(value)
        if array is not None:
            kind = "int64" if array.dtype.kind == "i" else "float32"  # str(dtype) is slow, and rows are many
            digest.update(f"A{kind}{array.shape}".encode() + array.tobytes())
            return
    if isinstance(value, (list, tuple)):
        digest.update(b"[")
        for item in value:
            _feed(digest, item)
        digest.update(b"]")
        return
    digest.update(f"{type(value).__name__}:{value!r};".encode())


def _numbers(value: Any) -> np.ndarray | None:
    """`value` as a contiguous int64 or float32 array, or None where it is not all numbers."""
    try:
        array = np.asarray(value)
    except ValueError:  # ragged
        return None
    if array.dtype.kind in "biu":
        return np.ascontiguousarray(array, dtype=np.int64)
    if array.dtype.kind == "f":
        return np.ascontiguousarray(array, dtype=np.float32)
    return None


def content_seen(row: Any, columns: set[str] | None) -> Any:
    """A row without what is in none of the `columns`; all of it for None, and where labels alone would be left."""
    if columns is None or not isinstance(row, Mapping):
        return row
    kept = {key: value for key, value in row.items() if key in columns}
    return kept if kept.keys() - LABEL_COLUMNS else dict(row)


def row_digests(dataset: Any, columns: set[str] | None = None) -> np.ndarray:
    """Digests of the content of all rows (`row_bytes`): uint8, `(rows, 32)`. One pass that reads every row.

    Those of a `datasets.Dataset`, which cannot change, are remembered; those of another object too, as long as 256
    of its rows are what they were.

    Args:
        dataset: the rows.
        columns: those that count; None for all.
    """
    return digests_and_columns(dataset, columns)[0]


def digests_and_columns(dataset: Any, columns: set[str] | None) -> tuple[np.ndarray, list[str]]:
    """`row_digests`, and the columns that are in any row and count."""
    stored = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    if not stored:
        return _digests_of_object(dataset, columns)
    counted = [name for name in dataset.column_names if columns is None or name in columns]
    if not set(counted) - LABEL_COLUMNS:
        counted = dataset.column_names
    key = (dataset._fingerprint, *sorted(counted))
    if key not in _REMEMBERED:
        _REMEMBERED[key] = _digest_all(dataset.select_columns(counted), None)
        while len(_REMEMBERED) > 1 and sum(held.nbytes for held, _ in _REMEMBERED.values()) > _REMEMBERED_BYTES:
            _REMEMBERED.popitem(last=False)
    _REMEMBERED.move_to_end(key)
    return _REMEMBERED[key]


def _digests_of_object(dataset: Any, columns: set[str] | None) -> tuple[np.ndarray, list[str]]:
    try:
        held = _OF_OBJECTS.get(dataset)
    except TypeError:  # a list
        return _digest_all((dataset[i] for i in range(len(dataset))), columns)
    if held is not None and held[0] == columns and len(held[1]) == len(dataset):
        again = sample_positions(len(dataset), _ROWS_READ_AGAIN, seed=len(dataset))
        now, _ = _digest_all((dataset[int(i)] for i in again), columns)
        if np.array_equal(now, held[1][again]):
            return held[1:]
    digests, seen = _digest_all((dataset[i] for i in range(len(dataset))), columns)
    _OF_OBJECTS[dataset] = (columns, digests, seen)
    return digests, seen


def _digest_all(rows: Iterable[Any], columns: set[str] | None) -> tuple[np.ndarray, list[str]]:
    digests, seen = bytearray(), set()
    for row in rows:
        counted = content_seen(row, columns)
        if isinstance(counted, Mapping):
            seen |= set(counted)
        digests += row_bytes(counted)
    return np.frombuffer(bytes(digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES), sorted(seen)


def sample_positions(length: int, size: int, seed: int) -> np.ndarray:
    """`min(size, length)` distinct positions below `length`, drawn with `seed`, ascending (int64)."""
    if size >= length:
        return np.arange(length)
    return np.sort(np.random.default_rng(seed).choice(length, size=size, replace=False))
