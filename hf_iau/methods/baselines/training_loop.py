"""Passes over rows with an optimizer: what the methods that train on have in common.

The loss is the row loss of the request, divided by the targets of the batch; gradients are not clipped. The model is in
training mode, as in the public code of the methods: dropout is on and the running statistics of BatchNorm follow the
batches that are seen, forget rows among them. Autocast is off, whatever the Trainer's precision. Every draw (order of
the rows, dropout, labels) follows from the seed of the request, and the process' generators are left as they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import set_seed

from hf_iau.data import RowSource, evaluation_mode
from hf_iau.data.rows import Batch
from hf_iau.errors import NonFiniteGradientError, RequestError
from hf_iau.memory.gradient_sum import trainable_parameters
from hf_iau.methods.context import ForgetContext
from hf_iau.utils.config_checks import check_choice, check_number

Item = TypeVar("Item")

OPTIMIZERS = ("sgd", "adamw")


@dataclass(frozen=True)
class TrainingLoopConfig:
    """Configuration of passes over rows.

    Raises:
        ConfigError: a value is out of range.
    """

    epochs: int = field(default=10, metadata={"help": "Passes over the rows."})
    lr: float = field(default=0.01, metadata={"help": "Learning rate."})
    optimizer: str = field(
        default="sgd",
        metadata={"help": "'sgd', as in the public code for image models, or 'adamw', which suits transformers."},
    )
    momentum: float = field(default=0.9, metadata={"help": "Momentum of 'sgd' (first β of 'adamw')."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of the optimizer."})
    batch_size: int | None = field(
        default=None, metadata={"help": "Rows a batch; default: the Trainer's per_device_train_batch_size."}
    )

    def __post_init__(self) -> None:
        check_number(self, "epochs", at_least=1, whole=True)
        check_number(self, "lr", at_least=0)
        check_choice(self, "optimizer", OPTIMIZERS)
        check_number(self, "momentum", at_least=0, below=1)
        check_number(self, "weight_decay", at_least=0)
        check_number(self, "batch_size", at_least=1, whole=True, optional=True)

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimizer of `parameters`."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(
                parameters, lr=self.lr, betas=(self.momentum, 0.999), weight_decay=self.weight_decay
            )
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def shuffled(source: RowSource, batch_size: int | None, seed: int, epoch: int) -> Iterator[Batch]:
    """All rows of `source` once, in an order drawn from `(seed, epoch)`; the last batch may be smaller."""
    order = np.random.default_rng([seed, epoch]).permutation(len(source))
    for _, inputs in source.select(order).resized(fitting_batch_size(len(source), batch_size or source.batch_size)):
        yield inputs


def endless(source: RowSource, batch_size: int | None, seed: int) -> Iterator[Batch]:
    """Batches of `source` without end, shuffled anew each time round."""
    epoch = 0
    while True:
        yield from shuffled(source, batch_size, seed, epoch)
        epoch += 1


def batches_of(source: RowSource, batch_size: int | None) -> int:
    """How many batches one pass over `source` has."""
    return -(-len(source) // fitting_batch_size(len(source), batch_size or source.batch_size))


def fitting_batch_size(n_rows: int, wanted: int) -> int:
    """The smallest size of at least `wanted` that leaves no single row over: BatchNorm cannot train on one row."""
    size = wanted
    while 1 < size < n_rows and n_rows % size == 1:
        size += 1
    return size


def trained_parameters(context: ForgetContext) -> dict[str, nn.Parameter]:
    """The parameters that a request may move: those that the memory covers, else all trainable ones."""
    return trainable_parameters(context.model, None if context.memory is None else list(context.memory.parameters))


def mean_loss(context: ForgetContext, inputs: Batch) -> Tensor | None:
    """Row loss of a batch by target, or None where the batch holds no target."""
    loss, targets = context.row_loss(context.model, inputs)
    return loss / targets if targets else None


@contextlib.contextmanager
def training_mode(context: ForgetContext) -> Iterator[None]:
    """The model in training mode without autocast, and generators seeded; all of it undone afterwards."""
    with evaluation_mode(context.model), torch.enable_grad():
        with torch.no_grad():  # a loss that finds out its own scale does so here, not on training batches
            context.row_loss(context.model, context.forget.select([0]).first_batch())
        set_seed(context.seed)
        context.model.train()
        yield


def descend(
    context: ForgetContext,
    config: TrainingLoopConfig,
    items: Callable[[int], Iterable[Item]],
    loss_of: Callable[[Item], Tensor | None],
    *,
    method: str,
    items_per_epoch: int | None = None,
    learning_rate: Callable[[int], float] | None = None,
    mask: Mapping[str, Tensor] | None = None,
) -> list[float]:
    """Take one optimizer step an item.

    Args:
        context: of the request; its model is moved in place.
        config: epochs and optimizer.
        items: epoch → what is to be looped over, usually batches.
        loss_of: the loss to be lowered, a scalar; None skips the item.
        method: name for the progress bar and errors.
        items_per_epoch: for the progress bar.
        learning_rate: epoch → learning rate; default: `config.lr` throughout.
        mask: parameter name → boolean tensor; entries that are False do not move, bit for bit.

    Returns:
        The mean of the loss over each epoch.

    Raises:
        NonFiniteGradientError: the loss is no longer finite.
        RequestError: no item held a target.
    """
    parameters = trained_parameters(context)
    optimizer = config.make_optimizer(parameters.values())
    start = {name: p.detach().clone() for name, p in parameters.items()} if mask is not None else {}
    curve = []
    with training_mode(context):
        for epoch in range(config.epochs):
            if learning_rate is not None:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(epoch)
            losses = []
            bar = f"{method} {epoch + 1}/{config.epochs}"
            for item in tqdm(items(epoch), total=items_per_epoch, desc=bar, disable=not context.progress):
                loss = loss_of(item)
                if loss is None:
                    continue
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                for name, may_move in (mask or {}).items():
                    gradient = parameters[name].grad
                    if gradient is not None:
                        gradient.mul_(may_move)
                optimizer.step()
                with torch.no_grad():
                    for name, may_move in (mask or {}).items():  # weight decay moves masked entries too
                        parameters[name].copy_(torch.where(may_move, parameters[name], start[name]))
                losses.append(loss.detach())
            if not losses:
                raise RequestError(f"method={method!r} found no target in any batch (all labels are ignored).")
            curve.append(float(torch.stack(losses).double().mean()))
            if not np.isfinite(curve[-1]):
                raise NonFiniteGradientError(
                    f"method={method!r}: the loss of epoch {epoch + 1} is {curve[-1]}, so nothing was changed. Lower "
                    f"lr={config.lr:g} or epochs={config.epochs}."
                )
    return curve
