"""The row loss: the objective that was trained, *summed* over the rows of a batch and free of every divisor.

A Trainer divides its loss by something that depends on the model class, its version, the accumulation steps and the
process count. None of that may reach a number that is kept, so each `RowLoss` finds out once how the loss at hand
scales and undoes it: sum-reduced where `num_items_in_batch=1` is honoured, mean times target count where it is not.
"""

from __future__ import annotations

import abc
import hashlib
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_iau.data.rows import Batch
from hf_iau.data.targets import (
    LABELS,
    SPAN_LABELS,
    TaskKind,
    base_model,
    count_targets,
    has_spans,
    labels_of,
    predicted_targets,
    read_targets,
    takes_argument,
)
from hf_iau.distributed import all_gather_arrays, is_sharded
from hf_iau.errors import UnsupportedModelError

LABEL_COLUMNS = ("labels", "label", "label_ids")

UserLossFunction = Callable[[nn.Module, Batch], Tensor]


class RowLoss(abc.ABC):
    """Sum over the rows of a batch of ℓ(row); ℓ(row) is itself the sum over the row's targets."""

    kind: str = "row loss"

    @abc.abstractmethod
    def __call__(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, int]:
        """Returns `(Σ ℓ, number of targets)`; the first is a differentiable scalar."""

    def fingerprint(self) -> dict[str, str]:
        """JSON that names the loss; equal losses give equal fingerprints in every process."""
        return {"kind": self.kind}


class _ScaledRowLoss(RowLoss):
    """A loss of unknown scale, probed once a model: is it a sum over `num_items_in_batch`, or a mean over targets?"""

    def __init__(self) -> None:
        # What makes Σ ℓ of the loss that is given one item; 0 for a mean over targets, whatever number it is given.
        self._factor: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()

    @abc.abstractmethod
    def _loss(self, model: nn.Module, inputs: Batch, num_items: int) -> Tensor:
        """The loss as the library computes it when told that the batch has `num_items` items."""

    def __call__(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, int]:
        labels = labels_of(inputs)
        n_targets = count_targets(model, labels, batch_rows(inputs))
        counts = 1.0
        if n_targets == 0:  # nothing but ignored labels: no loss, and a mean over them would be NaN
            if labels is None or not is_sharded(model):
                return sum((p.sum() * 0.0 for p in model.parameters() if p.requires_grad), torch.zeros(())), 0
            # All processes pass through a sharded model: with labels of some kind.
            counts, inputs = 0.0, with_some_labels(inputs)
        if model not in self._factor:
            self._find_scale(model, inputs)
        loss = self._loss(model, inputs, 1) * counts
        return loss * (self._factor.get(model) or n_targets), n_targets

    def _find_scale(self, model: nn.Module, inputs: Batch) -> None:
        """Whether the loss halves with twice the items; left open where it is zero or not finite.

        Of question answering Transformers has two kinds of sum: over starts and ends, and half of that.
        """
        with torch.no_grad():
            one, two = (float(self._loss(model, inputs, items)) for items in (1, 2))
            whole = float(predicted_targets(model, inputs).losses().sum()) if has_spans(inputs) else one
        factors: list[float] = []
        if one != 0.0 and np.isfinite(one):
            is_sum = abs(one - 2.0 * two) <= 1e-3 * abs(one)
            factors = [(2.0 if abs(2.0 * one - whole) < abs(one - whole) else 1.0) if is_sum else 0.0]
        if is_sharded(model):  # so that all take the same passes from here on
            by_rank = all_gather_arrays({}, {"factors": factors}, "the scale of the loss")
            factors = [value for _, about in by_rank for value in about["factors"]]
        if factors:
            self._factor[model] = factors[0]


class ModelRowLoss(_ScaledRowLoss):
    """The loss that the model itself returns when it is given labels."""

    kind = "model"

    def _loss(self, model: nn.Module, inputs: Batch, num_items: int) -> Tensor:
        if "labels" in inputs and not takes_argument(model, "labels"):
            raise UnsupportedModelError(
                f"{type(model).__name__}.forward takes no `labels`, so it returns no loss. Pass `compute_loss_func=` "
                "or `row_loss=`, or give forward a `labels` argument and let it return a mapping with `loss`."
            )
        outputs = model(**inputs, **({"num_items_in_batch": num_items} if accepts_loss_kwargs(model) else {}))
        loss = outputs.get("loss") if hasattr(outputs, "get") else outputs[0] if isinstance(outputs, tuple) else None
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise UnsupportedModelError(
                f"{type(model).__name__}.forward returned no scalar `loss` for inputs {sorted(inputs)}. Give the rows "
                "`labels`, return a mapping with `loss`, or pass `compute_loss_func=` to the trainer or `row_loss=`."
            )
        return loss


