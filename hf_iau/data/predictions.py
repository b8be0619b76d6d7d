"""One forward pass over some rows: what a model makes of each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn

from hf_iau.data.model_mode import evaluation_mode
from hf_iau.data.rows import RowSource
from hf_iau.data.targets import Targets, TaskKind, predicted_targets
from hf_iau.distributed import all_gather_arrays, sync_errors
from hf_iau.errors import RequestError


@dataclass(frozen=True)
class RowPredictions:
    """Per-row figures of a model, each a float64 array of shape `(rows,)`; NaN for rows without a target.

    Attributes:
        kind: the task.
        loss: plain cross-entropy (or BCE, squared error), mean over the row's targets.
        correct: share of the row's targets predicted correctly (0 or 1 for a classifier; NaN for regression).
        confidence: mean probability of the true label (NaN for regression).
        entropy: mean entropy of the predicted distribution, in nats.
        modified_entropy: Song & Mittal's label-aware entropy (arXiv 2003.10595, equation 4), mean over targets.
        targets: number of targets in the row.
        label: the true class of a single-label row, else NaN.
        predicted: the predicted class of a single-label row, else NaN.
        probabilities: `(rows, classes)` predicted distribution of single-label rows when asked for, else None.
        token_losses: `(rows, most tokens of a row)`, the loss of each token of token-prediction rows, NaN beyond
            a row's last; None for other tasks.
    """

    kind: TaskKind
    loss: np.ndarray
    correct: np.ndarray
    confidence: np.ndarray
    entropy: np.ndarray
    modified_entropy: np.ndarray
    targets: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray | None = None
    token_losses: np.ndarray | None = None

    @classmethod
    def from_probabilities(cls, probabilities: np.ndarray, labels: np.ndarray | None = None) -> RowPredictions:
        """The figures of single-label rows with given predicted distributions, by the formulas of `predict_rows`.

        Args:
            probabilities: each row's predicted distribution (after the softmax), shape `(rows, classes)`.
            labels: true classes, whole numbers from 0, shape `(rows,)`; None for rows without labels, whose figures
                are then NaN.

        A probability of 0 has the loss of the smallest normal float64, about 708 nats.

        Raises:
            RequestError: for other shapes, labels that are no classes, or rows that are no distributions.
        """
        p = np.asarray(probabilities, dtype=np.float64)
        if p.ndim != 2 or p.shape[1] < 2:
            raise RequestError(f"probabilities has shape {p.shape}: give (rows, classes), with at least 2 classes.")
        wrong = ~((p >= -1e-6).all(axis=1) & (np.abs(p.sum(axis=1) - 1) <= 1e-2))
        if wrong.any():
            raise RequestError(
                f"{int(wrong.sum())} of {len(p)} rows of probabilities are no distributions (row "
                f"{int(np.flatnonzero(wrong)[0])} sums to {p[wrong][0].sum():.4g}): apply the softmax to the logits "
                "first."
            )
        if labels is None:
            missing = np.full(len(p), np.nan)
            names = (name for name in _figures_of_a_row() if name != "targets")
            return cls(
                TaskKind.SINGLE_LABEL, **dict.fromkeys(names, missing), targets=np.zeros(len(p)), probabilities=p
            )
        y = np.asarray(labels)
        if y.shape != (len(p),) or (len(y) and not ((y == y.astype(np.int64)) & (y >= 0) & (y < p.shape[1])).all()):
            raise RequestError(
                f"labels of shape {y.shape} with values {np.unique(y)[:5].tolist()} …: give each of the {len(p)} rows "
                f"a class from 0 to {p.shape[1] - 1}."
            )
        logits = torch.from_numpy(np.log(np.maximum(p, np.finfo(np.float64).tiny)))
        classes = torch.from_numpy(y.astype(np.int64))
        positions = torch.arange(len(p))
        targets = Targets(TaskKind.SINGLE_LABEL, logits, classes, positions, len(p), torch.zeros_like(positions))
        figures = _target_figures(targets)
        values = {name: figure.double().numpy() for name, figure in figures.items()}
        return cls(TaskKind.SINGLE_LABEL, **values, targets=np.ones(len(p)), probabilities=p)

    @classmethod
    def from_losses(cls, losses: np.ndarray) -> RowPredictions:
        """Rows of which only the loss is known, shape `(rows,)`: the loss attack is all that can be made of them."""
        loss = np.asarray(losses, dtype=np.float64).reshape(-1)
        names = (name for name in _figures_of_a_row() if name not in ("loss", "targets"))
        missing = np.full(len(loss), np.nan)
        return cls(TaskKind.REGRESSION, loss=loss, **dict.fromkeys(names, missing), targets=np.ones(len(loss)))

    def __len__(self) -> int:
        return len(self.loss)

    def select(self, positions: np.ndarray) -> RowPredictions:
        """The figures of the rows at `positions` (int or bool array)."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        return RowPredictions(
            **{name: value[positions] if isinstance(value, np.ndarray) else value for name, value in chosen.items()}
        )

    @property
    def target_losses(self) -> np.ndarray:
        """The loss of each target: `(rows, most tokens of a row)` for token prediction, else `(rows,)`."""
        return self.loss if self.token_losses is None else self.token_losses

    @property
    def mean_loss(self) -> float:
        """Mean loss a target, over all targets of all rows; NaN if the loss of any row with targets is."""
        counted = self.targets > 0
        return float(np.sum(self.loss[counted] * self.targets[counted]) / max(self.targets.sum(), 1))

    @property
    def accuracy(self) -> float:
        """Share of all targets predicted correctly; NaN for regression."""
        if np.isnan(self.correct).all():
            return float("nan")
        return float(np.nansum(self.correct * self.targets) / max(self.targets.sum(), 1))


