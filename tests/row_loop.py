"""The obviously right for-loop that gradient sums are compared with: one row, its summed loss, `torch.autograd.grad`.

Nothing of `hf_iau` is used here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tiny_models import Collator, Row
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}

SummedLoss = Callable[[Tensor, Tensor], Tensor]


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    # Transformers computes a language model's loss from float32 logits, also in a float64 model.
    return token_loss(logits[:, :-1].float(), labels[:, 1:])


def multi_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    # A row's loss is the mean over its labels, as the model's own.
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / logits.shape[1]


def regression_loss(logits: Tensor, labels: Tensor) -> Tensor:
    values = labels.reshape(logits.shape).to(logits.dtype)
    return F.mse_loss(logits, values, reduction="sum") / logits.shape[1]


LOSSES: dict[str, SummedLoss] = {
    "bert": class_loss,
    "bert-tokens": token_loss,
    "roberta": class_loss,
    "gpt2": next_token_loss,
    "gpt2-classifier": class_loss,
    "llama": next_token_loss,
    "llama-classifier": class_loss,
    "vit": class_loss,
    "resnet": class_loss,
    "plain": class_loss,
    "lora": class_loss,
}


def in_dtype(collator: Collator, dtype: torch.dtype) -> Collator:
    """`collator` with floats in `dtype`."""

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in collator(rows).items()}

    return collate


def row_gradients(
    model: nn.Module, rows: Any, collator: Collator, loss: SummedLoss
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """(Σ ∇ℓ, the rows' ∇ℓ) in float64, by name of the trainable parameters."""
    model = copy.deepcopy(model).eval()
    model.__dict__.pop("forward", None)  # Accelerate's autocast wrapper, if there is one
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    each = []
    for number in range(len(rows)):
        inputs = dict(collator([rows[number]]))
        labels = inputs.pop("labels")
        value = loss(model(**inputs)["logits"], labels)
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        each.append(
            {
                name: torch.zeros_like(p, dtype=torch.float64) if g is None else g.double()
                for (name, p), g in zip(parameters.items(), gradients, strict=True)
            }
        )
    return {name: sum(row[name] for row in each) for name in parameters}, each  # type: ignore[misc]


def norm(tensors: dict[str, Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors.values()) ** 0.5


def relative_error(found: dict[str, Tensor], reference: dict[str, Tensor], each: list[dict[str, Tensor]]) -> float:
    """‖found − reference‖ / Σ‖∇ℓ_i‖."""
    assert found.keys() == reference.keys()
    assert {tensor.dtype for tensor in found.values()} <= {torch.float32, torch.float64}
    return norm({name: found[name] - reference[name] for name in reference}) / sum(norm(row) for row in each)
