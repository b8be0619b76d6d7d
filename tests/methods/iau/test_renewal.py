"""Curvature that the weights have left behind is estimated anew, where retained rows are at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import plain_rows
from torch import Tensor
from unlearning_trainers import WITH_CURVATURE, collator, make_trainer

from hf_iau import GatherConfig, GradientMemory, IAUConfig, UnlearningTrainer, gather
from hf_iau.data import ModelRowLoss, RowSource
from hf_iau.errors import ConfigError
from hf_iau.methods.iau.curvature_renewal import renew_curvature, renewal_settings

GIVEN = IAUConfig(scale=1.0, damping=0.1)
GONE, NEXT = list(range(16)), list(range(16, 40))


def after_one_request(folder: Path, config: GatherConfig = WITH_CURVATURE) -> UnlearningTrainer:
    """A trainer whose weights have left the place where their curvature was estimated."""
    trainer = make_trainer(folder, "plain", rows=plain_rows(200), dtype=torch.float64)
    held_out = plain_rows(120, seed=1)
    trainer.eval_dataset = type(trainer.train_dataset).from_list(held_out, features=trainer.train_dataset.features)
    trainer.gather(config)
    trainer.unlearn(forget_indices=GONE, config=GIVEN)
    assert trainer.memory.path_since_curvature == trainer.memory.relative_path > 1e-3
    return trainer


def factors(memory: GradientMemory) -> dict[str, Tensor]:
    assert memory.curvature is not None
    return memory.curvature.tensors()


def same(one: GradientMemory, other: GradientMemory) -> bool:
    first, second = factors(one), factors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_the_curvature_that_gathering_now_would_find(tmp_path: Path) -> None:
    trainer = after_one_request(tmp_path)
    before = trainer.memory
    rows = trainer.train_dataset.select([i for i in range(200) if i not in GONE])
    fresh = gather(trainer.model, rows, data_collator=collator(torch.float64), config=WITH_CURVATURE)
    source = RowSource(rows, collator(torch.float64), batch_size=7)
    settings = renewal_settings(before, progress=False)
    assert settings == WITH_CURVATURE.resolved()
    renewed = renew_curvature(before, trainer.model, ModelRowLoss(), source, settings)
    assert not same(renewed, before)
    for name, tensor in factors(renewed).items():
        scale = float(factors(fresh)[name].abs().max())
        if "vectors" not in name:  # of equal eigenvalues they may be turned
            assert torch.allclose(tensor, factors(fresh)[name], rtol=0, atol=1e-10 * scale), name
    vector = {name: torch.ones(shape, dtype=torch.float64) for name, shape in before.parameters.items()}
    solved, expected = (m.curvature.solve(vector, 0.1) for m in (renewed, fresh))
    for name, value in solved.items():
        assert torch.allclose(value, expected[name], rtol=1e-8, atol=1e-10 * float(expected[name].abs().max())), name
    assert renewed.curvature_path == renewed.relative_path == before.relative_path
    assert renewed.path_since_curvature == 0.0 and renewed.calibration is None
    assert renewed.gradient_sum is before.gradient_sum


def test_a_request_renews_what_is_far_away_and_the_memory_keeps_it(tmp_path: Path) -> None:
    trainer = after_one_request(tmp_path)
    before, path = trainer.memory, trainer.memory.relative_path
    kept = {name: tensor.clone() for name, tensor in factors(before).items()}
    near = trainer.unlearn(forget_indices=NEXT, config=IAUConfig(renew_curvature=2.0 * path), dry_run=True).report
    assert not near.diagnostics["curvature"]["renewed"] and "curvature" not in near.seconds
    assert trainer.memory is before
    result = trainer.unlearn(forget_indices=NEXT, config=IAUConfig(renew_curvature=0.5 * path))
    assert result.report.diagnostics["curvature"]["renewed"] and result.report.seconds["curvature"] > 0
    assert result.memory is not None and not same(result.memory, before)
    assert result.memory.curvature_path == path
    assert result.memory.path_since_curvature == pytest.approx(result.report.diagnostics["relative_step_norm"])
    assert result.report.diagnostics["budget"]["path_since_curvature"] == result.memory.path_since_curvature
    loaded = GradientMemory.load(result.memory.save(tmp_path / "kept").parent)
    assert loaded.curvature_path == path and same(loaded, result.memory)
    result.revert()
    assert trainer.memory is before
    assert all(torch.equal(tensor, kept[name]) for name, tensor in factors(before).items())


def test_rows_that_are_out_have_no_part_in_it(tmp_path: Path) -> None:
    """Neither those forgotten earlier nor those of the request: the curvature is that of the others."""
    trainer = after_one_request(tmp_path)
    model = trainer.model
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    result = trainer.unlearn(forget_indices=NEXT, config=IAUConfig(renew_curvature=0.0))
    rows = trainer.train_dataset.select([i for i in range(200) if i not in GONE + NEXT])
    model.load_state_dict(weights)
    fresh = gather(model, rows, data_collator=collator(torch.float64), config=WITH_CURVATURE)
    assert result.memory is not None and result.memory.curvature is not None
    vector = {name: torch.ones(shape, dtype=torch.float64) for name, shape in fresh.parameters.items()}
    solved, expected = result.memory.curvature.solve(vector, 0.1), fresh.curvature.solve(vector, 0.1)
    for name, value in solved.items():
        assert torch.allclose(value, expected[name], rtol=1e-8, atol=1e-10 * float(expected[name].abs().max())), name


@pytest.mark.parametrize("case", ["never", "given", "no rows", "few rows", "adam", "of another version"])
def test_else_the_old_one_serves(tmp_path: Path, case: str) -> None:
    trainer = after_one_request(tmp_path)
    memory = trainer.memory
    config = IAUConfig(renew_curvature=None if case == "never" else 0.0)
    if case == "given":
        config = replace(GIVEN, renew_curvature=0.0)
    elif case == "adam":
        memory.settings["curvature"] = "adam"
    elif case == "of another version":
        memory.settings["what_is_this"] = 1
    request = {"forget_indices": NEXT}
    if case == "few rows":
        request["retain_dataset"] = trainer.train_dataset.select(range(100, 180))
    if case == "no rows":
        request = {"forget_dataset": trainer.train_dataset.select(NEXT)}
        trainer.train_dataset = None
    result = trainer.unlearn(**request, config=config)
    assert not result.report.diagnostics["curvature"]["renewed"]
    assert result.memory is not None and same(result.memory, memory) and result.memory.curvature_path == 0.0


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_share_that_is_none(value: float) -> None:
    with pytest.raises(ConfigError, match="renew_curvature"):
        IAUConfig(renew_curvature=value)


def test_nothing_is_renewed_before_the_weights_have_moved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", rows=plain_rows(60), dtype=torch.float64)
    trainer.gather(WITH_CURVATURE)
    trainer.eval_dataset = None
    report = trainer.unlearn(forget_indices=GONE, config=IAUConfig(renew_curvature=0.0)).report
    assert not report.diagnostics["curvature"]["renewed"]
    assert np.isfinite(report.diagnostics["step_norm"])
