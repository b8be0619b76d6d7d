"""Estimating the curvature anew, where the weights have moved far from where it was estimated."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import nn

from hf_iau.data import RowLoss, RowSource
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.gathering import estimate_curvature
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ForgetContext

FEWEST_ROWS = 0.5
"""Of the rows that the old curvature was estimated on; an estimate from fewer is no better for being near."""
# Other rows than those that calibration retains and draws as proxies, for the same request.
_CURVATURE_SEED = 11


def renewal_settings(memory: GradientMemory, **changes: Any) -> GatherConfig | None:
    """What the curvature of `memory` was estimated with; None where it cannot be estimated again from rows alone.

    Args:
        memory: with a curvature.
        changes: settings to take instead.
    """
    names = {field.name for field in dataclasses.fields(GatherConfig)}
    if not memory.settings.keys() <= names:  # of another version
        return None
    config = GatherConfig(**{**memory.settings, **changes})
    return None if config.curvature in ("none", "adam") else config


def renew_curvature(
    memory: GradientMemory, model: nn.Module, row_loss: RowLoss, rows: RowSource, config: GatherConfig
) -> GradientMemory:
    """`memory` with the curvature of `rows` at the present weights.

    What earlier calibrations found goes, for it was found with the old one.

    Args:
        memory: of the present weights; left as it is.
        model: the bare model.
        row_loss: the objective.
        rows: retained rows, in batches that fit gradients.
        config: see `renewal_settings`.
    """
    curvature = estimate_curvature(model, rows, np.arange(len(rows)), row_loss, config, memory.weight_decay)
    return dataclasses.replace(memory, curvature=curvature, curvature_path=memory.relative_path, calibration=None)


def with_near_curvature(context: ForgetContext, memory: GradientMemory, farthest: float | None) -> GradientMemory:
    """The memory; its curvature is estimated anew where it was left behind and enough retained rows are at hand.

    Args:
        context: the request.
        memory: with a curvature.
        farthest: how far the weights may have moved since, as a share of their norm; None: as far as they like.
    """
    if farthest is None or memory.path_since_curvature <= farthest:
        return memory
    config = renewal_settings(memory, progress=context.progress)
    if config is None:
        return memory
    with context.timer.phase("curvature"):
        rows = context.retained_sample(config.curvature_rows, context.seed + _CURVATURE_SEED, "curvature rows")
        if rows is None or len(rows) < FEWEST_ROWS * memory.require_curvature("iau").n_rows:
            return memory
        rows = rows.resized(context.forget.batch_size)
        return renew_curvature(memory, context.model, context.row_loss, rows, config)
