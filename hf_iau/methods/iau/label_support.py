"""Which forget rows have a label that nothing but the row itself supports: wrong labels, poison.

A model trained without such a row would not give it that label, so the row's target is what held-out rows lose on
labels that nobody taught. Whether other rows support a label is read from the model's own features: a linear probe on
the retained rows predicts the labels of the others. In late layers a model that knows its rows by heart has put every
row where its label says; so the probe takes the layer that tells held-out rows well and treats training rows, by
leave-one-out, little better than held-out ones (compare "prediction depth": Baldock et al. 2021, arXiv 2106.09647;
out-of-sample predictions as evidence of wrong labels: Northcutt et al. 2021, arXiv 1911.00068).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_iau.data import RowPredictions, RowSource
from hf_iau.data.model_mode import evaluation_mode
from hf_iau.data.targets import TaskKind
from hf_iau.distributed import all_gather_arrays, sync_errors

# Rows of each kind that the probe learns from and is checked on.
_ROWS = 1000
# Layers that are looked at, evenly spread; features of each, by a fixed random projection where there are more.
_LAYERS, _WIDTH = 8, 256
_SIDE = 4  # images are averaged over so many places a side
# Ridge penalties that are tried, of the features' mean squared norm; the best by leave-one-out is taken.
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
# What a layer's accuracy on held-out rows is reduced by, for each point that leave-one-out on training rows is better:
# there the layer has begun to put rows where their labels say, and rows with wrong labels more than any.
_COST_OF_MEMORISING = 3.0
# The share of rows without support must be above that of held-out rows by so many standard errors (1 % by chance).
_STANDARD_ERRORS = 2.6
_SEED = 11


@dataclass(frozen=True)
class LabelSupport:
    """What the rows of a request are, by whether anything else supports their labels.

    Attributes:
        unsupported: bool, `(forget rows,)`.
        margins: float64, `(forget rows,)`: the probe's score of the row's label less the best of the others; the
            higher, the more the label is supported. Zeros where the caller said what the rows are.
        untaught_losses: float64, `(pairs,)`: what the model loses on labels that nobody taught, of held-out rows.
        found: whether it was found out, and not told.
        layer: the name of the layer that was read; "" where none was.
        share, held_out_share: share of the forget rows, and of the held-out rows, whose label is likelier wrong.
    """

    unsupported: np.ndarray
    margins: np.ndarray
    untaught_losses: np.ndarray
    found: bool
    layer: str = ""
    share: float = 0.0
    held_out_share: float = 0.0

    @classmethod
    def told(cls, forget: RowPredictions, held_out: RowPredictions) -> LabelSupport:
        """Of rows that are all known to have wrong labels.

        Args:
            forget, held_out: what the model makes of the rows; of the held-out rows with probabilities.
        """
        rows = len(forget)
        return cls(np.ones(rows, dtype=bool), np.zeros(rows), untaught_losses(held_out, forget.label), found=False)

    def targets(self, losses: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """`losses`, the targets of the rows at `positions` (float64, `(m,)`), those without support replaced."""
        chosen = self.unsupported[positions]
        count = int(chosen.sum())
        if not count:
            return losses
        # Rows may change places among themselves: the best supported gets the smallest of the losses.
        order = np.argsort(np.argsort(-self.margins[positions][chosen], kind="stable"))
        replaced = losses.copy()
        levels = np.quantile(self.untaught_losses, (np.arange(count) + 0.5) / count)
        replaced[chosen] = np.maximum(levels[order], losses[chosen])
        return replaced

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, of no single row."""
        return {
            "unsupported": int(self.unsupported.sum()),
            "rows": len(self.unsupported),
            "found_out": self.found,
            "layer": self.layer,
            "likelier_wrong": self.share,
            "likelier_wrong_among_held_out": self.held_out_share,
        }


def untaught_losses(held_out: RowPredictions, labels: np.ndarray, seed: int = _SEED) -> np.ndarray:
    """−log p of labels that nobody taught, one for each held-out row: float64, `(rows,)`.

    Args:
        held_out: with probabilities.
        labels: the classes to draw from, as often as the forget rows have them; those a row is predicted to be of, and
            its own, are not drawn.
        seed: of the draw.
    """
    assert held_out.probabilities is not None
    rng = np.random.default_rng(seed)
    p = held_out.probabilities
    counts = np.bincount(labels.astype(int), minlength=p.shape[1]).astype(np.float64)
    weights = np.tile(counts, (len(p), 1))
    rows = np.arange(len(p))
    weights[rows, held_out.predicted.astype(int)] = 0.0
    weights[rows, held_out.label.astype(int)] = 0.0
    drawn = weights.sum(axis=1) > 0
    shares = np.cumsum(weights[drawn], axis=1)
    chosen = (shares < rng.random(int(drawn.sum()))[:, None] * shares[:, -1:]).sum(axis=1)
    losses: np.ndarray = -np.log(np.maximum(p[drawn, chosen], np.finfo(np.float64).tiny))
    return losses


