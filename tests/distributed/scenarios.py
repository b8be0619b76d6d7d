"""What several processes do together, and what they do when one of them fails. Each function is run in all of them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file
from tiny_models import as_dataset, build, pad_right, plain_rows, rows_of
from torch import Tensor, nn
from transformers import TrainerCallback
from unlearning_trainers import EXACT, FORGET, WITH_CURVATURE, make_trainer, renewed, state_of

from hf_iau import (
    DeletionService,
    GatherConfig,
    GradientMemory,
    IAUCallback,
    IAUConfig,
    Ledger,
    UnlearningTrainer,
    gather,
    register_method,
)
from hf_iau.curvature import fit_curvature
from hf_iau.data import ModelRowLoss, RowSource, predict_rows
from hf_iau.data.trainer_rows import model_of
from hf_iau.distributed import get_rank, is_main_process
from hf_iau.errors import IAUError, MissingMemoryError
from hf_iau.memory.fingerprints import weights_fingerprint
from hf_iau.memory.gradient_sum import sum_row_gradients
from hf_iau.memory.keys import find_key
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.iau.multi_step import MultiStep, MultiStepResult, MultiStepRows, MultiStepSettings
from hf_iau.methods.iau.targets import ForgetTargets
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.methods.weights import WeightSnapshot

TIMEOUT = 6  # seconds of the process group, where a process is to be missed
GIVEN = IAUConfig(scale=0.1, damping=1.0, retain_weight=0.01)


def source_of(family: str, rows: list[dict[str, Any]], batch_size: int = 2) -> RowSource:
    return RowSource(as_dataset(rows), pad_right(), batch_size=batch_size, name="some rows")


def join() -> None:
    """The processes as a plain program would join them."""
    PartialState(cpu=True)


def same_bits(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    now = state_of(model)
    return all(torch.equal(now[name], expected[name]) for name in expected)


# --- numbers ----------------------------------------------------------------------------------------------------------


def few_rows(folder: Path) -> dict[str, Any]:
    """Sums, factors and predictions of no more rows than processes, and of an odd number of rows."""
    model = build("bert", dtype=torch.float64, num_hidden_layers=1)
    found: dict[str, Any] = {}

    def numbers() -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        for n in (1, 2, 5):
            rows = source_of("bert", rows_of("bert", 5)[:n])
            total = sum_row_gradients(model, ModelRowLoss(), rows, track_batches=True)
            curvature = fit_curvature(model, rows)
            solved = curvature.solve(total.tensors, 0.1)
            predicted = predict_rows(model, rows, keep_probabilities=True)
            again = predict_rows(model, rows.keep_batches())
            numbers[str(n)] = {
                "counts": [total.n_rows, total.n_targets, curvature.n_rows, curvature.n_targets, len(predicted)],
                "batch_rows": sum(count for count, _ in total.batches),
                "norm": total.norm(),
                "loss": total.loss,
                "solved": float(sum(t.square().sum() for t in solved.values())),
                "losses": predicted.loss.tolist(),
                "again": again.loss.tolist(),
                "labels": predicted.label.tolist(),
                "probabilities": predicted.probabilities.tolist(),
            }
        return numbers

    found["alone"] = numbers()  # before the processes have joined
    join()
    found["sync_errors"] = numbers()
    return found


def calibrated(folder: Path) -> dict[str, Any]:
    """A request whose k, λ and c are found on held-out rows."""
    model = build("plain")
    trainer = make_trainer(
        folder / "trainer",
        "plain",
        model=model,
        rows=plain_rows(160),
        settings={"max_steps": 60, "learning_rate": 5e-2, "per_device_train_batch_size": 8, "optim": "sgd"},
        eval_dataset=as_dataset(plain_rows(120, seed=1)),
    )
    # The same weights with any number of processes: those of training on all rows in one process.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batch = pad_right()(plain_rows(160))
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    trainer.gather(GatherConfig(gradient_sum="full", progress=False))
    output = trainer.unlearn(forget_indices=list(range(0, 30)))
    calibration = output.report.diagnostics["calibration"]
    return {
        "calibration": {name: calibration[name] for name in ("scale", "damping", "retain_weight", "source")},
        "after": {name: value for name, value in output.report.after.items() if isinstance(value, float)},
        "weights": float(sum(p.double().square().sum() for p in model.parameters())),
        "print": output.memory.model["weights"] if output.memory else None,
        "renewed": renewed(trainer),
    }


# --- errors -----------------------------------------------------------------------------------------------------------


def many_steps_by_token(folder: Path) -> dict[str, Any]:
    """Many steps of a language model, alone and together: rows of several lengths, one without a target, and a
    request of fewer rows than processes."""
    rows = rows_of("gpt2", 30)
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    model = build("gpt2", dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(15):
        for _, inputs in source_of("gpt2", rows, batch_size=15):
            optimizer.zero_grad()
            model(**inputs)["loss"].backward()
            optimizer.step()
    names = [name for name, _ in model.named_parameters()]
    held_out = source_of("gpt2", rows_of("gpt2", 20, seed=1), batch_size=5)
    curvature = fit_curvature(model, source_of("gpt2", rows))

    def take(count: int) -> tuple[ForgetTargets, MultiStepResult]:
        forget, retained = source_of("gpt2", rows[:count], batch_size=3), source_of("gpt2", rows[10:], batch_size=4)
        targets = ForgetTargets.of(*(predict_rows(model, rows) for rows in (forget, retained, held_out)))
        steps = MultiStep(
            WeightSnapshot.of(model, names),
            curvature,
            MultiStepRows(forget, retained, held_out),
            targets,
            MultiStepSettings(most_steps=6),
        )
        return targets, steps.run()

    requests = (10, 2)
    alone = [take(count) for count in requests]
    join()
    found = {}
    for count, (targets, path), (own_targets, own_path) in zip(requests, map(take, requests), alone, strict=True):
        moved, apart = (
            float(sum((path.step[n] - there).square().sum() for n, there in other.items())) ** 0.5
            for other in (dict.fromkeys(names, torch.zeros(())), own_path.step)
        )
        found[str(count)] = {
            "targets": [targets.targets.shape, own_targets.targets.shape],
            "targets apart": float(np.nanmax(np.abs(targets.targets - own_targets.targets))),
            "steps": [len(path.curve), len(own_path.curve)],
            "remaining": [path.share_remaining, own_path.share_remaining],
            "apart": apart / moved,
            "moved": moved,
        }
    return found


def non_finite_row(folder: Path) -> dict[str, Any]:
    """A row of the last process has no finite loss."""
    join()
    model = build("plain")
    rows = plain_rows(9)
    rows[7]["features"] = rows[7]["features"] * float("nan")
    found = {}
    for name, call in {
        "sum": lambda: sum_row_gradients(model, ModelRowLoss(), source_of("plain", rows)),
        "curvature": lambda: fit_curvature(model, source_of("plain", rows)),
    }.items():
        try:
            call()
        except IAUError as error:
            found[name] = [type(error).__name__, str(error)]
    return found


class Unreadable:
    """Rows of which one cannot be read."""

    def __init__(self, bad: int) -> None:
        self.rows, self.bad = plain_rows(6), bad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        if position == self.bad:
            raise OSError(f"row {position} is on a broken disk")
        return self.rows[position]


def unreadable_row(folder: Path) -> None:
    """An error that is not the package's own, in process 1 alone."""
    join()
    predict_rows(build("plain"), RowSource(Unreadable(5), pad_right(), batch_size=2))


