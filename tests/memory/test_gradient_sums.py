"""Gradient sums against a plain loop over single rows, for every model family and every way to batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from row_loop import (
    LOSSES,
    TOLERANCE,
    class_loss,
    in_dtype,
    multi_label_loss,
    norm,
    regression_loss,
    relative_error,
    row_gradients,
    token_loss,
)
from tiny_models import (
    FAMILIES,
    PlainClassifier,
    as_dataset,
    bert,
    bert_tokens,
    build,
    gpt2,
    language_rows,
    llama,
    multi_label_rows,
    pad_left,
    pad_right,
    plain,
    plain_rows,
    regression_rows,
    rows_of,
    text_rows,
    token_rows,
)
from torch import Tensor, nn
from transformers.trainer_pt_utils import LabelSmoother

from hf_iau import CoupledRowsError, GatherConfig, gather
from hf_iau.data import ModelRowLoss, OutputRowLoss, RowLoss, RowSource, SmoothedRowLoss, UserRowLoss
from hf_iau.memory.gradient_sum import GradientSum, sum_row_gradients

DTYPES = [torch.float64, torch.float32]
EXACT = GatherConfig(gradient_sum="full", curvature="none", batch_size=5, progress=False)


def gradient_sum(model: nn.Module, rows: Any, loss: RowLoss, collator: Callable, batch_size: int) -> GradientSum:
    return sum_row_gradients(model, loss, RowSource(rows, collator, batch_size=batch_size))


def assert_equals_loop(
    model: nn.Module,
    rows: Any,
    reference_loss: Callable[[Tensor, Tensor], Tensor],
    *,
    row_loss: RowLoss | None = None,
    collators: tuple[Callable, ...] = (pad_right(), pad_right(5)),
    batch_sizes: tuple[int, ...] = (1, 2, 5, 12),
    tolerance: float | None = None,
) -> None:
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    reference, each = row_gradients(model, rows, in_dtype(pad_right(), dtype), reference_loss)
    assert all(norm(row) > 0 for row in each[:1])
    for collator in collators:
        for batch_size in batch_sizes:
            found = gradient_sum(model, rows, row_loss or ModelRowLoss(), in_dtype(collator, dtype), batch_size)
            assert found.n_rows == len(rows)
            error = relative_error(found.tensors, reference, each)
            assert error <= (tolerance or TOLERANCE[dtype]), f"batch size {batch_size}: {error}"


# --- families ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_batch_size_and_padding_equals_the_loop(family: str, dtype: torch.dtype) -> None:
    assert_equals_loop(build(family, dtype=dtype), rows_of(family), LOSSES[family])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("family", ["bert-tokens", "gpt2", "gpt2-classifier", "llama", "llama-classifier"])
def test_left_padding_with_position_ids_equals_the_loop(family: str, dtype: torch.dtype) -> None:
    collators = (pad_left(), pad_left(4))
    rows = rows_of(family)
    for row in rows if family in ("gpt2", "llama") else ():
        # With padding before it, a row's first token would be predicted, from the padding.
        row["labels"][0] = -100
    # Llama's attention and norms work in float32 inside, whatever the weights' type.
    tolerance = max(1e-7, TOLERANCE[dtype]) if family.startswith("llama") else None
    assert_equals_loop(build(family, dtype=dtype), rows, LOSSES[family], collators=collators, tolerance=tolerance)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_first_token_that_is_a_target_only_when_padded_is_refused(family: str) -> None:
    with pytest.raises(CoupledRowsError):
        gather(build(family), rows_of(family), data_collator=pad_left(), config=EXACT)


def test_left_padding_without_position_ids_is_refused_where_it_changes_the_model() -> None:
    rows = [row | {"labels": [-100, *row["labels"][1:]]} for row in language_rows()]
    with pytest.raises(CoupledRowsError):
        gather(gpt2(), rows, data_collator=pad_left(position_ids=False), config=EXACT)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_dropout_of_a_model_in_training_mode_plays_no_part(family: str) -> None:
    model = build(family, dtype=torch.float64, dropout=0.5).train()
    assert_equals_loop(model, rows_of(family), LOSSES[family], batch_sizes=(3,))
    assert model.training


def test_batch_norm_in_training_mode_does_not_couple_rows() -> None:
    model = build("resnet", dtype=torch.float64).train()
    assert_equals_loop(model, rows_of("resnet"), class_loss, batch_sizes=(1, 4))


def test_language_model_losses_in_true_float64() -> None:
    """With a row loss that stays in float64 the bound is not owed to Transformers' float32 logits."""

    def in_double(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs.pop("labels")
        return token_loss(model(**inputs).logits[:, :-1], labels[:, 1:])

    assert_equals_loop(
        gpt2().double(),
        language_rows(),
        lambda logits, labels: token_loss(logits[:, :-1], labels[:, 1:]),
        row_loss=UserRowLoss(in_double),
    )


def test_more_batches_than_are_added_in_float32() -> None:
    assert_equals_loop(plain(), plain_rows(60), class_loss, collators=(pad_right(),), batch_sizes=(1, 3))


# --- losses -----------------------------------------------------------------------------------------------------------

CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64)


