"""`python -m benchmarks.month --requests 30 --crashes 5 --seed 0`: a month of deletion requests, with crashes.

One small model runs the requests twice: in one go, and with kill -9 at random points (half of them at a named step of
writing, half after a random time) and two restarts on another number of processes. Every process that starts hands in
all requests from the first on, as somebody would who does not know how far the last one got. Exit code 0 only if the
ledger verifies and still has every head that was given out, no request was lost or run twice, and the weights are those
of the uninterrupted run to 1e-5 of their norm.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks import month_worker
from benchmarks.hardware import hardware
from benchmarks.interruptions import POINTS
from benchmarks.month_worker import TRAIN_ROWS, weights
from hf_iau import GradientMemory, Ledger

_TOLERANCE = 1e-5
_OTHER_WORLD_SIZE = 2
_LONGEST = 900.0
_LATE = 99


def main(
    requests: Annotated[int, typer.Option(help="Deletion requests.")] = 30,
    crashes: Annotated[int, typer.Option(help="Processes that die by kill -9.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the rows that are forgotten, and of when processes die.")] = 0,
    rows: Annotated[int, typer.Option(help="Rows of each request.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Folder for month.json; its models are kept there too.")] = None,
) -> None:
    """Serve a month of requests with crashes, and check that nothing of it shows."""
    if requests < 4 or not 0 <= crashes < requests or rows * requests >= TRAIN_ROWS:
        raise typer.BadParameter(
            f"requests={requests}, crashes={crashes}, rows={rows}: give at least 4 requests, fewer crashes than "
            f"requests, and fewer than {TRAIN_ROWS} rows in all."
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if out is None else out
        folder.mkdir(parents=True, exist_ok=True)
        document = _month(folder, requests, crashes, seed, rows)
        if out is not None:
            (out / "month.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for name, held in document["checks"].items():
        print(f"{'yes' if held else 'NO ':3}  {name}")
    figures = document["figures"]
    print(
        f"{requests} requests of {rows} rows, {figures['kills']} kills, {figures['starts']} starts, "
        f"{figures['seconds']:.0f} s; relative difference of the weights {figures['relative_difference']:.2g}, "
        f"median request {figures['median_request_seconds']:.2f} s"
    )
    raise typer.Exit(0 if all(document["checks"].values()) else 1)


def _month(folder: Path, requests: int, crashes: int, seed: int, rows: int) -> dict[str, Any]:
    started = time.perf_counter()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported; a Trainer asks for a collection each time
    random = np.random.default_rng(seed)
    order = random.permutation(TRAIN_ROWS)[: rows * requests].reshape(requests, rows)
    plan: dict[str, Any] = {"requests": [sorted(chosen) for chosen in order.tolist()], "until": requests}
    os.environ["HF_IAU_KEY"] = secrets.token_hex(32)
    whole, broken = folder / "uninterrupted", folder / "interrupted"
    for old in (whole, broken):
        shutil.rmtree(old, ignore_errors=True)
        old.with_suffix(".jsonl").unlink(missing_ok=True)
    training = _start(month_worker.prepare, str(whole))
    training.join()
    if training.exitcode != 0:
        raise RuntimeError("Training failed: see above.")
    shutil.copytree(whole, broken)
    if _run(whole, plan) != 0:
        raise RuntimeError("The uninterrupted run failed: see above.")
    usual = float(np.median([line["seconds"] for line in _log(whole)]))

    # Where a process dies, and between which requests the number of processes changes: to two, and back.
    dying = sorted(random.choice(requests - 1, size=crashes, replace=False).tolist())
    changes = sorted(random.choice(np.arange(1, requests), size=2, replace=False).tolist())
    events: list[dict[str, Any]] = []
    for turn, number in enumerate(dying):
        if turn % 2:
            events.append({"request": number, "seconds": float(random.uniform(0, usual))})
        else:
            events.append({"request": number, "point": str(random.choice(POINTS))})
    kills, starts = 0, 0
    for until, processes in ((changes[0], 1), (changes[1], _OTHER_WORLD_SIZE), (requests, 1)):
        while True:
            crash = next((event for event in events if event["request"] < until), None)
            starts += 1
            code = _run(broken, plan | {"until": until, "crash": crash}, processes)
            if code == -signal.SIGKILL:
                kills += 1
                events.remove(crash or {})
                continue
            if code != 0:
                raise RuntimeError(f"A process ended with {code}, which nobody asked for: see above.")
            if crash is None:
                break
            # The time had not come when all was done: it comes in the next process.
            crash.pop("point", None)
            crash |= {"request": min(until, requests - 1), "seconds": crash.get("seconds", 0.0) / 2}
            if until < requests:
                break

    checks, difference = _check(whole, broken, plan["requests"], rows)
    checks[f"{crashes} processes died by kill -9"] = kills == crashes
    lines = _log(broken)
    return {
        "command": shlex.join(["python", "-m", "benchmarks.month", *sys.argv[1:]]),
        "hardware": hardware(),
        "checks": checks,
        "figures": {
            "seconds": time.perf_counter() - started,
            "kills": kills,
            "starts": starts,
            "died_at": dying,
            "processes_changed_before": changes,
            "relative_difference": difference,
            "median_request_seconds": usual,
            "verdicts": [line["verdict"] for line in _log(whole)],
            "answered_without_serving": sum(not line["applied"] for line in lines),
        },
    }


def _check(whole: Path, broken: Path, requests: list[list[int]], rows: int) -> tuple[dict[str, bool], float]:
    checks: dict[str, bool] = {}
    ledgers = {name: Ledger.of(folder) for name, folder in (("whole", whole), ("broken", broken))}
    for line in _log(broken):  # raises where a head is gone
        ledgers["broken"].verify(line["head"], line["entry"])
    checks["the ledger verifies, and has every head that was given out"] = True
    entries = {name: ledger.entries() for name, ledger in ledgers.items()}
    checks["no request was lost or run twice"] = (
        len(entries["broken"]) == len(requests)
        and [entry.request for entry in entries["broken"]] == [entry.request for entry in entries["whole"]]
        and len({row for entry in entries["broken"] for row in entry.row_ids}) == rows * len(requests)
    )
    ran = [line["request"] for line in _log(broken) if line["applied"]]
    checks["no process was told twice that it ran a request"] = len(ran) == len(set(ran))
    chain = [entry.weights_before for entry in entries["broken"][1:]]
    checks["each request began with the weights that the last one left"] = chain == [
        entry.weights_after for entry in entries["broken"][:-1]
    ]
    memory = GradientMemory.load(broken)
    forgotten = np.flatnonzero(memory.row_identity.forgotten).tolist() if memory.row_identity is not None else []
    checks["the memory is of these weights, and knows what is forgotten"] = memory.model["weights"] == entries[
        "broken"
    ][-1].weights_after and forgotten == sorted(row for chosen in requests for row in chosen)
    left = [path.name for path in (broken / "_iau").iterdir() if path.name in ("staged", "journal.json")]
    checks["nothing half-written is left"] = not left and len(list((broken / "_iau").glob("memory-*"))) == 1
    one, other = weights(whole), weights(broken)
    squared = sum(float((other[name].double() - one[name].double()).square().sum()) for name in one)
    norm = sum(float(one[name].double().square().sum()) for name in one)
    difference = (squared / norm) ** 0.5
    checks[f"the weights are those of the uninterrupted run to {_TOLERANCE:g}"] = difference <= _TOLERANCE
    return checks, difference


def _run(output: Path, plan: dict[str, Any], processes: int = 1) -> int:
    """Serve a plan into `output` in so many processes; the first one's exit code, negative for a signal."""
    plan = plan | {"folder": str(output), "log": str(output.with_suffix(".jsonl"))}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for number in range(processes):
        environment: dict[str, str] = {}
        if processes > 1:
            environment = {
                "RANK": str(number),
                "LOCAL_RANK": str(number),
                "WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "ACCELERATE_USE_CPU": "true",
            }
        running.append(_start(month_worker.run_requests, plan, environment))
    try:
        running[0].join(_LONGEST)
        code = running[0].exitcode
        if code == 0:
            for process in running[1:]:
                process.join(_LONGEST)
                code = code or process.exitcode
    finally:
        for process in running:  # who waits for a dead process would wait long
            process.kill()
            process.join()
    return _LATE if code is None else code


def _start(work: Callable[[Any], None], argument: Any, environment: dict[str, str] | None = None) -> Any:
    """A process of its own for `work`; forked, so that it need not import everything again."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(work, argument, environment or {}))
    process.start()
    return process


def _child(work: Callable[[Any], None], argument: Any, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    logging.getLogger("hf_iau.unlearn").setLevel(logging.ERROR)
    try:
        work(argument)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # process groups are not to be waited for


def _log(output: Path) -> list[dict[str, Any]]:
    path = output.with_suffix(".jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    typer.run(main)
