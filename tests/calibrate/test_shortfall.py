"""What a walk is to make up for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hf_iau.calibrate import Shortfall, shortfall
from hf_iau.objective import RowPredictions


def classifier_rows(losses) -> RowPredictions:
    p = np.exp(-np.asarray(losses))
    found = RowPredictions.from_probabilities(np.stack([p, 1 - p], axis=1), np.zeros(len(p)))
    return found


def test_targets_by_hand():
    """A row better known than half of the training rows is to be known as the median held-out row is."""
    rows, known = RowPredictions.from_losses(np.array([0.25, 0.0, 9.0])), RowPredictions.from_losses(np.arange(4) / 10)
    held_out = RowPredictions.from_losses(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    found = Shortfall.of(rows, known, held_out)
    # Ranks: 3 of 4 below; half of one (a tie) of 4; all, but for half a place.
    assert found.targets == pytest.approx(np.quantile([1.0, 2.0, 3.0, 4.0, 5.0], [0.75, 0.125, 0.875]))


def test_rows_known_like_held_out_rows_have_nothing_left():
    losses = np.random.default_rng(0).exponential(size=500)
    same = classifier_rows(losses)
    found = Shortfall.of(same, same, same)
    assert found.at_start < 0.005
    known = classifier_rows(losses / 100.0)
    found = Shortfall.of(known, known, same)
    assert found.at_start > 0.1 and found.remaining(known.loss) == pytest.approx(1.0)
    assert found.remaining(losses) < 0.01 and found.remaining(2.0 * losses) == 0.0
    assert found.remaining(np.random.default_rng(1).permutation(losses)) < 0.01  # rows may change places
    assert found.remaining(np.full(500, np.nan)) == float("inf")


def test_the_luck_of_an_easy_draw_stays():
    """Forget rows that are easier than training rows are on average get targets that are easier, too."""
    losses = np.random.default_rng(0).exponential(size=2000)
    known, held_out = classifier_rows(losses / 10.0), classifier_rows(losses)
    easy = classifier_rows(np.sort(losses)[:400] / 10.0)
    assert Shortfall.of(easy, known, held_out).targets.mean() == pytest.approx(np.sort(losses)[:400].mean(), rel=0.02)


def test_a_row_without_targets_does_not_count():
    """Every label of a text may be ignored; such a row has no loss."""
    rows = classifier_rows(np.array([0.11, 0.21, 0.31, 0.41]))
    bare = dataclasses.replace(
        rows, loss=np.where([1, 0, 1, 1], rows.loss, np.nan), targets=np.array([1.0, 0.0, 1.0, 1.0])
    )
    known, held_out = classifier_rows(np.arange(1, 9) / 20), classifier_rows(np.arange(1, 9) / 2)
    found, without = (Shortfall.of(r, known, held_out) for r in (bare, rows.select(np.array([0, 2, 3]))))
    assert found.at_start == without.at_start > 0
    assert found.remaining(bare.loss) == pytest.approx(1.0)
    assert found.each(bare.loss)[1] == 0.0 and np.isnan(found.targets[1])
    assert found.remaining(np.array([0.11, np.nan, np.inf, 0.41])) == float("inf")


def test_q_is_the_probability_at_softness_one_and_softer_beyond(monkeypatch):
    losses = np.array([1e-6, 0.01, 0.5, 3.0, 40.0])
    found = Shortfall(losses, 1.0, 1.0)
    p = np.exp(-losses)
    assert found.known(losses) == pytest.approx(1 / (1 + np.exp(-np.log(p / (1 - p)) / shortfall._SOFTNESS)), rel=1e-6)
    monkeypatch.setattr(shortfall, "_SOFTNESS", 1.0)
    assert found.known(losses) == pytest.approx(p, rel=1e-6)
    assert found.doubt(losses) == pytest.approx(1 - p, rel=1e-6)
