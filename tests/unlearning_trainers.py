"""`UnlearningTrainer`s of tiny models, and the plain restatements that they are compared with."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from tiny_models import Collator, Row, RowList, as_dataset, build, pad_right, rows_of
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_iau import GatherConfig, IAUConfig, UnlearningTrainer

EXACT = GatherConfig(gradient_sum="full", curvature="none", progress=False)
WITH_CURVATURE = GatherConfig(gradient_sum="full", curvature="ekfac", progress=False)
ROWS = 12
HELD_OUT = 6
FORGET = [1, 4, 7]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Three quick steps on the CPU."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **(defaults | settings))


def make_trainer(
    folder: Path,
    family: str = "bert",
    *,
    model: nn.Module | None = None,
    rows: list[Row] | None = None,
    kind: str = "datasets",
    dtype: torch.dtype = torch.float32,
    settings: dict[str, Any] | None = None,
    model_settings: dict[str, Any] | None = None,
    trainer_class: type[UnlearningTrainer] = UnlearningTrainer,
    **kwargs: Any,
) -> UnlearningTrainer:
    """A trainer of a tiny model with twelve training rows and six held-out ones.

    Args:
        folder: its output directory.
        family: of `tiny_models.FAMILIES`.
        model, rows: other ones than that family's.
        kind: "datasets" or "torch": what holds the rows.
        dtype: of the model's parameters.
        settings, model_settings, kwargs: of the training arguments, the model and the trainer.
    """
    wrap = as_dataset if kind == "datasets" else RowList
    if model is None and "model_init" not in kwargs:
        model = build(family, dtype=dtype, **(model_settings or {}))
    given: dict[str, Any] = {
        "model": model,
        "args": arguments(folder, **(settings or {})),
        "train_dataset": wrap(rows if rows is not None else rows_of(family, ROWS)),
        "eval_dataset": wrap(rows_of(family, HELD_OUT, seed=1)),
        "data_collator": collator(dtype),
    }
    logging.getLogger("hf_iau.unlearn").setLevel(logging.ERROR)
    return trainer_class(**(given | kwargs))


def collator(dtype: torch.dtype) -> Collator:
    """`pad_right()`, with numbers in `dtype`."""

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in pad_right()(rows).items()}

    return collate


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return parameters_of(model) | buffers


def assert_bits(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Every parameter and buffer is, bit for bit, as in `expected`."""
    now = state_of(model)
    assert now.keys() == expected.keys()
    moved = [name for name in now if not torch.equal(now[name], expected[name])]
    assert not moved, f"moved: {moved}"


def relative_distance(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Distance of two sets of weights, relative to the way that the second went from `start`."""

    def norm(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return float(sum(float((a[name].double() - b[name].double()).square().sum()) for name in b) ** 0.5)

    return norm(one, other) / norm(other, start)


def gradient_loop(model: nn.Module, rows: list[Row]) -> tuple[dict[str, Tensor], int]:
    """Σ of the rows' summed-loss gradients, float64, and the number of targets: a plain loop over single rows."""
    model = copy.deepcopy(model).eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in trained.items()}
    targets = 0
    causal = type(model).__name__.endswith("ForCausalLM") or type(model).__name__ == "GPT2LMHeadModel"
    for row in rows:
        batch = pad_right()([row])
        labels = batch["labels"][:, 1:] if causal else batch["labels"]
        count = 1 if labels.is_floating_point() else int((labels != -100).sum())
        loss = model(**batch)["loss"] * count  # the models' own loss is the mean over a row's targets
        for name, gradient in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
            total[name] += gradient
        targets += count
    return total, targets


def renewed(trainer: UnlearningTrainer) -> dict[str, Any]:
    """A further request, which estimates the curvature anew."""
    output = trainer.unlearn(forget_indices=list(range(50, 80)), config=IAUConfig(renew_curvature=0.0))
    calibration = output.report.diagnostics["calibration"]
    assert output.report.diagnostics["curvature"]["renewed"] and output.memory is not None
    found = {
        "spread": output.memory.is_sharded,
        "numbers": [calibration["scale"], calibration["damping"], output.report.diagnostics["step_norm"]],
        "path": output.memory.curvature_path,
    }
    output.revert()
    return found
