"""Intervals: known values, and how often they hold the truth on simulated rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binom, binomtest, norm

from hf_iau.data import TaskKind
from hf_iau.errors import ConfigError, RequestError
from hf_iau.evaluation.attacks import attack, score_attack
from hf_iau.evaluation.figures import Figures
from hf_iau.evaluation.intervals import (
    MISSING,
    balanced_accuracy_interval,
    difference_interval,
    proportion_interval,
    ratio_interval,
    true_positive_rate_interval,
)
from hf_iau.evaluation.measurement import Measurement, accuracy_interval
from hf_iau.evaluation.model_agreement import agreement
from hf_iau.evaluation.retraining_gap import gap


def holds(interval: tuple[float, float], truth: float) -> bool:
    return interval[0] <= truth <= interval[1]


def test_wilson_interval_by_its_formula():
    for successes, rows in ((0, 10), (10, 10), (3, 7), (450, 500)):
        p, z = successes / rows, norm.ppf(0.975)
        middle = (p + z**2 / (2 * rows)) / (1 + z**2 / rows)
        half = z / (1 + z**2 / rows) * np.sqrt(p * (1 - p) / rows + z**2 / (4 * rows**2))
        assert proportion_interval(successes, rows) == pytest.approx((middle - half, middle + half), abs=1e-12)
    assert np.isnan(proportion_interval(0, 0)).all()
    for successes in (-1, 11, 2.5):
        with pytest.raises(RequestError, match=f"successes={successes}"):
            proportion_interval(successes, 10)


def test_proportion_interval_covers():
    random = np.random.default_rng(0)
    for truth, rows in ((0.1, 60), (0.6, 200)):
        held = [holds(proportion_interval(k, rows), truth) for k in random.binomial(rows, truth, 400)]
        assert 0.92 <= np.mean(held) <= 0.985


def test_ratio_interval_covers_where_the_targets_of_a_row_agree():
    """Tokens of one row are right or wrong together: a share of tokens would have far too narrow an interval."""
    random = np.random.default_rng(1)
    held, held_by_tokens = [], []
    for trial in range(200):
        targets = random.integers(5, 30, 80).astype(float)
        correct = np.where(random.random(80) < 0.3, 0.2, 0.9)
        held.append(holds(ratio_interval(correct, targets, seed=trial), 0.69))
        tokens = targets.sum()
        held_by_tokens.append(holds(proportion_interval(round((correct * targets).sum()), int(tokens)), 0.69))
    assert 0.89 <= np.mean(held) <= 0.99
    assert np.mean(held_by_tokens) < 0.8


def test_ratio_interval_of_constant_rows_and_of_none():
    assert ratio_interval(np.full(5, 0.4), np.ones(5)) == (0.4, 0.4)
    assert np.isnan(ratio_interval(np.zeros(0), np.zeros(0))).all()
    assert np.isnan(ratio_interval(np.arange(3.0), np.ones(3), resamples=0)).all()
    rows_without_targets = ratio_interval(np.array([0.0, np.nan, 1.0]), np.array([1.0, 0.0, 1.0]), seed=3)
    assert rows_without_targets == ratio_interval(np.array([0.0, 1.0]), np.ones(2), seed=3)
    with pytest.raises(ConfigError, match="bootstrap=-1"):
        ratio_interval(np.arange(3.0), np.ones(3), resamples=-1)


@pytest.mark.parametrize("shift, members, others", [(0.0, 60, 90), (1.0, 40, 400), (2.5, 60, 90)])
def test_operating_points_cover(rows, shift, members, others):
    """The truth is that of the whole distribution: Φ(d/2) at the best threshold, Φ(d − z) at a false positive rate."""
    random = np.random.default_rng(7)
    held = {"balanced_accuracy": 0, "tpr_at_1_percent_fpr": 0, "tpr_at_0_1_percent_fpr": 0}
    truth = {
        "balanced_accuracy": norm.cdf(shift / 2),
        "tpr_at_1_percent_fpr": norm.sf(norm.isf(0.01) - shift),
        "tpr_at_0_1_percent_fpr": norm.sf(norm.isf(0.001) - shift),
    }
    trials = 100
    for _ in range(trials):
        found = attack(
            rows(20 - shift + random.normal(size=members)), rows(20 + random.normal(size=others)), bootstrap=2
        )
        for name in held:
            low, high = (getattr(found, f"{name}_{end}") for end in ("low", "high"))
            assert low <= getattr(found, name) <= high
            held[name] += low <= truth[name] <= high
    assert min(held.values()) >= 0.92 * trials


def test_best_threshold_on_rows_that_nothing_tells_apart():
    """A best threshold always finds more than one half; its interval nevertheless reaches down to it."""
    random = np.random.default_rng(3)
    reached = []
    for _ in range(200):
        a, b = random.normal(size=50), random.normal(size=200)
        grid = np.concatenate([a, b])
        best = grid[np.argmax([(a >= t).mean() - (b >= t).mean() for t in grid])]
        reached.append(balanced_accuracy_interval(a, b, best)[0] == 0.5)
    assert np.mean(reached) >= 0.95


def test_true_positive_rate_bounds_are_honest_about_few_rows_and_ties():
    apart = np.linspace(2, 3, 100)
    low, high = true_positive_rate_interval(apart, np.linspace(0, 1, 100), 0.01)
    assert (low, high) == (0, 1)  # the highest of 100 says little about the highest percent
    low, high = true_positive_rate_interval(apart, np.linspace(0, 1, 5000), 0.01)
    assert 0.94 < low < high == 1
    right, wrong = np.repeat([1.0, 0.0], [90, 10]), np.repeat([1.0, 0.0], [600, 400])
    assert true_positive_rate_interval(right, wrong, 0.01)[0] == 0  # no threshold has 1 % false positives but ∞
    assert score_attack(right, wrong, bootstrap=0).tpr_at_1_percent_fpr == 0


def test_difference_interval_covers_for_independent_rates():
    random = np.random.default_rng(5)
    held = 0
    for k, j in zip(random.binomial(120, 0.8, 300), random.binomial(80, 0.65, 300), strict=True):
        a, b = k / 120, j / 80
        found = difference_interval(a, proportion_interval(k, 120), b, proportion_interval(j, 80))
        held += holds(found, 0.15)
    assert 0.92 <= held / 300 <= 0.985


def test_figures_hold_intervals(rows):
    random = np.random.default_rng(0)
    measured = Measurement(
        *(rows(random.exponential(size=size)) for size in (40, 100)), test=rows(random.exponential(size=80))
    )
    figures = measured.figures()
    assert figures.intervals.keys() == {"forget_accuracy", "retain_accuracy", "test_accuracy", "mia_auc"}
    assert figures.intervals["forget_accuracy"] == proportion_interval(measured.forget.correct.sum(), 40)
    assert figures.intervals["mia_auc"] == (figures.attacks["loss"].ci_low, figures.attacks["loss"].ci_high)
    assert Figures.from_dict(json.loads(json.dumps(figures.to_dict()))) == figures
    without = measured.figures(bootstrap=0)
    assert without.intervals is None and np.isnan(without.attacks["loss"].balanced_accuracy_low)
    with pytest.raises(ConfigError, match="bootstrap=-1"):
        measured.figures(bootstrap=-1)


def test_figures_of_older_reports_are_read(rows):
    random = np.random.default_rng(0)
    figures = Measurement(rows(random.exponential(size=40)), test=rows(random.exponential(size=80))).figures()
    older = figures.to_dict()
    del older["intervals"]
    for result in older["attacks"].values():
        for name in [name for name in result if name.endswith(("_low", "_high")) and not name.startswith("ci_")]:
            del result[name]
    read = Figures.from_dict(json.loads(json.dumps(older)))
    assert read.intervals is None and read.mia_auc == figures.mia_auc
    assert read.attacks["loss"].ci_low == figures.attacks["loss"].ci_low
    assert np.isnan(read.attacks["loss"].balanced_accuracy_low)
    assert gap(read, figures).intervals is None


def test_few_forget_rows_give_no_bootstrap_of_theirs_away(rows):
    random = np.random.default_rng(0)
    tokens = rows(random.exponential(size=5), kind=TaskKind.TOKENS, targets=np.full(5, 9.0), correct=random.random(5))
    other = rows(random.exponential(size=50))
    assert "forget_accuracy" not in Measurement(tokens, test=other).figures().intervals
    plain = Measurement(rows(random.exponential(size=5)), test=other).figures().intervals
    assert plain.keys() == {"forget_accuracy", "test_accuracy"}  # Wilson's follows from mean and number alone


def test_accuracy_interval_weighs_rows_by_their_targets(rows):
    random = np.random.default_rng(0)
    correct, targets = random.random(50), random.integers(1, 9, 50).astype(float)
    tokens = rows(random.exponential(size=50), kind=TaskKind.TOKENS, targets=targets, correct=correct)
    low, high = accuracy_interval(tokens)
    assert low < tokens.accuracy < high
    assert (low, high) == ratio_interval(correct, targets)
    assert accuracy_interval(tokens, bootstrap=0) is MISSING


def test_gap_intervals_hold_the_difference():
    def figures(right: int, auc: float) -> Figures:
        return Figures(
            forget_accuracy=right / 100,
            mia_auc=auc,
            intervals={"forget_accuracy": proportion_interval(right, 100), "mia_auc": (auc - 0.05, auc + 0.05)},
        )

    found = gap(figures(80, 0.6), figures(60, 0.5))
    low, high = found.intervals["forget_accuracy"]
    assert low < found.forget_accuracy < high
    assert (high - low) / 2 == pytest.approx(1.96 * 100 * np.sqrt(0.8 * 0.2 / 100 + 0.6 * 0.4 / 100), rel=0.05)
    half = 100 * np.hypot(0.05, 0.05)
    assert found.intervals["mia_auc"] == pytest.approx((10 - half, 10 + half))
    assert gap(Figures(forget_accuracy=0.8), figures(60, 0.5)).intervals is None


def test_agreement_has_intervals(rows):
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(3), 60), random.dirichlet(np.ones(3), 60)
    found = agreement(rows(np.ones(60), probabilities=p), rows(np.ones(60), probabilities=q))
    assert (found.agreement_low, found.agreement_high) == proportion_interval(60 * found.agreement, 60)
    assert found.jensen_shannon_low < found.jensen_shannon < found.jensen_shannon_high


def test_the_ends_are_clopper_and_pearsons():
    """Against the bisection of scipy's exact binomial test, for scores without ties."""
    generator = np.random.default_rng(3)
    inside, outside = generator.normal(0.8, 1, 300), generator.normal(0, 1, 2000)
    quarter = 0.05 / 4
    fewest, most = (int(binom.ppf(q, 2000, 0.01)) for q in (quarter, 1 - quarter))
    descending = np.sort(outside)[::-1]
    above = [int((inside >= descending[fewest - 1]).sum()), int((inside > descending[most]).sum())]
    ends = [binomtest(count, 300).proportion_ci(1 - 2 * quarter, method="exact") for count in above]
    assert 0 < above[0] < above[1] < 300
    assert true_positive_rate_interval(inside, outside, 0.01) == pytest.approx((ends[0].low, ends[1].high), abs=1e-9)
