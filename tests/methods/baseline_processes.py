"""Requests with baselines as several processes serve them; run by `several_processes`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from baseline_settings import quick_settings
from unlearning_trainers import FORGET, make_trainer

CONFIGS = {
    method: config
    for method, config in quick_settings("plain").items()
    if method in ("fine-tune", "scrub", "ssd", "influence-cg", "retrain")
}
CONFIGS["scrub"] = replace(CONFIGS["scrub"], lr=0.01)  # to be seen beside the rounding


def every_method(folder: Path) -> dict[str, list[float]]:
    """Method → all weights after a request."""
    found = {}
    for method, config in CONFIGS.items():
        trainer = make_trainer(folder, "plain", settings={"max_steps": 2, "learning_rate": 0.1, "optim": "sgd"})
        trainer.unlearn(forget_indices=FORGET, method=method, config=config)
        found[method] = torch.cat([p.detach().flatten() for p in trainer.model.parameters()]).tolist()
    return found
