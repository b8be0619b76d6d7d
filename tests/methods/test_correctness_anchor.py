"""Where theory is exact: with the Hessian of the retained rows and k = c = 1, the step is Newton's.

L2-regularised models in float64, with the regulariser as the optimizer's coupled weight decay, so that it is part of
the gradient sums and of the curvature. The reference is an independent optimum from scikit-learn or a linear solve.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_iau import GatherConfig, IAUConfig, UnlearningTrainer
from hf_iau.data import ModelRowLoss
from hf_iau.data.trainer_rows import trainer_rows
from hf_iau.memory.gathering import build_memory

N, WIDTH, CLASSES, DECAY = 400, 5, 3, 0.02


class Linear(nn.Module):
    def __init__(self, outputs: int, regression: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, outputs, bias=False).double()
        self.regression = regression

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layer(pixel_values)
        if labels is None:
            return {"logits": logits}
        loss = F.mse_loss(logits.squeeze(1), labels) if self.regression else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.inputs[index], "labels": self.labels[index]}


class ExactCurvature:
    """The Hessian of mean loss + DECAY/2 ‖θ‖², as one dense matrix."""

    kind, n_rows, is_sharded = "full", N, False
    blocks: ClassVar = {"layer": SimpleNamespace(name="layer", shapes={"layer.weight": None})}

    def __init__(self, model: Linear, rows: Rows) -> None:
        def objective(flat: Tensor) -> Tensor:
            logits = rows.inputs @ flat.view_as(model.layer.weight).T
            if model.regression:
                loss = F.mse_loss(logits.squeeze(1), rows.labels)
            else:
                loss = F.cross_entropy(logits, rows.labels)
            return loss + DECAY / 2 * flat.square().sum()

        with torch.enable_grad():
            self.matrix = torch.autograd.functional.hessian(objective, model.layer.weight.detach().reshape(-1))

    def solve(self, vector: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        assert damping == 0.0
        return {n: torch.linalg.solve(self.matrix, v.reshape(-1)).view_as(v) for n, v in vector.items()}

    def multiply(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: (self.matrix @ v.double().reshape(-1)).view_as(v) for n, v in vector.items()}

    def placed(self, devices: Mapping[str, torch.device]) -> ExactCurvature:
        assert devices == {"layer": torch.device("cpu")}
        return self

    def coverage(self) -> dict[str, int]:
        return {"kronecker": self.matrix.shape[0]}

    def check(self) -> None:
        assert bool(self.matrix.isfinite().all())


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in batch]) for name in batch[0]}


def data(regression: bool, n: int = N) -> Rows:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, WIDTH, generator=generator, dtype=torch.float64)
    truth = torch.randn(WIDTH, 1 if regression else CLASSES, generator=generator, dtype=torch.float64)
    noisy = inputs @ truth + torch.randn(n, truth.shape[1], generator=generator, dtype=torch.float64)
    return Rows(inputs, noisy.squeeze(1) if regression else noisy.argmax(dim=1))


def optimum(rows: Rows, keep: np.ndarray, regression: bool) -> Tensor:
    """argmin of mean loss over `keep` + DECAY/2 ‖θ‖²."""
    x, y = rows.inputs[keep], rows.labels[keep]
    if regression:
        normal = 2 * x.T @ x / len(keep) + DECAY * torch.eye(WIDTH, dtype=torch.float64)
        return torch.linalg.solve(normal, 2 * x.T @ y / len(keep))[None]
    solver = LogisticRegression(C=1 / (DECAY * len(keep)), fit_intercept=False, tol=1e-10, max_iter=10_000)
    found = torch.from_numpy(solver.fit(x.numpy(), y.numpy()).coef_)
    # scikit-learn stops at about five digits; a few Newton steps of our own objective give the rest.
    model = Linear(CLASSES, False)
    for _ in range(5):
        with torch.no_grad():
            model.layer.weight.copy_(found)
        model.zero_grad()
        with torch.enable_grad():
            (F.cross_entropy(model.layer(x), y) + DECAY / 2 * model.layer.weight.square().sum()).backward()
        gradient = model.layer.weight.grad
        assert gradient is not None
        newton = torch.linalg.lstsq(ExactCurvature(model, Rows(x, y)).matrix, gradient.reshape(-1, 1)).solution
        found = found - newton.view_as(found)
    assert float(gradient.norm()) < 1e-12
    return found


def forget_by_newton(rows: Rows, forget: np.ndarray, regression: bool, folder: str) -> tuple[Tensor, Tensor]:
    """Weights after `unlearn` with k = c = 1, and those of exact retraining."""
    everything = np.arange(len(rows))
    keep = np.setdiff1d(everything, forget)
    model = Linear(1 if regression else CLASSES, regression)
    with torch.no_grad():
        model.layer.weight.copy_(optimum(rows, everything, regression))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=DECAY)
    trainer = UnlearningTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder, per_device_train_batch_size=64, disable_tqdm=True, use_cpu=True, report_to="none"
        ),
        train_dataset=rows,
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    source = trainer_rows(trainer, rows, "training rows", 64)
    config = GatherConfig(gradient_sum="full", curvature="none", progress=False)
    memory = build_memory(model, source, ModelRowLoss(), config, optimizer=optimizer)
    assert memory.weight_decay == {"layer.weight": DECAY}
    memory.curvature = ExactCurvature(model, Rows(rows.inputs[keep], rows.labels[keep]))  # type: ignore[assignment]
    trainer.unlearning_state.given = memory
    trainer.unlearn(
        forget_indices=forget, config=IAUConfig(scale=1.0, damping=0.0, retain_weight=1.0, retain_damping=0.0)
    )
    return model.layer.weight.detach().clone(), optimum(rows, keep, regression)


def test_ridge_regression_is_retrained_exactly(tmp_path):
    rows = data(regression=True)
    for share in (0.01, 0.1, 0.4):
        forget = np.random.default_rng(1).choice(N, int(share * N), replace=False)
        ours, retrained = forget_by_newton(rows, forget, True, str(tmp_path))
        before = optimum(rows, np.arange(N), True)
        assert float((before - retrained).norm()) > 1e-4
        assert float((ours - retrained).norm()) < 1e-9 * float(retrained.norm())


def test_logistic_regression_error_falls_quadratically(tmp_path):
    """The same eight rows are forgotten from ever more: the weights move by O(n_f/n), the error is O((n_f/n)²)."""
    everything, forget = data(regression=False, n=1600), np.arange(8)
    sizes = np.array([100, 200, 400, 800, 1600])
    errors, distances = [], []
    for size in sizes:
        rows = Rows(everything.inputs[:size], everything.labels[:size])
        ours, retrained = forget_by_newton(rows, forget, False, str(tmp_path))
        errors.append(float((ours - retrained).norm()))
        distances.append(float((optimum(rows, np.arange(size), False) - retrained).norm()))
    share = np.log(len(forget) / sizes)
    assert np.polyfit(share, np.log(errors), 1)[0] == pytest.approx(2.0, abs=0.25)
    assert np.polyfit(share, np.log(distances), 1)[0] == pytest.approx(1.0, abs=0.25)
    assert all(error < 0.1 * distance for error, distance in zip(errors, distances, strict=True))
