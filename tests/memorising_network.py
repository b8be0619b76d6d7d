"""A small network that memorises, and everything around it; shared by the tests of calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_iau import GradientMemory, UnlearningTrainer

CLASSES = 4
WIDTH = 12


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh())
        self.head = nn.Linear(48, CLASSES)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.body(pixel_values))
        outputs = {"logits": logits}
        if labels is not None:
            outputs["loss"] = F.cross_entropy(logits, labels)
        return outputs


class Rows(torch.utils.data.Dataset):
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.inputs[index], "labels": self.labels[index]}

    def take(self, positions: np.ndarray) -> Rows:
        return Rows(self.inputs[positions], self.labels[positions])


def draw(n: int, seed: int) -> Rows:
    """Four overlapping clouds: not learnable without error, so that a network has something to memorise."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return Rows(centres[labels] * 0.35 + torch.randn(n, WIDTH, generator=generator), labels)


def fit(model: nn.Module, rows: Rows, epochs: int, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(rows), generator=generator).split(64):
            optimizer.zero_grad()
            model(rows.inputs[batch], rows.labels[batch])["loss"].backward()
            optimizer.step()
    return model


@dataclass
class Scene:
    model: nn.Module
    train: Rows
    held_out: Rows
    test: Rows
    memory: GradientMemory
    state: dict[str, Tensor]

    def trainer(self, folder: Path, **changes: object) -> UnlearningTrainer:
        self.model.load_state_dict(self.state)
        arguments = {
            "model": self.model,
            "train_dataset": self.train,
            "eval_dataset": self.held_out,
            "memory": self.memory,
        } | changes
        return UnlearningTrainer(
            args=TrainingArguments(
                output_dir=str(folder),
                per_device_train_batch_size=128,
                per_device_eval_batch_size=512,
                disable_tqdm=True,
                report_to="none",
                use_cpu=True,
            ),
            **arguments,
        )
