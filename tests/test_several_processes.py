"""The launcher of test processes: one function that hangs fails alone, and nothing is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from several_processes import TESTS, run_in_processes


def hangs_in_one(folder: Path) -> int:
    if os.environ["RANK"] == "1":
        time.sleep(600)
    return 1


def works(folder: Path) -> str:
    return folder.name


def test_a_function_that_hangs_fails_alone(tmp_path: Path) -> None:
    found = run_in_processes(Path(__file__), tmp_path, "hangs_in_one:2", "works:2", limit=5)
    ended, hung = found["hangs_in_one:2"]
    assert (ended["error"], ended["result"]) == (None, 1)
    assert hung["error"] == "TimeoutError"
    assert "in hangs_in_one" in hung["message"]
    assert [process["result"] for process in found["works:2"]] == ["works-2"] * 2


def test_processes_end_with_the_launcher(tmp_path: Path) -> None:
    command = [sys.executable, str(TESTS / "several_processes.py"), __file__, str(tmp_path), "hangs_in_one:2"]
    launcher = subprocess.Popen(command, env=os.environ | {"SECONDS_PER_JOB": "600"}, start_new_session=True)
    stacks = tmp_path / "hangs_in_one-2" / "process-1.stacks"
    end = time.monotonic() + 120
    while not stacks.exists() and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(1)
    group = os.getpgid(launcher.pid)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    end = time.monotonic() + 30
    while _alive(group) and time.monotonic() < end:
        time.sleep(0.2)
    assert not _alive(group)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
