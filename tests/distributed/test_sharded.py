"""Models sharded by `fully_shard`: the numbers of one process, though no process holds the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from several_processes import results, run_jobs

# Earlier ones are refused with UnsupportedModelError, which says so.
if Version(Version(torch.__version__).base_version) < Version("2.13"):
    pytest.skip("FSDP2 is served from PyTorch 2.13 on", allow_module_level=True)

JOBS = {
    "sharded": 2,
    "forget_alone": 1,
    "sharded_kinds": 2,
    "few_rows_of_shards": 3,
    "all_kinds_of_layers": 2,
    "memory_of_shards": 2,
    "calibrated_on_shards": 2,
    "many_steps_on_shards": 2,
    "all_or_nothing_on_shards": 2,
    "trained_by_trainer": 2,
    "checked": 2,
    "troubles": 2,
    "sharded_refusals": 2,
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Scenario (with ":1" the one in a single process) → what each process has to say."""
    program = Path(__file__).with_name("sharded_scenarios.py")
    return run_jobs(program, tmp_path_factory.mktemp("scenarios"), JOBS, "calibrated_on_shards")


def test_sharded_parameters_give_the_same_memory_and_weights(jobs: dict[str, Any]) -> None:
    for found in results(jobs["sharded"]):
        assert found["training"] < 1e-12
        for name in ("sums", "solved", "weights"):
            assert found[name] < 1e-10, name
        assert found["still_sharded"]
        assert found["saved"]
        assert found["memory"] == [3, 3]
        assert found["architectures"] == [found["class"]]
        assert found["reverted"]
        assert found["moved_after"]
        assert found["class"] == "BertForSequenceClassification"


def test_kinds_of_sharding(jobs: dict[str, Any]) -> None:
    for found in results(jobs["sharded_kinds"]):
        assert found.keys() == {"plain", "kept whole", "as Accelerate does", "bf16", "replicas"}
        for kind in found.values():
            assert kind["sums"] < 1e-10
            assert kind["solved"] < 1e-10
            assert abs(kind["norm"]) < 1e-12
            assert kind["batch_rows"] == 7
            assert kind["kinds"] == ["diagonal", "kronecker"]
            assert kind["trains_as_before"]


def test_few_rows_and_rows_without_targets(jobs: dict[str, Any]) -> None:
    for found in results(jobs["few_rows_of_shards"]):
        assert found["alone"].keys() == {"1", "2", "5"}
        assert found["alone"]["5"]["counts"][2] == 2
        for n, alone in found["alone"].items():
            assert max(found["distances"][n]) < 1e-10
            sync_errors = found["sync_errors"][n]
            for name in ("counts", "more_counts", "batch_rows"):
                assert sync_errors[name] == alone[name], (n, name)
            assert sync_errors["loss"] == pytest.approx(alone["loss"], rel=1e-12)
            assert sync_errors["losses"] == pytest.approx(alone["losses"], rel=1e-12)


def test_all_kinds_of_layers_have_their_owner(jobs: dict[str, Any]) -> None:
    for found in results(jobs["all_kinds_of_layers"]):
        assert max(found["distances"]) < 1e-5
        assert found["names"]
        assert found["layers"]
        assert set(found["held"].values()) == {0, 1}
        assert {"scale", "convolution", "bypassed.weight"} < found["held"].keys()
        assert found["left_alone"]
        assert found["bytes"][0] == found["bytes"][1]


def test_no_process_holds_all_parameters_at_once(jobs: dict[str, Any]) -> None:
    for found in results(jobs["memory_of_shards"]):
        assert 0 < found["spread"]["gathered"] < 0.35 * found["parameters"]
        assert found["spread"]["looks"] > 300


def test_a_process_holds_its_share_of_the_memory(jobs: dict[str, Any]) -> None:
    for found in results(jobs["memory_of_shards"]):
        spread, at_once = found["spread"]["held"], found["at_once"]["held"]
        assert found["bytes"][0] == found["bytes"][1]
        assert found["held"] < 0.6 * found["bytes"][0]
        assert spread < 0.7 * at_once
        assert found["fingerprints"]


def test_files_are_those_of_a_whole_memory(jobs: dict[str, Any]) -> None:
    files = results(jobs["memory_of_shards"])[0]["files"]
    assert files["spread"] == files["whole"]  # named by their digest


