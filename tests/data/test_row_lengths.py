"""Rows of similar length share a batch, and every number still belongs to its row."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import RowList, as_dataset, build, image_rows, pad_right, rows_of, text_rows

from hf_iau.curvature import fit_curvature
from hf_iau.data import ModelRowLoss, RowSource, predict_rows
from hf_iau.data.rows import row_lengths
from hf_iau.memory.gradient_sum import sum_row_gradients
from hf_iau.methods.iau.multi_step_gradients import forget_gradient, weighted_gradient
from hf_iau.methods.iau.targets import ForgetTargets


def texts(n: int = 21) -> list[dict]:
    """Some rows of 2 to 30 tokens."""
    return text_rows(n, length=(2, 30))


def source_of(rows: list[dict], batch_size: int = 4) -> RowSource:
    return RowSource(as_dataset(rows), pad_right(), batch_size=batch_size)


def test_neighbours_in_a_batch_are_of_similar_length() -> None:
    rows = texts()
    source = source_of(rows)
    lengths = np.array([len(row["input_ids"]) for row in rows])
    seen, padded = [], 0
    for positions, inputs in source.by_length():
        assert inputs["input_ids"].shape[1] == lengths[positions].max()
        assert inputs["attention_mask"].sum(dim=1).tolist() == lengths[positions].tolist()
        seen += positions.tolist()
        padded += inputs["input_ids"].numel()
    assert sorted(seen) == list(range(len(rows)))
    assert lengths[seen].tolist() == sorted(lengths, reverse=True)
    assert padded < sum(inputs["input_ids"].numel() for _, inputs in source)


def test_plain_iteration_and_a_later_start_keep_their_meaning() -> None:
    source = source_of(texts())
    order = source.length_order()
    assert np.concatenate([positions for positions, _ in source]).tolist() == list(range(len(source)))
    assert np.concatenate([positions for positions, _ in source.by_length(9)]).tolist() == order[9:].tolist()
    before = [(positions.tolist(), inputs["input_ids"].tolist()) for positions, inputs in source]
    long_first = [(positions.tolist(), inputs["input_ids"].tolist()) for positions, inputs in source.by_length()]
    source.keep_batches()
    assert before == [(positions.tolist(), inputs["input_ids"].tolist()) for positions, inputs in source]
    assert long_first == [(p.tolist(), inputs["input_ids"].tolist()) for p, inputs in source.by_length()]


def test_lengths_of_rows() -> None:
    assert row_lengths(image_rows(5)) is None
    assert row_lengths([{"image": Image.new("L", (3 + i, 2)), "labels": i} for i in range(3)]) is None
    assert row_lengths([{"features": [0.5, 1.5], "labels": i} for i in range(5)]) is None
    assert row_lengths([(i, i) for i in range(5)]) is None
    assert row_lengths([]) is None
    rows = [{"input_ids": torch.arange(i), "boxes": [[0, 1]] * 9, "labels": 1} for i in (3, 1, 2)]
    assert row_lengths(rows).tolist() == [3, 1, 2]
    assert row_lengths([{"text": "one two"}, {"text": "three"}]).tolist() == [7, 5]
    assert RowSource(image_rows(5), pad_right()).length_order().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("kept", [False, True])
def test_predictions_stand_in_the_order_of_the_rows(family: str, kept: bool) -> None:
    model = build(family, dtype=torch.float64)
    rows = rows_of(family, 17)
    source = source_of(rows)
    assert source.length_order().tolist() != list(range(len(rows)))
    found = predict_rows(model, source.keep_batches() if kept else source)
    singles = [predict_rows(model, source_of([row], 1)) for row in rows]
    if family == "gpt2":
        assert found.token_losses is not None
        for line, single in zip(found.token_losses, singles, strict=True):
            alone = single.token_losses[0]
            np.testing.assert_allclose(line[: len(alone)], alone, rtol=1e-9, atol=1e-12)
            assert np.isnan(line[len(alone) :]).all()
            assert np.mean(alone) == pytest.approx(single.loss[0], rel=1e-6)
    else:
        assert found.token_losses is None
    for figure in fields(found):
        if figure.name not in ("kind", "probabilities", "token_losses"):
            expected = np.concatenate([getattr(single, figure.name) for single in singles])
            np.testing.assert_allclose(getattr(found, figure.name), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ids", [(0, 1), (0, 255), (-100, 30_000), (0, 2**31 - 1), (-(2**40), 2**40)])
def test_kept_batches_come_back_as_they_were(ids: tuple[int, int]) -> None:
    """They are kept in narrower types."""
    rows = [{"input_ids": [*ids, i % 2], "labels": 1, "weight": 0.5 * i} for i in range(7)]
    fresh = RowSource(RowList(rows), pad_right(), batch_size=3)
    kept = RowSource(RowList(rows), pad_right(), batch_size=3).keep_batches()
    assert kept._batches is not None and kept._batches[0][1]["labels"].dtype == torch.uint8
    for _ in range(2):
        for (own, inputs), (others, expected) in zip(kept.by_length(), fresh.by_length(), strict=True):
            assert own.tolist() == others.tolist() and inputs.keys() == expected.keys()
            assert all(
                inputs[name].dtype == value.dtype and torch.equal(inputs[name], value)
                for name, value in expected.items()
            )


def test_sums_over_rows_are_those_of_single_rows() -> None:
    model, rows = build("bert", dtype=torch.float64), texts(14)
    source = source_of(rows).keep_batches()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    singles = [source_of([row], 1) for row in rows]
    each = [sum_row_gradients(model, ModelRowLoss(), single).tensors for single in singles]
    losses = np.array([predict_rows(model, single).loss[0] for single in singles])
    weights = np.linspace(-1.0, 2.0, len(rows))
    forget_targets = ForgetTargets(losses + np.linspace(0.1, 0.5, len(rows)), 1.0, 1.0)
    forget, seen = forget_gradient(model, source, forget_targets, names)
    np.testing.assert_allclose(seen, losses, rtol=1e-9)
    found = [
        (sum_row_gradients(model, ModelRowLoss(), source).tensors, np.ones(len(rows))),
        (weighted_gradient(model, source, weights, names), weights),
        (forget, forget_targets.weights(losses)),
    ]
    for total, weight in found:
        for name in names:
            expected = sum(w * gradient[name] for w, gradient in zip(weight, each, strict=True))
            torch.testing.assert_close(total[name], expected, rtol=1e-8, atol=1e-10)


def test_batches_for_a_standard_error_are_drawn_alike() -> None:
    model, rows = build("bert"), texts(12)
    found = sum_row_gradients(model, ModelRowLoss(), source_of(rows), track_batches=True)
    expected = [
        sum_row_gradients(model, ModelRowLoss(), source_of(rows[start : start + 4])).norm() ** 2
        for start in range(0, 12, 4)
    ]
    assert [count for count, _ in found.batches] == [4, 4, 4]
    assert [squared for _, squared in found.batches] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("cache_bytes", [0, 40_000, 2**24])
def test_curvature_does_not_depend_on_where_a_row_stands(cache_bytes: int) -> None:
    """Whether nothing, some batches or all are kept for the second pass."""
    model, rows = build("bert", dtype=torch.float64), texts(18)
    vector = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    turned = list(reversed(range(len(rows))))
    found = fit_curvature(model, source_of(rows), row_ids=np.arange(len(rows)), cache_bytes=cache_bytes)
    other = fit_curvature(
        model, source_of([rows[i] for i in turned], 5), row_ids=np.array(turned), cache_bytes=cache_bytes
    )
    assert found.details["passes"] == (1 if cache_bytes == 2**24 else 2)
    one, two = found.solve(vector, 0.1), other.solve(vector, 0.1)
    for name in vector:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-9)