def predict_rows(model: nn.Module, source: RowSource, *, keep_probabilities: bool = False) -> RowPredictions:
    """Run `model` over the rows of `source` in evaluation mode, without gradients.

    Of several processes, each takes its share of the rows; all get the figures of all rows, in their order.

    Args:
        model: the bare model.
        source: the rows, with labels.
        keep_probabilities: keep each single-label row's distribution, `(rows, classes)`.
    """
    what = f"the predictions for the {source.name}"
    with sync_errors(what):
        own, own_kind = _predict_own_rows(model, source, keep_probabilities)
        parts = all_gather_arrays(own, {"kind": None if own_kind is None else own_kind.value}, what)
    filled = [(arrays, about["kind"]) for arrays, about in parts if about["kind"] is not None]
    if not filled:
        return RowPredictions(kind=TaskKind.SINGLE_LABEL, **{name: np.zeros(0) for name in _figures_of_a_row()})
    arrays = {name: stacked([part[name] for part, _ in filled]) for name in filled[0][0]}
    return RowPredictions(kind=TaskKind(filled[-1][1]), **arrays)


def stacked(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One array of rows from several, `(rows,)` or `(rows, width)` each; unequal widths are filled up with NaN."""
    width = max((part.shape[1] for part in parts if part.ndim == 2), default=0)
    return np.concatenate(
        [
            np.pad(part, ((0, 0), (0, width - part.shape[1])), constant_values=np.nan)
            if part.ndim == 2 and part.shape[1] < width
            else part
            for part in parts
        ]
    )


def _figures_of_a_row() -> list[str]:
    return [f.name for f in fields(RowPredictions) if f.name not in ("kind", "probabilities", "token_losses")]


def _predict_own_rows(
    model: nn.Module, source: RowSource, keep_probabilities: bool
) -> tuple[dict[str, np.ndarray], TaskKind | None]:
    collected: dict[str, list[Tensor]] = {}
    token_losses: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    kind: TaskKind | None = None
    with evaluation_mode(model), torch.no_grad():
        for positions, inputs, counts_here in source.passes(model):
            targets = predicted_targets(model, inputs)
            if not counts_here:
                continue
            seen.append(positions)
            kind = targets.kind
            figures = _target_figures(targets)
            if kind is TaskKind.TOKENS:
                token_losses.append(targets.in_rows(figures["loss"]).cpu().numpy())
            counts = torch.bincount(targets.rows, minlength=targets.n_rows).double()
            for name, values in figures.items():
                sums = torch.zeros(targets.n_rows, dtype=torch.float64, device=values.device)
                sums.index_add_(0, targets.rows, values.double())
                collected.setdefault(name, []).append((sums / counts).cpu())  # 0/0 is NaN: a row without targets
            collected.setdefault("targets", []).append(counts.cpu())
            if keep_probabilities and kind is TaskKind.SINGLE_LABEL:
                collected.setdefault("probabilities", []).append(targets.logits.softmax(dim=1).cpu())
    order = np.argsort(np.concatenate(seen)) if seen else np.zeros(0, dtype=np.int64)
    arrays = {name: torch.cat(parts).numpy()[order] for name, parts in collected.items()}
    if token_losses:
        arrays["token_losses"] = stacked(token_losses)[order]
    return arrays, kind


def _target_figures(targets: Targets) -> dict[str, Tensor]:
    """Figure → its values, `(targets,)`."""
    parts = [_figures_of_part(part.kind, part.logits, part.labels, part.losses()) for part in targets.parts()]
    return {name: torch.cat([figures[name] for figures in parts]) for name in parts[0]}


def _figures_of_part(kind: TaskKind, logits: Tensor, labels: Tensor, losses: Tensor) -> dict[str, Tensor]:
    missing = torch.full_like(losses, float("nan"))
    figures = {"loss": losses, "label": missing, "predicted": missing}
    if kind is TaskKind.REGRESSION:
        return figures | dict.fromkeys(("correct", "confidence", "entropy", "modified_entropy"), missing)
    if kind is TaskKind.MULTI_LABEL:
        p = logits.sigmoid().clamp(1e-12, 1 - 1e-7)
        entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean(dim=1)
        of_label = torch.where(labels > 0.5, p, 1 - p)
        # Two classes an output: the modified entropy reduces to -2 (1 - p_y) log p_y.
        modified = (-2 * (1 - of_label) * of_label.log()).mean(dim=1)
        correct = ((logits > 0) == (labels > 0.5)).double().mean(dim=1)
        return figures | {
            "correct": correct,
            "confidence": of_label.mean(dim=1),
            "entropy": entropy,
            "modified_entropy": modified,
        }
    log_p = logits.log_softmax(dim=1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=1)
    predicted = logits.argmax(dim=1)
    p_y = p.gather(1, labels[:, None]).squeeze(1)
    log_rest = torch.log1p(-p.clamp(max=1 - 1e-7))
    others = -(p * log_rest).sum(dim=1) + p_y * log_rest.gather(1, labels[:, None]).squeeze(1)
    modified = (1 - p_y) * losses + others
    figures |= {
        "correct": (predicted == labels).double(),
        "confidence": p_y,
        "entropy": entropy,
        "modified_entropy": modified,
    }
    if kind is TaskKind.SINGLE_LABEL:
        figures |= {"label": labels.double(), "predicted": predicted.double()}
    return figures
