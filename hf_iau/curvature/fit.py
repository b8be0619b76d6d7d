"""One fit of EK-FAC or diagonal curvature, from the probe of its closed forms to its blocks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hf_iau.curvature.blocks import Block, DiagonalBlock, KroneckerBlock
from hf_iau.curvature.call_cache import CallCache
from hf_iau.curvature.closed_form_probe import probe_closed_forms
from hf_iau.curvature.eigenvalue_sums import Bases, add_cached_squares, add_squares_of_calls, new_eigenvalue_sum
from hf_iau.curvature.eigenvectors import eigenvectors, spare_for_eigenvectors
from hf_iau.curvature.factor_sums import FactorSums, Placement
from hf_iau.curvature.fit_rows import FitRows
from hf_iau.curvature.layer_hooks import LayerHooks
from hf_iau.curvature.layers import Call, Layer, LayerPlan, MatrixLayer, NotSeparableError
from hf_iau.curvature.row_loop import loop_reason, sum_squares_of_rows
from hf_iau.distributed import broadcast_, get_rank
from hf_iau.errors import NonFiniteGradientError, RequestError

Reduce = Callable[[Tensor], Tensor]


class Fit:
    """One fit, step by step, and what it has summed so far.

    A layer's statistics are made while the loss is still being differentiated, so that no more than one layer's output
    gradients are held.

    Args:
        rows: this process's rows.
        plan: the layers; those that turn out to have no closed form are moved out of it.
        placement: where statistics lie.
        cache_bytes: memory for sparing the second pass.
        looped: positions of the rows on which parameters without a closed form are measured.
        owners: processes that the eigendecompositions are shared out among.
        reduce: makes a sum over this process's rows that over all rows.
    """

    uses_at_once = True

    def __init__(
        self,
        rows: FitRows,
        plan: LayerPlan,
        *,
        placement: Placement,
        cache_bytes: int,
        looped: np.ndarray,
        owners: int,
        reduce: Reduce,
    ) -> None:
        self.rows = rows
        self.plan = plan
        self.planned = plan.layers
        self.placement = placement
        self.looped = looped
        self.owners = owners
        self.reduce = reduce
        self.sums = FactorSums(placement, start=rows.start, total_rows=rows.total)
        self.cache = CallCache(cache_bytes, placement)
        self.bases: dict[str, Bases] = {}
        self.bounds: dict[str, float] = {}  # on ΣΛ, see `FactorSums`
        self.eigenvalue_sums: dict[str, Tensor] = {}
        self.n_rows = self.n_targets = 0  # of all processes
        self.passes = 1

    def run(self, weight_decay: float) -> list[Block]:
        """All steps. `weight_decay` is added to every eigenvalue."""
        probe_closed_forms(self.rows, self.plan, self.placement, self._demote)
        self._sum_factors()
        self._demote_alike()
        self._count_rows()
        self._find_bases()
        self._sum_eigenvalues()
        return self._blocks(weight_decay)

    # --- factors ------------------------------------------------------------------------------------------------------

    def _sum_factors(self) -> None:
        """Covariances of the Kronecker layers and squared gradients of the diagonal ones, in a pass over the rows."""
        rows = self.rows
        if not self.plan.layers:  # only counts are needed
            for positions, inputs in rows.batches("curvature: targets"):
                with torch.no_grad():
                    rows.count(positions, rows.loss(positions, inputs)[1])
            return
        with LayerHooks(rows.model, self.plan.layers) as hooks:
            for positions, inputs in rows.batches("curvature: factors"):

                def use(layer: Layer, calls: list[Call], positions: np.ndarray = positions) -> None:
                    if layer in self.plan.layers:
                        try:
                            self._add_calls(layer, calls, positions)
                        except NotSeparableError as error:
                            self._demote(layer, str(error))

                calls = rows.calls(hooks, positions, inputs, use if self.uses_at_once else None)
                rows.count(positions, rows.n_targets_of_batch)
                for layer in self.plan.layers:
                    use(layer, calls.pop(layer.name, []))
                    self._layer_done(layer)
                self.cache.end_batch(len(positions))

    def _add_calls(self, layer: Layer, calls: list[Call], positions: np.ndarray) -> None:
        if not calls:
            return
        if layer in self.plan.diagonal:
            layer.add_squares(calls, len(positions), self.sums.squares_of(layer))
            return
        assert isinstance(layer, MatrixLayer)
        first = 0
        for a, g in layer.expand_in_chunks(calls, len(positions)):
            self.cache.add(layer, a, g)
            self.sums.add_positions(layer, a, g, positions[first : first + a.shape[1]])
            first += a.shape[1]

    def _layer_done(self, layer: Layer) -> None:
        """Called when a batch has been added to a layer's sums."""

    def _demote(self, layer: Layer, reason: str) -> None:
        """Measure a layer's parameters by the loop, for its rows cannot be told apart."""
        self.plan.demote(layer, reason)
        self.sums.discard(layer.name)

    def _demote_alike(self) -> None:
        """Measure a layer by the loop everywhere when one process has to."""
        left = {layer.name for layer in self.plan.layers}
        flags = torch.tensor(
            [float(layer.name not in left) for layer in self.planned], dtype=torch.float64, device=self._device
        )
        if not len(flags):
            return
        for layer, flag in zip(self.planned, self.reduce(flags).tolist(), strict=True):
            if flag > 0 and layer.name in left:
                self._demote(layer, "another process could not tell its rows apart")

    def _count_rows(self) -> None:
        """Rows and targets of all processes.

        Raises:
            RequestError: there are no targets.
        """
        counts = torch.tensor([self.rows.n_rows, self.rows.n_targets], dtype=torch.float64, device=self._device)
        self.n_rows, self.n_targets = (round(count) for count in self.reduce(counts).tolist())
        if self.n_targets == 0:
            raise RequestError(
                f"The {self.n_rows} {self.rows.source.name} have no targets (every label is ignored), so there is no "
                "curvature. Give rows with labels."
            )

    # --- bases and eigenvalues ----------------------------------------------------------------------------------------

    def _find_bases(self) -> None:
        """Eigenbases of the covariances; of several processes, each works out those of some layers for all."""
        for number, layer in enumerate(self.plan.kronecker):
            own = number % self.owners == get_rank() % self.owners
            *sums, bound = self.sums.covariance_of(layer)
            self.sums.covariances.pop(layer.name, None)
            self.bounds[layer.name] = float(self.reduce(bound))
            bases = []
            while sums:  # a covariance is freed as its eigenvectors take its place
                total = self.reduce(sums.pop(0))
                if own:
                    # Where factors are apart, it is not their device that is short of memory.
                    spare = math.inf if self.placement.is_apart else spare_for_eigenvectors(layer)
                    total = eigenvectors(total, layer.name, spare=spare)
                bases.append(total)
            self.bases[layer.name] = (bases[0], bases[1])
        if self.owners > 1:
            for number, layer in enumerate(self.plan.kronecker):
                for basis in self.bases[layer.name]:
                    broadcast_(basis, number % self.owners, f"the eigenvectors of {layer.name}")

    def _sum_eigenvalues(self) -> None:
        """Λ of the Kronecker layers: of the cached rows, and of the others in a second pass."""
        if not self.plan.kronecker:
            return
        for layer in self.plan.kronecker:
            self.eigenvalue_sums[layer.name] = new_eigenvalue_sum(layer, self.bases[layer.name])
        for layer in self.plan.kronecker:
            add_cached_squares(layer, self.bases[layer.name], self.eigenvalue_sums[layer.name], self.cache)
        self.cache.clear()
        if self.cache.n_rows < len(self.rows.source):
            self._second_pass()

    def _second_pass(self) -> None:
        self.passes = 2
        rows = self.rows
        with LayerHooks(rows.model, self.plan.kronecker) as hooks:
            for positions, inputs in rows.batches("curvature: eigenvalues", self.cache.n_rows):

                def use(layer: Layer, calls: list[Call], n_rows: int = len(positions)) -> None:
                    assert isinstance(layer, MatrixLayer)
                    total = self.eigenvalue_sums[layer.name]
                    add_squares_of_calls(layer, self.bases[layer.name], total, calls, n_rows)

                calls = rows.calls(hooks, positions, inputs, use)
                for layer in self.plan.kronecker:
                    if layer.name in calls:
                        use(layer, calls.pop(layer.name))

    # --- blocks -------------------------------------------------------------------------------------------------------

    def _blocks(self, weight_decay: float) -> list[Block]:
        blocks = self._closed_form_blocks(weight_decay) + self._loop_blocks(weight_decay)
        refuse_overflow(blocks)
        return blocks

    def _closed_form_blocks(self, weight_decay: float) -> list[Block]:
        blocks: list[Block] = []
        for layer in self.plan.kronecker:
            values = self.reduce(self.eigenvalue_sums.pop(layer.name))
            rounding = (100 * torch.finfo(layer.dtype).eps) ** 2
            if float(values.sum(dtype=torch.float64)) <= rounding * self.bounds[layer.name]:
                # The positions' gradients cancel but for rounding (the bias of attention keys): no curvature.
                values = torch.zeros_like(values)
            values = values / self.n_targets + weight_decay
            inputs, outputs = self.bases[layer.name]
            blocks.append(KroneckerBlock(layer.name, layer.layout, inputs, outputs, values))
        for other in self.plan.diagonal:
            totals = self.sums.squares_of(other)
            del self.sums.squares[other.name]
            means = {name: self.reduce(total) / self.n_targets + weight_decay for name, total in totals.items()}
            blocks.append(DiagonalBlock(other.name, means, other.reason))
        return blocks

    def _loop_blocks(self, weight_decay: float) -> list[Block]:
        if not self.plan.loose:
            return []
        sums, n_targets = sum_squares_of_rows(self.rows, self.looped, self.plan.loose, self.placement)
        count = torch.tensor([n_targets], dtype=torch.float64, device=self._device)
        n_targets = max(round(float(self.reduce(count))), 1)
        blocks: list[Block] = []
        for entry in sorted(self.plan.loose, key=lambda entry: entry.name):
            values = self.reduce(sums[entry.name]) / n_targets + weight_decay
            blocks.append(DiagonalBlock(entry.name, {entry.name: values}, loop_reason(entry)))
        return blocks

    @property
    def _device(self) -> torch.device:
        """Where counts are made that all processes reduce."""
        if self.placement.device is not None:
            return self.placement.device
        return next((parameter.device for parameter in self.rows.model.parameters()), torch.device("cpu"))


def refuse_overflow(blocks: list[Block]) -> None:
    """Raise `NonFiniteGradientError` for a block that holds NaN or infinity."""
    for block in blocks:
        if not all(bool(tensor.isfinite().all()) for tensor in block.tensors().values()):
            raise NonFiniteGradientError(
                f"The curvature of layer {block.name!r} overflows although every row's gradient is finite. "
                "Compute in a wider type, or scale the loss down."
            )
