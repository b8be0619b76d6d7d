"""kill -9 at every step of writing a request: the old state or the new one, and the request run once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.interruptions import COMMITTED, POINTS


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("crashes")
    tests = Path(__file__).parents[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_IAU_KEY": "k0123456789" * 4,
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("crashes.py")), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_the_uninterrupted_run(results: dict[str, Any]) -> None:
    old, new = results["old"], results["new"]
    assert new["applied"] == [True, False] and (old["served"], new["served"]) == (1, 2)
    assert old["forgotten"] == [0, 2, 4] and len(new["forgotten"]) == 19
    assert old["on disk"] != new["on disk"] and old["weights"] != new["weights"]


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_the_old_state_or_the_new_one(point: str, results: dict[str, Any]) -> None:
    crashed, old, new = results[point], results["old"], results["new"]
    expected = {key: value for key, value in (new if point in COMMITTED else old).items() if key != "applied"}
    assert crashed["killed"]
    assert crashed["plain reader"] in (old["on disk"], new["on disk"])
    look = crashed["next look"]
    assert look == expected
    assert look["ledger ends with"] == look["weights"]


@pytest.mark.parametrize("point", POINTS)
def test_the_same_request_run_again_is_run_once(point: str, results: dict[str, Any]) -> None:
    crashed, new = results[point], results["new"]
    again = crashed["killed again"]
    # The process that is killed a second time has committed by then, and so has none that finds nothing to do.
    assert again == (point in ("weights staged", "journal ready"))
    assert crashed["rerun"].pop("applied") == [point not in COMMITTED and not again, False]
    assert crashed["rerun"] == {key: value for key, value in new.items() if key != "applied"}
