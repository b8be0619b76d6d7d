"""Which labels nothing else supports, and what such rows are to lose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from memorising_network import CLASSES, Classifier, Rows, draw, fit
from transformers import default_data_collator

from hf_iau import RequestError
from hf_iau.data import RowPredictions, RowSource, predict_rows
from hf_iau.methods.iau.label_support import LabelSupport, _Probe, find_label_support, layer_features, untaught_losses
from hf_iau.methods.iau.targets import ForgetTargets


def predictions(probabilities: np.ndarray, labels: np.ndarray) -> RowPredictions:
    return RowPredictions.from_probabilities(probabilities, labels)


def source(rows: Rows, name: str = "rows") -> RowSource:
    return RowSource(rows, default_data_collator, batch_size=50, name=name)


def test_untaught_losses_are_of_labels_that_are_neither_predicted_nor_given() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), size=400)
    labels = rng.integers(0, 5, size=400)
    held_out = predictions(p, labels)
    asked = np.array([0.0, 0.0, 0.0, 1.0, 3.0])  # classes 2 and 4 are never asked for
    losses = untaught_losses(held_out, asked)
    predicted = p.argmax(axis=1)
    allowed = [[c for c in (0, 1, 3) if c not in (labels[i], predicted[i])] for i in range(400)]
    expected = [{round(float(-np.log(p[i, c])), 9) for c in classes} for i, classes in enumerate(allowed) if classes]
    assert len(losses) == len(expected)
    assert all(round(float(loss), 9) in kinds for loss, kinds in zip(losses, expected, strict=True))
    # Class 0 is drawn three times as often as 1 and 3, where all are allowed.
    free = [i for i in range(400) if labels[i] not in (0, 1, 3) and predicted[i] not in (0, 1, 3)]
    where = np.cumsum([bool(classes) for classes in allowed]) - 1
    share = np.mean([abs(losses[where[i]] + np.log(p[i, 0])) < 1e-12 for i in free])
    assert abs(share - 0.6) < 0.2
    assert np.array_equal(losses, untaught_losses(held_out, asked))


def test_targets_of_unsupported_rows_alone_are_replaced() -> None:
    support = LabelSupport(
        unsupported=np.array([True, False, True, True]),
        margins=np.array([-0.9, 0.5, -0.1, -0.5]),
        untaught_losses=np.array([2.0, 4.0, 6.0, 8.0]),
        found=True,
    )
    old = np.array([0.1, 0.2, 0.3, 7.9])
    new = support.targets(old, np.arange(4))
    levels = np.quantile(support.untaught_losses, [1 / 6, 0.5, 5 / 6])
    assert new[1] == 0.2 and new[2] == levels[0]  # the best supported gets the smallest
    assert new[3] == 7.9 and new[0] == levels[2]  # never nearer than as any other row
    some = support.targets(old[[3, 1]], np.array([3, 1]))
    assert some.tolist() == [7.9, 0.2] and old.tolist() == [0.1, 0.2, 0.3, 7.9]
    none = LabelSupport(np.zeros(2, bool), np.zeros(2), np.ones(3), found=True)
    assert none.targets(old[:2], np.arange(2)) is not None and none.targets(old[:2], np.arange(2)).tolist() == [
        0.1,
        0.2,
    ]


def test_leave_one_out_of_the_probe_is_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, size=40)
    features = rng.normal(size=(40, 6)) + np.eye(3, 6)[labels] * 2.0
    probe = _Probe(features, labels, 3)
    standard = (features - features.mean(axis=0)) / (features.std(axis=0) + 1e-6)
    x = np.concatenate([standard, np.ones((40, 1))], axis=1)
    best = 0.0
    for penalty in (1e-3, 1e-2, 1e-1, 1.0):
        ridge = penalty * np.trace(x.T @ x) / x.shape[1] * np.eye(x.shape[1])
        hits = 0
        for i in range(40):
            rest = np.arange(40) != i
            weights = np.linalg.solve(x[rest].T @ x[rest] + ridge, x[rest].T @ np.eye(3)[labels[rest]])
            hits += int((x[i] @ weights).argmax() == labels[i])
        best = max(best, hits / 40)
    assert probe.accuracy == pytest.approx(best)


@pytest.fixture(scope="module")
def memorised() -> tuple[Classifier, Rows, np.ndarray, Rows]:
    """A network that knows 600 rows by heart, a tenth of them with a wrong label; and held-out rows with right ones."""
    rows, held_out = draw(600, 1), draw(400, 2)
    centres = torch.randn(CLASSES, rows.inputs.shape[1], generator=torch.Generator().manual_seed(99))
    for part in (rows, held_out):  # farther apart than they are drawn, so that there are right labels
        part.inputs += 0.65 * centres[part.labels]
    wrong = np.random.default_rng(3).permutation(600)[:60]
    rows.labels[wrong] = (rows.labels[wrong] + 1) % CLASSES
    torch.manual_seed(0)
    model = Classifier()
    fit(model, rows, 250, 0)
    return model.eval(), rows, wrong, held_out


def find(memorised: tuple[Classifier, Rows, np.ndarray, Rows], forget: np.ndarray) -> LabelSupport:
    model, rows, _, held_out = memorised
    retained = np.setdiff1d(np.arange(600), forget)
    sources = (source(rows.take(forget)), source(rows.take(retained)), source(held_out))
    seen = tuple(predict_rows(model, part, keep_probabilities=True) for part in sources)
    assert seen[0].accuracy > 0.95  # known by heart, so what it predicts tells nothing
    found = find_label_support(model, sources, seen)
    assert found is not None
    return found


def test_wrong_labels_are_found_and_random_rows_are_not(
    memorised: tuple[Classifier, Rows, np.ndarray, Rows],
) -> None:
    _, _, wrong, _ = memorised
    assert find(memorised, wrong).unsupported.mean() > 0.85
    right = np.setdiff1d(np.arange(600), wrong)[:60]
    assert not find(memorised, right).unsupported.any()


def test_a_mixture_is_told_apart_row_by_row(memorised: tuple[Classifier, Rows, np.ndarray, Rows]) -> None:
    _, _, wrong, _ = memorised
    right = np.setdiff1d(np.arange(600), wrong)[:40]
    found = find(memorised, np.concatenate([wrong[:40], right])).unsupported
    assert found[:40].mean() > 0.8 and found[40:].mean() < 0.2


def test_features_do_not_depend_on_batches(memorised: tuple[Classifier, Rows, np.ndarray, Rows]) -> None:
    model, rows, _, _ = memorised
    one = layer_features(model, [source(rows)])
    other = layer_features(model, [RowSource(rows, default_data_collator, batch_size=7, name="rows")])
    assert list(one) == ["body.0", "body.2"]
    for name in one:
        assert one[name][0].shape == (600, 48) and np.allclose(one[name][0], other[name][0], atol=1e-5)


def test_forget_targets_take_them(memorised: tuple[Classifier, Rows, np.ndarray, Rows]) -> None:
    model, rows, wrong, held_out = memorised
    forget, known, unseen = (
        predict_rows(model, source(part), keep_probabilities=True) for part in (rows.take(wrong), rows, held_out)
    )
    plain = ForgetTargets.of(forget, known, unseen)
    told = ForgetTargets.of(forget, known, unseen, LabelSupport.told(forget, unseen))
    assert (told.targets >= plain.targets).all() and np.median(told.targets) > 4 * np.median(plain.targets)
    assert told.deficit_at_start > plain.deficit_at_start


def test_a_reason_is_one_of_those_that_are_known(tmp_path: Path) -> None:
    from unlearning_trainers import make_trainer

    with pytest.raises(RequestError, match="reason='typo' is unknown: give one of 'random', 'wrong-label', or None"):
        make_trainer(tmp_path, "plain").unlearn(forget_indices=[1], reason="typo")
