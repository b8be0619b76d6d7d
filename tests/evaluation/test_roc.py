"""The ROC curve against scikit-learn's, bit for bit."""

from __future__ import annotations

import numpy as np
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from hf_iau.evaluation.roc import area_under_curve, roc_curve

SCORES = st.lists(st.integers(-6, 6) | st.floats(-1e300, 1e300), min_size=1, max_size=40)


@given(SCORES, SCORES)
def test_curve_and_area(inside: list[float], outside: list[float]) -> None:
    ours = np.array(inside, dtype=np.float64), np.array(outside, dtype=np.float64)
    truth, scores = np.repeat([1.0, 0.0], [len(inside), len(outside)]), np.concatenate(ours)
    theirs = sklearn.metrics.roc_curve(truth, scores, drop_intermediate=False)
    assert all(np.array_equal(a, b) for a, b in zip(roc_curve(*ours), theirs, strict=True))
    assert area_under_curve(*ours) == sklearn.metrics.roc_auc_score(truth, scores)
