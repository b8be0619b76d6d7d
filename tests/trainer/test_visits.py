"""Visits are those of the batches that were trained on, whatever was drawn and not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from several_processes import results, run_in_processes
from tiny_models import as_dataset, plain, plain_rows
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from unlearning_trainers import WITH_CURVATURE, arguments, assert_bits, collator, make_trainer, state_of

from hf_iau import GradientMemory, IAUCallback, IAUConfig, UnlearningTrainer
from hf_iau.trainer.visits import VISITS_FILE, VisitCounter

GIVEN = IAUConfig(scale=0.1, damping=1.0)
ROWS = 22


def rows(n: int = ROWS) -> Any:
    return as_dataset(plain_rows(n))


class Recounting:
    """Counts rows plainly, in the step that trains on them."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        known = {round(float(row["features"][0]), 5): i for i, row in enumerate(plain_rows(ROWS))}
        recount = self.__dict__.setdefault("recount", np.zeros(ROWS, dtype=np.int64))
        if getattr(self, "fails_at", None) == int(recount.sum()):
            self.fails_at = None
            raise RuntimeError("CUDA out of memory.")
        for x in inputs["features"][:, 0]:
            recount[known[round(float(x), 5)]] += 1
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]


class PlainTrainer(Recounting, Trainer):
    pass


class OurTrainer(Recounting, UnlearningTrainer):
    pass


