"""U-LiRA and KLoM on sets of models with planted margins, against loops and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy, norm
from torch.distributions import Normal, kl_divergence

from hf_iau.errors import ConfigError, RequestError
from hf_iau.metrics.model_sets import klom, margins, row_divergences, u_lira


def sets(random, shift: float, rows: int, unlearned: int, retrained: int, scale: float = 1.0):
    """Margins of rows with centres of their own; under unlearned models they are shifted."""
    centre = random.normal(0, 3, (rows, 1))
    return (
        centre + shift + scale * random.normal(size=(rows, unlearned)),
        centre + random.normal(size=(rows, retrained)),
    )


def test_margins_are_the_logit_of_the_probability():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(5, 7, 4)), random.integers(4, size=(5, 7))
    p = np.take_along_axis(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(margins(logits, labels), np.log(p / (1 - p)))
    assert margins([[90.0, 0.0, 0.0]], [0])[0] == pytest.approx(90 - np.log(2))  # where 1 − p rounds to 0
    with pytest.raises(RequestError, match="one label a row"):
        margins(logits, labels[0])
    with pytest.raises(RequestError, match="from 0 to 4"):
        margins(np.zeros((2, 4)), np.array([0, 4]))


# --- U-LiRA -----------------------------------------------------------------------------------------------------------


def test_u_lira_is_at_chance_when_the_sets_agree():
    """0.5 lies in 95 % of the intervals, and the estimate has no bias in either direction."""
    random = np.random.default_rng(0)
    found = [u_lira(*sets(random, 0.0, 15, 12, 10), folds=3, seed=trial) for trial in range(200)]
    for name in ("accuracy", "auc"):
        held = [getattr(one, f"{name}_low") <= 0.5 <= getattr(one, f"{name}_high") for one in found]
        assert 0.92 <= np.mean(held) < 1
        values = [getattr(one, name) for one in found]
        assert abs(np.mean(values) - 0.5) < 3.5 * np.std(values) / np.sqrt(200)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_u_lira_finds_a_planted_shift_as_well_as_can_be(shift):
    """With known normal distributions the ratio is right for Φ(d/2) of the models and its AUC is Φ(d/√2)."""
    found = u_lira(*sets(np.random.default_rng(1), shift, 60, 40, 40), folds=4)
    assert found.accuracy == pytest.approx(norm.cdf(shift / 2), abs=0.02)
    assert found.auc == pytest.approx(norm.cdf(shift / np.sqrt(2)), abs=0.02)
    assert found.accuracy_low < found.accuracy < found.accuracy_high and found.accuracy_low > 0.5
    assert (found.rows, found.unlearned_models, found.retrained_models) == (60, 40, 40)
    assert not found.shared_variance


def test_u_lira_tells_planted_models_apart():
    found = u_lira(*sets(np.random.default_rng(2), 20.0, 30, 8, 8))
    assert (found.accuracy, found.auc) == (1, 1)
    assert found.shared_variance  # few models


def test_u_lira_by_loops():
    unlearned, retrained = sets(np.random.default_rng(3), 0.7, 9, 6, 5)
    n, m, folds = 6, 5, 2
    random = np.random.default_rng(4)
    fold_u, fold_r = random.permutation(np.arange(n) % folds), random.permutation(np.arange(m) % folds)

    def ratio(x: float, row: int, fold: int) -> float:
        value = 0.0
        for sign, values, own in ((1, unlearned, fold_u), (-1, retrained, fold_r)):
            fitted = values[:, own != fold]
            deviation = np.sqrt(np.mean([np.var(one, ddof=1) for one in fitted]))
            mean = fitted[row].mean()
            value += sign * (-np.log(deviation) - (x - mean) ** 2 / (2 * deviation**2))
        return value

    of_u = [[ratio(unlearned[row, i], row, fold_u[i]) for row in range(9)] for i in range(n)]
    of_r = [[ratio(retrained[row, j], row, fold_r[j]) for row in range(9)] for j in range(m)]
    found = u_lira(unlearned, retrained, folds=2, seed=4)
    assert found.accuracy == pytest.approx((np.mean(np.array(of_u) > 0) + np.mean(np.array(of_r) < 0)) / 2)
    per_model = []
    for i in range(n):
        against = [of_r[j] for j in range(m) if fold_r[j] == fold_u[i]]
        per_model.append(np.mean([a > b for other in against for a in of_u[i] for b in other]))
    assert found.auc == pytest.approx(np.mean(per_model))


def test_u_lira_on_models_that_are_all_alike():
    same = np.full((6, 8), 2.5)
    found = u_lira(same, same)
    assert (found.accuracy, found.auc) == (0.5, 0.5)


@pytest.mark.parametrize("test", [u_lira, klom])
def test_sets_that_cannot_be_compared(test):
    good = np.random.default_rng(0).normal(size=(5, 6))
    with pytest.raises(RequestError, match=r"unlearned has shape \(5, 3\)"):
        test(good[:, :3], good)
    with pytest.raises(RequestError, match=r"retrained has shape \(5,\)"):
        test(good, good[:, 0])
    with pytest.raises(RequestError, match="unlearned has 5 and retrained 4 rows"):
        test(good, good[:4])
    with pytest.raises(RequestError, match="1 margins that are not finite"):
        test(np.where(good == good[0, 0], np.inf, good), good)


def test_u_lira_needs_folds():
    good = np.random.default_rng(0).normal(size=(5, 6))
    with pytest.raises(ConfigError, match="folds=1"):
        u_lira(good, good, folds=1)


# --- KLoM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift, scale", [(1.0, 1.0), (0.5, 2.0), (-2.0, 0.7)])
def test_klom_of_planted_normal_distributions(shift, scale):
    """KL(N(d, s²) ‖ N(0, 1)) = (s² + d² − 1) / 2 − ln s."""
    truth = (scale**2 + shift**2 - 1) / 2 - np.log(scale)
    unlearned, retrained = sets(np.random.default_rng(0), shift, 8, 20_000, 20_000, scale)
    found = klom(unlearned, retrained, "gaussian", permutations=0)
    assert found.mean == pytest.approx(truth, rel=0.03)
    assert found.median == pytest.approx(truth, rel=0.05) and found.mean_low < found.mean < found.mean_high
    # Bins lose a little of the divergence, and the least share of a bin cuts off the tails.
    assert klom(unlearned, retrained, permutations=0).mean == pytest.approx(truth, rel=0.15)


def test_gaussian_divergence_is_that_of_torch():
    unlearned, retrained = sets(np.random.default_rng(1), 0.8, 12, 9, 7, 1.4)
    u, r = (Normal(torch.from_numpy(x.mean(1)), torch.from_numpy(x.std(1, ddof=1))) for x in (unlearned, retrained))
    np.testing.assert_allclose(row_divergences(unlearned, retrained, "gaussian"), kl_divergence(u, r), rtol=1e-9)


def test_histogram_divergence_is_that_of_scipy():
    unlearned, retrained = sets(np.random.default_rng(2), 0.8, 12, 30, 25)
    unlearned[0], retrained[0] = 250.0, -3.0  # clipped at 100
    found = row_divergences(unlearned, retrained, "histogram")
    for row in range(12):
        u, r = np.clip(unlearned[row], -100, 100), np.clip(retrained[row], -100, 100)
        edges = np.linspace(min(u.min(), r.min()), max(u.max(), r.max()), 21)
        p, q = (np.histogram(x, edges)[0] / len(x) for x in (u, r))
        assert found[row] == pytest.approx(entropy(p, np.where(p > 0, np.maximum(q, 1e-5), q)), rel=1e-9)


@pytest.mark.parametrize("estimator", ["histogram", "gaussian"])
def test_klom_of_equal_sets_is_its_value_at_chance(estimator):
    random = np.random.default_rng(3)
    found = [
        klom(*sets(random, 0.0, 20, 12, 12), estimator, permutations=19, bootstrap=0, seed=trial) for trial in range(40)
    ]
    assert np.mean([one.mean for one in found]) == pytest.approx(np.mean([one.chance_mean for one in found]), rel=0.1)
    assert sum(one.p_value <= 0.1 for one in found) <= 10  # 10 % of 40; more has probability 0.001
    found = klom(*sets(random, 1.5, 20, 12, 12), estimator)
    assert found.p_value < 0.01 and found.mean > 1.2 * found.chance_mean
    assert found.percentile_95 > found.median


def test_klom_of_models_that_are_all_alike():
    same = np.full((6, 8), 2.5)
    for estimator in ("histogram", "gaussian"):
        found = klom(same, same, estimator, permutations=3)
        assert found.mean == 0 and found.p_value == 1


def test_klom_arguments():
    good = np.random.default_rng(0).normal(size=(5, 6))
    with pytest.raises(ConfigError, match="histogram, gaussian"):
        klom(good, good, "kernel")
    with pytest.raises(ConfigError, match="permutations=-1"):
        klom(good, good, permutations=-1)
    assert np.isnan(klom(good, good, permutations=0).p_value)