def find_label_support(
    model: nn.Module,
    rows: tuple[RowSource, RowSource, RowSource],
    predictions: tuple[RowPredictions, RowPredictions, RowPredictions],
) -> LabelSupport | None:
    """Find out which labels nothing else supports; None where the rows have no classes, or there are too few.

    Args:
        model: the bare model.
        rows: all forget rows, retained rows, held-out rows.
        predictions: of the same; of the held-out rows with probabilities.
    """
    forget, retained, held_out = predictions
    if any(seen.kind is not TaskKind.SINGLE_LABEL or np.isnan(seen.label).any() for seen in predictions):
        return None
    picked = [np.arange(min(len(seen), _ROWS)) for seen in (retained, held_out)]
    if min(len(part) for part in picked) < 50:
        return None
    sources = [rows[0], *(source.select(part) for source, part in zip(rows[1:], picked, strict=True))]
    features = layer_features(model, sources)
    classes = int(max(seen.label.max() for seen in predictions)) + 1
    labels = [seen.label.astype(int) for seen in (forget, retained.select(picked[0]), held_out.select(picked[1]))]
    best: tuple[float, str, np.ndarray, np.ndarray] | None = None
    for name, (of_forget, of_retained, of_held_out) in features.items():
        probe = _Probe(of_retained, labels[1], classes)
        scores = probe.scores(of_held_out)
        accuracy = float((scores.argmax(axis=1) == labels[2]).mean())
        merit = accuracy - _COST_OF_MEMORISING * max(probe.accuracy - accuracy, 0.0)
        if best is None or merit > best[0]:
            best = (merit, name, probe.scores(of_forget), scores)
    if best is None:
        return None
    _, name, of_forget, of_held_out = best
    rng = np.random.default_rng(_SEED)
    others = (labels[2] + rng.integers(1, max(classes, 2), size=len(labels[2]))) % classes
    right, wrong = _margins(of_held_out, labels[2]), _margins(of_held_out, others)
    margins = _margins(of_forget, labels[0])
    ratio = _likelihood_ratio(right, wrong)
    share = _share_of_wrong(ratio(margins))
    # More of the forget rows than of the held-out rows must be likelier wrong than right: else all are like any others.
    likelier, among_held_out = float((ratio(margins) > 1.0).mean()), float((ratio(right) > 1.0).mean())
    expected = min(max(among_held_out, 1.0 / len(right)), 1.0 - 1.0 / len(right))
    error = (expected * (1.0 - expected) * (1.0 / len(margins) + 1.0 / len(right))) ** 0.5
    more = likelier - among_held_out > _STANDARD_ERRORS * error
    unsupported = share * ratio(margins) > (1.0 - share) if more else np.zeros(len(margins), dtype=bool)
    untaught = untaught_losses(held_out, forget.label[unsupported] if unsupported.any() else forget.label)
    return LabelSupport(unsupported, margins, untaught, True, name, likelier, among_held_out)


class _Probe:
    """A ridge regression of one-hot labels on standardised features, the penalty by leave-one-out.

    Attributes:
        accuracy: by leave-one-out.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, classes: int) -> None:
        self._mean, self._scale = features.mean(axis=0), features.std(axis=0) + 1e-6
        x = self._standard(features)
        y = np.eye(classes)[labels]
        gram = x.T @ x
        values, vectors = np.linalg.eigh(gram)
        rotated, target = x @ vectors, vectors.T @ (x.T @ y)
        self.accuracy = -1.0
        for penalty in _PENALTIES:
            inverse = 1.0 / (np.maximum(values, 0.0) + penalty * np.trace(gram) / len(gram))
            leverage = np.minimum((rotated**2 * inverse).sum(axis=1), 1.0 - 1e-9)[:, None]
            without = (rotated @ (inverse[:, None] * target) - leverage * y) / (1.0 - leverage)
            accuracy = float((without.argmax(axis=1) == labels).mean())
            if accuracy > self.accuracy:
                self.accuracy, self._weights = accuracy, vectors @ (inverse[:, None] * target)

    def scores(self, features: np.ndarray) -> np.ndarray:
        """`(rows, classes)`."""
        found: np.ndarray = self._standard(features) @ self._weights
        return found

    def _standard(self, features: np.ndarray) -> np.ndarray:
        return np.concatenate([(features - self._mean) / self._scale, np.ones((len(features), 1))], axis=1)


def _margins(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Score of each row's label less the best of the others, `(rows,)`."""
    rows = np.arange(len(labels))
    others = scores.copy()
    others[rows, labels] = -np.inf
    margins: np.ndarray = scores[rows, labels] - others.max(axis=1)
    return margins


