"""Estimating the curvature anew, where the weights have moved far from where it was estimated."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from torch import nn

from hf_iau.gather.config import GatherConfig
from hf_iau.gather.gather import estimate_curvature
from hf_iau.objective import RowLoss, RowSource
from hf_iau.remember import GradientMemory


def renewal_settings(memory: GradientMemory, **changes: Any) -> GatherConfig | None:
    """What the curvature of `memory` was estimated with; None where it cannot be estimated again from rows alone.

    Args:
        memory: with a curvature.
        changes: settings to take instead.
    """
    kinds = {field.name for field in dataclasses.fields(GatherConfig)}
    if not memory.settings.keys() <= kinds:  # of another version
        return None
    config = GatherConfig(**{**memory.settings, **changes})
    return None if config.curvature in ("none", "adam") else config


def renew_curvature(
    memory: GradientMemory, model: nn.Module, row_loss: RowLoss, rows: RowSource, config: GatherConfig
) -> GradientMemory:
    """`memory` with the curvature of `rows` at the present weights. What an earlier calibration found goes: it was found with the old one.

    Args:
        memory: of the present weights; left as it is.
        model: the bare model.
        row_loss: the objective.
        rows: retained rows, in batches that fit gradients.
        config: see `renewal_settings`.
    """
    curvature = estimate_curvature(model, rows, np.arange(len(rows)), row_loss, config, memory.weight_decay)
    return dataclasses.replace(memory, curvature=curvature, curvature_path=memory.relative_path, calibration=None)
