"""How far the first-order picture holds is counted, said, and reset by gathering anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import plain_rows
from unlearning_trainers import WITH_CURVATURE, gradient_loop, make_trainer, parameters_of

from hf_iau import GradientMemory, IAUConfig, UnlearningReport
from hf_iau.errors import ConfigError
from hf_iau.unlearn.budget import Budget, judged


def memory(**changes: object) -> GradientMemory:
    settings = {"n_rows": 90, "forgotten_rows": 10, "held_out": {"loss": 2.0, "content": "x"}} | changes
    return GradientMemory(parameters={}, n_targets=90, model={}, data={}, loss={}, **settings)


@pytest.mark.parametrize(
    "changes, loss, error, advice, reason",
    [
        ({}, 2.1, 0.1, "go on", None),
        ({"relative_path": 0.4}, 2.0, 0.1, "rebase", "add up to 40%"),
        ({"relative_path": 0.9, "curvature_path": 0.5}, 2.0, 0.1, "rebase", "add up to 40%"),
        ({"relative_path": 0.9, "curvature_path": 0.6}, 2.0, 0.6, "go on", None),
        ({}, 2.3, 0.1, "rebase", "risen by 15% since gathering"),
        # A long path is a reason to look; what was measured says whether the first-order picture has ended.
        ({"relative_path": 0.7}, 2.1, 0.4, "rebase", "add up to 70%"),
        ({"relative_path": 1.5}, 1.9, 0.0, "rebase", "add up to 150%"),
        (
            {"relative_path": 0.7},
            2.3,
            0.1,
            "retrain",
            "beyond a first-order picture: the held-out loss has risen by 15%",
        ),
        ({"relative_path": 0.7}, 2.0, 0.5, "retrain", "foresaw the effect of the last step with an error of 50%"),
        ({"relative_path": 0.7}, 2.0, 12.0, "retrain", "an error of 1200%"),
        ({"relative_path": 0.4}, 2.0, 12.0, "rebase", "add up to 40%"),
        ({"relative_path": 0.7}, float("nan"), 0.1, "retrain", "risen by nan%"),
        # What was not measured reassures nobody.
        ({"relative_path": 0.7}, None, 0.1, "retrain", "what it did to the held-out loss is not known"),
        ({"relative_path": 0.7, "held_out": None}, 2.0, 0.1, "retrain", "is not known"),
        ({"relative_path": 0.7}, 2.0, None, "retrain", "there was no forecast of the last step"),
        ({}, 2.7, 0.1, "retrain", "risen by 35%"),
        ({}, float("nan"), 0.1, "retrain", "risen by nan%"),
        ({"forgotten_rows": 70}, 2.0, 0.1, "retrain", "44% of the training rows are forgotten"),
        ({"held_out": None}, 9.0, None, "go on", None),
    ],
)
def test_advice(
    changes: dict[str, object], loss: float | None, error: float | None, advice: str, reason: str | None
) -> None:
    budget = Budget.of(memory(**changes), loss, error)
    assert budget.advice == advice
    sentence = budget.sentence()
    assert (sentence is None) == (reason is None)
    if sentence is not None and reason is not None:
        assert reason in sentence and sentence.startswith("Retrain now" if advice == "retrain" else "Gather anew")


@pytest.mark.parametrize(
    "verdict, advice, expected",
    [
        ("ok", "go on", ("ok", ["own"])),
        ("ok", "rebase", ("check", ["of the budget"])),
        ("check", "rebase", ("check", ["of the budget", "own"])),
        ("retrain", "rebase", ("retrain", ["own"])),
        ("retrain", "retrain", ("retrain", ["of the budget", "own"])),
        (None, "retrain", (None, ["own"])),
    ],
)
def test_the_more_severe_of_method_and_budget_counts_and_reasons_add_up(
    verdict: str | None, advice: str, expected: tuple[str | None, list[str]]
) -> None:
    budget = Budget(0.5, 0.5, None, None, 0.1, advice, ["of the budget"])
    assert judged(verdict, ["own"], budget) == expected
    assert judged(verdict, ["own"], None) == (verdict, ["own"])


@pytest.mark.parametrize("method, config", [("iau", IAUConfig(scale=0.3, damping=0.1)), ("iau-released", None)])
def test_the_forecast_is_the_gradient_times_the_step(method: str, config: object, tmp_path: Path) -> None:
    rows = plain_rows(60)
    trainer = make_trainer(tmp_path, "plain", rows=rows, dtype=torch.float64)
    trainer.gather(WITH_CURVATURE)
    gradient, before = gradient_loop(trainer.model, rows[:20])[0], parameters_of(trainer.model)
    report = trainer.unlearn(forget_indices=list(range(20)), method=method, config=config).report
    moved = parameters_of(trainer.model)
    foreseen = sum(float((gradient[name] * (moved[name] - before[name])).sum()) for name in gradient) / 20
    error = report.diagnostics["budget"]["forecast_error"]
    measured = report.after["forget_loss"] - report.before["forget_loss"]
    assert report.diagnostics["forecast_forget_loss_rise"] == pytest.approx(foreseen, rel=1e-6)
    assert error == pytest.approx(abs(measured - foreseen) / abs(measured), rel=1e-6)


def test_a_long_path_on_which_nothing_was_lost_is_to_be_checked(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", rows=plain_rows(400))
    trainer.gather(WITH_CURVATURE)
    config = IAUConfig(scale=0.02, damping=1.0)

    def served(start: int, path: float, **held_out: float) -> UnlearningReport:
        trainer.memory.relative_path = path
        trainer.memory.held_out = (trainer.memory.held_out or {}) | held_out
        return trainer.unlearn(forget_indices=list(range(start, start + 16)), config=config).report

    first = trainer.unlearn(forget_indices=list(range(16)), config=config).report
    assert first.verdict == "ok" and first.diagnostics["budget"]["forecast_error"] < 0.3
    long = served(16, 0.9)
    assert long.verdict == "check" and long.diagnostics["budget"]["advice"] == "rebase"
    assert long.diagnostics["reasons"][0].startswith("the steps since the curvature was estimated add up to 9")
    worse = served(32, 0.9, loss=first.before["held_out_loss"] / 1.2)
    assert worse.verdict == "retrain" and worse.diagnostics["budget"]["advice"] == "retrain"


def test_the_budget_runs_through_requests_and_is_reset_by_rebase(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", rows=plain_rows(60))
    trainer.gather(WITH_CURVATURE)
    config = IAUConfig(scale=0.5, damping=0.1, max_relative_step=2.0)
    first = trainer.unlearn(forget_indices=list(range(8)), config=config).report
    second = trainer.unlearn(forget_indices=list(range(8, 16)), config=config).report
    one, two = (report.diagnostics["budget"] for report in (first, second))
    steps = [report.diagnostics["relative_step_norm"] for report in (first, second)]
    assert one["relative_path"] == pytest.approx(steps[0]) and two["relative_path"] == pytest.approx(sum(steps))
    assert (one["share_forgotten"], two["share_forgotten"]) == (8 / 60, 16 / 60)
    start = first.before["held_out_loss"]
    assert two["held_out_drift"] == pytest.approx((second.after["held_out_loss"] - start) / start)
    assert any("fewer than 16" in sentence for sentence in first.warnings)
    rebased = trainer.rebase()
    assert rebased.settings == WITH_CURVATURE.resolved().to_dict()
    assert (rebased.n_rows, rebased.forgotten_rows, rebased.relative_path, rebased.held_out) == (44, 16, 0.0, None)
    third = trainer.unlearn(forget_indices=list(range(20, 28)), config=config).report
    budget = third.diagnostics["budget"]
    assert budget["relative_path"] == pytest.approx(third.diagnostics["relative_step_norm"])
    assert budget["share_forgotten"] == 24 / 60
    assert budget["held_out_drift"] == pytest.approx(
        (third.after["held_out_loss"] - third.before["held_out_loss"]) / third.before["held_out_loss"]
    )
    # Two fifths are forgotten: whatever the method thinks of its own step, the advice is to retrain.
    assert budget["advice"] == "retrain" and third.verdict == "retrain"
    assert any(
        sentence.startswith("Retrain now: ") and "40% of the training rows are forgotten" in sentence
        for sentence in third.warnings
    )


def test_rebase_with_settings_of_another_version(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", rows=plain_rows(60))
    trainer.gather(WITH_CURVATURE).settings["unheard_of"] = 1
    with pytest.raises(ConfigError, match=r"settings that this version does not know.*unheard_of"):
        trainer.rebase()
