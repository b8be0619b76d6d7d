"""The ROC curve of scores and the area under it, in float64."""

from __future__ import annotations

import numpy as np


def roc_curve(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every corner of the curve of "a member scores at least the threshold", collinear ones too.

    Args:
        inside: scores of members, shape `(m,)`, at least one and none NaN.
        outside: scores of non-members, shape `(n,)`, the same.

    Returns:
        False positive rates, true positive rates and thresholds, each of shape `(distinct scores + 1,)`, from (0, 0) at
        the threshold ∞ to (1, 1) at the lowest score.
    """
    false_positives, true_positives, thresholds = _counts(inside, outside)
    return (
        np.concatenate([[0.0], false_positives]) / len(outside),
        np.concatenate([[0.0], true_positives]) / len(inside),
        np.concatenate([[np.inf], thresholds]),
    )


def area_under_curve(inside: np.ndarray, outside: np.ndarray) -> float:
    """The probability that a random member scores higher than a random non-member, ties counting half.

    Args:
        inside, outside: see `roc_curve`.
    """
    false_positives, true_positives, _ = _counts(inside, outside)
    # Points between two others on a line change nothing but the rounding of the sum.
    bent = np.logical_or(np.diff(false_positives, 2), np.diff(true_positives, 2))
    corners = np.concatenate([[True], bent, [True]])[: len(false_positives)]
    x = np.concatenate([[0.0], false_positives[corners]]) / len(outside)
    y = np.concatenate([[0.0], true_positives[corners]]) / len(inside)
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2.0).sum())


def _counts(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many non-members and members score at least each distinct score, and the scores, falling."""
    scores = np.concatenate([inside, outside])
    order = np.argsort(-scores, kind="stable")
    member, scores = (order < len(inside)).astype(np.float64), scores[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each run of equal scores
    true_positives = member.cumsum()[last]
    return 1.0 + last - true_positives, true_positives, scores[last]
