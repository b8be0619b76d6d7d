"""Diagonals of the Fisher matrix."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hf_iau.curvature import fit_curvature
from hf_iau.data import RowSource
from hf_iau.errors import RequestError
from hf_iau.methods.baselines.training_loop import trained_parameters
from hf_iau.methods.context import ForgetContext


def fisher_diagonal(
    context: ForgetContext, source: RowSource, fisher: Literal["true", "empirical"] = "empirical"
) -> tuple[dict[str, Tensor], int]:
    """(1/targets) Σ_rows (∂ℓ/∂θ_i)², at the rows' own labels ("empirical") or at labels drawn from the model ("true").

    Exact, row by row, for all layers with a closed form; tied weights, raw parameters and unknown modules are measured
    on at most 128 rows, as in `fit_curvature`.

    Returns:
        Tensors by parameter name, and the number of targets.
    """
    curvature = fit_curvature(
        context.model,
        source,
        kind="diagonal",
        fisher=fisher,
        row_loss=context.row_loss if fisher == "empirical" else None,
        seed=context.seed,
        progress=context.progress,
    )
    if curvature.n_targets == 0:
        raise RequestError(f"The {source.name} hold no targets (all labels are ignored).")
    ones = {name: torch.ones_like(p, requires_grad=False) for name, p in trained_parameters(context).items()}
    return curvature.multiply(ones), curvature.n_targets
