"""Attacks against known answers: planted distributions, brute force, degenerate rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm

from hf_iau.data import TaskKind
from hf_iau.errors import ConfigError, NonFiniteGradientError, RequestError
from hf_iau.evaluation.attacks import (
    ATTACK_SCORES,
    all_attacks,
    attack,
    attack_auc,
    attack_scores,
    svc_confidence_attack,
)


def test_perfect_memoriser_is_always_recognised(rows):
    members, others = rows(np.linspace(0, 0.1, 50)), rows(np.linspace(1, 2, 80))
    for score in ATTACK_SCORES:
        assert attack_auc(members, others, score) == 1.0
        assert attack_auc(others, members, score) == 0.0
    result = attack(members, others)
    assert (result.balanced_accuracy, result.tpr_at_1_percent_fpr, result.tpr_at_0_1_percent_fpr) == (1, 1, 1)
    assert (result.ci_low, result.ci_high) == (1, 1)


@pytest.mark.parametrize(
    "score, field, member, other",
    [
        ("loss", "loss", 0.1, 2.0),
        ("confidence", "confidence", 0.9, 0.2),
        ("entropy", "entropy", 0.1, 1.0),
        ("modified_entropy", "modified_entropy", 0.1, 1.0),
        ("correctness", "correct", 1.0, 0.0),
    ],
)
def test_orientation_of_each_score_alone(rows, score, field, member, other):
    same = np.ones(10)
    members = replace(rows(same), **{field: np.full(10, member)})
    others = replace(rows(same), **{field: np.full(10, other)})
    assert attack_auc(members, others, score) == 1.0
    assert (attack_scores(members, score) > attack_scores(others, score)).all()
    for unchanged in set(ATTACK_SCORES) - {score}:
        assert attack_auc(members, others, unchanged) == 0.5


def test_same_distribution_is_chance_within_its_interval(rows):
    random = np.random.default_rng(3)
    result = attack(rows(random.exponential(size=600)), rows(random.exponential(size=900)))
    assert result.ci_low <= 0.5 <= result.ci_high
    assert abs(result.auc - 0.5) < 3 * 0.29 / np.sqrt(600) * 1.3


@pytest.mark.parametrize("shift", [-0.5, 0.3, 1.0, 2.0])
def test_planted_gaussian_shift(rows, shift):
    random = np.random.default_rng(0)
    members = rows(10 - shift + random.normal(size=4000))
    others = rows(10 + random.normal(size=4000))
    result = attack(members, others, bootstrap=100)
    expected = norm.cdf(shift / np.sqrt(2))
    assert result.auc == pytest.approx(expected, abs=0.02)
    assert result.ci_low <= expected <= result.ci_high
    best_threshold = norm.cdf(abs(shift) / 2) if shift > 0 else 0.5
    assert result.balanced_accuracy == pytest.approx(best_threshold, abs=0.02)


def test_auc_equals_counting_pairs_with_ties(rows):
    random = np.random.default_rng(5)
    a, b = random.integers(0, 6, 37).astype(float), random.integers(1, 7, 53).astype(float)
    pairs = (a[:, None] < b[None]).mean() + 0.5 * (a[:, None] == b[None]).mean()
    assert attack_auc(rows(a), rows(b)) == pytest.approx(pairs, abs=1e-12)
    assert mannwhitneyu(b, a).statistic / (37 * 53) == pytest.approx(pairs, abs=1e-12)


@pytest.mark.parametrize("n_others", [40, 100, 2500])
def test_operating_points_by_brute_force(rows, n_others):
    random = np.random.default_rng(n_others)
    a = np.round(random.normal(0.0, 1.5, 300), 1) + 9
    b = np.round(random.normal(1.0, 1.0, n_others), 1) + 9
    result = attack(rows(a), rows(b), bootstrap=0)
    thresholds = [-1.0, *np.unique(np.concatenate([a, b]))]
    curve = [((a <= t).mean(), (b <= t).mean()) for t in thresholds]
    for level, found in ((0.01, result.tpr_at_1_percent_fpr), (0.001, result.tpr_at_0_1_percent_fpr)):
        assert found == pytest.approx(max(tpr for tpr, fpr in curve if fpr <= level))
    assert result.balanced_accuracy == pytest.approx(max((tpr + 1 - fpr) / 2 for tpr, fpr in curve))
    assert np.isnan(result.ci_low) and np.isnan(result.ci_high)


def test_interval_is_seeded_and_covers(rows):
    truth = norm.cdf(0.8 / np.sqrt(2))
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(60):
        result = attack(rows(5 - 0.8 + random.normal(size=120)), rows(5 + random.normal(size=150)), seed=trial)
        covered += result.ci_low <= truth <= result.ci_high
    assert covered >= 51  # 95 % of 60 is 57; fewer than 51 has probability 0.003

    members, others = rows(random.exponential(size=50)), rows(random.exponential(size=50) + 0.2)
    assert attack(members, others, seed=1) == attack(members, others, seed=1)
    assert attack(members, others, seed=1).ci_low != attack(members, others, seed=2).ci_low


def test_interval_has_the_width_of_the_standard_error(rows):
    random = np.random.default_rng(2)
    result = attack(rows(random.exponential(size=200)), rows(random.exponential(size=20_000)), bootstrap=400)
    assert (result.ci_high - result.ci_low) / (2 * 1.96) == pytest.approx(0.29 / np.sqrt(200), rel=0.2)


def test_rows_without_targets_are_dropped_and_counted(rows):
    members = rows([0.1, np.nan, 0.2, 0.3, np.nan])
    others = rows([1.0, 2.0, np.nan])
    result = attack(members, others)
    assert (result.n_members, result.n_non_members) == (3, 2)
    assert (result.dropped_members, result.dropped_non_members) == (2, 1)
    assert result.auc == attack_auc(rows([0.1, 0.2, 0.3]), rows([1.0, 2.0])) == 1.0


def test_infinite_losses_rank_last(rows):
    assert attack_auc(rows([0.1, np.inf]), rows([1.0, 2.0])) == 0.5
    assert attack_auc(rows([np.inf, np.inf]), rows([np.inf, np.inf])) == 0.5


def test_a_diverged_model_is_refused(rows):
    members = replace(rows([np.nan, 0.1, 0.2]), targets=np.ones(3))
    with pytest.raises(NonFiniteGradientError, match="1 of 3"):
        attack_auc(members, rows([1.0, 2.0]))


@pytest.mark.parametrize("members, others", [([0.1], [1.0, 2.0]), ([0.1, 0.2], [1.0, np.nan]), ([], [1.0, 2.0])])
def test_too_few_rows(rows, members, others):
    with pytest.raises(RequestError, match="at least 2"):
        attack_auc(rows(members), rows(others))
    with pytest.raises(RequestError, match="at least 2"):
        all_attacks(rows(members), rows(others))


def test_unknown_arguments(rows):
    with pytest.raises(ConfigError, match="modified_entropy"):
        attack_auc(rows([1, 2]), rows([1, 2]), "margin")
    with pytest.raises(ConfigError, match="bootstrap=-1"):
        attack(rows([1, 2]), rows([1, 2]), bootstrap=-1)


def test_all_attacks(rows):
    random = np.random.default_rng(0)
    members, others = rows(random.exponential(size=40)), rows(1 + random.exponential(size=40))
    results = all_attacks(members, others, bootstrap=50, seed=4)
    assert list(results) == list(ATTACK_SCORES)
    for score, result in results.items():
        assert result == attack(members, others, score, bootstrap=50, seed=4)


def test_regression_has_the_loss_attack_alone(rows):
    members = rows([0.1, 0.2, np.nan], kind=TaskKind.REGRESSION)
    others = rows([1.0, 2.0], kind=TaskKind.REGRESSION)
    with pytest.raises(RequestError, match="score='loss'"):
        attack_auc(members, others, "confidence")
    results = all_attacks(members, others)
    assert results["loss"].auc == 1.0
    assert np.isnan(results["entropy"].auc)
    assert (results["entropy"].n_members, results["entropy"].dropped_members) == (2, 1)


def test_svc_attack_on_separable_confidences():
    random = np.random.default_rng(0)
    retained, unseen = random.uniform(0.9, 1, 200), random.uniform(0, 0.5, 300)
    assert svc_confidence_attack(retained, unseen, np.full(30, 0.95)) == 0.0
    assert svc_confidence_attack(retained, unseen, np.full(30, 0.2)) == 1.0
    mixed = np.concatenate([np.full(25, 0.2), np.full(75, 0.97), [np.nan]])
    assert svc_confidence_attack(retained, unseen, mixed) == pytest.approx(0.25)


def test_svc_attack_is_that_of_the_published_code():
    """With sides of equal size nothing is subsampled, and the result is the published recipe's."""
    from sklearn.svm import SVC

    random = np.random.default_rng(1)
    retained, unseen, forget = random.beta(8, 1, 150), random.beta(3, 1, 150), random.beta(5, 1, 80)
    reference = SVC(C=3, gamma="auto", kernel="rbf").fit(
        np.concatenate([retained, unseen])[:, None], np.concatenate([np.ones(150), np.zeros(150)])
    )
    expected = 1 - reference.predict(forget[:, None]).mean()
    assert svc_confidence_attack(retained, unseen, forget) == pytest.approx(expected)


def test_svc_attack_balances_and_is_seeded():
    random = np.random.default_rng(2)
    retained, unseen, forget = random.beta(8, 1, 2000), random.beta(2, 1, 100), random.beta(4, 1, 100)
    found = svc_confidence_attack(retained, unseen, forget)
    assert found == svc_confidence_attack(retained, unseen, forget)
    assert found > 0.1  # on 20 : 1 shadow rows the SVC would call nearly everything a member
    with pytest.raises(RequestError, match="at least 2, 2 and 1"):
        svc_confidence_attack(retained, unseen[:1], forget)
    with pytest.raises(RequestError, match="at least 2, 2 and 1"):
        svc_confidence_attack(retained, unseen, np.array([np.nan]))
