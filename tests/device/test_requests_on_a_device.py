"""Requests served on an accelerator change the weights as they do on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from baseline_settings import quick_settings
from memorising_network import Classifier, draw, fit
from simulated_device import on_both
from tiny_models import build
from torch import Tensor
from unlearning_trainers import (
    FORGET,
    WITH_CURVATURE,
    arguments,
    assert_bits,
    make_trainer,
    parameters_of,
    relative_distance,
    state_of,
)

from hf_iau import (
    DeletionService,
    GatherConfig,
    GradientMemory,
    IAUCallback,
    IAUConfig,
    IAUPaperConfig,
    UnlearningTrainer,
)
from hf_iau.methods.base import available_methods

GIVEN = IAUConfig(scale=1.0, damping=0.1, retain_weight=0.01, retain_damping=0.2)  # with a damping of its own
OFFLOADED = replace(WITH_CURVATURE, memory_device="cpu")


def settings_for(device: torch.device, **others: Any) -> dict[str, Any]:
    """Of the training arguments; the simulation has no pinned memory."""
    return {"use_cpu": device.type == "cpu", "dataloader_pin_memory": False, "per_device_train_batch_size": 5} | others


def on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def served(
    folder: Path,
    device: torch.device,
    family: str,
    method: str,
    config: Any,
    gathering: GatherConfig = WITH_CURVATURE,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after a request, which is then reverted and rehearsed."""
    trainer = make_trainer(folder, family, settings=settings_for(device))
    trainer.gather(gathering)
    before = state_of(trainer.model)
    assert {tensor.device for tensor in before.values()} == {device if device.index is None else torch.device(device)}
    result = trainer.unlearn(forget_indices=FORGET, method=method, config=config)
    after = parameters_of(trainer.model)
    assert result.report.after["forget_loss"] != result.report.before["forget_loss"]
    result.revert()
    assert_bits(trainer.model, before)
    return on_cpu(before), on_cpu(after)


def assert_served_alike(folder: Path, family: str, method: str, config: Any, gathering: GatherConfig) -> None:
    (before, expected), (start, found) = on_both(
        lambda device: served(folder / device.type, device, family, method, config, gathering)
    )
    assert all(torch.equal(before[name], start[name]) for name in before)
    assert relative_distance(found, expected, {name: before[name] for name in expected}) < 1e-4