def weighted_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Class-weighted, summed and divided by what the Trainer says."""
    logits = outputs["logits"]
    weight = CLASS_WEIGHTS.to(logits.dtype)
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), weight=weight, reduction="sum")
    return loss / num_items_in_batch


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("family", ["bert", "bert-tokens", "plain", "resnet", "lora"])
def test_class_weights_in_compute_loss_func(family: str, dtype: torch.dtype) -> None:
    def reference(logits: Tensor, labels: Tensor) -> Tensor:
        flat, labels = logits.flatten(0, -2), labels.flatten()
        kept = labels != -100
        each = F.cross_entropy(flat[kept], labels[kept], reduction="none")
        return (each * CLASS_WEIGHTS.to(each.dtype)[labels[kept]]).sum()

    assert_equals_loop(build(family, dtype=dtype), rows_of(family), reference, row_loss=OutputRowLoss(weighted_loss))


def test_a_mean_compute_loss_func_is_turned_into_a_sum() -> None:
    def mean_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels)

    assert_equals_loop(bert().double(), text_rows(), class_loss, row_loss=OutputRowLoss(mean_loss))


@pytest.mark.parametrize("per_row", [True, False], ids=["rows' losses", "their sum"])
def test_user_row_loss(per_row: bool) -> None:
    def row_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(
            model(inputs["features"])["logits"], inputs["labels"], reduction="none" if per_row else "sum"
        )

    assert_equals_loop(plain().double(), plain_rows(), class_loss, row_loss=UserRowLoss(row_loss))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("family", ["bert", "bert-tokens", "gpt2", "llama", "vit", "lora"])
def test_label_smoothing_is_that_of_transformers(family: str, dtype: torch.dtype) -> None:
    smoother = LabelSmoother(epsilon=0.3)
    shift = family in ("gpt2", "llama")

    def reference(logits: Tensor, labels: Tensor) -> Tensor:
        targets = int((labels[:, 1:] if shift else labels).ne(-100).sum())
        return smoother({"logits": logits}, labels.reshape(1, -1) if shift else labels, shift_labels=shift) * targets

    # LabelSmoother adds up the smoothed part in float32, whatever the logits are in.
    tolerance = 1e-7 if dtype is torch.float64 else None
    assert_equals_loop(
        build(family, dtype=dtype),
        rows_of(family),
        reference,
        row_loss=SmoothedRowLoss(0.3),
        tolerance=tolerance,
    )


def test_label_smoothing_in_true_float64() -> None:
    def reference(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.3)

    assert_equals_loop(bert().double(), text_rows(), reference, row_loss=SmoothedRowLoss(0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_multi_label(dtype: torch.dtype) -> None:
    model = bert(problem_type="multi_label_classification").to(dtype)
    assert_equals_loop(model, multi_label_rows(), multi_label_loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_regression(outputs: int, dtype: torch.dtype) -> None:
    model = bert(outputs, problem_type="regression").to(dtype)
    assert_equals_loop(model, regression_rows(outputs=outputs), regression_loss)


def test_ignored_labels_of_a_classifier() -> None:
    rows = text_rows()
    for number in (0, 3, 4, 11):
        rows[number]["labels"] = -100
    rows.insert(0, rows.pop(1))
    reference, each = row_gradients(bert().double(), rows, pad_right(), class_loss)
    assert [norm(row) > 0 for row in each].count(False) == 4
    for batch_size in (1, 2, 5, 12):
        found = gradient_sum(bert().double(), rows, ModelRowLoss(), pad_right(), batch_size)
        assert relative_error(found.tensors, reference, each) <= 1e-10
        assert (found.n_rows, found.n_targets) == (12, 8)


@pytest.mark.parametrize("make", [bert_tokens, gpt2, llama], ids=["bert-tokens", "gpt2", "llama"])
def test_rows_without_any_target_count_but_add_nothing(make: Callable[[], nn.Module]) -> None:
    rows = token_rows() if make is bert_tokens else language_rows()
    shift = int(make is not bert_tokens)
    for number in (0, 1, 7):
        rows[number]["labels"] = [-100] * len(rows[number]["labels"])
    if shift:  # a label that no token predicts is no target
        rows[2]["labels"] = rows[2]["input_ids"][:1] + [-100] * (len(rows[2]["labels"]) - 1)
    model = make().double()
    loss = LOSSES[{bert_tokens: "bert-tokens", gpt2: "gpt2", llama: "llama"}[make]]
    reference, each = row_gradients(model, rows, pad_right(), loss)
    expected_targets = sum(label != -100 for row in rows for label in row["labels"][shift:])
    for batch_size in (1, 2, 5, 12):
        found = gradient_sum(model, rows, ModelRowLoss(), pad_right(), batch_size)
        assert relative_error(found.tensors, reference, each) <= 1e-10
        assert (found.n_rows, found.n_targets) == (len(rows), expected_targets)
    ones = gradient_sum(model, rows, ModelRowLoss(), pad_right(), 1)
    assert ones.rows_without_targets == 3 + shift


def test_only_rows_without_targets() -> None:
    rows = [row | {"labels": -100} for row in text_rows(4)]
    found = gradient_sum(bert(), rows, ModelRowLoss(), pad_right(), 2)
    assert (found.n_rows, found.n_targets, found.loss, found.norm()) == (4, 0, 0.0, 0.0)


def test_loss_is_the_sum_of_the_rows_losses() -> None:
    model, rows = bert_tokens().double(), token_rows()
    found = gradient_sum(model, rows, ModelRowLoss(), pad_right(), 5)
    inputs = pad_right()(rows)
    expected = token_loss(model.eval()(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"])
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-12)


# --- which parameters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_frozen_parameters_have_no_sum_and_change_no_other(dtype: torch.dtype) -> None:
    model = bert().to(dtype)
    frozen = [p for name, p in model.named_parameters() if "embeddings" in name or "layer.0" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    found = gradient_sum(model, text_rows(), ModelRowLoss(), pad_right(), 5)
    assert list(found.tensors) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert 0 < len(found.tensors) < len(list(model.parameters()))
    assert_equals_loop(model, text_rows(), class_loss)


def test_the_first_batch_of_a_partly_frozen_model_may_have_no_target() -> None:
    model = bert().double()
    model.bert.requires_grad_(False)
    rows = [row | {"labels": -100} for row in text_rows(3)] + text_rows(5, seed=1)
    reference, each = row_gradients(model, rows, pad_right(), class_loss)
    found = gradient_sum(model, rows, ModelRowLoss(), pad_right(), 2)
    assert relative_error(found.tensors, reference, each) <= 1e-10


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
def test_tied_parameters_are_summed_once_with_both_their_uses(dtype: torch.dtype) -> None:
    model = gpt2().to(dtype)
    assert model.lm_head.weight is model.transformer.wte.weight
    found = gradient_sum(model, language_rows(), ModelRowLoss(), pad_right(), 5).tensors
    assert "transformer.wte.weight" in found and "lm_head.weight" not in found

    class Tied(PlainClassifier):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(10, 10, bias=False)
            self.once_more = nn.Linear(10, 10, bias=False)
            self.once_more.weight = self.again.weight

        def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            hidden = torch.tanh(self.again(torch.tanh(self.hidden(features))))
            logits = self.output(torch.tanh(self.once_more(hidden)))
            return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    assert_equals_loop(Tied().to(dtype), plain_rows(), class_loss)


def test_unused_parameters_have_a_zero_sum() -> None:
    model = plain()
    model.unused = nn.Parameter(torch.ones(3))
    found = gradient_sum(model, plain_rows(), ModelRowLoss(), pad_right(), 5)
    assert found.tensors["unused"].equal(torch.zeros(3, dtype=torch.float64))


def test_named_parameters_only() -> None:
    model, rows = bert().double(), text_rows()
    names = ["classifier.bias", "bert.encoder.layer.1.output.dense.weight"]
    source = RowSource(rows, pad_right(), batch_size=4)
    some = sum_row_gradients(model, ModelRowLoss(), source, names=names).tensors
    every = sum_row_gradients(model, ModelRowLoss(), source).tensors
    assert list(some) == names
    assert all(some[name].equal(every[name]) for name in names)


# --- the sums of a memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "resnet", "plain", "lora"])
def test_sum_over_retained_rows_from_memory_equals_a_direct_pass(family: str, dtype: torch.dtype) -> None:
    model, rows = build(family, dtype=dtype), rows_of(family, 18)
    collator = in_dtype(pad_right(), dtype)
    forgotten = [0, 4, 5, 17]
    kept = [number for number in range(18) if number not in forgotten]
    memory = gather(model, as_dataset(rows), data_collator=collator, config=EXACT)
    assert memory.gradient_sum is not None and memory.gradient_sum_kind == "full" and memory.n_rows == 18
    of_forgotten = gradient_sum(model, [rows[i] for i in forgotten], ModelRowLoss(), collator, 3).tensors
    from_memory = {name: memory.gradient_sum[name] - of_forgotten[name] for name in of_forgotten}
    reference, each = row_gradients(model, [rows[i] for i in kept], collator, LOSSES[family])
    assert relative_error(from_memory, reference, each) <= TOLERANCE[dtype]
    direct = gradient_sum(model, [rows[i] for i in kept], ModelRowLoss(), collator, 5).tensors
    assert relative_error(from_memory, direct, each) <= TOLERANCE[dtype]


def test_minus_subtracts_counts_loss_and_sums() -> None:
    rows = token_rows()
    model = bert_tokens().double()
    whole, part, rest = (
        gradient_sum(model, chosen, ModelRowLoss(), pad_right(), 5) for chosen in (rows, rows[:4], rows[4:])
    )
    difference = whole.minus(part)
    assert (difference.n_rows, difference.n_targets) == (rest.n_rows, rest.n_targets)
    assert difference.loss == pytest.approx(rest.loss, rel=1e-12)
    assert all(torch.allclose(difference.tensors[name], rest.tensors[name], atol=1e-10) for name in rest.tensors)


def sampled(model: nn.Module, rows: Any, seed: int, *, sample_rows: int, batch_size: int) -> Any:
    config = GatherConfig(
        gradient_sum="sampled",
        sample_rows=sample_rows,
        batch_size=batch_size,
        seed=seed,
        curvature="none",
        progress=False,
    )
    return gather(model, rows, data_collator=in_dtype(pad_right(), torch.float64), config=config)


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_sampled_sum_is_unbiased_and_knows_its_standard_error(batch_size: int) -> None:
    model, rows, size = plain().double(), plain_rows(48), 12
    reference, each = row_gradients(model, rows, in_dtype(pad_right(), torch.float64), class_loss)
    gradients = torch.stack([flat(row) for row in each])
    variance = float((gradients - gradients.mean(dim=0)).square().sum()) / (len(rows) - 1)
    standard_error = len(rows) * (variance / size * (1 - size / len(rows))) ** 0.5
    memories = [sampled(model, rows, seed, sample_rows=size, batch_size=batch_size) for seed in range(60)]
    errors = torch.stack([flat(memory.gradient_sum) - flat(reference) for memory in memories])
    assert all(memory.gradient_sum_rows == size and memory.n_rows == 48 for memory in memories)
    # The mean of 60 independent draws misses by the standard error over √60, itself known to about a third.
    assert float(errors.mean(dim=0).norm()) <= 1.5 * standard_error / 60**0.5
    # What is promised on average is what happens.
    assert float(errors.square().sum(dim=1).mean()) ** 0.5 == pytest.approx(standard_error, rel=0.15)
    promised = np.mean([memory.gradient_sum_error**2 for memory in memories]) ** 0.5
    assert promised == pytest.approx(standard_error, rel=0.15)


def test_standard_error_of_one_sample_is_the_formula() -> None:
    model, rows, size = plain().double(), plain_rows(48), 12
    rows[5]["labels"] = rows[20]["labels"] = -100  # rows without a target are rows with a zero gradient
    for row in rows[30:40]:
        row["labels"] = -100
    memory = sampled(model, rows, 3, sample_rows=size, batch_size=1)
    _, each = row_gradients(model, rows, in_dtype(pad_right(), torch.float64), class_loss)
    source = RowSource(rows, pad_right())
    chosen = source.sample(size, 3 + 1).dataset.indices
    gradients = torch.stack([flat(each[i]) for i in chosen])
    assert 0 < sum(float(g.norm()) == 0 for g in gradients) < size
    assert torch.allclose(flat(memory.gradient_sum), gradients.sum(dim=0) * 48 / size, rtol=1e-9, atol=1e-12)
    variance = float((gradients - gradients.mean(dim=0)).square().sum()) / (size - 1)
    expected = 48 * (variance / size * (1 - size / 48)) ** 0.5
    assert memory.gradient_sum_error == pytest.approx(expected, rel=1e-6)


def test_the_sample_follows_the_seed_and_a_large_sample_is_exact() -> None:
    model, rows = plain().double(), plain_rows(30)
    one, same, other = (sampled(model, rows, seed, sample_rows=10, batch_size=4) for seed in (1, 1, 2))
    assert flat(one.gradient_sum).equal(flat(same.gradient_sum))
    assert not flat(one.gradient_sum).equal(flat(other.gradient_sum))
    reference, each = row_gradients(model, rows, in_dtype(pad_right(), torch.float64), class_loss)
    everything = sampled(model, rows, 1, sample_rows=30, batch_size=4)
    assert relative_error(everything.gradient_sum, reference, each) <= 1e-10
    assert everything.gradient_sum_error == 0.0


def test_gathering_leaves_the_model_as_it_was() -> None:
    model = bert(dropout=0.3).train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    gather(
        model,
        as_dataset(text_rows()),
        data_collator=pad_right(),
        config=GatherConfig(gradient_sum="full", curvature_rows=8, progress=False),
    )
    assert model.training and all(module.training for module in model.modules())
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
    assert torch.get_rng_state().equal(state)
