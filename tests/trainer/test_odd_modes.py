"""Modes and models in which a gradient cannot be had are refused in words, before anything is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import as_dataset, plain, plain_rows
from torch import nn
from unlearning_trainers import WITH_CURVATURE, assert_bits, make_trainer, state_of

from hf_iau import GatherConfig, IAUCallback, IAUConfig, RequestError, UnsupportedModelError, gather

GIVEN = IAUConfig(scale=0.1, damping=1.0)


def test_inference_mode_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    before = state_of(trainer.model)
    for call, name in (
        (lambda: trainer.unlearn(forget_indices=[1], config=GIVEN), "unlearn"),
        (lambda: trainer.gather(), "gather"),
        (lambda: gather(trainer.model, trainer.train_dataset), "gather"),
    ):
        with (
            torch.inference_mode(),
            pytest.raises(RequestError, match=rf"{name}\(\) was called inside"),
        ):
            call()
    assert_bits(trainer.model, before)


def test_without_gradients_is_no_matter(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    with torch.no_grad():
        assert trainer.unlearn(forget_indices=[1], config=GIVEN).applied


def test_parameters_without_elements_are_named() -> None:
    model = plain()
    model.left = nn.Parameter(torch.zeros(0, 4))
    with pytest.raises(UnsupportedModelError, match=r"Parameter 'left' has no elements \(shape \(0, 4\)\)"):
        gather(model, as_dataset(plain_rows()), config=GatherConfig(progress=False))


def test_a_transform_that_misses_its_column_names_the_setting(tmp_path: Path) -> None:
    rows = as_dataset(plain_rows()).rename_column("features", "raw")
    shown = rows.with_transform(lambda batch: {"features": batch["raw"], "labels": batch["labels"]})
    trainer = make_trainer(
        tmp_path, "plain", train_dataset=shown.remove_columns("raw"), callbacks=[IAUCallback(WITH_CURVATURE)]
    )
    with pytest.raises(RequestError, match=r"reads the column 'raw'.*remove_unused_columns=False"):
        trainer.train()


def test_float64_by_default_changes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    plainly = trainer.unlearn(forget_indices=[1, 4], config=GIVEN)
    expected = state_of(trainer.model)
    plainly.revert()
    torch.set_default_dtype(torch.float64)
    try:
        assert trainer.unlearn(forget_indices=[1, 4], config=GIVEN).applied
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in state_of(trainer.model).items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-7), name