@pytest.mark.parametrize("gathering", [WITH_CURVATURE, OFFLOADED], ids=["there", "offloaded"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet", "lora"])
def test_one_step(family: str, gathering: GatherConfig, tmp_path: Path) -> None:
    assert_served_alike(tmp_path, family, "iau", GIVEN, gathering)


METHODS = {"iau-paper": IAUPaperConfig(eta=1e-3), "iau-released": None, **quick_settings("resnet")}


def test_no_method_is_left_out() -> None:
    assert sorted([*METHODS, "iau"]) == available_methods()


@pytest.mark.parametrize("method", METHODS)
def test_every_other_method(method: str, tmp_path: Path) -> None:
    assert_served_alike(tmp_path, "resnet", method, METHODS[method], WITH_CURVATURE)


@pytest.mark.parametrize("method", ["npo", "scrub", "ssd", "influence-cg"])
def test_methods_that_look_at_tokens(method: str, tmp_path: Path) -> None:
    config = METHODS[method]
    if method == "npo":  # AdamW moves keys' biases, whose gradient is nothing but rounding, as far as anything else
        config = replace(config, optimizer="sgd", lr=0.01)
    assert_served_alike(tmp_path, "gpt2", method, config, WITH_CURVATURE)


# --- calibration ------------------------------------------------------------------------------------------------------

REQUEST = np.random.default_rng(5).choice(1000, 220, replace=False)
TRAIN, HELD_OUT = draw(1000, 1), draw(400, 2)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return fit(Classifier(), TRAIN, epochs=80, seed=0).state_dict()


def memorised(folder: Path, device: torch.device, weights: dict[str, Tensor], **gathering: Any) -> UnlearningTrainer:
    model = Classifier()
    model.load_state_dict(weights)
    settings = settings_for(device, per_device_train_batch_size=128, per_device_eval_batch_size=400)
    trainer = UnlearningTrainer(
        model=model, args=arguments(folder, **settings), train_dataset=TRAIN, eval_dataset=HELD_OUT
    )
    trainer.gather(GatherConfig(gradient_sum="full", batch_size=128, progress=False, **gathering))
    return trainer


@pytest.mark.parametrize(
    ("request_", "config", "source"),
    [
        (REQUEST, IAUConfig(multi_step=False), "forget rows"),
        (REQUEST[:4], IAUConfig(), "proxies"),
        (REQUEST, IAUConfig(), "multi-step"),
    ],
    ids=["own", "proxies", "multi_step"],
)
def test_calibration(
    request_: np.ndarray, config: IAUConfig, source: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    def serve(device: torch.device) -> tuple[dict[str, Tensor], Any]:
        trainer = memorised(tmp_path / device.type, device, weights)
        report = trainer.unlearn(
            forget_indices=request_, config=config, test_dataset=HELD_OUT.take(np.arange(100))
        ).report
        return on_cpu(parameters_of(trainer.model)), report

    (expected, report_on_cpu), (found, report) = on_both(serve)
    assert report.diagnostics["calibration"]["source"] == source
    assert report_on_cpu.diagnostics["calibration"]["source"] == source
    assert relative_distance(found, expected, weights) < 1e-4
    assert report.after["mia_auc"] == pytest.approx(report_on_cpu.after["mia_auc"], abs=1e-3)


@pytest.mark.parametrize("memory_device", [None, "cpu"])
def test_a_memory_from_disk_serves_a_model_on_the_device(
    memory_device: str | None, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    """It is read into the host's memory; a request then works where it would have after gathering."""

    def kinds_of(memory: GradientMemory | None) -> set[str]:
        assert memory is not None and memory.curvature is not None and memory.gradient_sum is not None
        return {t.device.type for t in [*memory.gradient_sum.values(), *memory.curvature.tensors().values()]}

    def serve(device: torch.device) -> dict[str, Tensor]:
        trainer = memorised(tmp_path / device.type, device, weights, memory_device=memory_device)
        assert trainer.memory is not None
        trainer.memory.save(tmp_path / "memory")
        trainer = UnlearningTrainer(
            model=trainer.model,
            args=trainer.args,
            train_dataset=TRAIN,
            eval_dataset=HELD_OUT,
            memory=GradientMemory.load(tmp_path / "memory"),
        )
        assert kinds_of(trainer.memory) == {"cpu"}
        trainer.unlearn(forget_indices=REQUEST[:20], config=IAUConfig(multi_step=False))
        assert trainer.memory is not None and trainer.memory.forgotten_rows == 20
        assert kinds_of(trainer.memory) == {device.type if memory_device is None else memory_device}
        trainer.unlearn(forget_indices=REQUEST[20:22], config=GIVEN)  # with the memory that was moved along
        return on_cpu(parameters_of(trainer.model))

    expected, found = on_both(serve)
    assert relative_distance(found, expected, weights) < 1e-4


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["finite-difference", "exact"])
def test_gradient_restriction_and_the_callback(mode: str, tmp_path: Path) -> None:
    def train(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        trainer = make_trainer(
            tmp_path / device.type,
            "plain",
            settings=settings_for(device, per_device_train_batch_size=4),
            restriction=mode,
            callbacks=[IAUCallback(GatherConfig(gradient_sum="full", curvature="adam", progress=False))],
        )
        before = on_cpu(parameters_of(trainer.model))
        trainer.train()
        assert trainer.memory is not None and trainer.memory.curvature is not None
        trained = on_cpu(parameters_of(trainer.model))
        trainer.unlearn(forget_indices=FORGET, config=IAUConfig(scale=1e-3, damping=0.1))
        unlearned = on_cpu(parameters_of(trainer.model))
        assert relative_distance(unlearned, trained, before) > 1e-4
        return before, unlearned

    (before, expected), (_, found) = on_both(train)
    assert relative_distance(found, expected, before) < 1e-4


def test_a_saved_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_IAU_KEY", "0123456789abcdef" * 4)

    def serve(device: torch.device) -> dict[str, Tensor]:
        trainer = make_trainer(tmp_path / device.type, "bert", settings=settings_for(device))
        trainer.gather(WITH_CURVATURE)
        trainer.save_model()
        result = DeletionService(trainer).unlearn(forget_indices=FORGET, config=GIVEN)
        assert result.entry is not None
        again = DeletionService(trainer).unlearn(forget_indices=FORGET, config=GIVEN)
        assert not again.applied
        return on_cpu(parameters_of(trainer.model))

    expected, found = on_both(serve)
    start = parameters_of(build("bert"))
    assert relative_distance(found, expected, start) < 1e-4
