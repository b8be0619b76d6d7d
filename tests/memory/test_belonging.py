"""Which model, data and loss a memory belongs to: fingerprints, and the checks that name both sides."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    RowList,
    as_dataset,
    bert,
    image_rows,
    lora,
    pad_right,
    plain,
    plain_rows,
    resnet,
    text_rows,
    vit,
)
from torch import Tensor, nn
from torch.utils.data import Subset

from hf_iau import GatherConfig, GradientMemory, MemoryMismatchError, MissingMemoryError, StaleMemoryError, gather
from hf_iau.data import ModelRowLoss, OutputRowLoss, RowSource, SmoothedRowLoss, UserRowLoss
from hf_iau.memory.fingerprints import data_fingerprint, model_fingerprint

CONFIG = GatherConfig(gradient_sum="full", curvature="none", batch_size=4, progress=False)


def make_memory(model: nn.Module, rows: Any, **settings: Any) -> GradientMemory:
    return gather(model, as_dataset(rows), data_collator=pad_right(), config=CONFIG, **settings)


# --- data fingerprints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "image", "plain"])
def test_the_same_rows_in_any_format_have_one_fingerprint(kind: str) -> None:
    model, rows = {"text": (bert(), text_rows()), "image": (vit(), image_rows()), "plain": (plain(), plain_rows())}[
        kind
    ]
    dataset = as_dataset(rows)
    expected = data_fingerprint(model, dataset)
    assert expected["rows"] == 12 and expected["columns"] == sorted(rows[0])
    assert len(expected["content"]) == 32
    for same in (
        dataset.with_format("torch"),
        dataset.with_format("numpy"),
        dataset.select(range(12)),
        dataset.add_column("note", ["not for the model"] * 12),
        dataset.add_column("idx", list(range(12))).with_format("torch"),
        rows,
        RowList(rows),
        Subset(RowList([*rows, *rows]), range(12)),
        dataset.with_transform(lambda batch: batch),
    ):
        assert data_fingerprint(model, same) == expected


def test_every_row_and_its_place_count() -> None:
    model, rows = bert(), text_rows(40)
    expected = data_fingerprint(model, as_dataset(rows))["content"]
    seen = {expected}
    for number in range(40):
        changed = copy.deepcopy(rows)
        changed[number]["input_ids"][-1] ^= 1
        seen.add(data_fingerprint(model, as_dataset(changed))["content"])
        changed = copy.deepcopy(rows)
        changed[number]["labels"] = (changed[number]["labels"] + 1) % 3
        seen.add(data_fingerprint(model, as_dataset(changed))["content"])
    assert len(seen) == 81
    shuffled = [rows[1], rows[0], *rows[2:]]
    for other in (shuffled, rows[:-1], [*rows, rows[0]]):
        assert data_fingerprint(model, as_dataset(other)) != data_fingerprint(model, as_dataset(rows))


def test_the_smallest_change_of_a_pixel_counts() -> None:
    rows = image_rows(6)
    expected = data_fingerprint(vit(), RowList(rows))
    rows[3]["pixel_values"][0, 0, 0] = torch.nextafter(
        torch.tensor(rows[3]["pixel_values"][0, 0, 0]), torch.tensor(torch.inf)
    )
    assert data_fingerprint(vit(), RowList(rows)) != expected


def test_rows_of_unlike_structure_are_not_mixed_up() -> None:
    model = plain()
    prints = [
        data_fingerprint(model, [{"features": features, "labels": 0}])["content"]
        for features in (
            [1.0, 2.0],
            [[1.0, 2.0]],
            [1.0, 2.0, 0.0],
            [1, 2],
            [[1.0], [2.0]],
            "1.0 2.0",
            None,
            [1.0, None],
        )
    ]
    assert len(set(prints)) == len(prints)


# --- model fingerprints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, resnet, lora, plain])
def test_one_weight_changes_the_weights_but_not_the_architecture(make: Any) -> None:
    model = make()
    expected = model_fingerprint(model)
    assert model_fingerprint(make()) == expected
    assert model_fingerprint(copy.deepcopy(model).train()) == expected
    assert model_fingerprint(make(seed=1))["weights"] != expected["weights"]
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            first = parameter.view(-1)[0].clone()
            parameter.view(-1)[0] = torch.nextafter(first, torch.tensor(torch.inf))
            changed = model_fingerprint(model)
            parameter.view(-1)[0] = first
        assert changed["weights"] != expected["weights"], name
        assert changed["architecture"] == expected["architecture"]
    assert model_fingerprint(model) == expected


def test_batch_norm_statistics_belong_to_the_weights() -> None:
    model = resnet()
    before = model_fingerprint(model)["weights"]
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_mean[0] += 1e-3
    assert model_fingerprint(model)["weights"] != before


def test_what_does_not_change_a_model_does_not_change_its_fingerprint() -> None:
    model = bert()
    before = model_fingerprint(model)
    model.train()
    model(**pad_right()(text_rows(2))).loss.backward()
    model.bert.requires_grad_(False)
    assert model_fingerprint(model) == before
    assert model_fingerprint(model.bfloat16())["weights"] != before["weights"]


def test_architectures_and_classes() -> None:
    assert model_fingerprint(bert())["class"] == "BertForSequenceClassification"
    assert model_fingerprint(lora())["class"] == "BertForSequenceClassification"
    prints = {model_fingerprint(model)["architecture"] for model in (bert(), bert(4), lora(), vit(), plain())}
    assert len(prints) == 5


# --- checks -----------------------------------------------------------------------------------------------------------


def test_check_model_names_both_sides() -> None:
    memory = make_memory(plain(), plain_rows())
    memory.check_model(plain())
    other = bert()
    with pytest.raises(MemoryMismatchError) as caught:
        memory.check_model(other)
    message = str(caught.value)
    assert "PlainClassifier" in message and memory.model["architecture"][:8] in message
    assert "BertForSequenceClassification" in message and model_fingerprint(other)["architecture"][:8] in message
    moved = plain(seed=1)
    with pytest.raises(StaleMemoryError) as caught:
        memory.check_model(moved)
    message = str(caught.value)
    assert memory.model["weights"][:8] in message and model_fingerprint(moved)["weights"][:8] in message


def test_check_data_names_both_sides() -> None:
    model, rows = plain(), plain_rows()
    memory = make_memory(model, rows)
    memory.check_data(model, RowList(rows))
    with pytest.raises(MemoryMismatchError) as caught:
        memory.check_data(model, as_dataset(rows[:-1]))
    assert "12 rows" in str(caught.value) and "11 rows" in str(caught.value)
    other = as_dataset(plain_rows(seed=1))
    with pytest.raises(MemoryMismatchError) as caught:
        memory.check_data(model, other)
    message = str(caught.value)
    assert memory.data["content"][:8] in message and data_fingerprint(model, other)["content"][:8] in message
    with pytest.raises(MemoryMismatchError) as caught:
        memory.check_data(model, as_dataset(rows).rename_column("features", "x"))
    assert "['features', 'labels']" in str(caught.value) and "['labels', 'x']" in str(caught.value)


def weighted(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    weight = torch.tensor([1.0, 2.0, 3.0])
    return F.cross_entropy(outputs["logits"], labels, weight=weight, reduction="sum") / num_items_in_batch


def weighted_otherwise(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    weight = torch.tensor([3.0, 2.0, 1.0])
    return F.cross_entropy(outputs["logits"], labels, weight=weight, reduction="sum") / num_items_in_batch


def summed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(**inputs)["logits"], inputs["labels"], reduction="sum")


def test_check_loss_names_both_sides() -> None:
    model, rows = plain(), plain_rows()
    losses = {
        "model": (ModelRowLoss(), {}),
        "smoothing": (SmoothedRowLoss(0.1), {"label_smoothing_factor": 0.1}),
        "more smoothing": (SmoothedRowLoss(0.2), {"label_smoothing_factor": 0.2}),
        "compute_loss_func": (OutputRowLoss(weighted), {"compute_loss_func": weighted}),
        "another": (OutputRowLoss(weighted_otherwise), {"compute_loss_func": weighted_otherwise}),
        "row_loss": (UserRowLoss(summed), {"row_loss": summed}),
    }
    for name, (_, settings) in losses.items():
        memory = make_memory(model, rows, **settings)
        for other, (loss, _) in losses.items():
            if other == name:
                memory.check_loss(loss)
                continue
            with pytest.raises(MemoryMismatchError) as caught:
                memory.check_loss(loss)
            assert str(losses[name][0].fingerprint()) in str(caught.value)
            assert str(loss.fingerprint()) in str(caught.value)


def test_check_probe_sees_what_source_code_does_not_show() -> None:
    """Two closures of one source, with other class weights."""

    def make(weight: list[float]) -> OutputRowLoss:
        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            summed = F.cross_entropy(outputs["logits"], labels, weight=torch.tensor(weight), reduction="sum")
            return summed / num_items_in_batch

        return OutputRowLoss(loss)

    trained, other = make([1.0, 1.0, 1.0]), make([1.0, 5.0, 1.0])
    model, rows = plain(), plain_rows()
    source = RowSource(RowList(rows), pad_right())
    memory = make_memory(model, rows, row_loss=trained)
    memory.check_loss(other)  # by name and source they are one
    memory.check_probe(model, trained, source)
    memory.check_probe(model.train(), trained, source.resized(1))
    with pytest.raises(MemoryMismatchError) as caught:
        memory.check_probe(model, other, source)
    then, now = (memory.probe_loss(model, loss, source) for loss in (trained, other))
    assert f"{then:.6g}" in str(caught.value) and f"{now:.6g}" in str(caught.value)
    del memory.loss["probe"]
    memory.check_probe(model, other, source)  # nothing to compare with


def test_the_probe_is_the_loss_of_the_first_rows() -> None:
    model, rows = plain(), plain_rows()
    memory = make_memory(model, rows)
    inputs = pad_right()(rows[:8])
    expected = F.cross_entropy(model(inputs["features"])["logits"], inputs["labels"], reduction="sum")
    assert memory.loss["probe"] == pytest.approx(float(expected.detach()), rel=1e-6)


def test_what_is_not_held_is_asked_for_by_name() -> None:
    memory = make_memory(plain(), plain_rows())
    assert memory.require_full_sum("iau-paper") is memory.gradient_sum
    with pytest.raises(MissingMemoryError, match=r"'iau'.*curvature"):
        memory.require_curvature("iau")
    for kind in ("sampled", "first-order", "none"):
        memory.gradient_sum_kind = kind
        with pytest.raises(MissingMemoryError, match=rf"'iau-paper'.*exact.*{kind!r}"):
            memory.require_full_sum("iau-paper")


def test_counts() -> None:
    memory = make_memory(plain(), plain_rows())
    assert (memory.n_rows, memory.n_targets, memory.gradient_sum_rows) == (12, 12, 12)
    assert memory.label_counts == {"0": 4, "1": 4, "2": 4}
    assert memory.nbytes() == 4 * sum(p.numel() for p in plain().parameters())
    assert memory.parameters == {name: tuple(p.shape) for name, p in plain().named_parameters()}
    assert memory.schema_version == 5 and memory.settings["gradient_sum"] == "full"
