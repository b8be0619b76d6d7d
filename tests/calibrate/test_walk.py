"""Many short steps, where one does not arrive."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch
from memorising_network import Classifier, Scene, draw, fit
from transformers import default_data_collator

from hf_iau import GatherConfig, IAUConfig, gather
from hf_iau.calibrate import Directions, TrialRunner, Walk, walk
from hf_iau.calibrate.calibration import find_length
from hf_iau.calibrate.trial import auc_distance
from hf_iau.calibrate.walk import DEAR, _still_known
from hf_iau.gather.gradient_sum import sum_row_gradients
from hf_iau.methods.verdict import SAFE
from hf_iau.objective import ModelRowLoss, RowSource, predict_rows

# The module; the package has a function of the same name.
WALK = import_module("hf_iau.calibrate.walk")
FORGET = np.random.default_rng(11).choice(1200, 200, replace=False)


def rows_of(dataset, batch_size=512):
    return RowSource(dataset, default_data_collator, batch_size=batch_size)


@pytest.fixture(scope="module")
def memorised() -> Scene:
    """Trained until it is right about, and sure of, nearly every training row."""
    torch.manual_seed(0)
    train, held_out, test = draw(1200, 1), draw(800, 2), draw(800, 3)
    model = fit(Classifier(), train, epochs=90, seed=0)
    memory = gather(model, train, config=GatherConfig(gradient_sum="exact", batch_size=128, progress=False))
    return Scene(model, train, held_out, test, memory, {k: v.clone() for k, v in model.state_dict().items()})


@pytest.fixture
def setting(memorised):
    memorised.model.load_state_dict(memorised.state)
    forget, held_out = rows_of(memorised.train.take(FORGET)), rows_of(memorised.held_out)
    total = sum_row_gradients(memorised.model, ModelRowLoss(), forget)
    remaining = memorised.memory.n_targets - total.n_targets
    directions = Directions(memorised.memory.curvature, total.tensors, memorised.memory.gradient_sum, remaining)
    return memorised.model, directions, forget, held_out


def walked(setting, damping=0.01, max_relative_step=0.5, **changes) -> Walk:
    model, directions, forget, held_out = setting
    return walk(
        model,
        ModelRowLoss(),
        changes.pop("directions", directions),
        forget,
        held_out,
        damping=damping,
        max_relative_step=max_relative_step,
        **changes,
    )


def unchanged(scene) -> bool:
    return all(torch.equal(value, scene.model.state_dict()[name]) for name, value in scene.state.items())


def test_the_weights_are_put_back_bit_for_bit(memorised, setting):
    path = walked(setting)
    assert path.steps > 0 and unchanged(memorised)
    assert all(change.dtype == torch.float64 for change in path.step.values())


@pytest.mark.parametrize("call", [1, 3, 4])
def test_the_weights_are_put_back_after_an_exception(memorised, setting, monkeypatch, call):
    """In the first look at the rows, at the held-out rows after a step, and at the forget rows after it."""
    calls = 0
    moved = []

    def fail(model, rows, **options):
        nonlocal calls
        calls += 1
        if calls == call:
            moved.append(not unchanged(memorised))
            raise RuntimeError("boom")
        return predict_rows(model, rows, **options)

    monkeypatch.setattr(WALK, "predict_rows", fail)
    with pytest.raises(RuntimeError, match="boom"):
        walked(setting)
    assert moved == [call > 2]  # the first two looks are before the first step
    assert unchanged(memorised)


def test_the_walk_stays_within_its_bound(setting):
    path = walked(setting, max_relative_step=0.04)
    assert path.curve and all(point["relative_step"] <= 0.04 for point in path.curve)
    assert path.relative_step <= 0.04
    assert walked(setting, max_relative_step=1e-4).steps == 0


def test_the_point_told_of_is_the_step_returned(memorised, setting):
    model, _, forget, held_out = setting
    path = walked(setting)
    assert path.curve[path.steps - 1]["criterion"] == path.criterion
    with torch.no_grad():
        for name, change in path.step.items():
            model.get_parameter(name).copy_(memorised.state[name].double() + change)
    treated, after = predict_rows(model, forget), predict_rows(model, held_out)
    assert path.criterion == pytest.approx(auc_distance(treated, after), abs=1e-6)
    assert path.held_out_loss == pytest.approx(after.mean_loss, rel=1e-6)
    model.load_state_dict(memorised.state)


def test_still_known_by_hand():
    held_out = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    # Sorted: 0.5, 1.5, 3.5, 9.0; partners at the quantiles 1/8, 3/8, 5/8, 7/8: 1.5, 2.5, 3.5, 4.5.
    losses = np.array([9.0, 0.5, 3.5, 1.5])
    assert _still_known(losses, held_out).tolist() == [1, 3]
    assert _still_known(np.zeros(4), held_out).tolist() == [0, 1, 2, 3]
    assert _still_known(np.full(4, 10.0), held_out).tolist() == []


def test_it_ends_where_half_the_rows_are_still_known(setting, monkeypatch):
    """Six looks: before, and after each step; half of the rows are left at the third step."""
    left = iter([200, 180, 140, 100, 60, 20])
    monkeypatch.setattr(WALK, "_still_known", lambda *_: np.arange(next(left)))
    monkeypatch.setattr(WALK, "auc_distance", lambda *_: 0.2)
    path = walked(setting)
    assert path.reached and path.steps == 3 and len(path.curve) == 3


def test_steps_taken_back_are_not_counted(setting, monkeypatch):
    """A held-out loss that jumps at the first step: the stride is halved, and the path has no such point."""
    looks = 0

    def jump(model, rows, **options):
        nonlocal looks
        looks += 1
        found = predict_rows(model, rows, **options)
        return replace(found, loss=found.loss * 2.0) if looks == 3 else found

    monkeypatch.setattr(WALK, "predict_rows", jump)
    path = walked(setting)
    assert path.curve[0]["stride"] == pytest.approx(0.015)
    assert path.steps <= len(path.curve)
    assert path.curve[path.steps - 1]["held_out_loss"] == path.held_out_loss


def test_nothing_known_nothing_walked(memorised, setting, monkeypatch):
    monkeypatch.setattr(WALK, "_still_known", lambda *_: np.arange(0))
    path = walked(setting)
    assert path.steps == 0 and not path.reached and not path.curve and unchanged(memorised)


def test_gradients_are_taken_in_the_batches_that_fit_them(memorised, setting, monkeypatch):
    model, directions, _, held_out = setting
    sizes = set()

    def look(model, row_loss, rows, **options):
        sizes.add(rows.batch_size)
        return sum_row_gradients(model, row_loss, rows, **options)

    monkeypatch.setattr(WALK, "sum_row_gradients", look)
    walked((model, directions, rows_of(memorised.train.take(FORGET), batch_size=32), held_out))
    assert sizes == {32}


def test_a_memorised_request_ends_nearer_to_held_out_rows_than_by_one_step(setting):
    """Of the same damping and bound, at a held-out loss no higher than the walk's."""
    damping = 0.01
    model, directions, forget, held_out = setting
    runner = TrialRunner(model, directions, forget, held_out)
    start = runner.run(0.0, damping)
    assert start.criterion > 0.15 and start.target_loss < 0.05  # memorised
    path = walked(setting, damping=damping)
    assert path.held_out_loss <= (1.0 + DEAR) * start.held_out_loss
    steps = [runner.run(k, damping) for k in np.geomspace(0.01, 1.0, 20) * runner.longest(damping, 0.5)]
    steps.append(find_length(runner, damping, 0.0, start=start, tolerance=0.005, max_relative_step=0.5)[0])
    as_dear = [start, *(step for step in steps if step.held_out_loss <= path.held_out_loss)]
    nearest = min(abs(step.criterion) for step in as_dear)
    assert abs(path.criterion) < nearest - 0.01


