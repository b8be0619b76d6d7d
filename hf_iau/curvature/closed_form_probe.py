"""Does a layer's closed form give what rows taken one by one give?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_iau.curvature.factor_sums import Placement
from hf_iau.curvature.fit_rows import FitRows, norm
from hf_iau.curvature.layer_hooks import LayerHooks
from hf_iau.curvature.layers import Layer, LayerPlan, NotSeparableError
from hf_iau.data.precision import rounds_to_half

PROBE_ROWS = 3


def probe_closed_forms(
    rows: FitRows, plan: LayerPlan, placement: Placement, demote: Callable[[Layer, str], None]
) -> None:
    """Compare each layer's closed form with a few rows taken one by one, and demote layers that disagree.

    Args:
        rows: of which a few, spread evenly, are probed.
        plan: the layers.
        placement: where statistics lie.
        demote: takes a layer out of the plan, and is told why.
    """
    most = min(PROBE_ROWS, rows.source.batch_size) if placement.is_apart else PROBE_ROWS
    positions = np.unique(np.linspace(0, len(rows.source) - 1, num=min(most, len(rows.source)), dtype=int))
    if not len(positions):
        return
    _, inputs = next(rows.source.select(positions).resized(len(positions)).passes_of_all(rows.model))
    if rows.row_loss is not None:
        with torch.no_grad():
            rows.row_loss(rows.model, inputs)  # lets the loss find its own scale outside of the hooks
    probe = _squares_of_batch(rows, plan, placement, demote, positions, inputs)
    _subtract_rows(rows, plan, probe, positions, inputs)
    largest = max(probe.maxima.values(), default=0.0)
    # Of the whole model: adapters are often wider than the base weights that their gradients pass through.
    half = rounds_to_half(rows.model)
    for layer in plan.layers:
        scale = probe.scales[layer.name]
        rounding = (100 * torch.finfo(layer.dtype).eps) ** 2 * largest
        size = sum(layer.parameter(attribute).numel() for attribute in layer.parameters)
        tolerance = (0.2 if half else 0.01) * scale + rounding * size**0.5
        if layer.name not in probe.called:  # its parameters may still be used without calling it
            tolerance = 0.0
        if rows.norm(layer, probe.differences[layer.name]) > tolerance:
            demote(layer, "its gradients differ from those of rows taken one by one")
        layer.accepts_merged_rows = layer.saw_merged_rows and scale > 0


@dataclass
class _Probe:
    """By layer name: Σ g² of the closed form (and then what rows one by one leave of it), its norm and its maximum."""

    called: set[str] = field(default_factory=set)
    differences: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)


def _squares_of_batch(
    rows: FitRows,
    plan: LayerPlan,
    placement: Placement,
    demote: Callable[[Layer, str], None],
    positions: np.ndarray,
    inputs: dict[str, Any],
) -> _Probe:
    """The closed forms, of a batch of all probed rows."""
    layers = plan.layers
    with LayerHooks(rows.model, layers) as hooks:
        calls = rows.calls(hooks, positions, inputs)
        unreadable = hooks.unreadable
    probe = _Probe(called=set(calls))
    for layer in layers:
        layer.accepts_merged_rows = True
        squares = layer.new_sums()
        try:
            if layer.name in unreadable:
                raise NotSeparableError(unreadable[layer.name])
            if layer.name in calls:
                layer.add_squares(calls.pop(layer.name), len(positions), squares)
        except NotSeparableError as error:
            demote(layer, str(error))
            continue
        probe.maxima[layer.name] = max(float(total.max()) for total in squares.values())
        probe.scales[layer.name] = norm(squares)
        probe.differences[layer.name] = placement.move_all(rows.own_part(layer, squares))
    return probe


def _subtract_rows(
    rows: FitRows, plan: LayerPlan, probe: _Probe, positions: np.ndarray, inputs: dict[str, Any]
) -> None:
    """Take from the closed forms what the rows of the batch give one by one."""
    names = [(layer, attribute, name) for layer in plan.layers for attribute, name in layer.parameters.items()]
    parameters = [layer.module._parameters[attribute] for layer, attribute, _ in names]
    for index in range(len(positions) if names else 0):
        loss, _ = rows.loss(positions[index : index + 1], _one_row(inputs, index, len(positions)))
        gradients = rows.gradients(loss, [p for p in parameters if p is not None])
        for (layer, _, name), gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                difference = probe.differences[layer.name][name]
                difference -= gradient.to(difference).square()
        del gradients, gradient  # before the next row has its own


def _one_row(value: Any, index: int, rows: int) -> Any:
    """A batch's row as a batch of one; tensors without a row dimension are kept."""
    if isinstance(value, Tensor):
        return value[index : index + 1] if value.dim() and value.shape[0] == rows else value
    if isinstance(value, Mapping):
        return {key: _one_row(item, index, rows) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and len(value) == rows:
        return type(value)([value[index]])
    return value
