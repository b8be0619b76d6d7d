"""Targets: what a model predicted and what it should have, one line a target, whatever the task."""

from __future__ import annotations

import enum
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_iau.data.digests import sample_positions
from hf_iau.errors import UnsupportedModelError

IGNORED_LABEL = -100
SPAN_LABELS = ("start_positions", "end_positions")
"""Label columns of extractive question answering."""
LABELS = ("labels", *SPAN_LABELS)
"""Inputs that are labels."""
_DRAW_UNITS = 2.0**52
_LOOKED_AT = 256
# What fits in a processor's cache, and what keeps an accelerator busy.
_PART_BYTES = {True: 2**20, False: 2**26}
# Models whose labels are known to be real numbers.
_REAL_VALUED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class TaskKind(enum.StrEnum):
    """What one target of a row is."""

    SINGLE_LABEL = "single-label classification"
    TOKENS = "token prediction"
    MULTI_LABEL = "multi-label classification"
    REGRESSION = "regression"


@dataclass(frozen=True)
class Targets:
    """The targets of one batch.

    Attributes:
        kind: the task.
        logits: `(targets, classes)`, at least float32. For regression the predicted values, `(rows, outputs)`.
        labels: `(targets,)` int64 class numbers; `(rows, outputs)` floats for multi-label and regression.
        rows: `(targets,)` int64, the row of the batch that each target belongs to.
        n_rows: rows in the batch.
        order: `(targets,)` int64, the target's number within its row (independent of padding).
    """

    kind: TaskKind
    logits: Tensor
    labels: Tensor
    rows: Tensor
    n_rows: int
    order: Tensor

    def __len__(self) -> int:
        return int(self.rows.numel())

    def parts(self) -> Iterator[Targets]:
        """The same targets, few enough at a time that their logits are no more than `_PART_BYTES` on their device.

        For what takes several tensors as large as the logits, which of a large vocabulary are themselves many
        megabytes.
        """
        classes = self.logits.shape[1] if self.logits.dim() > 1 else 1
        size = max(_PART_BYTES[self.logits.device.type == "cpu"] // max(classes * self.logits.element_size(), 1), 1)
        for start in range(0, max(len(self), 1), size):
            part = slice(start, start + size)
            yield replace(
                self, logits=self.logits[part], labels=self.labels[part], rows=self.rows[part], order=self.order[part]
            )

    def losses(self) -> Tensor:
        """Plain loss of each target, shape `(targets,)`: cross-entropy, mean BCE over labels, or mean squared error."""
        if self.kind in (TaskKind.SINGLE_LABEL, TaskKind.TOKENS):
            return F.cross_entropy(self.logits, self.labels, reduction="none")
        if self.kind is TaskKind.MULTI_LABEL:
            return F.binary_cross_entropy_with_logits(self.logits, self.labels, reduction="none").mean(dim=1)
        return (self.logits - self.labels).square().mean(dim=1)

    def in_rows(self, values: Tensor) -> Tensor:
        """`values` of all targets, `(targets,)`, by row: `(rows, most targets of a row)`, NaN where there is none."""
        width = int(self.order.max()) + 1 if len(self) else 1
        lines = values.new_full((self.n_rows, width), float("nan"))
        lines[self.rows, self.order] = values
        return lines

    def fisher_loss(self, row_ids: np.ndarray, seed: int) -> Tensor:
        """Summed loss at labels drawn from the model itself; its row gradients have the true Fisher as second moment.

        Class labels are drawn by importance. A model that has memorised its rows is sure of nearly every label, and a
        plain draw y ~ p tells something about the curvature only in the rare case that it is a wrong label. So y is
        drawn from q_y ∝ p_y ‖p − e_y‖², the draw with the least variance of g gᵀ in the logits, and its gradient is
        weighted with ±√(p_y / q_y): E_q[(p/q) g gᵀ] = E_p[g gᵀ]. The random sign keeps the gradients of a row's
        several targets uncorrelated, as they are when labels are drawn from p.

        The draw of a target depends on `(seed, row id, the target's number in its row)` alone, so it is the same for
        every batch size, order and padding. For losses that are means over a row's outputs (multi-label, regression)
        the gradient is scaled so that its covariance is the Gauss-Newton matrix of that mean.

        Args:
            row_ids: `(rows,)` int, the rows' numbers in the training data.
            seed: the seed of the draw.

        Returns:
            A scalar to be differentiated.
        """
        uniforms = self._uniforms(row_ids, seed)
        if self.kind in (TaskKind.SINGLE_LABEL, TaskKind.TOKENS):
            with torch.no_grad():
                sizes = [len(part) for part in self.parts()]
                draws = [
                    _draw_by_importance(part.logits.double().softmax(dim=1), chosen)
                    for part, chosen in zip(self.parts(), uniforms.split(sizes), strict=True)
                ]
                drawn, weights = (torch.cat(found) for found in zip(*draws, strict=True))
            losses = F.cross_entropy(self.logits, drawn, reduction="none")
            return (weights.to(losses.dtype) * losses).sum()
        outputs = self.logits.shape[1]
        if self.kind is TaskKind.MULTI_LABEL:
            drawn = (uniforms < self.logits.detach().double().sigmoid()).to(self.logits.dtype)
            loss = F.binary_cross_entropy_with_logits(self.logits, drawn, reduction="sum")
        else:
            # The Hessian of (f - y)^2 is 2 J'J; a residual of variance 1/2 gives gradients 2 r J with that covariance.
            noise = torch.special.ndtri(uniforms.clamp(1e-12, 1 - 1e-12)) * 0.5**0.5
            loss = (self.logits - (self.logits.detach() + noise.to(self.logits.dtype))).square().sum()
        return loss / outputs**0.5

    def _uniforms(self, row_ids: np.ndarray, seed: int) -> Tensor:
        """`(targets, draws)` float64 in [0, 1): a label and a sign a class target, one an output otherwise."""
        draws = 2 if self.kind in (TaskKind.SINGLE_LABEL, TaskKind.TOKENS) else self.logits.shape[1]
        counts = torch.bincount(self.rows, minlength=self.n_rows).tolist()
        by_row = [
            np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, int(row_id)])).random((count, draws))
            for row_id, count in zip(row_ids, counts, strict=True)
        ]
        starts = np.cumsum([0, *counts[:-1]]) if counts else np.zeros(0, dtype=int)
        drawn = np.concatenate(by_row) if by_row else np.zeros((0, draws))
        ordered = drawn[starts[self.rows.cpu().numpy()] + self.order.cpu().numpy()]
        return torch.from_numpy(ordered).to(self.logits.device)


