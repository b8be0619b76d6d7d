"""Requests with baselines as several processes serve them; run by `several_processes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import build
from unlearning_trainers import FORGET, make_trainer

from hf_iau.methods import FineTuneConfig, InfluenceCGConfig, RetrainConfig, SCRUBConfig, SSDConfig

CONFIGS: dict[str, Any] = {
    "fine-tune": FineTuneConfig(epochs=1),
    "scrub": SCRUBConfig(epochs=1, max_epochs=1, lr=0.01),
    "ssd": SSDConfig(selection=1.1),
    "influence-cg": InfluenceCGConfig(iterations=3),
    "retrain": RetrainConfig(model_init=lambda: build("plain", seed=5)),
}


def every_method(folder: Path) -> dict[str, list[float]]:
    """Method → all weights after a request."""
    found = {}
    for method, config in CONFIGS.items():
        trainer = make_trainer(folder, "plain", settings={"max_steps": 2, "learning_rate": 0.1, "optim": "sgd"})
        trainer.unlearn(row_indices=FORGET, method=method, config=config)
        found[method] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()
    return found