# --- the choice between a step and a walk ---------------------------------------------------------------------------


def fake_walk(monkeypatch, loss_of, *, reached):
    """A walk that goes nowhere and says what it is told to; returns what the trainer's own step cost."""
    seen = []

    def pretend(model, row_loss, directions, forget, held_out, *, damping, offset, max_relative_step):
        step = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in directions.forget_sum.items()}
        before = predict_rows(model, held_out).mean_loss
        seen.append(damping)
        return Walk(step, damping, 1, reached, 0.0 if reached else 0.01, loss_of(before), 0.0, [{"damping": damping}])

    monkeypatch.setattr("hf_iau.methods.iau.walk", pretend)
    return seen


@pytest.mark.parametrize("reached", [True, False])
def test_a_walk_that_costs_more_than_a_step_that_arrives_is_not_taken(memorised, tmp_path, monkeypatch, reached):
    seen = fake_walk(monkeypatch, lambda before: 10.0 * before, reached=reached)
    monkeypatch.setattr("hf_iau.methods.iau.DEAR", -1.0)  # every step is dear
    config = IAUConfig(length=0.01, damping=None)  # a given k counts as arrived
    report = memorised.trainer(tmp_path).unlearn(row_indices=FORGET, config=config).report
    assert seen and report.diagnostics["calibration"]["source"] != "walk"
    assert "walk" not in report.diagnostics


def test_a_walk_is_reported_as_one_and_not_remembered_as_a_step(memorised, tmp_path, monkeypatch):
    fake_walk(monkeypatch, lambda before: 0.0, reached=True)
    monkeypatch.setattr("hf_iau.methods.iau.DEAR", -1.0)
    trainer = memorised.trainer(tmp_path)
    result = trainer.unlearn(row_indices=FORGET)
    found = result.report.diagnostics["calibration"]
    assert found["source"] == "walk" and found["lengths"] == []
    assert result.report.diagnostics["walk"]["steps"] == 1
    assert result.report.diagnostics["walk"]["one_step"]["source"] in ("forget rows", "proxies")
    assert result.memory.calibration is None
    others = np.setdiff1d(np.arange(1200), FORGET)[:60]
    assert trainer.unlearn(row_indices=others).report.diagnostics["calibration"]["source"] != "remembered"


def test_a_walk_keeps_to_the_range_of_damping(memorised, tmp_path, monkeypatch):
    seen = fake_walk(monkeypatch, lambda before: 0.0, reached=True)
    monkeypatch.setattr("hf_iau.methods.iau.DEAR", -1.0)
    config = IAUConfig(damping_range=(0.005, 0.5))
    memorised.trainer(tmp_path).unlearn(row_indices=FORGET, config=config)
    assert seen == [0.005, 0.01]


def test_no_walk_when_it_is_switched_off(memorised, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_iau.methods.iau.walk", lambda *_, **__: pytest.fail("walked"))
    monkeypatch.setattr("hf_iau.methods.iau.DEAR", -1.0)
    memorised.trainer(tmp_path).unlearn(row_indices=FORGET, config=IAUConfig(walk=False))


def test_through_the_trainer_a_memorised_model_forgets(memorised, tmp_path):
    report = memorised.trainer(tmp_path).unlearn(row_indices=FORGET, test_dataset=memorised.test).report
    assert abs(report.after["mia_auc_test"] - 0.5) < 0.3 * (report.before["mia_auc_test"] - 0.5)
    drift = report.after["held_out_loss"] / report.before["held_out_loss"] - 1.0
    assert drift <= DEAR or report.verdict != SAFE