def _draw_by_importance(p: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Labels y ~ q ∝ p_y ‖p − e_y‖² and their signed weights ±√(p_y / q_y).

    Args:
        p: `(targets, classes)` float64 probabilities.
        uniforms: `(targets, 2)` in [0, 1), for the label and the sign.

    Returns:
        `(targets,)` int64 labels and `(targets,)` float64 weights.
    """
    importance = (p.square().sum(dim=1, keepdim=True) - 2.0 * p + 1.0).clamp_(min=0.0).mul_(p)  # p_y ‖p − e_y‖²
    total = importance.sum(dim=1, keepdim=True)
    certain = total <= 0.0  # one class has all the probability there is: no curvature, any draw will do
    importance = torch.where(certain, p, importance)
    total = torch.where(certain, p.sum(dim=1, keepdim=True), total)
    # Summed up in whole numbers, which are the same in any order: with floats, cumsum is not deterministic on GPUs.
    cumulative = (importance / total).mul_(_DRAW_UNITS).round_().long().cumsum(dim=1)
    threshold = (uniforms[:, :1] * cumulative[:, -1:]).floor().long()
    drawn = (cumulative <= threshold).sum(dim=1).clamp_(max=p.shape[1] - 1)
    chosen = drawn[:, None]
    ratio = p.gather(1, chosen) * total / importance.gather(1, chosen).clamp(min=1e-300)
    sign = torch.where(uniforms[:, 1:2] < 0.5, -1.0, 1.0)
    return drawn, (sign * ratio.sqrt()).squeeze(1)


def labels_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """A batch's labels: `labels`; or of question answering the tokens where answers start and end, `(rows, 2)`.

    As Transformers' models do it, an answer that lies beyond the tokens is ignored, and a negative place is the first.

    Raises:
        UnsupportedModelError: labels that are no tensor; an answer of which only one end lies beyond the tokens, whose
            model's loss depends on the rows beside it.
    """
    labels = inputs.get("labels")
    if labels is not None and not isinstance(labels, Tensor):
        raise UnsupportedModelError(
            f"`labels` are a {type(labels).__name__} instead of a tensor: object detection and other tasks with labels "
            "of several parts are not supported."
        )
    if labels is not None or not has_spans(inputs):
        return labels
    spans = torch.stack([inputs[name].reshape(-1) for name in SPAN_LABELS], dim=1).clamp(min=0)
    tokens = inputs.get("input_ids")
    if not isinstance(tokens, Tensor):
        return spans
    beyond = spans >= tokens.shape[1]
    if bool((beyond[:, 0] != beyond[:, 1]).any()):
        start, end = spans[beyond[:, 0] != beyond[:, 1]][0].tolist()
        raise UnsupportedModelError(
            f"start_positions={start} and end_positions={end} of a row of {tokens.shape[1]} tokens: one of them lies "
            "beyond the tokens, and the model's loss of such a row depends on the rows beside it. Set both to 0 (no "
            "answer), or both beyond."
        )
    return spans.masked_fill(beyond, IGNORED_LABEL)


def has_spans(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch's labels are starts and ends of answers."""
    return "labels" not in inputs and all(isinstance(inputs.get(name), Tensor) for name in SPAN_LABELS)


def takes_argument(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument `name`, or takes any."""
    base = base_model(model)
    parameters = inspect.signature(base.__dict__.get("_original_forward", base.forward)).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def read_logits(outputs: Any) -> Tensor:
    """The logits in a model's outputs: `outputs["logits"]`, or the first tensor after the loss of a tuple.

    Of question answering the logits of start and end, `(rows, 2, tokens)`.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if isinstance(outputs, Mapping):
        if "logits" in outputs:
            return outputs["logits"]
        if "start_logits" in outputs and "end_logits" in outputs:
            return torch.stack([outputs["start_logits"], outputs["end_logits"]], dim=1)
        raise UnsupportedModelError(
            f"The model returned {', '.join(map(str, outputs))} but no `logits`, so its predictions cannot be read. "
            "Return a mapping with `logits` (and `loss`)."
        )
    for item in outputs:
        if isinstance(item, Tensor) and item.dim() >= 2:
            return item
    raise UnsupportedModelError("The model's output tuple holds no tensor of two or more dimensions to read as logits.")


def base_model(model: nn.Module) -> nn.Module:
    """The Transformers model inside a PEFT wrapper, else `model` itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def input_columns(model: nn.Module) -> set[str]:
    """The columns of a row that the model's forward (or its labels) can use."""
    forward = base_model(model).__dict__.get("_original_forward", base_model(model).forward)
    return set(inspect.signature(forward).parameters) | {"label", "labels", "label_ids"}


def shifts_labels(model: nn.Module) -> bool:
    """Whether the model's own loss predicts the *next* token (decoder-only language models)."""
    base = base_model(model)
    config = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return False
    loss_type = getattr(base, "loss_type", None)
    if loss_type is None and hasattr(base, "loss_function"):
        # Transformers falls back on the causal loss for classes that it has no loss for, such as `GPT2LMHeadModel`.
        return _uses_loss_function(type(base).forward)
    return loss_type in ("ForCausalLM", "ForConditionalGeneration")


@functools.cache
def _uses_loss_function(forward: Callable[..., Any]) -> bool:
    """Whether a model's forward calls `self.loss_function`, rather than a loss of its own."""
    try:
        return "self.loss_function(" in inspect.getsource(forward)
    except (OSError, TypeError):
        return False


def count_targets(model: nn.Module, labels: Tensor | None, n_rows: int) -> int:
    """How many targets the model's mean loss is a mean over."""
    if labels is None or labels.is_floating_point():
        return n_rows
    if labels.dim() >= 2 and shifts_labels(model):
        labels = labels[..., 1:]
    return int(labels.ne(IGNORED_LABEL).sum())


def read_targets(model: nn.Module, outputs: Any, labels: Tensor | None) -> Targets:
    """Line up a batch's logits with its labels.

    Args:
        model: the model that made `outputs` (its configuration names the task).
        outputs: mapping, tuple or tensor of outputs.
        labels: `(rows,)`, `(rows, tokens)` int, or `(rows[, outputs])` float, see `labels_of`.

    Raises:
        UnsupportedModelError: when there are no labels or the shapes are of no supported task.
    """
    logits = read_logits(outputs)
    if logits.dim() == 0:  # squeezed, of one row
        logits = logits[None]
    if labels is None:
        raise UnsupportedModelError(
            "The rows have no `labels`, so there is no target to measure. Give the data set a `labels` column, or of "
            "question answering `start_positions` and `end_positions` (other tasks with several label columns are not "
            "supported)."
        )
    labels = labels.to(logits.device)
    problem = getattr(getattr(base_model(model), "config", None), "problem_type", None)
    n_rows = int(logits.shape[0])
    every_row = torch.arange(n_rows, device=logits.device)
    first = torch.zeros_like(every_row)

    scalar_output = logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)
    if problem == "regression" or (
        problem is None and logits.dim() <= 2 and (scalar_output or _is_real_valued(model, labels, logits))
    ):
        values = _wide(logits.reshape(n_rows, -1))
        return Targets(
            TaskKind.REGRESSION, values, labels.reshape(n_rows, -1).to(values.dtype), every_row, n_rows, first
        )
    if logits.dim() == 2 and labels.is_floating_point() and labels.shape == logits.shape:
        logits = _wide(logits)
        return Targets(TaskKind.MULTI_LABEL, logits, labels.to(logits.dtype), every_row, n_rows, first)
    if logits.dim() == 2 and not labels.is_floating_point() and labels.numel() == n_rows:
        flat = labels.reshape(-1).long()
        labelled = flat.ne(IGNORED_LABEL)
        return Targets(
            TaskKind.SINGLE_LABEL, _wide(logits[labelled]), flat[labelled], every_row[labelled], n_rows, first[labelled]
        )
    if logits.dim() == 3 and not labels.is_floating_point() and labels.shape == logits.shape[:2]:
        if shifts_labels(model):
            logits, labels = logits[:, :-1], labels[:, 1:]
        labelled = labels.ne(IGNORED_LABEL)
        order = labelled.long().cumsum(dim=1) - 1
        rows = every_row[:, None].expand_as(labels)
        return Targets(
            TaskKind.TOKENS, _wide(logits[labelled]), labels[labelled].long(), rows[labelled], n_rows, order[labelled]
        )
    raise UnsupportedModelError(
        f"Logits of shape {tuple(logits.shape)} with labels of shape {tuple(labels.shape)} and type {labels.dtype} are "
        "of no supported task (single-label, multi-label or token classification, language modelling, question "
        "answering, regression)."
    )


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32, where they are narrower."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def predicted_targets(model: nn.Module, inputs: Mapping[str, Any]) -> Targets:
    """Run `model` on a batch and line up its logits with the batch's labels, see `read_targets`."""
    given = {key: value for key, value in inputs.items() if key not in LABELS or takes_argument(model, key)}
    return read_targets(model, model(**given), labels_of(inputs))


def find_real_valued_labels(model: nn.Module, dataset: Any) -> None:
    """Settle by a look at up to 256 rows whether float labels are numbers to be met or indicators of classes.

    A model without a `problem_type` does not say it, and a batch whose labels all happen to be 0 or 1 cannot. Once a
    number is seen, the model is taken for a regression from then on.

    Args:
        model: whose labels they are.
        dataset: rows, of which those that are mappings with float `labels` (or `label`) are looked at.
    """
    base = base_model(model)
    if base in _REAL_VALUED or getattr(getattr(base, "config", None), "problem_type", None) is not None:
        return
    for position in sample_positions(len(dataset), _LOOKED_AT, 0):
        row = dataset[int(position)]
        labels = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
        try:
            values = np.asarray(labels)
        except ValueError:  # ragged
            return
        if values.dtype.kind != "f":
            return
        if ((values != 0) & (values != 1)).any():
            _REAL_VALUED.add(base)
            return


def _is_real_valued(model: nn.Module, labels: Tensor, logits: Tensor) -> bool:
    """Float labels that cannot be multi-label indicators."""
    if not labels.is_floating_point() or labels.numel() != logits.numel():
        return False
    base = base_model(model)
    if base not in _REAL_VALUED and bool(((labels != 0) & (labels != 1)).any()):
        _REAL_VALUED.add(base)
    return base in _REAL_VALUED
