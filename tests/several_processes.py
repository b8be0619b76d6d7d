"""Starts the same function in several CPU processes, joined by gloo.

    python tests/several_processes.py <program.py> <folder> <function>:<processes> ...

imports the program once and forks from there, so that no process has to import PyTorch again. Each process calls
`function(folder / "<function>-<processes>")` and leaves what it returned or raised in `process-<number>.json` there.

A function that does not end fails alone: after a time limit its processes write where they are and are killed.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
LIMIT = 120.0  # seconds that a function may take: several times what the longest takes on two busy cores


def run_in_processes(program: Path, folder: Path, *jobs: str, limit: float = LIMIT) -> dict[str, list[dict[str, Any]]]:
    """Run `jobs` ("function:processes") one after the other, each for at most `limit` seconds.

    Returns:
        Job → for each process its `exit_code` and, where it came to its end, `result` (JSON), `error` (class name),
        `message` and `seconds`. A process that did not come to its end has an `error` "TimeoutError" and where it was
        as its `message`.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SECONDS_PER_JOB": str(limit)}
    command = [sys.executable, str(Path(__file__)), str(program), str(folder), *jobs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found: dict[str, list[dict[str, Any]]] = json.loads((folder / "jobs.json").read_text())
    return found


def run_jobs(program: Path, folder: Path, jobs: dict[str, int], *alone: str) -> dict[str, list[dict[str, Any]]]:
    """Run functions of `program` in several processes.

    Args:
        program: file with the functions.
        folder: for their files.
        jobs: function → processes.
        alone: functions to be run in a single process as well.

    Returns:
        Function (with ":1" the one in a single process) → for each process what `run_in_processes` tells.
    """
    single = [f"{name}:1" for name in alone]
    found = run_in_processes(program, folder, *single, *(f"{name}:{count}" for name, count in jobs.items()))
    return {name if name in single else name.split(":")[0]: processes for name, processes in found.items()}


def results(processes: list[dict[str, Any]]) -> list[Any]:
    """What each process returned, none having failed."""
    assert [process["error"] for process in processes] == [None] * len(processes), processes
    return [process["result"] for process in processes]


def _process(function: Callable[[Path], Any], folder: Path, environment: dict[str, str], out: Path) -> None:
    os.environ.update(environment)
    stacks = out.with_suffix(".stacks").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    started = time.perf_counter()
    result: dict[str, Any] = {"error": None, "message": None}
    try:
        result["result"] = function(folder)
    except Exception as error:
        result = {"error": type(error).__name__, "message": str(error)}
        traceback.print_exc()
    out.write_text(json.dumps(result | {"seconds": time.perf_counter() - started}))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # process groups are not to be waited for


def _store(port: Connection) -> None:
    """Serve the store in which processes find each other."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    _end_with(os.getppid())


def _serve_store(context: ForkContext) -> tuple[BaseProcess, int]:
    """A process that serves a store, and its port.

    As torchrun does it. Were the first of the processes to open a port chosen before, another program, or a process
    that tries to reach it, could have taken that port by then, and the processes would wait for each other.
    """
    receives, sends = context.Pipe(duplex=False)
    process = context.Process(target=_store, args=(sends,), daemon=True)
    process.start()
    sends.close()  # so that its end is noticed
    return process, receives.recv()


def _end_with(parent: int) -> None:
    """End this process when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _stop(processes: list[BaseProcess]) -> None:
    """Have `processes` write where they are, and kill them."""
    for process in processes:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
    if processes:
        time.sleep(1)  # to write
    for process in processes:
        process.kill()
        process.join()


def main(program: str, folder: str, *jobs: str) -> None:
    """Import `program`, then fork for each job."""
    import torch.distributed  # noqa: F401  # once, before the processes that serve stores are forked

    sys.path[:0] = [str(TESTS), str(Path(program).parent)]
    module = importlib.import_module(Path(program).stem)
    gc.collect()
    gc.freeze()  # Trainers collect garbage often: spare them all that was imported
    context = multiprocessing.get_context("fork")
    found: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        name, count = job.rsplit(":", 1)
        own = Path(folder) / job.replace(":", "-")
        own.mkdir(parents=True, exist_ok=True)
        store, port = _serve_store(context)
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": count,
            "ACCELERATE_USE_CPU": "true",
        }
        processes = []
        for number in range(int(count)):
            environment = shared | {"RANK": str(number), "LOCAL_RANK": str(number)}
            out = own / f"process-{number}.json"
            process = context.Process(target=_process, args=(getattr(module, name), own, environment, out))
            process.start()
            processes.append((process, out))
        end = time.monotonic() + float(os.environ["SECONDS_PER_JOB"])
        for process, _ in processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [process for process, _ in processes if process.is_alive()]
        _stop(late)
        store.kill()
        store.join()
        found[job] = []
        for process, out in processes:
            ended = json.loads(out.read_text()) if out.exists() else {}
            if process in late:
                ended = {"error": "TimeoutError", "message": out.with_suffix(".stacks").read_text()}
            found[job].append({"exit_code": process.exitcode, **ended})
    (Path(folder) / "jobs.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
