"""Predictions made of probabilities or losses alone equal those of a model."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from tiny_models import RowList, pad_right, plain, plain_rows

from hf_iau.data import RowPredictions, RowSource, predict_rows
from hf_iau.errors import RequestError
from hf_iau.evaluation.attacks import attack_auc


def test_probabilities_give_what_the_model_gives():
    data = plain_rows(40)
    model = plain().double()
    found = predict_rows(model, RowSource(RowList(data), pad_right()), keep_probabilities=True)
    again = RowPredictions.from_probabilities(found.probabilities, [row["labels"] for row in data])
    for field in fields(RowPredictions):
        if field.name != "kind":
            torch.testing.assert_close(getattr(again, field.name), getattr(found, field.name), rtol=1e-9, atol=1e-9)
    assert again.kind is found.kind


def test_modified_entropy_by_its_formula():
    p = np.random.default_rng(0).dirichlet(np.ones(4), 20)
    labels = np.arange(20) % 4
    found = RowPredictions.from_probabilities(p, labels)
    for row in range(20):
        y = labels[row]
        expected = -(1 - p[row, y]) * np.log(p[row, y])
        expected -= sum(p[row, i] * np.log(1 - p[row, i]) for i in range(4) if i != y)
        assert found.modified_entropy[row] == pytest.approx(expected)
        assert found.entropy[row] == pytest.approx(-(p[row] * np.log(p[row])).sum())


def test_probabilities_of_zero_and_one_are_finite():
    found = RowPredictions.from_probabilities([[1.0, 0.0], [0.0, 1.0]], [0, 0])
    assert found.loss[0] == 0 and 700 < found.loss[1] < 710
    assert found.confidence == pytest.approx([1, 0]) and found.correct.tolist() == [1, 0]
    for name in ("entropy", "modified_entropy"):
        assert np.isfinite(getattr(found, name)).all()


def test_rows_without_labels_keep_their_probabilities():
    found = RowPredictions.from_probabilities([[0.4, 0.6]])
    assert np.isnan(found.loss).all() and found.targets.tolist() == [0] and found.probabilities.shape == (1, 2)


def test_losses_alone():
    members, others = RowPredictions.from_losses([0.1, 0.2]), RowPredictions.from_losses([1.0, 0.15])
    assert attack_auc(members, others) == 0.75
    with pytest.raises(RequestError, match="score='loss'"):
        attack_auc(members, others, "entropy")


@pytest.mark.parametrize(
    "probabilities, labels, message",
    [
        ([[2.0, -1.0]], [0], "softmax"),
        ([[0.5, 0.5], [3.0, 4.0]], [0, 0], "row 1 sums to 7"),
        ([[np.nan, 0.5]], [0], "softmax"),
        ([0.5, 0.5], [0, 1], "classes"),
        ([[0.5, 0.5]], [2], "from 0 to 1"),
        ([[0.5, 0.5]], [0.5], "from 0 to 1"),
        ([[0.5, 0.5]], [0, 1], "each of the 1 rows"),
    ],
)
def test_what_is_no_prediction(probabilities, labels, message):
    with pytest.raises(RequestError, match=message):
        RowPredictions.from_probabilities(probabilities, labels)
