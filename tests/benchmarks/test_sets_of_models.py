"""Sets of models, trained and unlearned: what is measured, known answers, and that finished work is not done again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from scipy.stats import norm
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import model_sets  # noqa: E402
from benchmarks.model_set_scores import DO_NOTHING, RETRAINED_AGAIN, RETRAINED_SET, SIDES, scores  # noqa: E402
from benchmarks.models import SmallCNN  # noqa: E402
from benchmarks.requests import gather_config  # noqa: E402
from benchmarks.scenarios import Scenario  # noqa: E402
from benchmarks.suites import SYNTHETIC, Training  # noqa: E402
from benchmarks.training import ModelStore  # noqa: E402
from benchmarks.variants import FINE_TUNE, RELEASED_TUNED  # noqa: E402
from hf_iau import IAUError, RequestError, UnlearningTrainer  # noqa: E402
from hf_iau.data import predict_rows  # noqa: E402
from hf_iau.data.trainer_rows import trainer_rows  # noqa: E402

MODELS = 4
# Few rows, many epochs and wrong labels: what is learned of the forget rows is known by heart.
MEMORISING = replace(
    SYNTHETIC, name="memorising", train_rows=100, training=Training(epochs=30, learning_rate=3e-3, batch_size=25)
)
FLIPPED = Scenario("flipped-20-rows", rows=20, flipped=True)

app = typer.Typer()
app.command()(model_sets.main)


def run(out: Path, *arguments: str) -> Any:
    threads = torch.get_num_threads()
    fixed = ("--out", str(out), "--models", str(MODELS), "--threads", str(threads))
    try:
        return CliRunner().invoke(app, [*arguments, *fixed], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)


METHODS = ("--methods", "iau;iau-released, tuned")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model_sets")
    result = run(out, "--work", "synthetic", *METHODS)
    assert result.exit_code == 0, result.output
    return out


def figures(out: Path, work: str = "synthetic") -> dict[str, Any]:
    return json.loads((out / f"model_sets_{work}_seed0" / "figures.json").read_text())


def cells(out: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: json.loads(path.read_text())
        for path in (out / "model_sets_synthetic_seed0" / "cells").glob("*.json")
    }


def test_three_sets_are_trained_on_one_forget_set_and_every_method_serves_each_original(finished: Path) -> None:
    document = figures(finished)
    sets = {entry["set"]: entry for entry in document["sets"]}
    assert list(sets) == [DO_NOTHING, "iau-released, tuned", "iau", RETRAINED_AGAIN, RETRAINED_SET]
    for name in (DO_NOTHING, "iau", "iau-released, tuned"):
        assert sets[name]["seeds"] == [0, 1, 2, 3]
    assert sets[RETRAINED_SET]["seeds"] == [1000, 1001, 1002, 1003]
    assert sets[RETRAINED_AGAIN]["seeds"] == [1004, 1005, 1006, 1007]
    assert len(list((finished / "models").glob("*.safetensors"))) == 3 * MODELS
    assert len({cell["forget_rows_digest"] for cell in cells(finished).values()}) == 1
    trained = {(c["set"], c["training"]["rows"]) for c in cells(finished).values()}
    assert trained == {(name, 380 if "retrained" in name else 400) for name in sets}
    assert document["hardware"]["threads"] >= 1 and document["peak_process_bytes"] > 0
    assert "benchmarks.model_sets" in document["command"]


def test_every_set_but_the_yardstick_has_both_tests_and_its_costs(finished: Path) -> None:
    for entry in figures(finished)["sets"]:
        if entry["set"] == RETRAINED_SET:
            assert entry["u_lira"] is None and entry["klom"] is None
            continue
        assert entry["u_lira"]["rows"] == 20 and entry["u_lira"]["unlearned_models"] == MODELS
        assert (
            0 <= entry["u_lira"]["accuracy_low"] <= entry["u_lira"]["accuracy"] <= entry["u_lira"]["accuracy_high"] <= 1
        )
        assert {side: entry["klom"][side]["gaussian"]["rows"] for side in SIDES} == {
            "forget": 20,
            "retained": 380,
            "test": 200,
        }
        assert (entry["unlearn_seconds"] or 0) > 0 or entry["training"]["cpu_seconds"] > 0


def test_unlearning_leaves_the_original_as_it_was_for_the_next_method(finished: Path) -> None:
    """What each method's file holds is what that method alone makes of the stored original."""
    store = ModelStore(finished / "models", None)
    case = store.case(*model_sets.WORKS["synthetic"], 0)
    original = store.original(case, 2)
    members = model_sets.Members(store, finished / "model_sets_synthetic_seed0", case, "")
    (_, before), (_, after) = (next(members.read(name, [2])) for name in (DO_NOTHING, "iau-released, tuned"))
    rows = trainer_rows(
        store.trainer(case.work, original.model, None, seed=0), case.train.dataset(), "training rows", 50
    )
    np.testing.assert_allclose(
        before["forget"], model_sets.row_margins(original.model, rows.select(case.forget_rows)), rtol=1e-6
    )
    trainer = store.trainer(
        case.work,
        original.model,
        case.train.dataset(),
        seed=2,
        held_out=case.splits.held_out.dataset(),
        for_request=True,
    )
    trainer.gather(gather_config(RELEASED_TUNED))
    config = members.tuned(RELEASED_TUNED)
    trainer.unlearn(forget_indices=case.forget_rows, method="iau-released", config=config)
    alone = model_sets.row_margins(original.model, rows.select(case.forget_rows))
    np.testing.assert_allclose(after["forget"], alone, rtol=1e-4, atol=1e-5)
    assert np.abs(before["forget"] - after["forget"]).max() > 1e-3


