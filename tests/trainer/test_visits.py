"""Visits are those of the batches that were trained on, whatever was drawn and not used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import as_dataset, plain, plain_rows
from torch.utils.data import WeightedRandomSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from unlearning_trainers import WITH_CURVATURE, arguments, assert_bits, collator, make_trainer, state_of

from hf_iau import GradientMemory, IAUCallback, IAUConfig, UnlearningTrainer
from hf_iau.trainer.visits import VisitCounter

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
    (tmp_path / f"checkpoint-{steps}" / "row_visits.npy").unlink()
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


def test_what_is_out_of_order_is_not_known() -> None:
    counter = VisitCounter(3)
    counter.trained()
    assert not counter.known
    counter = VisitCounter(3)
    counter.watch(object())
    assert not counter.known and counter.counts() is None


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