def _likelihood_ratio(right: np.ndarray, wrong: np.ndarray) -> Any:
    """How many times likelier a margin is of a wrong label than of a right one, by two normal distributions of which
    the ratio may only fall with the margin (equal spread)."""
    spread = ((right.var() + wrong.var()) / 2.0) ** 0.5 + 1e-9
    middle, distance = (right.mean() + wrong.mean()) / 2.0, max(right.mean() - wrong.mean(), 0.0)
    return lambda margins: np.exp(np.clip(-(margins - middle) * distance / spread**2, -50.0, 50.0))


def _share_of_wrong(ratio: np.ndarray, rounds: int = 100) -> float:
    """The share of wrong labels under which the rows are likeliest (expectation maximisation)."""
    share = 0.5
    for _ in range(rounds):
        share = float((share * ratio / (share * ratio + 1.0 - share)).mean())
        share = min(max(share, 1e-6), 1.0 - 1e-6)
    return share


# --- features ---------------------------------------------------------------------------------------------------------


def layer_features(model: nn.Module, sources: list[RowSource]) -> dict[str, list[np.ndarray]]:
    """What some layers, evenly spread over the depth, make of rows: name → `(rows, features)` float64 for each source.

    Args:
        model: the bare model.
        sources: of rows; every process gets the features of all.
    """
    modules = _layers_in_order(model, sources[0])
    picked = [modules[i] for i in np.unique(np.linspace(0, len(modules) - 1, num=_LAYERS).astype(int))]
    parts: dict[str, list[np.ndarray]] = {name: [] for name, _ in picked}
    for source in sources:
        with sync_errors(f"the features of the {source.name}"):
            own = _own_features(model, source, dict(picked))
            gathered = all_gather_arrays(own, {}, f"the features of the {source.name}")
        for name in parts:
            parts[name].append(np.concatenate([arrays[name] for arrays, _ in gathered if name in arrays]))
    return parts


def _layers_in_order(model: nn.Module, source: RowSource) -> list[tuple[str, nn.Module]]:
    """Layers in the order in which a batch passes them: normalisations where there are enough, else those with weights;
    but for the last, which predicts."""
    passed: dict[str, nn.Module] = {}
    hooks = []
    for name, module in model.named_modules():
        if next(iter(module.parameters(recurse=False)), None) is not None:
            hooks.append(module.register_forward_hook(_note(passed, name)))
    try:
        with evaluation_mode(model), torch.no_grad():
            _, inputs = next(source.select([0]).passes_of_all(model))
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    normal = [(n, m) for n, m in passed.items() if "norm" in type(m).__name__.lower()]
    return normal if len(normal) >= 4 else list(passed.items())[:-1] or list(passed.items())


def _note(passed: dict[str, nn.Module], name: str) -> Any:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() >= 2:
            passed.setdefault(name, module)

    return note


def _own_features(model: nn.Module, source: RowSource, layers: dict[str, nn.Module]) -> dict[str, np.ndarray]:
    seen: dict[str, Tensor] = {}
    collected: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    order: list[np.ndarray] = []
    hooks = [module.register_forward_hook(_keep(seen, name)) for name, module in layers.items()]
    try:
        with evaluation_mode(model), torch.no_grad():
            for positions, inputs, counts_here in source.passes(model):
                model(**inputs)
                if not counts_here:
                    continue
                order.append(positions)
                for name in layers:
                    collected[name].append(_reduced(seen[name], inputs.get("attention_mask"), len(positions)))
    finally:
        for hook in hooks:
            hook.remove()
    if not order:
        return {}
    rows = np.argsort(np.concatenate(order))
    return {name: np.concatenate(parts)[rows] for name, parts in collected.items()}


def _keep(seen: dict[str, Tensor], name: str) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        seen[name] = output

    return keep


def _reduced(output: Tensor, mask: Any, rows: int) -> np.ndarray:
    """`(rows, at most 256)`: tokens averaged where the mask counts them, images over a few places."""
    values = output.detach().float()
    if values.dim() == 3:
        weights = torch.ones(values.shape[:2], device=values.device)
        if isinstance(mask, Tensor) and mask.shape == values.shape[:2]:
            weights = mask.float()
        values = (values * weights[:, :, None]).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)[:, None]
    elif values.dim() == 4:
        values = F.adaptive_avg_pool2d(values, _SIDE)
    flat = values.reshape(rows, -1).cpu().double().numpy()
    if flat.shape[1] <= _WIDTH:
        return flat
    projection = np.random.default_rng(0).standard_normal((flat.shape[1], _WIDTH)) / flat.shape[1] ** 0.5
    projected: np.ndarray = flat @ projection
    return projected
