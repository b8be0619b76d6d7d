"""A program that serves a request and is killed on the way, again and again; run by `test_crashes`.

One interpreter forks a child for each crash, so that a kill -9 costs no new start. Children know of each other only
what is on disk.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tiny_models import plain, plain_rows
from unlearning_trainers import WITH_CURVATURE, make_trainer

from benchmarks.interruptions import POINTS, observed
from hf_iau import DeletionService, IAUCallback, IAUConfig, Ledger, UnlearningTrainer
from hf_iau.utils.atomic_files import file_digest

ROWS = list(range(1, 32, 2))
EARLIER = [0, 2, 4]
KILLED_AGAIN = ("weights staged", "journal ready", "journal removed")
GIVEN = IAUConfig(scale=0.1, damping=1.0)


def from_disk(folder: Path) -> UnlearningTrainer:
    model = plain()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return make_trainer(folder, "plain", model=model, rows=plain_rows(60))


def serve(trainer: UnlearningTrainer, rows: list[int] = ROWS) -> Any:
    return DeletionService(trainer).unlearn(forget_indices=rows, config=GIVEN)


def state(trainer: UnlearningTrainer, folder: Path) -> dict[str, Any]:
    """What a process finds: the model that it holds, the memory, and what is on disk."""
    DeletionService(trainer)  # finishes what was committed
    memory = trainer.memory
    memory.check_model(trainer.model)
    ledger = Ledger.of(folder)
    head = ledger.verify()
    private = folder / "_iau"
    return {
        "weights": memory.model["weights"],
        "forgotten": np.flatnonzero(memory.row_identity.forgotten).tolist(),
        "served": head.count,
        "ledger ends with": ledger.entries()[-1].weights_after,
        "on disk": file_digest(folder / "model.safetensors"),
        "memories": len(list(private.glob("memory-*"))),
        "left behind": sorted(p.name for p in private.iterdir() if p.name in ("staged", "journal.json")),
    }


def in_child(work: Callable[[], Any], result: Path | None = None) -> int:
    """The status of a forked process that does `work` and writes what it returned."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        found = work()
        if result is not None:
            result.write_text(json.dumps(found))
        status = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(status)


def killing_at(point: str) -> contextlib.AbstractContextManager[None]:
    def kill(passed: str) -> None:
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return observed(kill)


def prepare(folder: Path) -> None:
    trainer = make_trainer(folder, "plain", rows=plain_rows(60), callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    trainer.memory.visits = None  # the few steps do not reach all rows that are to go
    trainer.save_model()
    serve(trainer, EARLIER)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what the libraries made on import; a Trainer asks for a collection each time
    base = root / "base"
    prepare(base)
    results: dict[str, Any] = {"old": state(from_disk(base), base)}

    def crash(folder: Path, point: str) -> int:
        def work() -> None:
            with killing_at(point):
                serve(from_disk(folder))

        return in_child(work)

    def look(folder: Path, result: Path) -> Any:
        assert in_child(lambda: state(from_disk(folder), folder), result) == 0
        return json.loads(result.read_text())

    def again(folder: Path, result: Path) -> Any:
        def work() -> Any:
            trainer = from_disk(folder)
            applied = [serve(trainer).applied, serve(from_disk(folder)).applied]
            return {"applied": applied} | state(trainer, folder)

        assert in_child(work, result) == 0
        return json.loads(result.read_text())

    shutil.copytree(base, root / "uninterrupted")
    results["new"] = again(root / "uninterrupted", root / "result.json")
    for point in POINTS:
        folder, copy = root / "crashed", root / "copy"
        shutil.copytree(base, folder)
        signalled = crash(folder, point)
        shutil.copytree(folder, copy)
        results[point] = {
            "killed": os.WIFSIGNALED(signalled) and os.WTERMSIG(signalled) == signal.SIGKILL,
            "plain reader": file_digest(folder / "model.safetensors"),
            "next look": look(copy, root / "result.json"),
            # Killed again on the way to the end, wherever that is; then left in peace.
            "killed again": point in KILLED_AGAIN and crash(folder, "first file moved") != 0,
            "rerun": again(folder, root / "result.json"),
        }
        shutil.rmtree(folder)
        shutil.rmtree(copy)
    (root / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