class Weighted(OurTrainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        weights = torch.ones(ROWS)
        weights[:4] = 8.0
        return WeightedRandomSampler(weights.tolist(), ROWS, generator=torch.Generator().manual_seed(0))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def counting(folder: Path, trainer_class: Any = OurTrainer, *callbacks: Any, **settings: Any) -> Any:
    defaults = {"num_train_epochs": 2, "max_steps": -1}
    return trainer_class(
        model=plain(),
        args=arguments(folder, **(defaults | settings)),
        train_dataset=rows(),
        eval_dataset=as_dataset(plain_rows(6, seed=1)),
        data_collator=collator(torch.float32),
        callbacks=[IAUCallback(WITH_CURVATURE), *callbacks],
    )


def memory_of(trainer: Any) -> GradientMemory:
    (callback,) = (cb for cb in trainer.callback_handler.callbacks if isinstance(cb, IAUCallback))
    return callback.memory


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
RUNS: dict[str, tuple[Any, list[Any], dict[str, Any]]] = {
    "two epochs": (OurTrainer, [], {}),
    "plain Trainer": (PlainTrainer, [], {}),
    "accumulation with a short last group": (OurTrainer, [], {"gradient_accumulation_steps": 4}),
    "drop_last": (OurTrainer, [], {"dataloader_drop_last": True}),
    "max_steps in an epoch": (OurTrainer, [], {"max_steps": 8}),
    "max_steps with accumulation": (OurTrainer, [], {"max_steps": 2, "gradient_accumulation_steps": 2}),
    "stopped early": (OurTrainer, [StopAt(4)], {}),
    "patience": (
        OurTrainer,
        [EarlyStoppingCallback(1, 10.0)],
        EVALUATED | {"load_best_model_at_end": True, "num_train_epochs": 5},
    ),
    "workers": (OurTrainer, [], {"dataloader_num_workers": 2, "max_steps": 4}),
    "a sampler with weights": (Weighted, [], {"num_train_epochs": 3}),
    "by length": (OurTrainer, [], {"train_sampling_strategy": "sequential"}),
}


@pytest.mark.parametrize("run", RUNS)
def test_counts_are_a_plain_recount(run: str, tmp_path: Path) -> None:
    trainer_class, callbacks, settings = RUNS[run]
    trainer = counting(tmp_path, trainer_class, *callbacks, **settings)
    trainer.train()
    visits = memory_of(trainer).visits
    assert visits is not None and trainer.recount.sum() > 0
    assert visits.tolist() == trainer.recount.tolist()
    assert GradientMemory.load(tmp_path).visits.tolist() == visits.tolist()


@pytest.mark.parametrize("steps", [4, 6, 8])  # six steps an epoch
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_counts_on(steps: int, accumulation: int, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": steps, "gradient_accumulation_steps": accumulation}
    first = counting(tmp_path, OurTrainer, StopAt(steps), num_train_epochs=4, **settings)
    first.train()
    second = counting(tmp_path, OurTrainer, num_train_epochs=4, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert memory_of(second).visits.tolist() == (first.recount + second.recount).tolist()
    (tmp_path / f"checkpoint-{steps}" / VISITS_FILE).unlink()
    third = counting(tmp_path, OurTrainer, num_train_epochs=4, **settings)
    third.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert memory_of(third).visits is None


def test_steps_before_an_out_of_memory_error_count(tmp_path: Path) -> None:
    trainer = counting(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer.fails_at = 16
    trainer.train()
    assert memory_of(trainer).visits.tolist() == trainer.recount.tolist()
    assert trainer.recount.sum() > 2 * ROWS


def test_a_second_run_of_the_same_model_counts_on(tmp_path: Path) -> None:
    trainer = counting(tmp_path, max_steps=3)
    trainer.train()
    trainer.train()
    assert memory_of(trainer).visits.tolist() == trainer.recount.tolist()


class Each(TrainerCallback):
    """Calls `on` of any event's name."""

    def __init__(self, **on: Any) -> None:
        for name, call in on.items():
            setattr(self, name, lambda args, state, control, call=call, **kwargs: call(state, control, **kwargs))


def test_counts_are_those_of_the_best_checkpoint(tmp_path: Path) -> None:
    class Worsens(OurTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            return super().evaluate(*args, **kwargs) | {"eval_loss": float(self.state.global_step)}

    settings = EVALUATED | {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    at: dict[int, list[int]] = {}
    note = Each(on_save=lambda state, control, **_: at.update({state.global_step: trainer.recount.tolist()}))
    trainer = counting(tmp_path, Worsens, note, num_train_epochs=1, **settings)
    trainer.train()
    assert trainer.state.best_global_step == 2 and max(at) > 2
    assert memory_of(trainer).visits.tolist() == at[2]


def test_batches_of_a_step_that_was_never_taken_do_not_count(tmp_path: Path) -> None:
    trainer = counting(tmp_path, auto_find_batch_size=True, gradient_accumulation_steps=2)
    done, lost = np.zeros(ROWS, dtype=np.int64), np.zeros(ROWS, dtype=np.int64)

    def begins(state: Any, control: Any, **_: Any) -> None:
        lost[:] = getattr(trainer, "recount", done) - done

    trainer.add_callback(
        Each(
            on_step_end=lambda state, control, **_: done.__setitem__(slice(None), trainer.recount),
            on_train_begin=begins,
        )
    )
    trainer.fails_at = 12  # the second batch of the second step
    trainer.train()
    assert lost.sum() == 4
    assert memory_of(trainer).visits.tolist() == (trainer.recount - lost).tolist()


def test_a_run_stopped_between_the_batches_of_a_step(tmp_path: Path) -> None:
    def stop(state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= 1

    trainer = counting(tmp_path, OurTrainer, Each(on_substep_end=stop), gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.recount.sum() == 12 and memory_of(trainer).visits.sum() == 8


def test_steps_that_the_optimizer_skips_do_not_count(tmp_path: Path) -> None:
    def overflows(state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        optimizer._is_overflow = state.global_step < 2  # as the scaler of float16 tells it

    trainer = counting(tmp_path, OurTrainer, Each(on_optimizer_step=overflows), num_train_epochs=1)
    trainer.train()
    assert trainer.recount.sum() == ROWS and memory_of(trainer).visits.sum() == ROWS - 8


def test_a_callback_that_reads_the_training_rows_is_not_counted(tmp_path: Path) -> None:
    def read(state: Any, control: Any, train_dataloader: Any, **_: Any) -> None:
        if state.global_step == 2:
            list(train_dataloader)

    trainer = counting(tmp_path, OurTrainer, Each(on_step_end=read), max_steps=5)
    trainer.train()
    assert memory_of(trainer).visits.tolist() == trainer.recount.tolist()


def test_an_out_of_memory_error_in_a_resumed_run(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 8, "auto_find_batch_size": True}
    first = counting(tmp_path, OurTrainer, StopAt(2), save_strategy="steps", save_steps=2, **settings)
    first.train()
    second = counting(tmp_path, OurTrainer, **settings)
    second.fails_at = 6  # after a step
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.fails_at is None
    assert memory_of(second).visits.tolist() == (first.recount + second.recount).tolist()


@pytest.mark.parametrize("other", ["another folder", "a run that did not count", "a truncated file"])
def test_counts_of_another_run_are_not_taken(other: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4}
    counting(tmp_path, OurTrainer, StopAt(4), seed=3, **settings).train()
    resumed = tmp_path / "checkpoint-4"
    if other == "another folder":
        counting(tmp_path / "other", OurTrainer, StopAt(4), seed=9, **settings).train()
        resumed = tmp_path / "other" / "checkpoint-4"
    elif other == "a run that did not count":
        silent = counting(tmp_path, PlainTrainer, StopAt(4), seed=9, **settings)
        silent.remove_callback(IAUCallback)
        silent.train()
    else:
        (resumed / VISITS_FILE).write_bytes(b"")
    trainer = counting(tmp_path, seed=9)
    trainer.train(resume_from_checkpoint=str(resumed))
    assert memory_of(trainer).visits is None


def test_a_second_run_with_other_rows_is_not_known(tmp_path: Path) -> None:
    trainer = counting(tmp_path, max_steps=3)
    trainer.train()
    trainer.train_dataset = trainer.train_dataset.select(range(ROWS - 1, -1, -1))
    trainer.train()
    assert memory_of(trainer).visits is None


def test_batches_that_cannot_be_watched_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Listed(OurTrainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_sampler=[[0, 1], [2, 3]], collate_fn=self.data_collator)

    trainer = counting(tmp_path, Listed)
    trainer.train()
    assert memory_of(trainer).visits is None
    assert caplog.text.count("batches drawn by a list cannot be watched") == 1


def test_what_is_out_of_order_is_not_known() -> None:
    counter = VisitCounter(3)
    counter.step_ends()
    assert not counter.known
    counter = VisitCounter(3)
    counter.watch(object())
    assert not counter.known and counter.counts() is None


# --- two processes ----------------------------------------------------------------------------------------------------

SHARED: dict[str, dict[str, Any]] = {
    "batches by process": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "split batches": {"accelerator_config": {"split_batches": True}},
    "dispatched batches": {"accelerator_config": {"dispatch_batches": True}},
}


def counted_in_processes(folder: Path) -> dict[str, Any]:
    """Case → visits and a recount of all processes, after a run that was stopped and after one that goes on from it."""
    found = {}
    for name, settings in SHARED.items():
        runs: list[Any] = []
        recount = torch.zeros(ROWS, dtype=torch.int64)
        for callbacks, checkpoint in (([StopAt(4)], None), ([], str(folder / name / "checkpoint-4"))):
            trainer = counting(
                folder / name,
                OurTrainer,
                *callbacks,
                num_train_epochs=3,
                save_strategy="steps",
                save_steps=4,
                **settings,
            )
            trainer.train(resume_from_checkpoint=checkpoint)
            own = torch.from_numpy(trainer.recount)
            torch.distributed.all_reduce(own)
            recount += own
            visits = memory_of(trainer).visits
            runs.append([None if visits is None else visits.tolist(), recount.tolist()])
        found[name] = runs
    return found


def test_counts_of_two_processes_are_added_up(tmp_path: Path) -> None:
    jobs = run_in_processes(Path(__file__), tmp_path, "counted_in_processes:2")
    for found in results(jobs["counted_in_processes:2"]):
        for name, runs in found.items():
            for visits, recount in runs:
                assert visits == (None if name == "dispatched batches" else recount), name
                assert sum(recount) > 2 * ROWS or runs[0][1] == recount


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["numbers", "rows"])
def test_rows_that_were_never_reached_are_left_out(named: str, tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, "plain", rows=plain_rows(160), settings={"max_steps": 3, "per_device_train_batch_size": 16}
    )
    trainer.train()
    visits = trainer.memory.visits
    assert visits.sum() == 48
    never, met = np.flatnonzero(visits == 0), np.flatnonzero(visits)

    def request(numbers: np.ndarray) -> Any:
        asked: dict[str, Any] = {"forget_indices": numbers}
        if named == "rows":
            asked = {"forget_dataset": trainer.train_dataset.select(numbers)}
        return trainer.unlearn(**asked, config=GIVEN)

    before = state_of(trainer.model)
    with pytest.warns(UserWarning, match="5 of the 5 requested rows were never reached in training"):
        result = request(never[:5])
    assert not result.applied and result.report.counts["left_out_rows"] == 5
    assert_bits(trainer.model, before)
    result = request(np.concatenate([never[:2], met[:3]]))
    assert result.report.counts["forget_rows"] == 3 and result.report.counts["left_out_rows"] == 2
    assert any("2 of the 5 requested rows were never reached" in sentence for sentence in result.report.warnings)
    assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == met[:3].tolist()
    assert trainer.gather().visits.tolist() == visits.tolist()


def test_unequal_visits_are_told(tmp_path: Path) -> None:
    trainer = counting(tmp_path, Weighted, num_train_epochs=3)
    trainer.train()
    met = trainer.recount[trainer.recount > 0]
    rows_met = np.flatnonzero(trainer.recount)[:2]
    told = trainer.unlearn(forget_indices=rows_met, config=GIVEN).report.warnings
    assert any(f"met unequally often, {met.min()} to {met.max()} times" in sentence for sentence in told)
    even = counting(tmp_path / "even", max_steps=8)
    even.train()
    assert not any("unequally" in s for s in even.unlearn(forget_indices=[1], config=GIVEN).report.warnings)
