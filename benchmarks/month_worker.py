"""One process of the scripted month: takes up the requests where the directory stands, and may be killed on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainingArguments, set_seed

from benchmarks.data import TensorRows
from benchmarks.interruptions import observed
from benchmarks.models import MLP
from hf_iau import DeletionService, GatherConfig, IAUCallback, UnlearningTrainer
from hf_iau.distributed import is_main_process

TRAIN_ROWS = 3000
_HELD_OUT_ROWS = 600
_CLASSES = 4
_COLUMNS = 30


def rows(n: int, seed: int) -> TensorRows:
    """Noise around one pattern a class: hard enough for the network to know its training rows better than others."""
    patterns = np.random.default_rng(0).normal(size=(_CLASSES, _COLUMNS))
    random = np.random.default_rng(seed)
    labels = random.integers(0, _CLASSES, n)
    columns = 0.3 * patterns[labels] + random.normal(size=(n, _COLUMNS))
    return TensorRows(torch.from_numpy(columns), torch.from_numpy(labels.astype(np.int64)))


def make_trainer(folder: Path, weights: Path | None = None) -> UnlearningTrainer:
    """A trainer of the month's model, new or with the weights on disk; its memory is found by itself."""
    set_seed(0)
    # In float64: with another number of processes sums are added up in another order, which in float32 shows in the
    # sixth digit of the losses that calibration looks at, and so in the fifth digit of the weights.
    model = MLP(_CLASSES).double()
    if weights is not None:
        model.load_state_dict(load_file(weights))
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=8,
        learning_rate=1e-3,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=500,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=0,
    )
    config = GatherConfig(gradient_sum="full", progress=False)
    return UnlearningTrainer(
        model=model,
        args=arguments,
        train_dataset=rows(TRAIN_ROWS, 1),
        eval_dataset=rows(_HELD_OUT_ROWS, 2),
        callbacks=[] if weights is not None else [IAUCallback(config)],
    )


def prepare(folder: str) -> None:
    """Train, gather, save."""
    trainer = make_trainer(Path(folder))
    trainer.train()
    trainer.save_model()


def run_requests(plan: dict[str, Any]) -> None:
    """Hand in the requests from the first to the plan's last, as a service that was just restarted would."""
    folder, log = Path(plan["folder"]), Path(plan["log"])
    main = is_main_process()
    service = DeletionService(make_trainer(folder, folder / "model.safetensors"))
    crash = plan.get("crash")
    for number, chosen in enumerate(plan["requests"][: plan["until"]]):
        if crash is not None and crash["request"] == number and main:
            _arrange(crash)
        started = time.perf_counter()
        result = service.unlearn(forget_indices=chosen)
        if not main:
            continue
        assert result.entry is not None
        line = {
            "request": number,
            "applied": result.applied,
            "entry": result.entry.number,
            "head": result.entry.mac,
            "seconds": time.perf_counter() - started,
            "verdict": result.report.verdict,
        }
        with open(log, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _arrange(crash: dict[str, Any]) -> None:
    """Die by kill -9 when a point of writing is passed, or so many seconds from now."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if "point" in crash:
        # Never left: the process dies in it.
        observed(lambda passed: die() if passed == crash["point"] else None).__enter__()
    else:
        timer = threading.Timer(crash["seconds"], die)
        timer.daemon = True
        timer.start()


def weights(folder: Path) -> dict[str, Tensor]:
    """The weights on disk."""
    found: dict[str, Tensor] = load_file(folder / "model.safetensors")
    return found
