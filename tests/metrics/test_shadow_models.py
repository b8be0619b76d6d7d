"""The shadow-model attack on planted predictions and on models that do memorise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm
from sklearn.neighbors import KNeighborsClassifier

from hf_iau.data import RowPredictions
from hf_iau.errors import RequestError
from hf_iau.metrics.shadow_models import ShadowPredictions, attack_features, shadow_model_attack, shadow_rows

CLASSES = 4


def planted(random: np.random.Generator, shift: float, size: int) -> RowPredictions:
    """Rows whose label has the probability σ(g), g ~ N(shift, 1); the other classes share the rest."""
    own = expit(random.normal(shift, 1, size))
    p = np.repeat((1 - own)[:, None] / (CLASSES - 1), CLASSES, axis=1)
    labels = random.integers(CLASSES, size=size)
    p[np.arange(size), labels] = own
    return RowPredictions.from_probabilities(p, labels)


def shadows(random: np.random.Generator, shift: float, models: int = 3, size: int = 500) -> list[ShadowPredictions]:
    return [ShadowPredictions(planted(random, shift, size), planted(random, 0.0, size)) for _ in range(models)]


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_planted_members_are_found_as_well_as_the_best_attack_finds_them(shift):
    """The likelihood ratio's shares are Φ(d/2), its AUC Φ(d/√2); nothing does better."""
    random = np.random.default_rng(0)
    made = shadows(random, shift)
    found = shadow_model_attack(planted(random, shift, 2000), planted(random, 0.0, 2000), made)
    assert found.balanced_accuracy == pytest.approx(norm.cdf(shift / 2), abs=0.025)
    assert found.ranking.auc == pytest.approx(norm.cdf(shift / np.sqrt(2)), abs=0.025)
    assert found.member_share_low < found.member_share < found.member_share_high
    assert found.shadow_models == 3 and found.shadow_rows == 3000


def test_forgotten_rows_are_called_members_as_often_as_unseen_ones():
    random = np.random.default_rng(1)
    found = shadow_model_attack(planted(random, 0.0, 800), planted(random, 0.0, 800), shadows(random, 2.0))
    assert found.ranking.ci_low <= 0.5 <= found.ranking.ci_high
    assert found.member_share_low <= found.unseen_member_share_high
    assert found.unseen_member_share_low <= found.member_share_high
    assert found.member_share == pytest.approx(norm.cdf(-1.0), abs=0.05)


def test_shadow_models_that_memorise_tell_a_victim_that_does():
    """Victim and shadow models are nearest-neighbour classifiers, which know every row by heart; labels are noise."""
    random = np.random.default_rng(2)
    features, labels = random.normal(size=(1600, 5)), random.integers(CLASSES, size=1600)
    forget, retained, unseen = np.arange(100), np.arange(100, 400), np.arange(400, 600)

    def predictions(model, positions) -> RowPredictions:
        return RowPredictions.from_probabilities(model.predict_proba(features[positions]), labels[positions])

    def trained(positions) -> KNeighborsClassifier:
        return KNeighborsClassifier(1).fit(features[positions], labels[positions])

    made = []
    for dealt in shadow_rows(1600, np.concatenate([forget, retained, unseen]), models=2):
        model = trained(dealt.members)
        made.append(ShadowPredictions(predictions(model, dealt.members), predictions(model, dealt.non_members)))
    remembers = trained(np.concatenate([forget, retained]))
    found = shadow_model_attack(predictions(remembers, forget), predictions(remembers, unseen), made)
    assert found.member_share == 1 and found.unseen_member_share < 0.4
    retrained = trained(retained)
    found = shadow_model_attack(predictions(retrained, forget), predictions(retrained, unseen), made)
    assert found.ranking.ci_low <= 0.5 <= found.ranking.ci_high
    assert found.member_share < 0.4


def test_shadow_rows_are_disjoint_from_the_victims():
    victim = np.arange(0, 100, 3)
    dealt = shadow_rows(100, victim, models=4, seed=5)
    assert len(dealt) == 4
    for one in dealt:
        assert len(one.members) == len(one.non_members) == 33
        everything = np.concatenate([one.members, one.non_members])
        assert len(np.unique(everything)) == 66 and not np.isin(everything, victim).any()
    assert not np.array_equal(dealt[0].members, dealt[1].members)
    again = shadow_rows(100, victim, models=4, seed=5)
    assert all(np.array_equal(a.members, b.members) for a, b in zip(dealt, again, strict=True))


def test_features_are_the_papers():
    predictions = RowPredictions.from_probabilities([[0.2, 0.8], [0.9, 0.1]], [1, 1])
    np.testing.assert_allclose(attack_features(predictions), [[0.2, -0.2, 0, 1], [0.9, -0.9, 0, 1]])


def test_unequal_sides_are_balanced_and_the_attack_is_seeded():
    random = np.random.default_rng(3)
    uneven = [ShadowPredictions(planted(random, 1.5, 900), planted(random, 0.0, 150))]
    forget, unseen = planted(random, 1.5, 300), planted(random, 0.0, 300)
    found = shadow_model_attack(forget, unseen, uneven, seed=1)
    assert found.shadow_rows == 300
    assert found.unseen_member_share < 0.5  # on 6 : 1 shadow rows nearly everything would be called a member
    assert found == shadow_model_attack(forget, unseen, uneven, seed=1)


def test_bad_input():
    random = np.random.default_rng(0)
    one, made = planted(random, 0.0, 50), shadows(random, 1.0, models=1, size=50)
    with pytest.raises(RequestError, match="shadows is empty"):
        shadow_model_attack(one, one, [])
    with pytest.raises(RequestError, match="at least 20 members"):
        shadow_model_attack(one, one, shadows(random, 1.0, models=1, size=19))
    with pytest.raises(RequestError, match="at least 2 of each"):
        shadow_model_attack(planted(random, 0.0, 1), one, made)
    with pytest.raises(RequestError, match="classes"):
        shadow_model_attack(RowPredictions.from_probabilities([[0.5, 0.5]] * 3, [0, 1, 0]), one, made)
    with pytest.raises(RequestError, match="keep_probabilities"):
        shadow_model_attack(RowPredictions.from_losses([1.0, 2.0]), one, made)
    with pytest.raises(RequestError, match="victim_rows reaches from 0 to 10"):
        shadow_rows(10, [0, 10])
    with pytest.raises(RequestError, match="leaves 2 of 10"):
        shadow_rows(10, range(8))
    with pytest.raises(RequestError, match="models=0"):
        shadow_rows(10, [0], models=0)
