"""What a multi-step update is to make up for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hf_iau.data import RowPredictions, TaskKind
from hf_iau.methods.iau.targets import ForgetTargets


def classifier_rows(losses) -> RowPredictions:
    p = np.exp(-np.asarray(losses))
    found = RowPredictions.from_probabilities(np.stack([p, 1 - p], axis=1), np.zeros(len(p)))
    return found


def test_targets_by_hand():
    """A row better known than half of the training rows is to be known as the median held-out row is."""
    rows, known = RowPredictions.from_losses(np.array([0.25, 0.0, 9.0])), RowPredictions.from_losses(np.arange(4) / 10)
    held_out = RowPredictions.from_losses(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    found = ForgetTargets.of(rows, known, held_out)
    # Ranks: 3 of 4 below; half of one (a tie) of 4; all, but for half a place.
    assert found.targets == pytest.approx(np.quantile([1.0, 2.0, 3.0, 4.0, 5.0], [0.75, 0.125, 0.875]))


def test_rows_known_like_held_out_rows_have_nothing_left():
    losses = np.random.default_rng(0).exponential(size=500)
    same = classifier_rows(losses)
    found = ForgetTargets.of(same, same, same)
    assert found.deficit_at_start < 0.005
    known = classifier_rows(losses / 100.0)
    found = ForgetTargets.of(known, known, same)
    assert found.deficit_at_start > 0.1 and found.share_remaining(known.loss) == pytest.approx(1.0)
    assert found.share_remaining(losses) < 0.01 and found.share_remaining(2.0 * losses) == 0.0
    assert found.share_remaining(np.random.default_rng(1).permutation(losses)) < 0.01  # rows may change places
    assert found.share_remaining(np.full(500, np.nan)) == float("inf")


def test_the_luck_of_an_easy_draw_stays():
    """Forget rows that are easier than training rows are on average get targets that are easier, too."""
    losses = np.random.default_rng(0).exponential(size=2000)
    known, held_out = classifier_rows(losses / 10.0), classifier_rows(losses)
    easy = classifier_rows(np.sort(losses)[:400] / 10.0)
    assert ForgetTargets.of(easy, known, held_out).targets.mean() == pytest.approx(
        np.sort(losses)[:400].mean(), rel=0.02
    )


def test_a_row_without_targets_does_not_count():
    """Every label of a text may be ignored; such a row has no loss."""
    rows = classifier_rows(np.array([0.11, 0.21, 0.31, 0.41]))
    bare = dataclasses.replace(
        rows, loss=np.where([1, 0, 1, 1], rows.loss, np.nan), targets=np.array([1.0, 0.0, 1.0, 1.0])
    )
    known, held_out = classifier_rows(np.arange(1, 9) / 20), classifier_rows(np.arange(1, 9) / 2)
    found, without = (ForgetTargets.of(r, known, held_out) for r in (bare, rows.select(np.array([0, 2, 3]))))
    assert found.deficit_at_start == without.deficit_at_start > 0
    assert found.share_remaining(bare.loss) == pytest.approx(1.0)
    assert found.deficit(bare.loss)[1] == 0.0 and np.isnan(found.targets[1])
    assert found.share_remaining(np.array([0.11, np.nan, np.inf, 0.41])) == float("inf")


def token_rows(*rows) -> RowPredictions:
    width = max(len(row) for row in rows)
    losses = np.array([[*row, *[np.nan] * (width - len(row))] for row in rows], dtype=np.float64)
    counts = np.isfinite(losses).sum(axis=1).astype(float)
    means = np.array([np.mean(row) if len(row) else np.nan for row in rows])
    return dataclasses.replace(
        RowPredictions.from_losses(means), kind=TaskKind.TOKENS, targets=counts, token_losses=losses
    )


def test_tokens_get_the_losses_of_the_rows_counterpart_by_hand():
    """The better known row is that of the better known held-out row; its tokens in their order."""
    known = token_rows([0.1], [0.2], [0.3], [0.4])
    held_out = token_rows([], [6.0, 2.0, 13.0], [1.0, 0.0])
    rows = token_rows([0.02, 0.0, 0.04], [0.9, 0.5], [])
    found = ForgetTargets.of(rows, known, held_out)
    # Thirds of two tokens: the best, half of each, the worst. Halves of three: the better one and half of the middle
    # one, ….
    assert found.targets[0] == pytest.approx([0.5, 0.0, 1.0])
    assert found.targets[1][:2] == pytest.approx([(13 + 6 / 2) / 1.5, (2 + 6 / 2) / 1.5])
    assert np.isnan(found.targets[1][2]) and np.isnan(found.targets[2]).all()
    longest, one = token_rows([0.1, 0.3, 0.2]), token_rows([0.1])
    assert ForgetTargets.of(longest, longest, token_rows([6.0, 2.0, 13.0])).targets == pytest.approx(
        np.array([[2, 13, 6.0]])
    )
    assert ForgetTargets.of(one, one, token_rows([6.0, 2.0, 13.0])).targets == pytest.approx(np.array([[7.0]]))
    assert found.deficit(rows.token_losses).shape == (3, 3)
    assert found.deficit(rows.token_losses[1:2, :2], np.array([1])).shape == (1, 2)  # of a batch of short rows alone


def test_tokens_that_are_nearly_there_are_not_enough_while_rows_can_be_told_apart():
    """What is left of each token is little, and the same for all tokens of all rows."""
    rng = np.random.default_rng(0)
    held_out = token_rows(*rng.exponential(size=(200, 10)))
    rows = token_rows(*(rng.exponential(size=(200, 10)) / 1000.0))
    found = ForgetTargets.of(rows, rows, held_out)
    assert found.share_remaining(rows.token_losses) == pytest.approx(1.0)
    # As the targets say, whichever token of a row it is.
    assert (
        found.share_remaining(
            np.take_along_axis(found.targets, rng.permuted(np.tile(np.arange(10), (200, 1)), axis=1), 1)
        )
        < 1e-9
    )
    nearly = 0.85 * found.targets
    wins = [[1.0 if a < b else 0.5 * (a == b) for b in found.targets.mean(axis=1)] for a in nearly.mean(axis=1)]
    assert found.mean_deficit(nearly) < 0.05 * found.deficit_at_start
    assert (
        found.share_remaining(nearly) == pytest.approx((np.mean(wins) - 0.5) / 0.5)
        and found.share_remaining(nearly) > 0.2
    )
    assert found.share_remaining(np.full((200, 10), np.nan)) == float("inf")


@pytest.mark.parametrize("softness", [1.0, 4.0, 16.0])
def test_q_is_the_probability_at_softness_one_and_softer_beyond(softness):
    losses = np.array([1e-6, 0.01, 0.5, 3.0, 40.0])
    found = ForgetTargets(losses, 1.0, 1.0, softness=softness)
    p = np.exp(-losses)
    assert found.soft_confidence(losses) == pytest.approx(1 / (1 + np.exp(-np.log(p / (1 - p)) / softness)), rel=1e-6)
    assert found.error_probability(losses) == pytest.approx(1 - p, rel=1e-6)
    if softness == 1.0:
        assert found.soft_confidence(losses) == pytest.approx(p, rel=1e-6)
