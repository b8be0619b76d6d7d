"""A request's figures go where those of the training go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import plain_rows
from transformers import TrainerCallback
from unlearning_trainers import WITH_CURVATURE, make_trainer

from hf_iau import IAUCallback, IAUConfig

GIVEN = IAUConfig(scale=0.1, damping=1.0)


class Tracker(TrainerCallback):
    """As the integrations of Transformers (TensorBoard, W&B, ...) it is told of every log."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.told.append(dict(logs or {}))


def test_figures_are_logged_and_stand_in_the_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker()
    trainer = make_trainer(
        tmp_path,
        "plain",
        rows=plain_rows(60),
        settings={"per_device_train_batch_size": 20},
        callbacks=[tracker, IAUCallback(WITH_CURVATURE)],
    )
    trainer.train()
    capsys.readouterr()
    tracker.told.clear()
    assert trainer.unlearn(forget_indices=range(25), config=GIVEN, dry_run=True).applied is False
    assert not tracker.told
    report = trainer.unlearn(forget_indices=range(25), config=GIVEN).report
    (told,) = tracker.told
    assert told["unlearn_rows"] == 25 and told["unlearn_verdict"] == report.verdict
    for when, figures in (("before", report.before), ("after", report.after)):
        for name in ("forget_accuracy", "forget_loss", "retain_accuracy", "held_out_loss", "mia_auc"):
            assert told[f"unlearn_{name}_{when}"] == figures[name]
    assert told["unlearn_seconds"] == pytest.approx(sum(report.seconds.values()), abs=1e-3)
    assert "unlearn" not in capsys.readouterr().out
    trainer.save_state()
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["unlearn_rows"] == 25
    # Of a single row no figure.
    trainer.unlearn(forget_indices=[30], config=GIVEN)
    assert "unlearn_held_out_loss_after" in tracker.told[-1]
    assert not [name for name in tracker.told[-1] if "forget" in name or "mia" in name]
