"""How far the first-order picture holds is counted, said, and reset by gathering anew."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import plain_rows
from unlearning_trainers import WITH_CURVATURE, make_trainer

from hf_iau import GradientMemory, IAUConfig
from hf_iau.errors import ConfigError
from hf_iau.requests import Budget


def memory(**changes: object) -> GradientMemory:
    settings = {"n_rows": 90, "forgotten_rows": 10, "held_out": {"loss": 2.0, "content": "x"}} | changes
    return GradientMemory(parameters={}, n_targets=90, model={}, data={}, loss={}, **settings)


@pytest.mark.parametrize(
    "changes, loss, advice, reason",
    [
        ({}, 2.1, "go on", None),
        ({"relative_path": 0.4}, 2.0, "rebase", "add up to 40%"),
        ({}, 2.3, "rebase", "risen by 15% since gathering"),
        ({"relative_path": 0.7}, 2.0, "retrain", "beyond a first-order picture"),
        ({}, 2.7, "retrain", "risen by 35%"),
        ({}, float("nan"), "retrain", "risen by nan%"),
        ({"forgotten_rows": 70}, 2.0, "retrain", "44% of the training rows are forgotten"),
        ({"held_out": None}, 9.0, "go on", None),
    ],
)
def test_advice(changes: dict[str, object], loss: float, advice: str, reason: str | None) -> None:
    budget = Budget.of(memory(**changes), loss)
    assert budget.advice == advice
    sentence = budget.sentence()
    assert (sentence is None) == (reason is None)
    if sentence is not None and reason is not None:
        assert reason in sentence and sentence.startswith("Retrain now" if advice == "retrain" else "Gather anew")


def test_the_budget_runs_through_requests_and_is_reset_by_rebase(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", rows=plain_rows(60))
    trainer.gather(WITH_CURVATURE)
    config = IAUConfig(length=0.5, damping=0.1, max_relative_step=2.0)
    first = trainer.unlearn(row_indices=list(range(8)), config=config).report
    second = trainer.unlearn(row_indices=list(range(8, 16)), config=config).report
    one, two = (report.diagnostics["budget"] for report in (first, second))
    steps = [report.diagnostics["relative_step_norm"] for report in (first, second)]
    assert one["relative_path"] == pytest.approx(steps[0]) and two["relative_path"] == pytest.approx(sum(steps))
    assert (one["share_forgotten"], two["share_forgotten"]) == (8 / 60, 16 / 60)
    start = first.before["held_out_loss"]
    assert two["held_out_drift"] == pytest.approx((second.after["held_out_loss"] - start) / start)
    assert any("fewer than 16" in sentence for sentence in first.warnings)
    rebased = trainer.rebase()
    assert rebased.settings == WITH_CURVATURE.to_dict()
    assert (rebased.n_rows, rebased.forgotten_rows, rebased.relative_path, rebased.held_out) == (44, 16, 0.0, None)
    third = trainer.unlearn(row_indices=list(range(20, 28)), config=config).report
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
