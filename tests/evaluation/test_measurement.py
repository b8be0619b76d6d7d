"""One forward pass over each set of rows, and the figures that come of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, default_data_collator

from hf_iau.data import RowSource, TaskKind, predict_rows
from hf_iau.evaluation.attacks import attack, attack_auc
from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES, Figures
from hf_iau.evaluation.measurement import Measurement, measure_model


def tiny_rows(count: int, seed: int) -> RowSource:
    random = np.random.default_rng(seed)
    data = [
        {"input_ids": random.integers(1, 30, 6).tolist(), "attention_mask": [1] * 6, "labels": int(random.integers(3))}
        for _ in range(count)
    ]
    return RowSource(data, default_data_collator, batch_size=8)


def tiny_model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=30,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=3,
        )
    )


def test_measure_model_runs_each_source_once():
    model = tiny_model().train()
    sources = [tiny_rows(25, 0), tiny_rows(30, 1), tiny_rows(40, 2), tiny_rows(50, 3)]
    calls = []
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    found = measure_model(model, *sources)
    assert calls == [False] * (4 + 4 + 5 + 7)  # batches of 8
    assert model.training
    for predictions, source in zip((found.forget, found.retain, found.held_out, found.test), sources, strict=True):
        np.testing.assert_array_equal(predictions.loss, predict_rows(model, source).loss)
        assert predictions.probabilities is None

    figures = found.figures(bootstrap=20)
    assert figures.test_accuracy == found.test.correct.mean()
    assert figures.retain_loss == pytest.approx(found.retain.loss.mean())
    assert figures.mia_auc == figures.mia_auc_test == attack_auc(found.forget, found.test)
    assert figures.mia_auc_held_out == attack_auc(found.forget, found.held_out)
    assert figures.attacks["entropy"] == attack(found.forget, found.test, "entropy", bootstrap=20)
    assert figures.attacks_against == "test"


def test_missing_sets_are_none():
    found = measure_model(tiny_model(), tiny_rows(25, 0), held_out=tiny_rows(30, 1), keep_probabilities=True)
    assert found.retain is None and found.test is None
    assert found.forget.probabilities.shape == (25, 3)
    figures = found.figures(bootstrap=0)
    assert figures.retain_accuracy is None and figures.test_loss is None and figures.mia_auc_test is None
    assert figures.mia_auc == figures.mia_auc_held_out is not None
    assert figures.attacks_against == "held_out"

    alone = Measurement(found.forget).figures()
    assert alone.mia_auc is None and alone.attacks is None and alone.attacks_against is None
    assert alone.forget_loss == figures.forget_loss


@pytest.mark.parametrize("count, suppressed", [(19, True), (20, False)])
def test_few_forget_rows_give_means_alone(rows, count, suppressed):
    assert MINIMUM_ROWS_FOR_PER_ROW_FIGURES == 20
    random = np.random.default_rng(0)
    loss = np.concatenate([random.exponential(size=count), [np.nan]])  # a row without target does not count
    figures = Measurement(rows(loss), test=rows(random.exponential(size=50))).figures()
    assert figures.per_row_suppressed is suppressed
    assert (figures.attacks is None) is suppressed
    assert figures.forget_loss == pytest.approx(np.nanmean(loss))
    assert figures.mia_auc is not None


def test_one_row_has_no_attack(rows):
    figures = Measurement(rows([0.3]), test=rows(np.ones(50))).figures()
    assert figures.mia_auc is None
    assert figures.forget_loss == 0.3


def test_no_targets_means_no_figures(rows):
    figures = Measurement(rows([np.nan, np.nan]), test=rows(np.ones(5))).figures()
    assert figures.forget_loss is None and figures.forget_accuracy is None and figures.mia_auc is None


def test_a_diverged_model_shows(rows):
    broken = replace(rows(np.full(30, np.nan)), targets=np.ones(30), correct=np.zeros(30))
    figures = Measurement(broken, test=broken).figures()
    assert np.isnan(figures.forget_loss) and np.isnan(figures.mia_auc)
    assert figures.forget_accuracy == 0
    assert figures.attacks is None


def test_means_weigh_targets(rows):
    tokens = rows([1.0, 4.0], kind=TaskKind.SINGLE_LABEL, targets=np.array([3.0, 1.0]), correct=np.array([1.0, 0.0]))
    figures = Measurement(tokens).figures()
    assert figures.forget_loss == pytest.approx(7 / 4)
    assert figures.forget_accuracy == 0.75


def test_regression_has_no_accuracy(rows):
    random = np.random.default_rng(0)
    a, b = (rows(random.exponential(size=30), kind=TaskKind.REGRESSION) for _ in range(2))
    figures = Measurement(a, retain=b, test=b).figures()
    assert figures.forget_accuracy is None and figures.retain_accuracy is None
    assert figures.mia_auc is not None
    assert np.isnan(figures.attacks["confidence"].auc)


def test_figures_round_trip(rows):
    random = np.random.default_rng(0)
    figures = Measurement(rows(random.exponential(size=30)), test=rows(random.exponential(size=30))).figures()
    assert Figures.from_dict(json.loads(json.dumps(figures.to_dict()))) == figures
