"""Fixtures of the calibration tests: see `memorising_network`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from memorising_network import Classifier, Scene, draw, fit

from hf_iau import GatherConfig, UnlearningTrainer, gather


@pytest.fixture(scope="session")
def scene() -> Scene:
    torch.manual_seed(0)
    train, held_out, test = draw(1200, 1), draw(800, 2), draw(800, 3)
    model = fit(Classifier(), train, epochs=30, seed=0)
    memory = gather(model, train, config=GatherConfig(gradient_sum="full", batch_size=128, progress=False))
    return Scene(model, train, held_out, test, memory, {k: v.clone() for k, v in model.state_dict().items()})


@pytest.fixture
def trainer_of(scene: Scene, tmp_path: Path) -> Callable[..., UnlearningTrainer]:
    return lambda **changes: scene.trainer(tmp_path, **changes)
