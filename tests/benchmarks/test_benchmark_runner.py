"""The runner on a synthetic data set: what its JSON says, and that finished work is not done again."""

from __future__ import annotations

import itertools
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
from benchmarks.data import _LOADERS, Split, load_splits  # noqa: E402
from benchmarks.files import read_arrays  # noqa: E402
from benchmarks.models import make_model  # noqa: E402
from benchmarks.run import groups_spelled_out, main  # noqa: E402
from benchmarks.scenarios import Scenario  # noqa: E402
from benchmarks.suites import CIFAR10_RESNET18, LENET, SUITES  # noqa: E402
from benchmarks.training import ModelStore  # noqa: E402

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


def one_request(out: Path) -> dict[str, dict[str, Any]]:
    """The cells of the scenario with one request, by method."""
    return {c["method"]: c for c in cells_of(out).values() if c["scenario"] == "random-5-percent"}


def test_there_is_one_cell_a_scenario_and_method(finished: Path) -> None:
    suite = SUITES["synthetic"]
    wanted = {(scenario.name, variant.name) for scenario in suite.scenarios for variant in suite.variants}
    assert {(cell["scenario"], cell["method"]) for cell in cells_of(finished).values()} == wanted


def test_a_cell_says_what_was_run_on_what(finished: Path) -> None:
    for cell in one_request(finished).values():
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
    by_method = one_request(finished)
    for cell in by_method.values():
        timing = cell["timing"]
        assert timing["unlearn_seconds"] >= sum(timing["unlearn_seconds_by_phase"].values()) > 0
        assert timing["share_of_retraining"] > 0
        assert "measure_retrained" not in timing["unlearn_seconds_by_phase"]
        assert cell["memory"]["peak_process_bytes"] > 0
    assert by_method["iau"]["scale"] > 0 and by_method["iau"]["damping"] > 0
    assert by_method["iau"]["retain_weight"] is not None
    assert by_method["iau"]["verdict"] in ("ok", "check", "retrain")
    assert by_method["iau-released"]["scale"] is None


def test_the_table_has_every_method_and_the_noise_floor(finished: Path) -> None:
    table = (finished / "synthetic" / "table.md").read_text()
    for name in ("do nothing", "| iau |", "| iau-released |", "noise floor"):
        assert name in table
    assert (finished / "synthetic" / "gap_against_seconds.png").stat().st_size > 0


def test_finished_cells_and_models_are_not_made_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (".json", ".safetensors", ".npz")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.suffix in kinds}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(cells_module, "serve", refuse)
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
    cells = {path: path.stat().st_mtime_ns for path in (finished / "synthetic" / "cells").glob("*iau-released.json")}
    assert len(cells) == len(SUITES["synthetic"].scenarios)
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


def test_requests_in_a_row_are_the_scenario_s_rows_in_a_seeded_order() -> None:
    scenario = Scenario("several", share=0.1, requests=4)
    rows = scenario.forget_rows(np.arange(200) % 10, seed=1)
    parts = scenario.split(rows, seed=1)
    assert [len(part) for part in parts] == [5] * 4
    assert np.sort(np.concatenate(parts)).tolist() == rows.tolist()
    assert not np.array_equal(np.concatenate(parts), rows)
    np.testing.assert_equal(scenario.split(rows, seed=1), parts)


def test_every_row_of_a_table_has_as_many_columns_as_its_head(finished: Path) -> None:
    for block in (finished / "synthetic" / "table.md").read_text().split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_several_requests_are_served_in_a_row(finished: Path) -> None:
    cells = {c["method"]: c for c in cells_of(finished).values() if c["scenario"] == "4-requests"}
    for cell in cells.values():
        assert [request["rows"] for request in cell["requests"]] == [20] * 4
        assert [point["requests"] for point in cell["checkpoints"]] == [4]
        assert cell["checkpoints"][-1]["gap"] == cell["gap"]
        total = sum(request["relative_step_norm"] for request in cell["requests"])
        assert cell["relative_path"] == cell["checkpoints"][-1]["relative_path"] == pytest.approx(total)
        assert cell["timing"]["unlearn_seconds"] == pytest.approx(sum(r["seconds"] for r in cell["requests"]))
        later = [(now["after"], then["before"]) for now, then in itertools.pairwise(cell["requests"])]
        for after, before in later:  # each request starts where the one before ended
            assert after["held_out_loss"] == before["held_out_loss"]
    assert "drift" in (finished / "synthetic" / "table.md").read_text()


