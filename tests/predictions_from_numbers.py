"""Row predictions made from numbers instead of a model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hf_iau.data import RowPredictions, TaskKind


@pytest.fixture
def rows() -> Callable[..., RowPredictions]:
    """Makes `RowPredictions` with the given row losses; a NaN loss is a row without a target."""

    def make(loss: np.ndarray, kind: TaskKind = TaskKind.SINGLE_LABEL, **fields: np.ndarray) -> RowPredictions:
        loss = np.asarray(loss, dtype=np.float64)
        missing = np.full(len(loss), np.nan)
        scores = {
            "correct": np.where(np.isnan(loss), np.nan, loss < np.log(2)),
            "confidence": np.exp(-loss),
            "entropy": loss / 2,
            "modified_entropy": loss * 2,
        }
        if kind is TaskKind.REGRESSION:
            scores = dict.fromkeys(scores, missing)
        values = {
            **scores,
            "targets": (~np.isnan(loss)).astype(np.float64),
            "label": missing,
            "predicted": missing,
            **fields,
        }
        return RowPredictions(kind=kind, loss=loss, **values)

    return make
