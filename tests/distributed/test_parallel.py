"""Several processes: the same numbers in each, errors in all of them, and no harm done by one that is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from several_processes import results, run_jobs

JOBS = {
    "few_rows": 3,
    "calibrated": 2,
    "many_steps_by_token": 3,
    "non_finite_row": 2,
    "unreadable_row": 2,
    "apart": 2,
    "other_weights": 2,
    "other_request": 2,
    "uneven_updates": 2,
    "killed_in_gathering": 2,
    "killed_in_unlearning": 2,
    "hung_in_unlearning": 2,
    "saved_request": 2,
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Scenario (with ":1" the one in a single process) → what each process has to say."""
    program = Path(__file__).with_name("scenarios.py")
    return run_jobs(program, tmp_path_factory.mktemp("scenarios"), JOBS, "calibrated")


def test_few_rows_and_processes_without_any(jobs: dict[str, Any]) -> None:
    for found in results(jobs["few_rows"]):
        for n, alone in found["alone"].items():
            sync_errors = found["sync_errors"][n]
            for name in ("counts", "batch_rows", "labels"):
                assert sync_errors[name] == alone[name], (n, name)
            for name in ("norm", "loss", "solved"):
                assert sync_errors[name] == pytest.approx(alone[name], rel=1e-9), (n, name)
            for name in ("losses", "again"):
                assert sync_errors[name] == pytest.approx(alone["losses"], rel=1e-9), (n, name)
            assert sync_errors["probabilities"] == [pytest.approx(row, rel=1e-9) for row in alone["probabilities"]]
            assert sync_errors["counts"] == [int(n)] * 5


def test_every_process_has_the_same_bits(jobs: dict[str, Any]) -> None:
    first, *others = (found["sync_errors"] for found in results(jobs["few_rows"]))
    assert all(other == first for other in others)


def test_calibration_is_that_of_one_process(jobs: dict[str, Any]) -> None:
    (alone,) = results(jobs["calibrated:1"])
    first, second = results(jobs["calibrated"])
    assert first == second
    assert first["calibration"].pop("source") == alone["calibration"].pop("source") == "proxies"
    assert first["calibration"] == pytest.approx(alone["calibration"], rel=1e-4)
    assert first["renewed"]["numbers"] == pytest.approx(alone["renewed"]["numbers"], rel=1e-3)
    assert first["renewed"]["path"] == pytest.approx(alone["renewed"]["path"], rel=1e-4)
    assert first["after"] == pytest.approx(alone["after"], rel=1e-4)
    assert first["weights"] == pytest.approx(alone["weights"], rel=1e-6)


def test_a_walk_by_tokens_is_that_of_one_process(jobs: dict[str, Any]) -> None:
    first, *others = results(jobs["many_steps_by_token"])
    assert all(other == first for other in others)
    for count, found in first.items():
        sync_errors, alone = found["targets"]
        assert sync_errors == alone and sync_errors[0] == int(count)
        assert found["targets apart"] < 1e-9
        assert found["steps"][0] == found["steps"][1] > 2
        assert found["remaining"][0] == pytest.approx(found["remaining"][1], rel=1e-9)
        assert found["remaining"][0] < 0.95
        assert found["moved"] > 0
        assert found["apart"] < 1e-9


def test_a_bad_row_of_one_process_is_named_by_all(jobs: dict[str, Any]) -> None:
    for found in results(jobs["non_finite_row"]):
        for name in ("sum", "curvature"):
            kind, message = found[name]
            assert kind == "NonFiniteGradientError"
            assert "ow 7" in message


def test_an_error_of_one_process_is_raised_in_all(jobs: dict[str, Any]) -> None:
    first, second = jobs["unreadable_row"]
    assert (first["error"], second["error"]) == ("ParallelError", "OSError")
    assert first["message"] == "Process 1 failed with OSError: row 5 is on a broken disk"
    assert second["message"] == "row 5 is on a broken disk"


@pytest.mark.parametrize(("name", "words"), [("apart", "come apart"), ("other_weights", "Seed every process alike")])
def test_processes_that_do_not_do_the_same(name: str, words: str, jobs: dict[str, Any]) -> None:
    for process in jobs[name]:
        assert process["error"] == "ParallelError"
        assert words in process["message"]


def test_another_request_in_each_process_is_refused(jobs: dict[str, Any]) -> None:
    for found in results(jobs["other_request"]):
        assert "Pass all forget rows" in found["error"]
        assert found["unchanged"]


def test_updates_are_the_same_or_rolled_back(jobs: dict[str, Any]) -> None:
    first, second = results(jobs["uneven_updates"])
    for found in (first, second):
        assert found["rounding"]["error"] is None
        assert not found["rounding"]["unchanged"]
        assert "0.1 of its length away" in found["other"]["error"]
        assert found["other"]["unchanged"]
        assert "no space left" in found["fails"]["error"]
        assert found["fails"]["unchanged"]
    assert first["rounding"]["weights"] == second["rounding"]["weights"]
    assert second["fails"]["error"].startswith("OSError")


@pytest.mark.parametrize("name", ["killed_in_gathering", "killed_in_unlearning", "hung_in_unlearning"])
def test_a_lost_process_leaves_the_others_unharmed(name: str, jobs: dict[str, Any]) -> None:
    left, lost = jobs[name]
    assert lost["exit_code"] == (0 if name.startswith("hung") else -9)
    (found,) = results([left])
    assert "Process 0 of 2 lost the others at 'the gradient sum" in found["error"]
    assert found["seconds"] < 30
    # The memory that was saved before is there, whole, and nothing else is.
    assert found["rows"] == 12
    assert [file.split("-")[0].split(".")[0] for file in found["files"]] == ["memory", "memory"]
    assert found.get("unchanged", True)


def test_a_saved_request_is_written_once(jobs: dict[str, Any]) -> None:
    for found in results(jobs["saved_request"]):
        assert found["applied"] == [True, False]
        assert (found["entry"], found["entries"]) == (1, 1)
        assert found["moved"]
        assert found["on_disk"]
        assert found["memory"]
