"""Fitting the curvature of a model whose parameters are sharded over processes, without ever holding all of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from hf_iau.curvature.blocks import Block, DiagonalBlock
from hf_iau.curvature.fit import LOOP_ROWS, Fit
from hf_iau.curvature.layer_hooks import LayerHooks
from hf_iau.curvature.layers import Call, Layer, LayerPlan, MatrixLayer, sum_of_squared_gradients
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
from hf_iau.errors import NonFiniteGradientError


class ShardedFit(Fit):
    """As `Fit`, but of each layer one process, its owner, holds the statistics.

    All processes pass through the model together, each with its own rows. After every batch their statistics of one
    layer after the other are added up at its owner and let go. Owners find the bases of their layers; for Λ, bases are
    sent around layer by layer in a second pass, and nothing is cached to spare it. Rows that are looked at one by one
    (the probe, and the loop for parameters without a closed form) are the same in every process, of whose gradient each
    sees its part.
    """

    uses_at_once = False  # statistics are sent around, which must not come between the passing of gradients

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.owner = Owners()
        self._counts = True  # whether the batch at hand is one of this process's share
        self._in_first_pass = False
        self._failed: dict[str, str] = {}
        self._totals: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._diagonal_totals: dict[str, dict[str, Tensor]] = {}

    # --- passes -------------------------------------------------------------------------------------------------------

    def _batches(self, what: str, start: int = 0) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        assert start == 0  # nothing is cached
        own, first = self.source.share()
        passes = self.source.passes(self.model)
        total = -(-len(own) // own.batch_size)
        for positions, inputs, counts in tqdm(passes, total=total, desc=what, disable=not self.progress):
            self._counts = counts
            yield first + positions, inputs
        self._counts = True

    def _loss(self, positions: np.ndarray, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        loss, n_targets = super()._loss(positions, inputs)
        return loss, n_targets if self._counts else 0

    def _capture(
        self,
        capture: LayerHooks,
        positions: np.ndarray,
        inputs: dict[str, Any],
        use: Callable[[Layer, list[Call]], None] | None = None,
    ) -> dict[str, list[Call]]:
        calls = super()._capture(capture, positions, inputs, use)
        return calls if self._counts else {}

    def _count(self, positions: np.ndarray, n_targets: int) -> None:
        if self._counts:
            super()._count(positions, n_targets)

    def _first_pass(self) -> None:
        for layer in self.plan.layers:
            self.owner.assign(layer.name, _statistics(layer))
        self._in_first_pass = True
        super()._first_pass()
        self._in_first_pass = False

    def _layer_done(self, layer: Layer) -> None:
        """Hand this batch's statistics over to the layer's owner."""
        owner, own = self.owner[layer.name], self.owner.is_here(layer.name)
        if isinstance(layer, MatrixLayer) and layer in self.plan.kronecker:
            sums = self._covariance(layer)
            del self.covariances[layer.name]
            reduce_(sums, owner, f"the covariances of {layer.name}")
            if own:
                _add_to(self._totals.setdefault(layer.name, sums), sums)
            return
        squares = self._diagonal(layer)
        del self.diagonal_sums[layer.name]
        reduce_(list(squares.values()), owner, f"the squared gradients of {layer.name}")
        if own:
            _add_to(self._diagonal_totals.setdefault(layer.name, squares).values(), squares.values())

    def _demote(self, layer: Layer, reason: str) -> None:
        if not self._in_first_pass:
            super()._demote(layer, reason)
            return
        # Other processes may know nothing of it: until the end of the pass they go on handing over.
        self._failed.setdefault(layer.name, reason)
        self.covariances.pop(layer.name, None)
        self.diagonal_sums.pop(layer.name, None)

    def _agree_on_layers(self) -> None:
        failed: dict[str, str] = {}
        for _, found in all_gather_arrays({}, self._failed, "layers whose rows cannot be told apart"):
            failed = found | failed
        for layer in self.plan.layers:
            if layer.name in failed:
                self._demote(layer, failed[layer.name])
                self._totals.pop(layer.name, None)
                self._diagonal_totals.pop(layer.name, None)

    def _rotate(self) -> None:
        self.covariances, self._totals = self._totals, {}
        with sync_errors("the bases of the curvature"), self._alone():
            super()._rotate()

    def _second_pass(self) -> None:
        if not self.plan.kronecker:
            return
        for layer in self.plan.kronecker:
            if self.owner.is_here(layer.name):
                self.kronecker_sums[layer.name] = _zeros(layer, self._device_of(layer))[2]
        self.passes = 2
        with LayerHooks(self.model, self.plan.kronecker) as capture:
            for positions, inputs_of_batch in self._batches("curvature: eigenvalues"):
                calls = self._capture(capture, positions, inputs_of_batch)
                for layer in self.plan.kronecker:
                    found = self._eigenvalues(layer, calls.pop(layer.name, []), len(positions))
                    reduce_([found], self.owner[layer.name], f"the eigenvalues of {layer.name}")
                    if self.owner.is_here(layer.name):
                        self.kronecker_sums[layer.name] += found

    def _eigenvalues(self, layer: MatrixLayer, calls: list[Call], rows: int) -> Tensor:
        """Σ over this process's rows of (Q_Sᵀ G Q_A)², with the owner's bases."""
        *bases, found = _zeros(layer, self._device_of(layer))
        bases = list(self.bases.get(layer.name, bases))
        inputs, outputs = (
            fetch_tensor(b, self.owner[layer.name], f"the eigenvectors of {layer.name}").to(found.device) for b in bases
        )
        for a, g in layer.expand_in_chunks(calls, rows) if calls else ():
            squares = sum_of_squared_gradients(
                a, g, inputs.to(g.device), outputs.to(g.device), temporary_bytes=layer.temporary_bytes
            )
            found += squares.to(found.device)
        return found

    # --- rows one by one ----------------------------------------------------------------------------------------------

    def _row_gradients(self, loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """This process's parts of the gradients of a row that all processes have at hand."""
        everything = list(self.model.parameters())
        for parameter in everything:
            parameter.grad = None
        if loss.requires_grad:
            loss.backward()
        # FSDP2 has added up as many copies as there are processes.
        found = [
            None if p.grad is None else to_local(p.grad) / (get_world_size() if isinstance(p, DTensor) else 1)
            for p in parameters
        ]
        for parameter in everything:
            parameter.grad = None
        return found

    def _own_part(self, layer: Layer, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        parameters = {name: layer.parameter(attribute) for attribute, name in layer.parameters.items()}
        return {name: to_local(shard_like(total, parameters[name])) for name, total in sums.items()}

    def _norm_of_parts(self, layer: Layer, parts: dict[str, Tensor]) -> float:
        squared = torch.zeros(1, dtype=torch.float64)
        for attribute, name in layer.parameters.items():
            squared += parts[name].double().square().sum().cpu() / replicas(layer.parameter(attribute))
        all_reduce_([squared], f"the probe of {layer.name}")
        return float(squared) ** 0.5

    def _loop_blocks(self, weight_decay: float) -> dict[str, Tensor]:
        """Mean squared gradients of the parameters without a closed form, sharded like them."""
        loose = {entry.name: entry.parameter for entry in self.plan.loose}
        dtypes = {name: torch.float64 if p.dtype == torch.float64 else torch.float32 for name, p in loose.items()}
        sums = {name: torch.zeros_like(p, dtype=dtypes[name]).detach() for name, p in loose.items()}
        n_targets = 0
        rows = self.source.select(self.looped).resized(1).passes_of_all(self.model)
        for index, inputs in tqdm(
            rows, total=len(self.looped), desc="curvature: row by row", disable=not self.progress
        ):
            position = self.looped[index]
            loss, targets = self._loss(position, inputs)
            n_targets += targets
            bad = []
            for (name, total), gradient in zip(
                sums.items(), self._row_gradients(loss, list(loose.values())), strict=True
            ):
                if gradient is None:
                    continue
                to_local(total).add_(gradient.to(total.dtype).square())
                if not bool(gradient.isfinite().all()):
                    bad.append(name)
            found = all_gather_arrays({}, {"bad": bad}, "a row of the loop")
            names = [name for _, about in found for name in about["bad"]]
            if names:
                raise NonFiniteGradientError(
                    f"The gradient of {names[0]!r} is NaN or infinite for row {int(self.row_ids[position[0]])} "
                    f"(position {int(position[0])} of the {self.source.name}). Remove or repair such rows."
                )
        return {name: total / max(n_targets, 1) + weight_decay for name, total in sums.items()}

    # --- results ------------------------------------------------------------------------------------------------------

    def _blocks(self, weight_decay: float) -> list[Block]:
        names = [layer.name for layer in self.plan.layers]
        self.diagonal_sums, self._diagonal_totals = self._diagonal_totals, {}
        with sync_errors("the curvature's layers"), self._alone():
            own = super()._blocks(weight_decay)
        loose = sorted(self.plan.loose, key=lambda entry: entry.name)
        values = self._loop_blocks(weight_decay) if loose else {}
        for entry in loose:
            self.owner.assign(entry.name, entry.parameter.numel())
            whole = full_tensor(values.pop(entry.name))
            if self.owner.is_here(entry.name):
                reason = f"{entry.reason}; measured on at most {LOOP_ROWS} rows"
                where = self.factor_device or whole.device
                own.append(DiagonalBlock(entry.name, {entry.name: whole.to(where)}, reason))
        with sync_errors("the curvature's numbers"):
            self._refuse_overflow(own)
        return with_remote_blocks(own, self.owner, [*names, *(entry.name for entry in loose)])

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


def _statistics(layer: Layer) -> int:
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


def _add_to(totals: Any, sums: Any) -> None:
    """Add in place, unless they are the same tensors."""
    for total, found in zip(totals, sums, strict=True):
        if total is not found:
            total += found
