"""Models of many kinds: gradients and curvature are those of a loop over rows, and requests are served."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, collate
from tiny_models import RowList
from torch import Tensor
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from unlearning_trainers import assert_bits, state_of

from hf_iau import IAUCallback, IAUConfig, UnlearningTrainer
from hf_iau.curvature import DiagonalBlock, KroneckerBlock, fit_curvature
from hf_iau.data import ModelRowLoss, RowSource, evaluation_mode, predicted_targets
from hf_iau.memory.gradient_sum import sum_row_gradients

DOUBLE = functools.partial(collate, dtype=torch.float64)
N_ROWS = 7


def norm(tensors: dict[str, Tensor]) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors.values()) ** 0.5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_and_curvature_are_those_of_a_loop(kind: str) -> None:
    architecture = ARCHITECTURES[kind]
    model, rows = architecture.model(torch.float64), architecture.rows(N_ROWS)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients_of(loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}

    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    size = 0.0
    with evaluation_mode(model):
        for number, row in enumerate(rows):
            inputs = DOUBLE([row])
            gradients = gradients_of(model(**inputs)["loss"] * architecture.targets)
            size += norm(gradients)
            drawn = gradients_of(predicted_targets(model, inputs).fisher_loss(np.array([number]), 0))
            for name in parameters:
                total[name] += gradients[name]
                squares[name] += drawn[name].square() / (architecture.targets * N_ROWS)
    source = RowSource(RowList(rows), DOUBLE, batch_size=3)
    found = sum_row_gradients(model, ModelRowLoss(), source)
    assert (found.n_rows, found.n_targets) == (N_ROWS, architecture.targets * N_ROWS)
    assert norm({name: found.tensors[name] - total[name] for name in total}) <= architecture.tolerance * size
    curvature = fit_curvature(model, source)
    assert curvature.coverage()["kronecker"] > 0
    largest = max(float(values.max()) for values in squares.values())
    for block in curvature.blocks.values():
        if isinstance(block, DiagonalBlock):
            for name, values in block.values.items():
                torch.testing.assert_close(values.double(), squares[name], rtol=1e-4, atol=1e-8 * largest, msg=name)
        else:  # a rotation keeps the sum of squares
            assert isinstance(block, KroneckerBlock)
            expected = sum(float(squares[name].sum()) for name in block.shapes)
            assert float(block.values.double().sum()) == pytest.approx(expected, rel=1e-4, abs=1e-8 * largest)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_calibrated_request(kind: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[kind]
    settings: dict[str, Any] = {"num_train_epochs": 8, "learning_rate": 1e-2, "per_device_train_batch_size": 10}
    logging.getLogger("hf_iau.unlearn").setLevel(logging.ERROR)
    trainer = UnlearningTrainer(
        model=architecture.model(),
        args=TrainingArguments(
            tmp_path,
            **settings,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=RowList(architecture.rows(60)),
        eval_dataset=RowList(architecture.rows(100, seed=1)),
        data_collator=collate,
        callbacks=[IAUCallback()],
    )
    trainer.train()
    before = state_of(trainer.model)
    result = trainer.unlearn(forget_indices=[3, 10, 20, 21])
    report = result.report
    assert report.verdict in ("ok", "check", "retrain")
    assert np.isfinite([report.before["forget_loss"], report.after["forget_loss"]]).all()
    assert report.before["forget_loss"] < report.before["held_out_loss"]
    assert report.after["forget_loss"] > report.before["forget_loss"]
    assert any(not torch.equal(value, before[name]) for name, value in state_of(trainer.model).items())
    result.revert()
    assert_bits(trainer.model, before)


class Seq2SeqUnlearningTrainer(UnlearningTrainer, Seq2SeqTrainer):
    """In front of another trainer."""


def test_in_front_of_a_trainer_for_sequences(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["t5"]
    found = []
    for trainer_class, args_class in (
        (UnlearningTrainer, TrainingArguments),
        (Seq2SeqUnlearningTrainer, Seq2SeqTrainingArguments),
    ):
        trainer = trainer_class(
            model=architecture.model(),
            args=args_class(
                tmp_path / trainer_class.__name__, use_cpu=True, report_to=[], save_strategy="no", max_steps=5
            ),
            train_dataset=RowList(architecture.rows(30)),
            eval_dataset=RowList(architecture.rows(20, seed=1)),
            data_collator=collate,
            callbacks=[IAUCallback()],
        )
        trainer.train()
        trainer.unlearn(forget_indices=[3, 10], config=IAUConfig(scale=0.1, damping=1.0))
        found.append(trainer)
    plain, sequences = found
    assert_bits(sequences.model, state_of(plain.model))
    sequences.args.predict_with_generate = True
    assert sequences.predict(sequences.eval_dataset, max_length=6).predictions.shape[0] == 20
