"""Λ: squared row gradients in the eigenbases, summed over rows."""

from __future__ import annotations

from torch import Tensor

from hf_iau.curvature.call_cache import CallCache
from hf_iau.curvature.layers import Call, MatrixLayer, sum_of_squared_gradients, sum_of_squares

Bases = tuple[Tensor, Tensor]
"""Eigenvectors in columns: Q_A, `(groups, columns, columns)`, and Q_S, `(groups, outputs, outputs)`."""


def new_eigenvalue_sum(layer: MatrixLayer, bases: Bases) -> Tensor:
    """Zeros, `(groups, outputs, columns)`."""
    groups, columns, rows = layer.layout.groups, layer.layout.columns, layer.layout.group_outputs
    return bases[0].new_zeros(groups, rows, columns)


def add_cached_squares(layer: MatrixLayer, bases: Bases, total: Tensor, cache: CallCache) -> None:
    """Add Σ_rows (Q_Sᵀ G Q_A)² over the rows that are cached to `total`."""
    device, limit = layer.parameter(next(iter(layer.parameters))).device, layer.temporary_bytes
    inputs, outputs = (basis.to(device) for basis in bases)
    for a, g in cache.of_layer(layer):
        if a is None:
            squares = sum_of_squares(g.to(device), inputs, outputs, temporary_bytes=limit)
        else:
            squares = sum_of_squared_gradients(a.to(device), g.to(device), inputs, outputs, temporary_bytes=limit)
        total += squares.to(total.device)


def add_squares_of_calls(layer: MatrixLayer, bases: Bases, total: Tensor, calls: list[Call], n_rows: int) -> None:
    """Add Σ_rows (Q_Sᵀ G Q_A)² over the rows of a batch to `total`, while its loss is being differentiated."""
    limit = layer.temporary_bytes // 2  # for the activations of layers before it are still held
    inputs, outputs = (basis.to(calls[0][1].device) for basis in bases)
    for a, g in layer.expand_in_chunks(calls, n_rows):
        squares = sum_of_squared_gradients(a, g, inputs, outputs, temporary_bytes=limit)
        total += squares.to(total.device)
        del a, g, squares  # before the next rows have their own