def apart(folder: Path) -> None:
    """One process predicts while the other sums."""
    join()
    model, rows = build("plain"), source_of("plain", plain_rows(4))
    if is_main_process():
        predict_rows(model, rows)
    else:
        sum_row_gradients(model, ModelRowLoss(), rows)


def other_weights(folder: Path) -> None:
    """Models that were not seeded alike."""
    join()
    gather(build("plain", seed=get_rank()), as_dataset(plain_rows(6)), config=EXACT)


def other_request(folder: Path) -> dict[str, Any]:
    """Each process asks for its own rows to be forgotten."""
    trainer = make_trainer(folder / "trainer", "plain")
    trainer.gather(WITH_CURVATURE)
    before = state_of(model_of(trainer))
    try:
        trainer.unlearn(forget_indices=[get_rank()], config=GIVEN)
    except IAUError as error:
        return {"error": str(error), "unchanged": same_bits(model_of(trainer), before)}
    return {}


@dataclass(frozen=True)
class UnevenConfig:
    noise: float = 0.0
    fails: bool = False


@register_method
class Uneven:
    """A method whose updates differ between processes, or that fails in one after the weights were changed."""

    name: ClassVar[str] = "uneven"
    config_class: ClassVar[type] = UnevenConfig
    citation: ClassVar[str] = "none"

    def check(self, context: ForgetContext, config: UnevenConfig) -> None:
        """Needs nothing."""

    def run(self, context: ForgetContext, config: UnevenConfig) -> MethodOutcome:
        with torch.no_grad():
            for parameter in context.model.parameters():
                parameter += 0.1 * (1 + config.noise * get_rank())
        if config.fails and get_rank() == 1:
            raise OSError("no space left")
        return MethodOutcome()


