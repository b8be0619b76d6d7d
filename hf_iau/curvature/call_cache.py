"""What spares a fit its second pass over rows, within a budget of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from hf_iau.curvature.eigenvectors import divide_and_conquer_bytes, eigenvector_bytes
from hf_iau.curvature.factor_sums import Placement
from hf_iau.curvature.layers import LayerPlan, MatrixLayer, row_gradients, spare_bytes

FEWEST_CACHE_BYTES = 24 * 2**20
"""What spares a second pass may always take so much, less what eigenvectors take that are found in the fastest way."""


class CallCache:
    """What the eigenvalues need of the first batches: a row's gradient or, where that is smaller, its factors.

    Of a batch all layers are kept or none.

    Args:
        max_bytes: the budget; the batch that exceeds it, and all after it, are not kept.
        placement: where what is kept lies.

    Attributes:
        is_open: whether the budget still holds.
        n_rows: rows of the batches that are kept, the first ones.
    """

    def __init__(self, max_bytes: int, placement: Placement) -> None:
        self.max_bytes = max_bytes
        self.placement = placement
        self.is_open = True
        self.n_rows = 0
        self._bytes = 0
        self._entries: list[tuple[str, Tensor | None, Tensor]] = []
        self._finished = 0  # entries of batches that are kept

    def add(self, layer: MatrixLayer, a: Tensor, g: Tensor) -> None:
        """Keep some rows of the batch at hand.

        Args:
            layer: whose inputs and output gradients they are.
            a, g: `(groups, rows, positions, columns)` and `(…, outputs)`.
        """
        if not self.is_open:
            return
        positions, columns, outputs = a.shape[2], a.shape[3], g.shape[3]
        self._bytes += cached_size(a.shape[:3], columns, outputs) * a.element_size()
        if self._bytes > self.max_bytes:
            self.is_open = False
        elif _is_smaller_as_matrices(positions, columns, outputs):
            self._entries.append((layer.name, None, self.placement.move(row_gradients(a, g))))
        else:
            a, g = self.placement.move(a.contiguous()), self.placement.move(g.contiguous())
            self._entries.append((layer.name, a, g))

    def end_batch(self, n_rows: int) -> None:
        """Keep the batch of `n_rows` rows that was added, if all of it was within the budget."""
        if self.is_open:
            self.n_rows += n_rows
            self._finished = len(self._entries)
        else:
            del self._entries[self._finished :]

    def of_layer(self, layer: MatrixLayer) -> Iterator[tuple[Tensor | None, Tensor]]:
        """What is kept of a layer: (a, g), or (None, rows' gradients)."""
        return ((a, g) for name, a, g in self._entries if name == layer.name)

    def clear(self) -> None:
        """Let go of everything."""
        self._entries = []


def usual_cache_bytes(model: nn.Module, plan: LayerPlan) -> int:
    """What `cache_bytes=None` comes to: the cache is there while eigenvectors are found."""
    spared = spare_bytes(model.parameters()) - eigenvector_bytes(plan)
    return max(spared, FEWEST_CACHE_BYTES - divide_and_conquer_bytes(plan), 0)


def cached_size(shape: Sequence[int], columns: int, outputs: int) -> int:
    """Scalars that are kept of some rows' inputs `(groups, rows, positions, columns)` and output gradients."""
    groups, rows, positions = shape
    matrices = _is_smaller_as_matrices(positions, columns, outputs)
    return groups * rows * (outputs * columns if matrices else positions * (outputs + columns))


def _is_smaller_as_matrices(positions: int, columns: int, outputs: int) -> bool:
    return positions > 1 and outputs * columns <= positions * (outputs + columns)