class OutputRowLoss(_ScaledRowLoss):
    """The Trainer's `compute_loss_func(outputs, labels, num_items_in_batch=…)`."""

    kind = "compute_loss_func"

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def _loss(self, model: nn.Module, inputs: Batch, num_items: int) -> Tensor:
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        extra = {"num_items_in_batch": num_items} if accepts_loss_kwargs(model) else {}
        return self.function(model(**inputs, **extra), labels, num_items_in_batch=num_items)

    def fingerprint(self) -> dict[str, str]:
        return {"kind": self.kind, **describe_function(self.function)}


class TrainerRowLoss(_ScaledRowLoss):
    """A Trainer subclass's own `compute_loss`."""

    kind = "compute_loss"

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer = weakref.ref(trainer)
        self.description = describe_function(type(trainer).compute_loss)

    def _loss(self, model: nn.Module, inputs: Batch, num_items: int) -> Tensor:
        trainer = self.trainer()
        if trainer is None:
            raise UnsupportedModelError("The trainer whose `compute_loss` is the row loss no longer exists.")
        across, trainer.args.average_tokens_across_devices = trainer.args.average_tokens_across_devices, False
        try:
            return trainer.compute_loss(model, dict(inputs), num_items_in_batch=torch.tensor(float(num_items)))
        finally:
            trainer.args.average_tokens_across_devices = across

    def fingerprint(self) -> dict[str, str]:
        return {"kind": self.kind, **self.description}


class SmoothedRowLoss(RowLoss):
    """Cross-entropy with the Trainer's `label_smoothing_factor` (Transformers' `LabelSmoother`, summed)."""

    kind = "label smoothing"

    def __init__(self, epsilon: float) -> None:
        self.epsilon = float(epsilon)

    def __call__(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, int]:
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None and labels_of(inputs) is not None:
            raise UnsupportedModelError(
                f"label_smoothing_factor={self.epsilon} is of no effect where rows have {' and '.join(SPAN_LABELS)}: "
                "the Trainer smooths `labels` alone. Leave it at 0."
            )
        targets = read_targets(model, model(**inputs), labels)
        if targets.kind not in (TaskKind.SINGLE_LABEL, TaskKind.TOKENS):
            raise UnsupportedModelError(
                f"label_smoothing_factor={self.epsilon} has no meaning for {targets.kind.value}."
            )
        log_probabilities = F.log_softmax(targets.logits, dim=1)
        true = -log_probabilities.gather(1, targets.labels[:, None]).sum()
        spread = -log_probabilities.mean(dim=1).sum()
        return (1.0 - self.epsilon) * true + self.epsilon * spread, len(targets)

    def fingerprint(self) -> dict[str, str]:
        return {"kind": self.kind, "epsilon": repr(self.epsilon)}


class UserRowLoss(RowLoss):
    """`row_loss(model, inputs)`, given by the user.

    Args:
        function: returns either the rows' losses, shape `(rows,)`, or their sum, a scalar; never a mean.
    """

    kind = "row_loss"

    def __init__(self, function: UserLossFunction) -> None:
        self.function = function

    def __call__(self, model: nn.Module, inputs: Batch) -> tuple[Tensor, int]:
        loss = self.function(model, dict(inputs))
        rows = batch_rows(inputs)
        if not isinstance(loss, Tensor) or loss.numel() not in (1, rows):
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise UnsupportedModelError(
                f"row_loss returned {shape} for a batch of {rows} rows: return a tensor of shape ({rows},) with each "
                "row's loss, or their sum as a scalar."
            )
        return loss.sum(), count_targets(model, labels_of(inputs), rows)

    def fingerprint(self) -> dict[str, str]:
        return {"kind": self.kind, **describe_function(self.function)}


def batch_rows(inputs: Batch) -> int:
    """How many rows a collated batch holds."""
    for key in ("labels", "input_ids", "pixel_values"):
        if isinstance(inputs.get(key), Tensor) and inputs[key].dim() > 0:
            return int(inputs[key].shape[0])
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return int(value.shape[0])
    raise UnsupportedModelError(f"The collated batch holds no tensor to count rows by, only {sorted(inputs)}.")


def accepts_loss_kwargs(model: nn.Module) -> bool:
    """Whether the model's forward takes `num_items_in_batch` (it may still ignore it)."""
    base = base_model(model)
    declared = getattr(base, "accepts_loss_kwargs", None)
    if declared is False:
        return False
    return takes_argument(base, "num_items_in_batch")


def with_some_labels(inputs: Batch) -> Batch:
    """A batch whose labels are all class or place 0, where all were ignored."""
    return {key: torch.zeros_like(value) if key in LABELS else value for key, value in inputs.items()}


def describe_function(function: Callable[..., Any]) -> dict[str, str]:
    """A function's name and a digest of its source (or byte code)."""
    target = getattr(function, "func", function)  # functools.partial
    name = f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', type(target).__qualname__)}"
    try:
        body = inspect.getsource(target if isinstance(target, (types.FunctionType, types.MethodType)) else type(target))
    except (OSError, TypeError):
        code = getattr(target, "__code__", None)
        body = code.co_code.hex() if code is not None else name
    return {"function": name, "source": hashlib.sha256(body.encode()).hexdigest()[:16]}
