"""Eigenvectors of covariances, in no more memory than training left."""

from __future__ import annotations

import logging

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from hf_iau.curvature.layers import LayerPlan, MatrixLayer
from hf_iau.errors import NonFiniteGradientError

logger = logging.getLogger(__name__)

DIVIDE_AND_CONQUER_COPIES = 3
"""Float64 matrices that LAPACK's divide and conquer (`syevd`) holds: the matrix itself and two as its workspace."""

QL_COPIES = 1
"""Float64 matrices that LAPACK's QL iteration (`syev`) holds. On one thread it takes about three times as long."""


def eigenvectors(covariance: Tensor, name: str, *, spare: float) -> Tensor:
    """Eigenvectors in columns, found in float64, in the place and the type of the matrices that they are of.

    Where an accelerator runs out of memory or does not converge, those of this one factor are found on the CPU.

    Args:
        covariance: `(groups, size, size)`; overwritten.
        name: the layer's, for errors.
        spare: bytes; where divide and conquer would take more, a CPU iterates by QL.

    Raises:
        NonFiniteGradientError: the covariance overflowed.
    """
    if not bool(covariance.isfinite().all()):
        raise NonFiniteGradientError(
            f"A covariance of layer {name!r} overflows although every row's gradient is finite. Compute in a wider "
            "type, or scale the loss down."
        )
    if covariance.shape[-1] == 1:
        return covariance.fill_(1.0)
    cpu = torch.device("cpu")
    where = cpu if covariance.device.type == "mps" else covariance.device
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1, dtype=torch.float64)[:, None, None]
    scale = torch.where(scale > 0, scale, 1.0)

    def scaled(device: torch.device) -> Tensor:
        # Column by column, as LAPACK wants it. Only the lower triangle is read, so rounding in the other is no matter.
        matrix = torch.empty_like(covariance, dtype=torch.float64, device=device).mT
        return matrix.copy_(covariance.to(device)).div_(scale.to(device))

    little = _bytes(covariance.shape[0], covariance.shape[-1], DIVIDE_AND_CONQUER_COPIES) > spare
    try:
        find = _by_ql if little and where.type == "cpu" else _by_divide_and_conquer
        vectors = find(scaled(where))
    except (torch.cuda.OutOfMemoryError, torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:
        size, kind = covariance.shape[-1], type(error).__name__
        logger.info("A factor of size %d of layer %r is diagonalised on the CPU: %s on %s.", size, name, kind, where)
        # A multiple of the identity does not move eigenvectors; another driver on the CPU often converges.
        matrix = scaled(cpu)
        matrix.diagonal(dim1=-2, dim2=-1).add_(1.0)
        vectors = _by_divide_and_conquer(matrix)
    return covariance.copy_(vectors)


def eigenvector_bytes(plan: LayerPlan) -> int:
    """Most bytes that are held on a CPU, beside the factors, while eigenvectors of a factor are found."""
    return max((_bytes_of(layer) for layer in plan.kronecker), default=0)


def divide_and_conquer_bytes(plan: LayerPlan) -> int:
    """What `eigenvector_bytes` would be without QL."""
    largest = (_bytes(layer.layout.groups, layer.largest_factor, DIVIDE_AND_CONQUER_COPIES) for layer in plan.kronecker)
    return max(largest, default=0)


def spare_for_eigenvectors(layer: MatrixLayer) -> int:
    """For `eigenvectors(spare=…)`, bytes: a fit holds neither training's gradients nor a copy of the weights."""
    return 2 * layer.temporary_bytes


def _bytes_of(layer: MatrixLayer) -> int:
    groups, sizes = layer.layout.groups, (layer.layout.columns, layer.layout.group_outputs)
    each = [_bytes(groups, size, DIVIDE_AND_CONQUER_COPIES) for size in sizes]
    ql = [_bytes(groups, size, QL_COPIES) for size in sizes]
    return max(few if many > spare_for_eigenvectors(layer) else many for many, few in zip(each, ql, strict=True))


def _bytes(groups: int, size: int, copies: int) -> int:
    return 8 * copies * groups * size**2


def _by_ql(matrix: Tensor) -> Tensor:
    """The eigenvectors of float64 matrices on a CPU, laid out column by column, in their place."""
    for group in matrix:
        # A view that LAPACK writes into; what it returns is that view.
        found = scipy.linalg.eigh(group.numpy(), driver="ev", overwrite_a=True, check_finite=False)[1]
        if not np.shares_memory(found, group.numpy()):
            group.copy_(torch.from_numpy(found))
    return matrix


def _by_divide_and_conquer(matrix: Tensor) -> Tensor:
    """The eigenvectors of float64 matrices, in their place where that is possible."""
    if matrix.device.type != "cpu":
        return torch.linalg.eigh(matrix).eigenvectors
    values = matrix.new_empty(matrix.shape[:-1])
    torch.linalg.eigh(matrix, out=(values, matrix))
    return matrix