def test_a_setting_is_chosen_on_the_first_original_and_serves_all(finished: Path) -> None:
    tuned = [cell for cell in cells(finished).values() if cell["set"] == "iau-released, tuned"]
    assert [cell["seed"] for cell in tuned if cell["tuning"] is not None] == [0]
    assert len({json.dumps(cell["method_config"]) for cell in tuned}) == 1
    chosen = next(cell["tuning"]["chosen"] for cell in tuned if cell["tuning"] is not None)
    assert all(cell["method_config"] == chosen for cell in tuned)


def test_every_row_of_the_table_has_as_many_columns_as_its_head(finished: Path) -> None:
    table = (finished / "model_sets_synthetic_seed0" / "table.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5 + 2 + 4
    assert len({row.count("|") for row in rows[:7]}) == len({row.count("|") for row in rows[7:]}) == 1


def test_what_is_finished_is_not_trained_or_unlearned_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = figures(finished)["sets"]
    kept = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.suffix in (".npz", ".safetensors")}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("finished work was done again")

    for method in ("train", "unlearn", "gather"):
        monkeypatch.setattr(UnlearningTrainer, method, refuse)
    assert run(finished, "--work", "synthetic", *METHODS).exit_code == 0
    assert figures(finished)["sets"] == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_only_what_is_missing_is_done(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = figures(finished)["sets"]
    folder = finished / "model_sets_synthetic_seed0" / "cells"
    (path,) = folder.glob("*iau-released-tuned--seed3.json")
    path.unlink()
    served = []
    unlearn = UnlearningTrainer.unlearn

    def spy(self: UnlearningTrainer, *args: Any, **kwargs: Any) -> Any:
        served.append((kwargs["method"], self.args.seed, kwargs.get("dry_run", False)))
        return unlearn(self, *args, **kwargs)

    monkeypatch.setattr(UnlearningTrainer, "unlearn", spy)
    monkeypatch.setattr(UnlearningTrainer, "train", lambda self: pytest.fail("trained again"))
    assert run(finished, "--work", "synthetic", *METHODS).exit_code == 0
    assert served == [("iau-released", 3, False)]
    again = figures(finished)["sets"]
    assert [entry["u_lira"] for entry in again] == [entry["u_lira"] for entry in before]


def test_a_failed_request_is_named_and_its_model_left_out(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished / "model_sets_synthetic_seed0"
    (path,) = (folder / "cells").glob("*--iau--seed1.json")
    written = path.read_text()
    path.unlink()

    def fail(*_: Any, **__: Any) -> None:
        raise RequestError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(UnlearningTrainer, "unlearn", fail)
        result = run(finished, "--work", "synthetic", *METHODS)
    assert result.exit_code == 1
    entry = next(e for e in figures(finished)["sets"] if e["set"] == "iau")
    assert entry["seeds"] == [0, 2, 3] and entry["u_lira"] is None
    assert "iau (3 models)" in (folder / "table.md").read_text()
    path.write_text(written)
    assert run(finished, "--work", "synthetic", *METHODS).exit_code == 0


def test_a_setting_that_the_first_original_has_not_chosen_is_not_guessed(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models", None)
    members = model_sets.Members(store, tmp_path, store.case(*model_sets.WORKS["synthetic"], 0), "")
    with pytest.raises(IAUError, match="first original"):
        members.tuned(FINE_TUNE)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    for arguments in (("--work", "nothing"), ("--work", "synthetic", "--methods", "nothing")):
        assert run(tmp_path, *arguments).exit_code == 2
    assert not (tmp_path / "models").exists()


def test_models_that_know_wrong_labels_by_heart_are_told_apart_and_retrained_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model_sets.WORKS, "memorising", (MEMORISING, FLIPPED))
    result = run(tmp_path, "--work", "memorising", "--methods", "iau-released")
    assert result.exit_code == 0, result.output
    sets = {entry["set"]: entry for entry in figures(tmp_path, "memorising")["sets"]}
    remembered, floor = sets[DO_NOTHING], sets[RETRAINED_AGAIN]
    assert remembered["u_lira"]["accuracy"] > 0.95
    assert floor["u_lira"]["accuracy_low"] <= 0.5 <= floor["u_lira"]["accuracy_high"]
    assert remembered["klom"]["forget"]["gaussian"]["mean"] > 10 * floor["klom"]["forget"]["gaussian"]["mean"]
    assert floor["klom"]["forget"]["gaussian"]["p_value"] > 0.01
    assert remembered["mean_margins"]["forget"] > 0 > sets[RETRAINED_SET]["mean_margins"]["forget"]


def planted(shift: float, seed: int, models: int = 40, rows: int = 100) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    random = np.random.default_rng(seed)
    about = {"training": {"seconds": 1.0, "cpu_seconds": 1.0}}
    return [
        ({"seed": i, **about}, {side: random.normal(size=rows) + shift * (side == "forget") for side in SIDES})
        for i in range(models)
    ]


def test_scores_of_planted_margins_are_the_analytic_ones() -> None:
    retrained = planted(0.0, 1)
    found = {
        DO_NOTHING: planted(2.0, 2),
        RETRAINED_AGAIN: planted(0.0, 3),
        "itself": retrained,
        RETRAINED_SET: retrained,
    }
    sets = {entry["set"]: entry for entry in scores(found, 0)}
    shifted, again, itself = (sets[name] for name in (DO_NOTHING, RETRAINED_AGAIN, "itself"))
    assert shifted["u_lira"]["accuracy"] == pytest.approx(norm.cdf(1.0), abs=0.02)  # two unit normals, 2 apart
    assert shifted["klom"]["forget"]["gaussian"]["mean"] == pytest.approx(2.0, rel=0.15)
    assert shifted["klom"]["test"]["gaussian"]["p_value"] > 0.01
    assert again["u_lira"]["accuracy"] == pytest.approx(0.5, abs=0.02)
    assert again["klom"]["forget"]["gaussian"]["mean"] == pytest.approx(
        again["klom"]["forget"]["gaussian"]["chance_mean"], rel=0.3
    )
    assert [(f["unlearned_models"], f["retrained_models"]) for f in shifted["by_models"]] == [
        (10, 10),
        (20, 20),
        (40, 40),
        (40, 80),
    ]
    assert [f["unlearned_models"] for f in again["by_models"]] == [10, 20, 40]
    assert shifted["by_models"][2]["u_lira"] == shifted["u_lira"]
    assert shifted["by_models"][3]["u_lira"]["accuracy"] == pytest.approx(norm.cdf(1.0), abs=0.02)
    for side in SIDES:
        for found_of in itself["klom"][side].values():
            assert found_of["mean"] == pytest.approx(0.0, abs=1e-9)


def test_a_model_that_diverged_is_left_out_and_named() -> None:
    models = planted(0.0, 4, models=6)
    models[2][1]["test"][5] = np.inf
    entry = scores({RETRAINED_AGAIN: models, RETRAINED_SET: planted(0.0, 5, models=6)}, 0)[0]
    assert entry["diverged_seeds"] == [2] and entry["u_lira"]["unlearned_models"] == 5


def test_margins_are_the_logit_of_the_label_s_probability(tmp_path: Path) -> None:
    store = ModelStore(tmp_path, None)
    case = store.case(*model_sets.WORKS["synthetic"], 0)
    torch.manual_seed(0)
    model = SmallCNN(4)
    rows = trainer_rows(store.trainer(case.work, model, None, seed=0), case.splits.test.dataset(), "test rows", 50)
    loss = predict_rows(model, rows).loss
    np.testing.assert_allclose(model_sets.row_margins(model, rows), -np.log(np.expm1(loss)), rtol=1e-4, atol=1e-5)
