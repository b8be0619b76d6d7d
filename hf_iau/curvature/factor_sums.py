"""Sums over rows of which the factors of a curvature are made, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_iau.curvature.layers import ConvolutionLayer, Layer, MatrixLayer, live_positions
from hf_iau.utils.vectors import is_same_device

BASIS_POSITIONS = 131_072
"""About so many positions of a convolution make its bases, which are covariances of a few hundred columns and need no
more; Λ is measured on the positions of all rows."""


@dataclass(frozen=True)
class Placement:
    """Where the statistics of a fit lie.

    Attributes:
        device: one device for all; None: each layer's beside the layer.
        is_apart: whether that is another device than the model's, for which training's memory has to be enough.
    """

    device: torch.device | None
    is_apart: bool

    @classmethod
    def beside(cls, model: nn.Module, device: torch.device | None) -> Placement:
        """That of a model's statistics, on `device` if one is given."""
        apart = device is not None and not all(is_same_device(p.device, device) for p in model.parameters())
        return cls(device, apart)

    def of_layer(self, layer: Layer) -> torch.device:
        """The device of a layer's statistics."""
        return self.device or layer.parameter(next(iter(layer.parameters))).device

    def move(self, tensor: Tensor) -> Tensor:
        """A statistic, moved to where it belongs."""
        return tensor.to(self.device or tensor.device)

    def move_all(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Statistics, moved to where they belong."""
        return {name: self.move(tensor) for name, tensor in tensors.items()}


class FactorSums:
    """A = Σ a aᵀ and S = Σ g gᵀ of Kronecker layers, and Σ_rows g² of diagonal ones.

    Args:
        placement: where the sums lie.
        start: the first row's position among those of all processes.
        total_rows: rows of all processes.

    Attributes:
        covariances: by layer name: A, `(groups, columns, columns)`, S, `(groups, outputs, outputs)`, and
            Σ ‖a‖²‖g‖² over positions, what ΣΛ would be if positions did not cancel (0 for a single one).
        squares: by layer name, by parameter name.
    """

    def __init__(self, placement: Placement, *, start: int, total_rows: int) -> None:
        self.placement = placement
        self.start = start
        self.total_rows = total_rows
        self.covariances: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.squares: dict[str, dict[str, Tensor]] = {}

    def covariance_of(self, layer: MatrixLayer) -> tuple[Tensor, Tensor, Tensor]:
        """The entry of `covariances` for a layer, zeros at first."""
        if layer.name not in self.covariances:
            groups, columns, rows = layer.layout.groups, layer.layout.columns, layer.layout.group_outputs
            options: dict[str, Any] = {"dtype": layer.dtype, "device": self.placement.of_layer(layer)}
            self.covariances[layer.name] = (
                torch.zeros(groups, columns, columns, **options),
                torch.zeros(groups, rows, rows, **options),
                torch.zeros(1, **options).double(),
            )
        return self.covariances[layer.name]

    def squares_of(self, layer: Layer) -> dict[str, Tensor]:
        """The entry of `squares` for a layer, zeros at first."""
        if layer.name not in self.squares:
            self.squares[layer.name] = self.placement.move_all(layer.new_sums())
        return self.squares[layer.name]

    def discard(self, name: str) -> None:
        """Let go of a layer's sums."""
        self.covariances.pop(name, None)
        self.squares.pop(name, None)

    def add_positions(self, layer: MatrixLayer, a: Tensor, g: Tensor, rows: np.ndarray) -> None:
        """Add some rows' positions to A and S.

        Args:
            layer: whose inputs and output gradients they are.
            a, g: `(groups, rows, positions, columns)` and `(…, outputs)`.
            rows: `(rows,)` int, their positions in the source.
        """
        share, groups, positions = 1.0, a.shape[0], a.shape[2]
        if isinstance(layer, ConvolutionLayer):  # of a fixed number of positions, whatever the padding of a text
            share = min(1.0, BASIS_POSITIONS / (positions * max(self.total_rows, 1)))
        chosen = torch.arange(len(rows), device=g.device)
        if share < 1.0:
            places = self.start + rows
            chosen = chosen[torch.from_numpy(np.floor((places + 1) * share) > np.floor(places * share)).to(g.device)]
            if not len(chosen):
                return
            g = g[:, chosen]
        live = live_positions(g)[..., None]
        inputs, outputs = a.reshape(groups, -1, a.shape[-1]), g.reshape(groups, -1, g.shape[-1])
        index = (chosen[:, None] * positions + torch.arange(positions, device=g.device)).reshape(-1)
        if groups == 1 and positions > 1:  # behind a max-pooling most positions are dead: work on the others alone
            used = live.reshape(-1).nonzero()[:, 0]  # the one place where an accelerator is waited for
            index, outputs = index[used], outputs if len(used) == outputs.shape[1] else outputs[:, used]
        if len(index) < inputs.shape[1]:
            inputs = inputs[:, index]
        weighted = inputs if groups == 1 and positions > 1 else inputs * live.reshape(groups, -1, 1)
        input_sum, output_sum, bound = self.covariance_of(layer)
        if positions > 1:
            norms = torch.linalg.vector_norm(weighted, dim=-1) * torch.linalg.vector_norm(outputs, dim=-1)
            bound += norms.square().sum(dtype=torch.float64).to(bound.device) / share
        input_sum += (weighted.mT @ inputs).to(input_sum.device)
        output_sum += (outputs.mT @ outputs).to(output_sum.device)
