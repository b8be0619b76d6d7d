"""With everything kept on the CPU, gathering and requests fit on the device wherever training did.

The models are of some megabytes, so floors below which a fit saves nothing, of a few megabytes too, are set to zero.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from simulated_device import MODULE, simulated_device
from test_requests_on_a_device import GIVEN, settings_for
from tiny_models import as_dataset, build, text_rows
from torch import nn
from transformers import TrainerCallback
from unlearning_trainers import FORGET, WITH_CURVATURE, make_trainer, state_of

from hf_iau import GatherConfig, IAUCallback, IAUConfig, UnlearningTrainer
from hf_iau.curvature.fit import Fit

WIDE = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 400,
    "max_position_embeddings": 48,
}
GATHERING = replace(WITH_CURVATURE, curvature_rows=12)
OFFLOADED = replace(GATHERING, memory_device="cpu")
SHORT, LONG = 8, 39
HELD_OUT = 100
MANY = range(24)  # with as many retained rows, to calibrate on


@pytest.fixture(autouse=True)
def no_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    for floor in ("hf_iau.curvature.layers.FEWEST_SPARE_BYTES", "hf_iau.curvature.call_cache.FEWEST_CACHE_BYTES"):
        monkeypatch.setattr(floor, 0)


def wide(kind: str, **settings: Any) -> nn.Module:
    model = build("bert", **(WIDE | settings))
    if kind == "full":
        return model
    torch.manual_seed(1)
    targets = ["query", "key", "value", "dense"]
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=targets, init_lora_weights=False))


@contextmanager
def wide_trainer(folder: Path, kind: str, length: int, layers: int = 2, **settings: Any) -> Iterator[UnlearningTrainer]:
    """On the device, with rows of one length: none is longer than what is seen when the optimizer has its state."""
    gc.collect()
    with simulated_device() as device:
        both = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
        yield make_trainer(
            folder,
            model=wide(kind, num_hidden_layers=layers),
            rows=text_rows(48, length=(length, length + 1)),
            settings=settings_for(device, **(both | settings)),
            eval_dataset=as_dataset(text_rows(HELD_OUT, seed=1, length=(length, length + 1))),
        )


def highest(work: Callable[[], Any]) -> int:
    """The most bytes on the device, weights included, while `work` runs and its result is held."""
    MODULE.highest = MODULE.held
    result = work()
    found = MODULE.highest
    del result
    return found


def test_without_an_optimizer(tmp_path: Path) -> None:
    """A model that was not trained in the same process: gathering and the request."""

    def peak(config: GatherConfig | None, work: Callable[[UnlearningTrainer], Any]) -> int:
        with wide_trainer(tmp_path, "full", SHORT) as trainer:
            if config is not None:
                trainer.gather(config)
            return highest(lambda: work(trainer))

    def request(trainer: UnlearningTrainer) -> Any:
        result = trainer.unlearn(forget_indices=FORGET, config=GIVEN)
        assert result.memory is not None and result.memory.curvature is not None
        kept = [*(result.memory.gradient_sum or {}).values(), *result.memory.curvature.tensors().values()]
        assert {tensor.device.type for tensor in kept} == {result.memory.settings["memory_device"] or "simulated"}
        return result

    training = peak(None, lambda trainer: trainer.train())
    peaks = {
        where: (peak(None, lambda trainer, c=config: trainer.gather(c)), peak(config, request))
        for where, config in {"there": GATHERING, "offloaded": OFFLOADED}.items()
    }
    assert max(peaks["offloaded"]) <= training
    assert all(offloaded < there for offloaded, there in zip(peaks["offloaded"], peaks["there"], strict=True))


class TrainingEnds(TrainerCallback):
    """Has `MODULE.highest` start anew at the end of training, before callbacks that come later."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.training, MODULE.highest = MODULE.highest, MODULE.held


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "full, weights take most": ("full", SHORT, {"optim": "adamw_torch"}),
    "full, activations take most": ("full", LONG, {}),
    "full, two rows": ("full", LONG, {"per_device_train_batch_size": 2}),
    "full, an optimizer without state": ("full", LONG, {"optim": "sgd"}),
    "LoRA": ("lora", LONG, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_beside_a_living_optimizer(case: str, tmp_path: Path) -> None:
    """`IAUCallback` gathers at the end of training, requests follow; one is calibrated where activations take most."""
    kind, length, settings = CASES[case]
    layers = (
        3 if case == "full, two rows" else 2
    )  # where training needs little, its layers have to outweigh our buffers

    def peaks(config: GatherConfig, requests: bool) -> tuple[int, list[int]]:
        """Of training, and of gathering and the requests."""
        with wide_trainer(tmp_path, kind, length, layers, **settings) as trainer:
            ends = TrainingEnds()
            trainer.add_callback(ends)
            trainer.add_callback(IAUCallback(config, save=False))
            found = [highest(trainer.train)]
            assert trainer.optimizer is not None and bool(trainer.optimizer.state) == (settings.get("optim") != "sgd")
            if requests:
                trainer.memory.visits = None  # the few steps do not reach all rows that are to go
                found.append(highest(lambda: trainer.unlearn(forget_indices=FORGET, config=GIVEN).revert()))
                if length == LONG and not settings:
                    found.append(highest(lambda: trainer.unlearn(forget_indices=MANY, config=IAUConfig(damping=0.1))))
        return ends.training, found

    training, offloaded = peaks(OFFLOADED, requests=True)
    assert max(offloaded) <= training
    training, there = peaks(GATHERING, requests=False)
    assert max(there) > training


class Gathering(TrainerCallback):
    """Gathers in the middle of training, before an optimizer's step; `failing` fails when most is held."""

    def __init__(self, failing: bool) -> None:
        self.failing = failing
        self.trainer: UnlearningTrainer
        self.gathered = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert all(p.grad is not None for p in self.trainer.model.parameters() if p.requires_grad)
        if state.global_step != 2:
            return
        if self.failing:
            with pytest.raises(torch.OutOfMemoryError, match="in the second pass"):
                self.trainer.gather(OFFLOADED)
        else:
            self.trainer.gather(OFFLOADED)
        self.gathered += 1


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_training_goes_on_as_if_nothing_was_gathered(
    kind: str, failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: weights, the optimizer's state, and the numbers that dropout draws."""

    def fails(fit: Fit) -> None:
        raise torch.OutOfMemoryError("in the second pass")

    if failing:
        monkeypatch.setattr(Fit, "_sum_eigenvalues", fails)

    def train(callback: Gathering | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        with simulated_device() as device:
            torch.manual_seed(0)
            model, settings = wide(kind, dropout=0.1, num_hidden_layers=1), settings_for(device, max_steps=5)
            trainer = make_trainer(tmp_path, model=model, settings=settings)
            if callback is not None:
                callback.trainer = trainer
                trainer.add_callback(callback)
            trainer.train()
            assert trainer.optimizer is not None
            return state_of(model), list(trainer.optimizer.state_dict()["state"].values())

    expected, moments = train(None)
    callback = Gathering(failing)
    found, others = train(callback)
    assert callback.gathered == 1 and moments
    assert all(torch.equal(found[name].cpu(), tensor.cpu()) for name, tensor in expected.items())
    for state, other in zip(moments, others, strict=True):
        assert all(torch.equal(torch.as_tensor(other[key]).cpu(), torch.as_tensor(state[key]).cpu()) for key in state)