def test_a_tuned_method_says_what_was_tried_and_what_that_cost(finished: Path) -> None:
    cell = one_request(finished)["iau-released, tuned"]
    tuning = cell["tuning"]
    assert [trial["setting"] for trial in tuning["tried"]] == cell["settings_to_choose_among"]
    assert tuning["chosen"] == cell["config"]
    assert tuning["seconds"] > 0
    assert one_request(finished)["iau"]["tuning"] is None


def test_forget_rows_are_published_with_their_numbers_in_the_data_set(finished: Path) -> None:
    models = ModelStore(finished / "models", None)
    for scenario in SUITES["synthetic"].scenarios:
        document = json.loads(
            (finished / "synthetic" / "forget_ids" / f"synthetic--{scenario.name}-seed0.json").read_text()
        )
        case = models.case(SUITES["synthetic"].works[0], scenario, 0)
        pool, _ = _LOADERS["synthetic"](None)
        forgotten = case.splits.train.select(np.asarray(document["rows"]))
        assert torch.equal(forgotten.pixel_values, pool.select(np.asarray(document["ids"])).pixel_values)
        assert document["rows"] == case.forget_rows.tolist()
        if scenario.requests > 1:
            assert sorted(itertools.chain(*document["requests"])) == document["rows"]


def test_row_losses_lie_beside_each_cell_and_are_drawn(finished: Path) -> None:
    for name, cell in cells_of(finished).items():
        losses = read_arrays(finished / "synthetic" / "cells" / name.replace(".json", ".npz"))
        assert losses["forget"].shape == (cell["forget_rows"],)
        assert losses["test"].shape == (cell["counts"]["test_rows"],)
        assert losses["forget"].mean() == pytest.approx(cell["figures"]["after"]["forget_loss"], rel=1e-5)
    plots = {path.name for path in (finished / "synthetic" / "plots").glob("*.png")}
    assert {"roc--synthetic--random-5-percent.png", "losses--synthetic--random-5-percent--iau.png"} <= plots


def test_a_cell_holds_attacks_that_nothing_was_optimised_for(finished: Path) -> None:
    for cell in cells_of(finished).values():
        for side in ("before", "after", "retrained", "retrained_again"):
            figures = cell["figures"][side]
            assert 0.0 <= figures["attacks"]["entropy"]["auc"] <= 1.0
            assert 0.0 <= figures["svc_mia"] <= 1.0


def test_a_group_of_methods_can_be_named() -> None:
    assert groups_spelled_out("published;iau", list(SUITES["synthetic"].variants)).split(";") == [
        "iau-released",
        "iau-released, tuned",
        "iau",
    ]


def test_keys_of_trained_models_stay_what_they_were() -> None:
    """Training options that were added later are no part of the key where they are not used."""
    assert LENET.settings()["training"] == {
        "epochs": 12,
        "learning_rate": 1e-3,
        "batch_size": 64,
        "restriction": "none",
        "alpha": 0.0,
    }
    assert CIFAR10_RESNET18.settings()["training"]["augmented"] is True


def test_augmented_images_are_shifted_copies_and_change_each_time() -> None:
    images = torch.arange(1.0, 3 * 32 * 32 + 1).reshape(1, 3, 32, 32)
    rows = Split(np.zeros(1, dtype=np.int64), images).dataset(augmented=True)
    seen = [rows[0]["pixel_values"] for _ in range(8)]
    known = set(images.flatten().tolist()) | {0.0}
    assert all(image.shape == (3, 32, 32) and set(image.flatten().tolist()) <= known for image in seen)
    assert any(not torch.equal(seen[0], image) for image in seen[1:])


def test_the_cifar_resnet_has_eleven_million_weights_and_keeps_its_resolution() -> None:
    model = make_model("resnet18", 10)
    assert 11.1e6 < sum(p.numel() for p in model.parameters()) < 11.3e6
    with torch.no_grad():
        assert model.resnet.embedder(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
        assert model(pixel_values=torch.zeros(2, 3, 32, 32)).logits.shape == (2, 10)
