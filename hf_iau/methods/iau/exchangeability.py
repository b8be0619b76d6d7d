"""Are the forget rows like any other training rows? Only then may they set the target themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from hf_iau.data import RowPredictions

_SIGNIFICANCE = 0.01


@dataclass(frozen=True)
class ShiftTest:
    """Outcome of comparing forget rows with other training rows, at the same weights.

    Attributes:
        loss_p: two-sample Kolmogorov-Smirnov test of the row losses.
        label_p: chi-squared test of the label counts; None where rows have no one class.
        passed: neither rejects at 1 %.
    """

    loss_p: float
    label_p: float | None
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def shift_test(forget: RowPredictions, others: RowPredictions) -> ShiftTest:
    """Compare the losses and labels of the forget rows with those of other training rows.

    Mislabelled rows, one person's rows or a whole class differ from a random draw; for those an AUC of one half against
    held-out rows is not what a retrained model shows, and proxies have to be used (statistics: SciPy).
    """
    loss_p = float(stats.ks_2samp(_finite(forget.loss), _finite(others.loss)).pvalue)
    label_p = None
    ours, theirs = _finite(forget.label), _finite(others.label)
    if ours.size and theirs.size:
        classes = np.unique(np.concatenate([ours, theirs]))
        if classes.size > 1:
            table = np.array([[np.sum(labels == c) for c in classes] for labels in (ours, theirs)])
            label_p = float(stats.chi2_contingency(table).pvalue)
    passed = loss_p >= _SIGNIFICANCE and (label_p is None or label_p >= _SIGNIFICANCE)
    return ShiftTest(loss_p, label_p, passed)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]
