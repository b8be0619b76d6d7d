"""Fitting the curvature of a model whose parameters are sharded over processes, without ever holding all of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from hf_iau.curvature.blocks import Block, DiagonalBlock
from hf_iau.curvature.fit import Fit, refuse_overflow
from hf_iau.curvature.fit_rows import FitRows
from hf_iau.curvature.layer_hooks import LayerHooks
from hf_iau.curvature.layers import Call, Layer, LayerPlan, MatrixLayer, sum_of_squared_gradients
from hf_iau.curvature.row_loop import loop_reason, non_finite
from hf_iau.curvature.sharded_blocks import Owners, fetch_tensor, with_remote_blocks
from hf_iau.distributed import (
    all_gather_arrays,
    all_reduce_,
    full_tensor,
    get_world_size,
    reduce_,
    replicas,
    shard_like,
    sync_errors,
    to_local,
)


class ShardedFitRows(FitRows):
    """As `FitRows`, for a model through which all processes pass together, each with its own rows.

    Processes with fewer batches pass rows again that do not count. A row that is taken alone is the same in every
    process, of whose gradient each sees its part.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.batch_counts = True  # whether the batch at hand is one of this process's share

    def batches(self, what: str, start: int = 0) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        assert start == 0  # nothing is cached
        own, first = self.source.share()
        passes = self.source.passes(self.model)
        total = -(-len(own) // own.batch_size)
        for positions, inputs, counts in tqdm(passes, total=total, desc=what, disable=not self.progress):
            self.batch_counts = counts
            yield first + positions, inputs
        self.batch_counts = True

    def count(self, positions: np.ndarray, n_targets: int) -> None:
        if self.batch_counts:
            super().count(positions, n_targets)

    def loss(self, positions: np.ndarray, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        loss, n_targets = super().loss(positions, inputs)
        return loss, n_targets if self.batch_counts else 0

    def calls(
        self,
        hooks: LayerHooks,
        positions: np.ndarray,
        inputs: dict[str, Any],
        use: Callable[[Layer, list[Call]], None] | None = None,
    ) -> dict[str, list[Call]]:
        calls = super().calls(hooks, positions, inputs, use)
        return calls if self.batch_counts else {}

    def gradients(self, loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """This process's parts of the gradients of a row that all processes have at hand."""
        everything = list(self.model.parameters())
        for parameter in everything:
            parameter.grad = None
        if loss.requires_grad:
            loss.backward()
        # FSDP2 has added up as many copies as there are processes.
        gradients = [
            None if p.grad is None else to_local(p.grad) / (get_world_size() if isinstance(p, DTensor) else 1)
            for p in parameters
        ]
        for parameter in everything:
            parameter.grad = None
        return gradients

    def own_part(self, layer: Layer, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = {name: layer.parameter(attribute) for attribute, name in layer.parameters.items()}
        return {name: to_local(shard_like(total, parameters[name])) for name, total in sums.items()}

    def norm(self, layer: Layer, parts: dict[str, Tensor]) -> float:
        squared = torch.zeros(1, dtype=torch.float64)
        for attribute, name in layer.parameters.items():
            squared += parts[name].double().square().sum().cpu() / replicas(layer.parameter(attribute))
        all_reduce_([squared], f"the probe of {layer.name}")
        return float(squared) ** 0.5


class ShardedFit(Fit):
    """As `Fit`, but of each layer one process, its owner, holds the statistics.

    After every batch the processes' statistics of one layer after the other are added up at its owner and let go.
    Owners find the bases of their layers; for Λ, bases are sent around layer by layer in a second pass, and nothing is
    cached to spare it.
    """

    uses_at_once = False  # statistics are sent around, which must not come between the passing of gradients

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.owner = Owners()
        self._in_first_pass = False
        self._failed: dict[str, str] = {}
        self._covariance_totals: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._square_totals: dict[str, dict[str, Tensor]] = {}

    # --- factors ------------------------------------------------------------------------------------------------------

    def _sum_factors(self) -> None:
        for layer in self.plan.layers:
            self.owner.assign(layer.name, _n_statistics(layer))
        self._in_first_pass = True
        super()._sum_factors()
        self._in_first_pass = False

    def _layer_done(self, layer: Layer) -> None:
        """Hand this batch's statistics over to the layer's owner."""
        owner, own = self.owner[layer.name], self.owner.is_here(layer.name)
        if isinstance(layer, MatrixLayer) and layer in self.plan.kronecker:
            covariances = self.sums.covariance_of(layer)
            del self.sums.covariances[layer.name]
            reduce_(covariances, owner, f"the covariances of {layer.name}")
            if own:
                _add_to(self._covariance_totals.setdefault(layer.name, covariances), covariances)
            return
        squares = self.sums.squares_of(layer)
        del self.sums.squares[layer.name]
        reduce_(list(squares.values()), owner, f"the squared gradients of {layer.name}")
        if own:
            _add_to(self._square_totals.setdefault(layer.name, squares).values(), squares.values())

    def _demote(self, layer: Layer, reason: str) -> None:
        if not self._in_first_pass:
            super()._demote(layer, reason)
            return
        # Other processes may know nothing of it: until the end of the pass they go on handing over.
        self._failed.setdefault(layer.name, reason)
        self.sums.discard(layer.name)

    def _demote_alike(self) -> None:
        failed: dict[str, str] = {}
        for _, failed_there in all_gather_arrays({}, self._failed, "layers whose rows cannot be told apart"):
            failed = failed_there | failed
        for layer in self.plan.layers:
            if layer.name in failed:
                self._demote(layer, failed[layer.name])
                self._covariance_totals.pop(layer.name, None)
                self._square_totals.pop(layer.name, None)

    # --- bases and eigenvalues ----------------------------------------------------------------------------------------

    def _find_bases(self) -> None:
        self.sums.covariances, self._covariance_totals = self._covariance_totals, {}
        with sync_errors("the bases of the curvature"), self._alone():
            super()._find_bases()

    def _sum_eigenvalues(self) -> None:
        if not self.plan.kronecker:
            return
        for layer in self.plan.kronecker:
            if self.owner.is_here(layer.name):
                self.eigenvalue_sums[layer.name] = _zeros(layer, self.placement.of_layer(layer))[2]
        self._second_pass()

    def _second_pass(self) -> None:
        self.passes = 2
        rows = self.rows
        with LayerHooks(rows.model, self.plan.kronecker) as hooks:
            for positions, inputs in rows.batches("curvature: eigenvalues"):
                calls = rows.calls(hooks, positions, inputs)
                for layer in self.plan.kronecker:
                    squares = self._squares(layer, calls.pop(layer.name, []), len(positions))
                    reduce_([squares], self.owner[layer.name], f"the eigenvalues of {layer.name}")
                    if self.owner.is_here(layer.name):
                        self.eigenvalue_sums[layer.name] += squares

    def _squares(self, layer: MatrixLayer, calls: list[Call], n_rows: int) -> Tensor:
        """Σ over this process's rows of (Q_Sᵀ G Q_A)², with the owner's bases."""
        *bases, total = _zeros(layer, self.placement.of_layer(layer))
        bases = list(self.bases.get(layer.name, bases))
        inputs, outputs = (
            fetch_tensor(b, self.owner[layer.name], f"the eigenvectors of {layer.name}").to(total.device) for b in bases
        )
        for a, g in layer.expand_in_chunks(calls, n_rows) if calls else ():
            squares = sum_of_squared_gradients(
                a, g, inputs.to(g.device), outputs.to(g.device), temporary_bytes=layer.temporary_bytes
            )
            total += squares.to(total.device)
        return total

    # --- blocks -------------------------------------------------------------------------------------------------------

    def _blocks(self, weight_decay: float) -> list[Block]:
        names = [layer.name for layer in self.plan.layers]
        self.sums.squares, self._square_totals = self._square_totals, {}
        with sync_errors("the curvature's layers"), self._alone():
            own = super()._blocks(weight_decay)
        loose = sorted(self.plan.loose, key=lambda entry: entry.name)
        own += self._own_loop_blocks(weight_decay)
        with sync_errors("the curvature's numbers"):
            refuse_overflow(own)
        return with_remote_blocks(own, self.owner, [*names, *(entry.name for entry in loose)])

    def _own_loop_blocks(self, weight_decay: float) -> list[Block]:
        """Those of this process; each parameter is whole for a moment in every process."""
        blocks: list[Block] = []
        means = self._mean_squares_of_rows(weight_decay) if self.plan.loose else {}
        for entry in sorted(self.plan.loose, key=lambda entry: entry.name):
            self.owner.assign(entry.name, entry.parameter.numel())
            whole = full_tensor(means.pop(entry.name))
            if self.owner.is_here(entry.name):
                blocks.append(DiagonalBlock(entry.name, {entry.name: self.placement.move(whole)}, loop_reason(entry)))
        return blocks

    def _mean_squares_of_rows(self, weight_decay: float) -> dict[str, Tensor]:
        """Mean squared gradients of the parameters without a closed form, sharded like them."""
        loose = {entry.name: entry.parameter for entry in self.plan.loose}
        dtypes = {name: torch.float64 if p.dtype == torch.float64 else torch.float32 for name, p in loose.items()}
        sums = {name: torch.zeros_like(p, dtype=dtypes[name]).detach() for name, p in loose.items()}
        n_targets = 0
        for position, loss, targets in self.rows.one_by_one(self.looped):
            n_targets += targets
            bad = []
            gradients = self.rows.gradients(loss, list(loose.values()))
            for (name, total), gradient in zip(sums.items(), gradients, strict=True):
                if gradient is None:
                    continue
                to_local(total).add_(gradient.to(total.dtype).square())
                if not bool(gradient.isfinite().all()):
                    bad.append(name)
            everywhere = all_gather_arrays({}, {"bad": bad}, "a row of the loop")
            names = [name for _, about in everywhere for name in about["bad"]]
            if names:
                raise non_finite(names[0], self.rows, int(position[0]))
        return {name: total / max(n_targets, 1) + weight_decay for name, total in sums.items()}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, only the layers that this process holds, whose sums are those of all rows."""
        plan, reduce, owners = self.plan, self.reduce, self.owners
        mine = self.owner.is_here
        self.plan = LayerPlan(
            [layer for layer in plan.kronecker if mine(layer.name)],
            [layer for layer in plan.diagonal if mine(layer.name)],
            [],
        )
        self.reduce, self.owners = (lambda total: total), 1
        try:
            yield
        finally:
            self.plan, self.reduce, self.owners = plan, reduce, owners


def _n_statistics(layer: Layer) -> int:
    """Scalars that a layer's owner holds."""
    if isinstance(layer, MatrixLayer) and layer.reason is None:
        layout = layer.layout
        columns, rows = layout.columns, layout.group_outputs
        return layout.groups * (columns**2 + rows**2 + rows * columns)
    return sum(math.prod(layer.parameter(attribute).shape) for attribute in layer.parameters)


def _zeros(layer: MatrixLayer, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for Q_A, Q_S and Λ."""
    groups, columns, rows = layer.layout.groups, layer.layout.columns, layer.layout.group_outputs
    options: dict[str, Any] = {"dtype": layer.dtype, "device": device}
    return (
        torch.zeros(groups, columns, columns, **options),
        torch.zeros(groups, rows, rows, **options),
        torch.zeros(groups, rows, columns, **options),
    )


def _add_to(totals: Iterable[Tensor], sums: Iterable[Tensor]) -> None:
    """Add in place, unless they are the same tensors."""
    for total, added in zip(totals, sums, strict=True):
        if total is not added:
            total += added
