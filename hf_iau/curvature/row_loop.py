"""Squared gradients of parameters without a closed form: a few rows, one after the other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hf_iau.curvature.factor_sums import Placement
from hf_iau.curvature.fit_rows import FitRows
from hf_iau.curvature.layers import LooseParameter
from hf_iau.errors import NonFiniteGradientError

LOOP_ROWS = 128
"""Rows on which parameters without a closed form are measured, one at a time."""


def looped_positions(n_rows: int) -> np.ndarray:
    """Positions of the rows, evenly spaced, that are taken one by one (int, ascending)."""
    return np.unique(np.linspace(0, n_rows - 1, num=min(LOOP_ROWS, n_rows), dtype=int))


def loop_reason(entry: LooseParameter) -> str:
    """Why a parameter has no closed form, and what is measured instead."""
    return f"{entry.reason}; measured on at most {LOOP_ROWS} rows"


def non_finite(name: str, rows: FitRows, position: int) -> NonFiniteGradientError:
    """The error for a row's gradient for parameter `name`."""
    return NonFiniteGradientError(
        f"The gradient of {name!r} is NaN or infinite for {rows.describe(position)}. Remove or repair such rows."
    )


def sum_squares_of_rows(
    rows: FitRows, positions: np.ndarray, loose: list[LooseParameter], placement: Placement
) -> tuple[dict[str, Tensor], int]:
    """Σ_rows g² by parameter name, and the rows' number of targets.

    Args:
        rows: this process's rows.
        positions: of those to take.
        loose: the parameters.
        placement: where the sums lie.

    Raises:
        NonFiniteGradientError: naming the parameter and the row.
    """
    sums = {}
    for entry in loose:
        dtype = torch.float64 if entry.parameter.dtype == torch.float64 else torch.float32
        zeros = torch.zeros_like(entry.parameter, dtype=dtype, memory_format=torch.contiguous_format).detach()
        sums[entry.name] = placement.move(zeros)
    n_targets = 0
    for position, loss, targets in rows.one_by_one(positions):
        n_targets += targets
        gradients = rows.gradients(loss, [entry.parameter for entry in loose])
        for entry, gradient in zip(loose, gradients, strict=True):
            if gradient is None:
                continue
            total = sums[entry.name]
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            squares = gradient.to(total.dtype).square().to(total.device)
            if not bool(squares.sum().isfinite()) and not bool(gradient.isfinite().all()):
                raise non_finite(entry.name, rows, int(position[0]))
            total += squares
        del gradients, gradient, loss  # before the next row has its own
    return sums, n_targets
