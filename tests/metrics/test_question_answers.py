"""TOFU's figures on cases with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import comb

from hf_iau.errors import RequestError
from hf_iau.metrics.question_answers import forget_quality, model_utility, truth_ratio


def test_truth_ratio_by_hand():
    """Right answer at probability 1/2 a token; wrong ones at 1/4 and 1/16, whose geometric mean is 1/8."""
    found = truth_ratio([math.log(2)], [[math.log(4), math.log(16)]])
    np.testing.assert_allclose(found, [0.25])


def test_a_model_that_knows_nothing_has_truth_ratio_one_and_one_that_knows_all_has_zero():
    np.testing.assert_allclose(truth_ratio(np.full(3, 7.0), np.full((3, 5), 7.0)), 1.0)
    assert truth_ratio([0.0], [[800.0, 800.0]])[0] == 0.0
    assert truth_ratio([800.0], [[0.0, 0.0]])[0] == np.inf  # denies the truth, and is no error


def test_forget_quality_of_equal_and_of_disjoint_ratios():
    ratios = np.linspace(0.1, 2.0, 12)
    same = forget_quality(ratios, ratios)
    assert (same.p_value, same.log10_p_value, same.statistic) == (1.0, 0.0, 0.0)
    apart = forget_quality(ratios, ratios + 10)
    # Of all C(24, 12) orders of the pooled rows, two are as extreme.
    assert apart.p_value == pytest.approx(2 / comb(24, 12, exact=True))
    assert apart.log10_p_value == pytest.approx(math.log10(apart.p_value))
    assert (apart.statistic, apart.rows, apart.retrained_rows) == (1.0, 12, 12)


def test_forget_quality_is_the_same_for_the_inverse_ratio():
    """TOFU's code tests 1/R; open-unlearning as well."""
    random = np.random.default_rng(0)
    a, b = random.lognormal(0.0, 1.0, 40), random.lognormal(0.4, 1.0, 30)
    assert forget_quality(a, b).p_value == pytest.approx(forget_quality(1 / a, 1 / b).p_value)


def test_forget_quality_is_uniform_where_there_is_no_difference():
    random = np.random.default_rng(1)
    p = [forget_quality(random.normal(size=60), random.normal(size=60)).p_value for _ in range(300)]
    assert np.mean(np.array(p) < 0.05) < 0.08
    assert np.median(p) == pytest.approx(0.5, abs=0.1)


def test_model_utility_by_hand():
    """Probabilities 1 and 1/2, truth ratios 1/4 and 3 (which counts as no truth at all), recalls 1 and 1/5."""
    found = model_utility([0.0, math.log(2)], [0.25, 3.0], [1.0, 0.2])
    assert (found.probability, found.truth_ratio, found.rouge_l_recall) == pytest.approx((0.75, 0.375, 0.6))
    assert found.utility == pytest.approx(3 / (1 / 0.75 + 1 / 0.375 + 1 / 0.6))
    without = model_utility([0.0, math.log(2)], [0.25, 3.0])
    assert without.utility == pytest.approx(2 / (1 / 0.75 + 1 / 0.375)) and without.rouge_l_recall is None


def test_model_utility_of_perfect_and_of_no_knowledge():
    assert model_utility([0.0, 0.0], [0.0, 0.0], [1.0, 1.0]).utility == 1.0
    assert model_utility([0.0, 0.0], [1.0, 1.0], [1.0, 1.0]).utility == 0.0  # one part of nothing is enough


def test_bad_input():
    with pytest.raises(RequestError, match="one loss a row"):
        truth_ratio([1.0, 2.0], [[1.0]])
    with pytest.raises(RequestError, match="has diverged"):
        forget_quality([1.0, np.nan], [1.0])
    with pytest.raises(RequestError, match="one number a forget row"):
        forget_quality([], [1.0])
    with pytest.raises(RequestError, match="one number a row"):
        model_utility([1.0], [1.0, 2.0])