def test_calibration_on_shards_is_that_of_one_process(jobs: dict[str, Any]) -> None:
    (alone,) = results(jobs["calibrated_on_shards:1"])
    first, second = results(jobs["calibrated_on_shards"])
    assert first == second
    assert first["before"] == alone["before"]
    assert first["calibration"].pop("source") == alone["calibration"].pop("source") == "proxies"
    for name in ("calibration", "after", "weights", "sum"):
        assert first[name] == pytest.approx(alone[name], rel=1e-10), name
    assert first["memory"] == [True, *alone["memory"][1:]]
    assert first["memory"][1] == "first-order"
    assert first["remembered"] == alone["remembered"]
    assert first["renewed"].pop("spread") and not alone["renewed"].pop("spread")
    assert first["renewed"]["numbers"] == pytest.approx(alone["renewed"]["numbers"], rel=1e-8)
    assert first["renewed"]["path"] == pytest.approx(alone["renewed"]["path"], rel=1e-10)
    assert first["reverted"]
    assert alone["reverted"]


def test_a_walk_on_shards_is_that_of_one_process(jobs: dict[str, Any]) -> None:
    for found in results(jobs["many_steps_on_shards"]):
        assert found["steps"][0] == found["steps"][1] > 3
        assert found["remaining"][0] == pytest.approx(found["remaining"][1], rel=1e-10)
        assert found["distance"] < 1e-10
        assert found["unchanged"]


def test_requests_on_shards_are_all_or_nothing(jobs: dict[str, Any]) -> None:
    for found in results(jobs["all_or_nothing_on_shards"]):
        unchanged = {name: found[name][1] for name in ("fails", "not finite", "nothing", "dry")}
        assert all(unchanged.values()), unchanged
        assert "no space left" in found["fails"][0]
        assert "non-finite, so it was not applied" in found["not finite"][0]
        assert found["nothing"][0] is found["dry"][0] is None
        assert found["moved"]
        assert found["reverted"]
        assert found["other method"]


def test_a_request_on_shards_holds_shards(jobs: dict[str, Any]) -> None:
    for found in results(jobs["all_or_nothing_on_shards"]):
        gathered, parameters = found["gathered"]
        assert 0 < gathered < 0.35 * parameters
        assert found["spread"]
        assert found["sums"]


def test_the_trainer_trains_shards(jobs: dict[str, Any]) -> None:
    for found in results(jobs["trained_by_trainer"]):
        assert "neither DeepSpeed nor FSDP1" in found["version 1"]
        assert found["sharded"] == [True, True, True]
        assert found["decay"] == [0.1]
        assert found["all decayed"]
        assert found["sums"] < 1e-10
        assert found["weights"] < 1e-10
        assert found["saved"]
        assert found["trained"]
        assert found["again"]


def test_the_checker_on_shards(jobs: dict[str, Any]) -> None:
    for found in results(jobs["checked"]):
        alone, sync_errors = found["alone"], found["sync_errors"]
        assert sync_errors["good"] == alone["good"] == [True, 1e-5, 6]
        assert sync_errors["bad"][0] == alone["bad"][0] == ["output.bias"]
        assert found["estimate"][0] == found["estimate"][1] > 0
        assert found["sharded"]
        assert sync_errors["bad"][1]["2"] == pytest.approx(alone["bad"][1]["2"], rel=1e-4)


def test_errors_during_passes(jobs: dict[str, Any]) -> None:
    for number, found in enumerate(results(jobs["troubles"])):
        assert found["curvature"].startswith("NonFiniteGradientError")
        assert "row 4" in found["curvature"]
        for name in ("sum", "curvature", "prediction"):
            words = (
                "OSError: a broken disk" if number else "ParallelError: Process 1 failed with OSError: a broken disk"
            )
            assert found[f"unreadable {name}"] == words
        assert "FileExistsError" in found["save"]
        assert found["loss"] == "OSError: in the middle of a pass"
        assert found["gradients"] == [True] * 4
        assert "set_requires_gradient_sync(False)" in found["not reduced"]


def test_memories_go_from_one_process_to_two_and_back(jobs: dict[str, Any]) -> None:
    assert [found["from_alone"] < 1e-10 for found in results(jobs["sharded"])] == [True, True]
    (found,) = results(jobs["forget_alone"])
    assert found["weights"] < 1e-10


def test_what_is_not_fsdp2_alone_is_refused(jobs: dict[str, Any]) -> None:
    for found in results(jobs["sharded_refusals"]):
        assert "tensor parallelism is not supported" in found["tensor parallel"]
        assert found["older PyTorch"].startswith("UnsupportedModelError: fully_shard of PyTorch")
        assert "has no 'reset_iter_state'" in found["older PyTorch"] and "or use DDP" in found["older PyTorch"]
        assert "Use curvature='ekfac' or 'diagonal'" in found["adam"]
        assert found["bad row"].startswith("NonFiniteGradientError: Row 5 of the some rows")
        assert "sharded by fully_shard" in found["train"]
