"""Several processes serve a request together: one writes, all know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from several_processes import run_in_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_IAU_KEY", "k0123456789" * 4)
        return run_in_processes(
            Path(__file__).with_name("process_scenarios.py"), tmp_path_factory.mktemp("processes"), "saved:1", "saved:2"
        )


def test_all_processes_know_what_one_of_them_wrote(found: dict[str, list[dict[str, Any]]]) -> None:
    for processes in found.values():
        assert [process["error"] for process in processes] == [None] * len(processes), processes
        results = [process["result"] for process in processes]
        assert all(result == results[0] for result in results)
        (result, *_) = results
        assert result["applied"] == [True, False, True, True] and result["entries"] == [1, 1, 2]
        assert result["told"] and result["unmoved"]
        assert result["forgotten"] == sorted([*range(1, 36, 2), 40, 41]) and result["ledger"] == 2
