"""What `evaluate` hands to a metric, as the objects that `hf_iau.evaluation` works on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_iau.data import RowPredictions
from hf_iau.errors import RequestError
from hf_iau.evaluation.measurement import Measurement

SPLITS = ("forget", "retain", "held_out", "test")
"""What a row can be: to be forgotten, retained, or never trained on (and seen by calibration, or by nothing)."""


def matrix(name: str, values: Any) -> np.ndarray:
    """`values` as a float64 array of shape `(rows, columns)`.

    Raises:
        RequestError: when the rows differ in length.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.zeros(0)
    if array.ndim != 2:
        raise RequestError(f"{name}: give one list of numbers a row, all of the same length.")
    return array


def measurement(predictions: RowPredictions, splits: Sequence[str]) -> Measurement:
    """The rows of `predictions` sorted by what each is.

    Args:
        predictions: of all rows.
        splits: for each row one of `SPLITS`.

    Raises:
        RequestError: for another word, or no forget row.
    """
    words = np.asarray(splits)
    unknown = sorted(set(words.tolist()) - set(SPLITS))
    if unknown:
        raise RequestError(f"splits holds {', '.join(map(repr, unknown))}: each row is one of {', '.join(SPLITS)}.")
    found = {split: predictions.select(words == split) if (words == split).any() else None for split in SPLITS}
    forget = found.pop("forget")
    if forget is None:
        raise RequestError("splits holds no 'forget': say which rows were to be forgotten.")
    return Measurement(forget, **found)


def unseen_of(measured: Measurement) -> RowPredictions:
    """The test rows, else the held-out rows.

    Raises:
        RequestError: when there are neither.
    """
    if measured.unseen is None:
        raise RequestError("splits holds neither 'test' nor 'held_out': an attack needs rows never trained on.")
    return measured.unseen
