"""Several processes that serve a baseline's request come to the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from several_processes import run_in_processes


def test_two_processes_come_to_the_weights_of_one(tmp_path: Path) -> None:
    jobs = ("every_method:1", "every_method:2")
    found = run_in_processes(Path(__file__).with_name("baseline_processes.py"), tmp_path, *jobs)
    assert [process["error"] for job in jobs for process in found[job]] == [None] * 3, found
    (alone,), (first, second) = ([process["result"] for process in found[job]] for job in jobs)
    assert first == second
    for method, weights in alone.items():
        if method == "retrain":  # the Trainer takes larger batches with more processes
            assert first[method] != pytest.approx(weights, abs=1e-6)
        else:
            assert first[method] == pytest.approx(weights, rel=1e-4, abs=1e-6), method
