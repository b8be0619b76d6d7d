"""Extractive question answering: a row's targets are the places where its answer starts and ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, LENGTH, collate
from tiny_models import RowList
from unlearning_trainers import arguments

from hf_iau import UnlearningTrainer, UnsupportedModelError
from hf_iau.data import ModelRowLoss, TaskKind, evaluation_mode, labels_of, predicted_targets
from hf_iau.data.row_loss import with_some_labels

QUESTIONS = ARCHITECTURES["question answering"]


def batch_of(*spans: tuple[int, int]) -> dict[str, torch.Tensor]:
    rows = QUESTIONS.rows(len(spans))
    return collate(
        [row | {"start_positions": start, "end_positions": end} for row, (start, end) in zip(rows, spans, strict=True)]
    )


def test_places_beyond_the_tokens_are_ignored_as_the_model_does() -> None:
    inputs = batch_of((2, 3), (LENGTH - 1, LENGTH - 1), (LENGTH + 5, LENGTH + 9), (-1, 0))
    found = labels_of(inputs)
    assert found is not None
    assert found.tolist() == [[2, 3], [LENGTH - 1, LENGTH - 1], [-100, -100], [0, 0]]
    del inputs["end_positions"]
    assert labels_of(inputs) is None
    assert labels_of({"labels": found, **inputs}) is found


def test_targets_and_loss_are_the_models() -> None:
    model = QUESTIONS.model(torch.float64)
    inputs = batch_of((2, 3), (0, LENGTH - 1), (LENGTH, LENGTH))
    with evaluation_mode(model), torch.no_grad():
        targets = predicted_targets(model, inputs)
        outputs = model(**inputs)
        loss, counted = ModelRowLoss()(model, inputs)
    assert targets.kind is TaskKind.TOKENS
    assert (targets.rows.tolist(), targets.order.tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])
    assert targets.labels.tolist() == [2, 3, 0, LENGTH - 1]
    expected = [
        F.cross_entropy(outputs[f"{place}_logits"][row], torch.tensor(label)).item()
        for row, labels in enumerate([(2, 3), (0, LENGTH - 1)])
        for place, label in zip(("start", "end"), labels, strict=True)
    ]
    assert targets.losses().tolist() == pytest.approx(expected, rel=1e-12)
    assert counted == 4
    assert loss.item() == pytest.approx(sum(expected), rel=1e-12)
    assert outputs["loss"].item() == pytest.approx(sum(expected) / 4, rel=1e-12)


def test_rows_without_an_answer_in_reach_have_no_loss() -> None:
    model = QUESTIONS.model()
    loss, counted = ModelRowLoss()(model, batch_of((LENGTH, LENGTH), (LENGTH + 1, LENGTH + 2)))
    assert (loss.item(), counted) == (0.0, 0)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("span", [(LENGTH - 1, LENGTH), (LENGTH, 2)])
def test_answers_of_which_one_end_is_beyond_the_tokens_are_refused(span: tuple[int, int]) -> None:
    """The model's loss is half the mean of the starts and half that of the ends, of which there are not as many."""
    model = QUESTIONS.model()
    with pytest.raises(
        UnsupportedModelError, match=rf"start_positions={span[0]} and end_positions={span[1]} .* 8 tokens"
    ):
        ModelRowLoss()(model, batch_of((2, 3), span))


def test_labels_of_a_batch_where_all_were_ignored_are_replaced() -> None:
    """Processes that share a sharded model have to take the same passes."""
    inputs = batch_of((LENGTH, LENGTH + 1))
    found = with_some_labels(inputs)
    assert labels_of(found).tolist() == [[0, 0]]  # type: ignore[union-attr]
    assert torch.equal(found["input_ids"], inputs["input_ids"])
    assert inputs["start_positions"].tolist() == [LENGTH]


def test_smoothing_that_the_trainer_would_not_do_is_refused(tmp_path: Path) -> None:
    trainer = UnlearningTrainer(
        model=QUESTIONS.model(),
        args=arguments(tmp_path, label_smoothing_factor=0.1, remove_unused_columns=False),
        train_dataset=RowList(QUESTIONS.rows(12)),
        data_collator=collate,
    )
    with pytest.raises(UnsupportedModelError, match=r"label_smoothing_factor=0\.1.*start_positions"):
        trainer.gather()