def uneven_updates(folder: Path) -> dict[str, Any]:
    """Rounding is settled, another update is refused, a failure in one process is rolled back in all."""
    trainer = make_trainer(folder / "trainer", "plain")
    model = model_of(trainer)
    join()
    found: dict[str, Any] = {}
    for name, config in {
        "rounding": UnevenConfig(noise=1e-5),
        "other": UnevenConfig(noise=0.1),
        "fails": UnevenConfig(fails=True),
    }.items():
        before = state_of(model)
        error = None
        try:
            trainer.unlearn(forget_indices=FORGET if name == "rounding" else [0], method="uneven", config=config)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        total = float(sum(p.double().sum() for p in model.parameters()))
        found[name] = {"error": error, "unchanged": same_bits(model, before), "weights": total}
    return found


# --- a process that is gone -------------------------------------------------------------------------------------------


class Deadly:
    """The model's loss; while `armed`, process 1 dies, or hangs, at the third row whose gradient is taken."""

    armed: ClassVar[str | None] = None
    calls: ClassVar[int] = 0

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if Deadly.armed and get_rank() == 1 and torch.is_grad_enabled():
            Deadly.calls += 1
            if Deadly.calls == 3:
                if Deadly.armed == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(TIMEOUT + 3)
        logits = model(inputs["features"])["logits"]
        return nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")


class _Arming(TrainerCallback):
    """Deadly as soon as the (only) training step is done."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        Deadly.armed = "kill"


def _deadly_trainer(folder: Path, **settings: Any) -> UnlearningTrainer:
    return make_trainer(
        folder / "trainer",
        "plain",
        settings={"per_device_train_batch_size": 1, **settings},
        row_loss=Deadly(),
        callbacks=[IAUCallback(WITH_CURVATURE)],
    )


def _what_is_left(trainer: UnlearningTrainer, folder: Path) -> dict[str, Any]:
    saved = GradientMemory.load(folder / "trainer")
    files = sorted(path.name for path in (folder / "trainer" / "_iau").glob("memory*"))
    return {"rows": saved.n_rows, "files": files, "print": saved.model["weights"]}


def killed_in_gathering(folder: Path) -> dict[str, Any]:
    """Process 1 dies while a second run gathers; the memory of the first run is on disk."""
    _deadly_trainer(folder).train()
    trainer = _deadly_trainer(folder, max_steps=1)
    started = time.perf_counter()
    trainer.add_callback(_Arming())
    trainer.train()
    try:
        trainer.memory  # noqa: B018
    except MissingMemoryError as error:
        left = _what_is_left(trainer, folder)
        return {"error": str(error), "seconds": time.perf_counter() - started, **left}
    return {}


def saved_request(folder: Path) -> dict[str, Any]:
    """A request that is written to disk, and what a second one of the same rows says."""
    os.environ["HF_IAU_KEY"] = "0123456789abcdef" * 4
    trainer = make_trainer(folder / "trainer", "bert", callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    trainer.save_model()
    before = state_of(model_of(trainer))
    dist.barrier() if dist.is_initialized() else None
    output = DeletionService(trainer).unlearn(forget_indices=FORGET, config=GIVEN)
    again = DeletionService(trainer).unlearn(forget_indices=FORGET, config=GIVEN)
    dist.barrier() if dist.is_initialized() else None
    saved = load_file(folder / "trainer" / "model.safetensors")
    return {
        "applied": [output.applied, again.applied],
        "entry": output.entry.number if output.entry else None,
        "moved": not same_bits(model_of(trainer), before),
        "on_disk": all(torch.equal(saved[name], p) for name, p in model_of(trainer).named_parameters()),
        "memory": GradientMemory.load(folder / "trainer").model["weights"] == weights_fingerprint(model_of(trainer)),
        "entries": len(Ledger(folder / "trainer" / "_iau" / "ledger.jsonl", find_key()).entries()),
    }


def killed_in_unlearning(folder: Path) -> dict[str, Any]:
    """Process 1 dies in the middle of a request."""
    return _lost_in_unlearning(folder, "kill")


def hung_in_unlearning(folder: Path) -> dict[str, Any]:
    """Process 1 does not answer any more."""
    # The Trainer hands `ddp_timeout` to the process group on GPUs only.
    dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    return _lost_in_unlearning(folder, "hang")


def _lost_in_unlearning(folder: Path, how: str) -> dict[str, Any]:
    trainer = _deadly_trainer(folder)
    trainer.train()
    trainer.memory.visits = None  # the few steps do not reach all rows that are to go
    before = state_of(model_of(trainer))
    Deadly.armed = how
    started = time.perf_counter()
    try:
        trainer.unlearn(forget_indices=list(range(8)), config=GIVEN)
    except IAUError as error:
        seconds = time.perf_counter() - started
        unchanged = same_bits(model_of(trainer), before)
        left = _what_is_left(trainer, folder)
        GradientMemory.load(folder / "trainer").check_model(model_of(trainer))
        return {"error": str(error), "seconds": seconds, "unchanged": unchanged, **left}
    return {}
