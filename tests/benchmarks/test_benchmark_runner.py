"""The runner on a synthetic data set: what its JSON says, and that finished work is not done again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import cells as cells_module  # noqa: E402
from benchmarks.data import load_splits  # noqa: E402
from benchmarks.run import main  # noqa: E402
from benchmarks.scenarios import Scenario  # noqa: E402
from benchmarks.suites import SUITES  # noqa: E402

app = typer.Typer()
app.command()(main)


def run(*arguments: str) -> Any:
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(app, [*arguments, "--threads", str(threads)], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished `synthetic` suite."""
    out = tmp_path_factory.mktemp("benchmarks")
    result = run("synthetic", "--out", str(out))
    assert result.exit_code == 0, result.output
    return out


def cells_of(out: Path) -> dict[str, dict[str, Any]]:
    return {path.name: json.loads(path.read_text()) for path in sorted((out / "synthetic" / "cells").glob("*.json"))}


def test_there_is_one_cell_a_method(finished: Path) -> None:
    assert {cell["method"] for cell in cells_of(finished).values()} == {v.name for v in SUITES["synthetic"].variants}


def test_a_cell_says_what_was_run_on_what(finished: Path) -> None:
    for cell in cells_of(finished).values():
        assert "benchmarks.run" in cell["command"]
        assert (cell["suite"], cell["seed"], cell["forget_rows"]) == ("synthetic", 0, 20)
        assert {"cpu_count", "threads", "torch", "transformers"} <= cell["hardware"].keys()
        assert cell["training"]["original"]["seconds"] > 0
        assert cell["training"]["original"]["rows"] == 400
        assert cell["training"]["retrained"]["rows"] == cell["training"]["retrained_again"]["rows"] == 380
        assert cell["training"]["retrained"]["seed"] != cell["training"]["retrained_again"]["seed"]


def test_a_cell_holds_figures_and_signed_differences(finished: Path) -> None:
    for cell in cells_of(finished).values():
        figures = cell["figures"]
        for name in ("retain_accuracy", "forget_accuracy", "test_accuracy", "mia_auc"):
            for side in ("before", "after", "retrained", "retrained_again"):
                assert 0.0 <= figures[side][name] <= 1.0
            assert cell["gap"][name] == pytest.approx(100 * (figures["after"][name] - figures["retrained"][name]))
            again = 100 * (figures["retrained_again"][name] - figures["retrained"][name])
            assert cell["noise_floor"][name] == pytest.approx(again)


def test_a_cell_tells_its_cost_and_what_calibration_found(finished: Path) -> None:
    by_method = {cell["method"]: cell for cell in cells_of(finished).values()}
    for cell in by_method.values():
        timing = cell["timing"]
        assert timing["unlearn_seconds"] >= sum(timing["unlearn_seconds_by_phase"].values()) > 0
        assert timing["share_of_retraining"] > 0
        assert "measure_retrained" not in timing["unlearn_seconds_by_phase"]
        assert cell["memory"]["peak_process_bytes"] > 0
    assert by_method["iau"]["length"] > 0 and by_method["iau"]["damping"] > 0
    assert by_method["iau"]["finish_weight"] is not None
    assert by_method["iau"]["verdict"] in ("safe", "check", "retrain")
    assert by_method["iau-released"]["length"] is None


def test_the_table_has_every_method_and_the_noise_floor(finished: Path) -> None:
    table = (finished / "synthetic" / "table.md").read_text()
    for name in ("do nothing", "| iau |", "| iau-released |", "noise floor"):
        assert name in table
    assert (finished / "synthetic" / "gap_against_seconds.png").stat().st_size > 0


def test_finished_cells_and_models_are_not_made_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.suffix in (".json", ".safetensors")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(cells_module, "_measure", refuse)
    assert run("synthetic", "--out", str(finished)).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_only_what_is_missing_is_run_and_trained_models_are_kept(finished: Path) -> None:
    paths = sorted((finished / "synthetic" / "cells").glob("*.json"))
    models = {path: path.stat().st_mtime_ns for path in (finished / "models").glob("*.safetensors")}
    kept = paths[0].stat().st_mtime_ns
    figures = json.loads(paths[1].read_text())["figures"]
    paths[1].unlink()
    assert run("synthetic", "--out", str(finished)).exit_code == 0
    assert paths[0].stat().st_mtime_ns == kept
    assert json.loads(paths[1].read_text())["figures"] == figures
    assert {path: path.stat().st_mtime_ns for path in models} == models


def test_unlearning_alone_can_be_redone(finished: Path) -> None:
    models = {path: path.stat().st_mtime_ns for path in (finished / "models").glob("*.safetensors")}
    cells = {path: path.stat().st_mtime_ns for path in (finished / "synthetic" / "cells").glob("*released.json")}
    assert len(cells) == 1
    others = {p: p.stat().st_mtime_ns for p in (finished / "synthetic" / "cells").glob("*.json") if p not in cells}
    result = run("synthetic", "--out", str(finished), "--redo-unlearning", "--methods", "iau-released")
    assert result.exit_code == 0
    assert all(path.stat().st_mtime_ns > then for path, then in cells.items())
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert {path: path.stat().st_mtime_ns for path in models} == models


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    assert "choose one of" in run("no-such-suite", "--out", str(tmp_path)).output
    assert "choose among" in run("synthetic", "--out", str(tmp_path), "--methods", "no-such-method").output
    assert not list(tmp_path.iterdir())


def test_splits_do_not_share_rows() -> None:
    splits = load_splits("digits", None, train_rows=1000, held_out_rows=397, test_rows=400)
    images = np.concatenate([part.pixel_values.flatten(1) for part in (splits.train, splits.held_out)])
    assert len(np.unique(images, axis=0)) == len(images)


def test_flipped_labels_are_wrong_on_the_forget_rows_alone() -> None:
    labels = np.arange(200) % 10
    scenario = Scenario("flipped", share=0.1, flipped=True)
    rows = scenario.forget_rows(labels, seed=1)
    trained = scenario.training_labels(labels, seed=1, n_classes=10)
    assert len(rows) == 20
    assert np.flatnonzero(trained != labels).tolist() == rows.tolist()
    assert ((trained >= 0) & (trained < 10)).all()


def test_a_class_scenario_takes_all_its_rows_and_no_others() -> None:
    labels = np.arange(50) % 5
    assert (labels[Scenario("class", label=2).forget_rows(labels, seed=0)] == 2).all()
    assert len(Scenario("class", label=2).forget_rows(labels, seed=0)) == 10
    with pytest.raises(ValueError, match="exactly one"):
        Scenario("both", rows=1, label=2)
