"""95 % intervals of the rates that are measured.

The right tool differs by rate: a share of independent rows has Wilson's interval, which stays within 0 and 1 and is
right where nothing or everything counts; an AUC, and a mean whose rows weigh differently, are bootstrapped over their
rows; where a threshold was chosen on the same rows (best balanced accuracy, true positive rate at a false positive
rate) the bootstrap misses the truth far too often, so these have bounds that hold whatever the scores' distribution.
All of them are about the *rows*: how far the rate might be for other rows drawn like these. None of them holds what
another seed of the training would change; the noise floor does.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import beta, binom, binomtest, bootstrap

from hf_iau.errors import ConfigError, RequestError

LEVEL = 0.95
"""Confidence level of every interval in reports and metrics."""

RESAMPLES = 200
"""Default number of bootstrap resamples."""

Interval = tuple[float, float]
"""Lower and upper end."""

MISSING: Interval = (float("nan"), float("nan"))
"""The interval of what was not computed."""

BOOTSTRAP_VALUES_AT_ONCE = 2_000_000
"""Values that are resampled at once: bounds the memory of a bootstrap to 16 MB an array."""


def check_resamples(bootstrap: int) -> None:
    """Raise ConfigError for a negative number of resamples."""
    if bootstrap < 0:
        raise ConfigError(f"bootstrap={bootstrap}: give the number of resamples, or 0 for no interval.")


def proportion_interval(successes: float, rows: int) -> Interval:
    """Wilson's interval of a share of independent rows (`scipy.stats.binomtest`); NaN without rows.

    Args:
        successes: rows that count, a whole number from 0 to `rows`.
        rows: rows looked at.

    Raises:
        RequestError: when `successes` is not such a number.
    """
    if not rows:
        return MISSING
    whole = round(successes)
    if abs(whole - successes) > 1e-6 * max(rows, 1) or not 0 <= whole <= rows:
        raise RequestError(f"successes={successes} of rows={rows}: give a whole number between 0 and rows.")
    found = binomtest(whole, int(rows)).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def ratio_interval(values: np.ndarray, weights: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap, over rows, of Σ values·weights / Σ weights; NaN without rows or resamples.

    Args:
        values: each row's mean, shape `(rows,)`.
        weights: what each row weighs (its number of targets), not negative.
        resamples: bootstrap resamples; 0 for no interval.
        seed: of the resampling.

    Rows are resampled and not their targets, because the tokens of one row are not independent.
    """
    check_resamples(resamples)
    counted = weights > 0
    values, weights = np.asarray(values, np.float64)[counted], np.asarray(weights, np.float64)[counted]
    if not resamples or not len(values):
        return MISSING
    if np.ptp(values) == 0:  # every resample has the same value; scipy would warn and give NaN
        return float(values[0]), float(values[0])

    def ratio(totals: np.ndarray, counts: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.asarray(totals.sum(axis=axis) / counts.sum(axis=axis))

    found = bootstrap(
        (values * weights, weights),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, BOOTSTRAP_VALUES_AT_ONCE // len(values)),
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def difference_interval(a: float, of_a: Interval, b: float, of_b: Interval) -> Interval:
    """Interval of a − b from the intervals of two independent rates (Newcombe 1998, "square and add").

    Two models measured on the same rows agree on most of them; then the difference varies less than this says.

    Args:
        a, b: the two rates.
        of_a, of_b: their intervals, in the same unit.
    """
    low = a - b - np.hypot(a - of_a[0], of_b[1] - b)
    high = a - b + np.hypot(of_a[1] - a, b - of_b[0])
    return float(low), float(high)


def balanced_accuracy_interval(inside: np.ndarray, outside: np.ndarray, threshold: float) -> Interval:
    """Bounds of the balanced accuracy at the best threshold, where that was chosen on the same rows.

    The best threshold flatters: on rows that nothing tells apart it still gives more than one half. The lower bound
    takes that off, by Smirnov's one-sided limit on the largest difference of two empirical distributions; the upper
    one is that of the two rates at the chosen threshold (Wilson, square and add), which flattery only widens.

    Args:
        inside: members' scores, higher = more member-like, shape `(m,)`.
        outside: non-members' scores, shape `(n,)`.
        threshold: the best threshold: scores at or above it are called members.
    """
    m, n = len(inside), len(outside)
    recognised, refused = int((inside >= threshold).sum()), int((outside < threshold).sum())
    best = (recognised / m + refused / n) / 2
    slack = np.sqrt(-np.log((1 - LEVEL) / 2) / 2 * (1 / m + 1 / n)) / 2
    above = (proportion_interval(recognised, m)[1] - recognised / m, proportion_interval(refused, n)[1] - refused / n)
    return max(0.5, float(best - slack)), min(1.0, float(best + np.hypot(*above) / 2))


def true_positive_rate_interval(inside: np.ndarray, outside: np.ndarray, false_positive_rate: float) -> Interval:
    """Bounds of the largest true positive rate at a false positive rate, without assumption on the scores.

    Two order statistics of the non-members' scores enclose the threshold that has that false positive rate, and
    Clopper and Pearson's bounds enclose the share of members above each of them, each at half the error (after Hilgers
    1991). Conservative: at least 95 %. Where the non-members are too few to know the threshold (fewer than about
    4.4 / rate), the lower bound is 0, which is all that they allow to say.

    Args:
        inside: members' scores, higher = more member-like, shape `(m,)`.
        outside: non-members' scores, shape `(n,)`.
        false_positive_rate: 0 to 1.
    """
    m, n = len(inside), len(outside)
    quarter = (1 - LEVEL) / 4
    fewest, most = (int(binom.ppf(q, n, false_positive_rate)) for q in (quarter, 1 - quarter))
    descending = np.sort(outside)[::-1]
    if fewest == 0:
        certain = 0
    else:
        threshold = descending[fewest - 1]
        tied = int((outside >= threshold).sum()) > fewest
        certain = int((inside > threshold).sum() if tied else (inside >= threshold).sum())
    possible = m if most >= n else int((inside > descending[most]).sum())
    # Clopper and Pearson's ends, as `binomtest(…).proportion_ci(method="exact")` finds them by bisection.
    return (
        float(beta.ppf(quarter, certain, m - certain + 1)) if certain else 0.0,
        float(beta.ppf(1 - quarter, possible + 1, m - possible)) if possible < m else 1.0,
    )
