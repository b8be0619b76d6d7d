"""The passes over rows in which the statistics of EK-FAC and diagonal curvature are summed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_iau.curvature.blocks import Block, DiagonalBlock, KroneckerBlock
from hf_iau.curvature.eigenvectors import (
    divide_and_conquer_bytes,
    eigenvector_bytes,
    eigenvectors,
    spare_for_eigenvectors,
)
from hf_iau.curvature.layer_hooks import LayerHooks, parameter_gradients
from hf_iau.curvature.layers import (
    Call,
    ConvolutionLayer,
    Layer,
    LayerPlan,
    MatrixLayer,
    NotSeparableError,
    live_positions,
    row_gradients,
    spare_bytes,
    sum_of_squared_gradients,
    sum_of_squares,
)
from hf_iau.data import RowLoss, RowSource, predicted_targets
from hf_iau.data.precision import rounds_to_half
from hf_iau.distributed import (
    broadcast_,
    get_rank,
)
from hf_iau.errors import NonFiniteGradientError, RequestError
from hf_iau.utils.vectors import is_same_device

Reduce = Callable[[Tensor], Tensor]

LOOP_ROWS = 128
"""Rows on which parameters without a closed form are measured, one at a time."""

PROBE_ROWS = 3

FEWEST_CACHE_BYTES = 24 * 2**20
"""What spares a second pass may always take so much, less what eigenvectors take that are found in the fastest way."""

BASIS_POSITIONS = 131_072
"""About so many positions of a convolution make its bases, which are covariances of a few hundred columns and need no
more; Λ is measured on the positions of all rows."""

SHARE_OF_TEMPORARIES = 8
"""By how much temporary tensors are smaller where factors are kept on another device than the model's.

Then passes are of half a batch. Beside the weights and whatever else training keeps, training needs room for gradients or a
batch's activations, whichever are larger, and such a pass half of the latter: half the gradients' bytes are free at least.
"""


class Fit:
    """One run over the rows and what it has summed so far.

    A layer's statistics are made while the loss is still being differentiated, so that no more than one layer's output
    gradients are held.
    """

    uses_at_once = True

    def __init__(
        self,
        model: nn.Module,
        source: RowSource,
        *,
        start: int,
        total_rows: int,
        looped: np.ndarray,
        owners: int,
        plan: LayerPlan,
        row_ids: np.ndarray,
        seed: int,
        row_loss: RowLoss | None,
        factor_device: torch.device | None,
        cache_bytes: int,
        progress: bool,
        reduce: Reduce,
    ) -> None:
        self.model = model
        # Whether statistics lie on another device than the model, for which training's memory has to be enough.
        self.is_apart = factor_device is not None and not all(
            is_same_device(parameter.device, factor_device) for parameter in model.parameters()
        )
        self.source = source.resized(max(1, source.batch_size // 2)) if self.is_apart else source
        self.start = start  # the first row's position among those of all processes
        self.total_rows = total_rows
        self.looped = looped
        self.owners = owners  # processes that the eigendecompositions are shared out among
        self.plan = plan
        self.row_ids = row_ids
        self.seed = seed
        self.row_loss = row_loss
        self.factor_device = factor_device
        self.cache_bytes = cache_bytes
        self.progress = progress
        self.reduce = reduce
        self.every_layer = plan.layers
        for layer in plan.layers if self.is_apart else []:
            layer.temporary_bytes //= SHARE_OF_TEMPORARIES
        self.needs_backward = False
        self.n_rows = 0
        self.n_targets = 0
        self._batch_targets = 0
        self.passes = 1
        self.cache: list[tuple[str, Tensor | None, Tensor]] = []
        self.cached_bytes = 0
        self.cached_rows = 0  # the first rows, of whose batches all is cached
        self.caching = True
        self.covariances: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.bounds: dict[str, float] = {}
        self.bases: dict[str, tuple[Tensor, Tensor]] = {}
        self.kronecker_sums: dict[str, Tensor] = {}
        self.diagonal_sums: dict[str, dict[str, Tensor]] = {}

    def run(self, weight_decay: float) -> list[Block]:
        self._probe()
        self._first_pass()
        self._agree_on_layers()
        counts = self._reduced(torch.tensor([self.n_rows, self.n_targets], dtype=torch.float64, device=self._device))
        self.n_rows, self.n_targets = (round(count) for count in counts.tolist())
        if self.n_targets == 0:
            raise RequestError(
                f"The {self.n_rows} {self.source.name} have no targets (every label is ignored), so there is no "
                "curvature. Give rows with labels."
            )
        self._rotate()
        self._second_pass()
        return self._blocks(weight_decay)

    # --- losses -------------------------------------------------------------------------------------------------------

    def _loss(self, positions: np.ndarray, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """The summed loss of some rows, to be differentiated, and their number of targets."""
        if self.row_loss is not None:
            loss, n_targets = self.row_loss(self.model, inputs)
        else:
            targets = predicted_targets(self.model, inputs)
            loss, n_targets = targets.fisher_loss(self.row_ids[positions], self.seed), len(targets)
        return loss, n_targets

    def _capture(
        self,
        capture: LayerHooks,
        positions: np.ndarray,
        inputs: dict[str, Any],
        use: Callable[[Layer, list[Call]], None] | None = None,
    ) -> dict[str, list[Call]]:
        """Calls of all layers; with `use`, only of those that it was not given while the loss was differentiated."""
        losses: list[Tensor] = []
        sums: list[Tensor] = []

        def loss() -> Tensor:
            value, self._batch_targets = self._loss(positions, inputs)
            losses.append(value.detach())
            self.needs_backward |= capture.needs_backward
            return value

        def take(layer: Layer, calls: list[Call]) -> None:
            assert use is not None
            sums.extend(tensor.sum(dtype=torch.float32) for call in calls for tensor in call)
            use(layer, calls)

        calls = capture.run(loss, None if use is None else take)
        if sums and not bool(torch.stack([total.to(losses[0].device) for total in sums]).isfinite().all()):
            losses.clear()
            calls = capture.run(loss)  # once more, to name the layer and the row
        self._refuse_non_finite(losses[0], calls, positions)
        return calls

    def _refuse_non_finite(self, loss: Tensor, calls: dict[str, list[Call]], positions: np.ndarray) -> None:
        sums = [
            tensor.sum(dtype=torch.float32).to(loss.device)
            for pairs in calls.values()
            for pair in pairs
            for tensor in pair
        ]
        if bool(torch.stack([loss.float().to(loss.device), *sums]).isfinite().all()):
            return
        for name, pairs in calls.items():  # in the order of differentiation: the first is where it began
            for what, index in (("gradient", 1), ("input", 0)):
                for pair in pairs:
                    bad = ~pair[index].isfinite()
                    if bool(bad.any()):
                        row = self._name_row(bad, positions)
                        raise NonFiniteGradientError(
                            f"The {what} of layer {name!r} is NaN or infinite{row}. Remove or repair such rows, or "
                            "compute in a wider type (bfloat16 or float32 instead of float16)."
                        )
        if not bool(loss.isfinite()):
            places = ", ".join(str(self.start + position) for position in np.sort(positions))
            raise NonFiniteGradientError(
                f"The loss of the {self.source.name} at positions {places} is {float(loss)} in all. Remove or repair such rows."
            )

    def _name_row(self, bad: Tensor, positions: np.ndarray) -> str:
        leading = bad.shape[0] if bad.dim() else 0
        if leading == 0 or leading % len(positions):
            return ""
        by_row = bad.reshape(len(positions), -1).any(dim=1).cpu().numpy()
        position = int(positions[int(by_row.argmax())])
        return f" for row {int(self.row_ids[position])} (position {self.start + position} of the {self.source.name})"

    # --- passes -------------------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Compare each closed form with rows taken one by one, and send layers that disagree to the loop."""
        most = min(PROBE_ROWS, self.source.batch_size) if self.is_apart else PROBE_ROWS
        positions = np.unique(np.linspace(0, len(self.source) - 1, num=min(most, len(self.source)), dtype=int))
        if not len(positions):
            return
        rows = len(positions)
        _, inputs = next(self.source.select(positions).resized(rows).passes_of_all(self.model))
        if self.row_loss is not None:
            with torch.no_grad():
                self.row_loss(self.model, inputs)  # lets the loss find its own scale outside of the hooks
        layers = self.plan.layers
        sums: dict[str, dict[str, Tensor]] = {}
        scales: dict[str, float] = {}
        maxima: dict[str, float] = {}
        with LayerHooks(self.model, layers) as capture:
            calls = self._capture(capture, positions, inputs)
            unreadable = capture.unreadable
        called = set(calls)
        for layer in layers:
            layer.accepts_merged_rows = True
            squares = layer.new_sums()
            try:
                if layer.name in unreadable:
                    raise NotSeparableError(unreadable[layer.name])
                if layer.name in calls:
                    layer.add_squares(calls.pop(layer.name), rows, squares)
            except NotSeparableError as error:
                self._demote(layer, str(error))
                continue
            maxima[layer.name] = max(float(total.max()) for total in squares.values())
            scales[layer.name] = _norm(squares)
            sums[layer.name] = self._all_on_factor_device(self._own_part(layer, squares))
        layers = self.plan.layers
        largest = max(maxima.values(), default=0.0)
        names = [(layer, attribute, name) for layer in layers for attribute, name in layer.parameters.items()]
        parameters = [layer.module._parameters[attribute] for layer, attribute, _ in names]
        for index in range(rows if names else 0):
            loss, _ = self._loss(positions[index : index + 1], _one_row(inputs, index, rows))
            gradients = self._row_gradients(loss, [p for p in parameters if p is not None])
            for (layer, _, name), gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    total = sums[layer.name][name]
                    total -= gradient.to(total).square()
            del gradients, gradient  # before the next row has its own
        # Of the whole model: adapters are often wider than the base weights that their gradients pass through.
        half = rounds_to_half(self.model)
        for layer in layers:
            rounding = (100 * torch.finfo(layer.dtype).eps) ** 2 * largest
            size = sum(layer.parameter(attribute).numel() for attribute in layer.parameters)
            tolerance = (0.2 if half else 0.01) * scales[layer.name] + rounding * size**0.5
            if layer.name not in called:  # its parameters may still be used without calling it
                tolerance = 0.0
            if self._norm_of_parts(layer, sums[layer.name]) > tolerance:
                self._demote(layer, "its gradients differ from those of rows taken one by one")
            layer.accepts_merged_rows = layer.saw_merged_rows and scales[layer.name] > 0

    def _row_gradients(self, loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """Gradients of a row's loss for some parameters."""
        return parameter_gradients(loss, parameters, backward=self.needs_backward)

    def _own_part(self, layer: Layer, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `_row_gradients` will give this process of a layer's parameters: all of each."""
        return sums

    def _norm_of_parts(self, layer: Layer, parts: dict[str, Tensor]) -> float:
        """Euclidean norm over a layer's parameters, of which each process has its own part."""
        return _norm(parts)

    def _batches(self, what: str, start: int = 0) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Batches of rows of similar length, without the first `start` rows."""
        total = -(-(len(self.source) - start) // self.source.batch_size)
        yield from tqdm(self.source.by_length(start), total=total, desc=what, disable=not self.progress)

    def _first_pass(self) -> None:
        """Covariances of the Kronecker layers and squared gradients of the diagonal ones."""
        if not self.plan.layers:  # only counts are needed
            for positions, inputs in self._batches("curvature: targets"):
                with torch.no_grad():
                    self._count(positions, self._loss(positions, inputs)[1])
            return
        with LayerHooks(self.model, self.plan.layers) as capture:
            for positions, inputs in self._batches("curvature: factors"):
                cached = len(self.cache)

                def use(layer: Layer, calls: list[Call], positions: np.ndarray = positions) -> None:
                    if layer in self.plan.layers:
                        try:
                            self._add_calls(layer, calls, positions)
                        except NotSeparableError as error:
                            self._demote(layer, str(error))

                calls = self._capture(capture, positions, inputs, use if self.uses_at_once else None)
                self._count(positions, self._batch_targets)
                for layer in self.plan.layers:
                    use(layer, calls.pop(layer.name, []))
                    self._layer_done(layer)
                if self.caching:
                    self.cached_rows += len(positions)
                else:
                    del self.cache[cached:]  # of a batch all layers or none

    def _add_calls(self, layer: Layer, calls: list[Call], positions: np.ndarray) -> None:
        if not calls:
            return
        if layer in self.plan.diagonal:
            layer.add_squares(calls, len(positions), self._diagonal(layer))
            return
        assert isinstance(layer, MatrixLayer)
        first = 0
        for a, g in layer.expand_in_chunks(calls, len(positions)):
            self._add_covariances(layer, a, g, positions[first : first + a.shape[1]])
            first += a.shape[1]
            del a, g  # before the next rows have their own

    def _layer_done(self, layer: Layer) -> None:
        """A batch is done with this layer."""

    def _count(self, positions: np.ndarray, n_targets: int) -> None:
        self.n_rows += len(positions)
        self.n_targets += n_targets

    def _add_covariances(self, layer: MatrixLayer, a: Tensor, g: Tensor, rows: np.ndarray) -> None:
        """Add some rows' positions to A and S.

        Args:
            layer: whose inputs and output gradients they are.
            a, g: `(groups, rows, positions, columns)` and `(…, outputs)`.
            rows: `(rows,)` int, their positions in the source.
        """
        self._keep(layer, a, g)
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
        input_sum, output_sum, bound = self._covariance(layer)
        if positions > 1:
            norms = torch.linalg.vector_norm(weighted, dim=-1) * torch.linalg.vector_norm(outputs, dim=-1)
            bound += norms.square().sum(dtype=torch.float64).to(bound.device) / share
        input_sum += (weighted.mT @ inputs).to(input_sum.device)
        output_sum += (outputs.mT @ outputs).to(output_sum.device)

    def _covariance(self, layer: MatrixLayer) -> tuple[Tensor, Tensor, Tensor]:
        """A, S, and Σ ‖a‖²‖g‖² over positions: what ΣΛ would be if positions did not cancel (0 for a single one)."""
        if layer.name not in self.covariances:
            groups, columns, rows = layer.layout.groups, layer.layout.columns, layer.layout.group_outputs
            options: dict[str, Any] = {"dtype": layer.dtype, "device": self._device_of(layer)}
            self.covariances[layer.name] = (
                torch.zeros(groups, columns, columns, **options),
                torch.zeros(groups, rows, rows, **options),
                torch.zeros(1, **options).double(),
            )
        return self.covariances[layer.name]

    def _diagonal(self, layer: Layer) -> dict[str, Tensor]:
        """Sums of squared gradients."""
        if layer.name not in self.diagonal_sums:
            self.diagonal_sums[layer.name] = self._all_on_factor_device(layer.new_sums())
        return self.diagonal_sums[layer.name]

    def _keep(self, layer: MatrixLayer, a: Tensor, g: Tensor) -> None:
        """Cache what Λ needs: a row's gradient or, where that is smaller, its factors."""
        if not self.caching:
            return
        positions, columns, outputs = a.shape[2], a.shape[3], g.shape[3]
        as_matrices = _kept_as_matrices(positions, columns, outputs)
        self.cached_bytes += cached_size(a.shape[:3], columns, outputs) * a.element_size()
        if self.cached_bytes > self.cache_bytes:
            self.caching = False
        elif as_matrices:
            self.cache.append((layer.name, None, self._on_factor_device(row_gradients(a, g))))
        else:
            a, g = self._on_factor_device(a.contiguous()), self._on_factor_device(g.contiguous())
            self.cache.append((layer.name, a, g))

    def _agree_on_layers(self) -> None:
        """Measure a layer by the loop everywhere when one process has to."""
        kept = {layer.name for layer in self.plan.layers}
        flags = torch.tensor(
            [float(layer.name not in kept) for layer in self.every_layer], dtype=torch.float64, device=self._device
        )
        if not len(flags):
            return
        for layer, flag in zip(self.every_layer, self._reduced(flags).tolist(), strict=True):
            if flag > 0 and layer.name in kept:
                self._demote(layer, "another process could not tell its rows apart")

    def _rotate(self) -> None:
        """Eigenbases of the covariances; of several processes, each works out those of some layers for all."""
        for number, layer in enumerate(self.plan.kronecker):
            own = number % self.owners == get_rank() % self.owners
            *sums, bound = self._covariance(layer)
            self.covariances.pop(layer.name, None)
            self.bounds[layer.name] = float(self._reduced(bound))
            bases = []
            while sums:  # a covariance is freed as its eigenvectors take its place
                total = self._reduced(sums.pop(0))
                if own:
                    # Where factors are apart, it is not their device that is short of memory.
                    spare = math.inf if self.is_apart else spare_for_eigenvectors(layer)
                    total = eigenvectors(total, layer.name, spare=spare)
                bases.append(total)
            self.bases[layer.name] = (bases[0], bases[1])
        if self.owners > 1:
            for number, layer in enumerate(self.plan.kronecker):
                for basis in self.bases[layer.name]:
                    broadcast_(basis, number % self.owners, f"the eigenvectors of {layer.name}")

    def _second_pass(self) -> None:
        """Λ of the Kronecker layers."""
        if not self.plan.kronecker:
            return
        for layer in self.plan.kronecker:
            groups, columns, rows = layer.layout.groups, layer.layout.columns, layer.layout.group_outputs
            self.kronecker_sums[layer.name] = self.bases[layer.name][0].new_zeros(groups, rows, columns)
        for layer in self.plan.kronecker:
            self._add_cached(layer)
        self.cache = []
        if self.cached_rows == len(self.source):
            return
        self.passes = 2
        with LayerHooks(self.model, self.plan.kronecker) as capture:
            for positions, inputs_of_batch in self._batches("curvature: eigenvalues", self.cached_rows):

                def use(layer: Layer, calls: list[Call], n_rows: int = len(positions)) -> None:
                    assert isinstance(layer, MatrixLayer)
                    total = self.kronecker_sums[layer.name]
                    limit = layer.temporary_bytes // 2  # for the activations of layers before it are still held
                    inputs, outputs = (basis.to(calls[0][1].device) for basis in self.bases[layer.name])
                    for a, g in layer.expand_in_chunks(calls, n_rows):
                        found = sum_of_squared_gradients(a, g, inputs, outputs, temporary_bytes=limit)
                        total += found.to(total.device)
                        del a, g, found  # before the next rows have their own

                calls = self._capture(capture, positions, inputs_of_batch, use)
                for layer in self.plan.kronecker:
                    if layer.name in calls:
                        use(layer, calls.pop(layer.name))

    def _add_cached(self, layer: MatrixLayer) -> None:
        """Λ of a layer, as far as what it takes is cached."""
        device, limit = layer.parameter(next(iter(layer.parameters))).device, layer.temporary_bytes
        total = self.kronecker_sums[layer.name]
        inputs, outputs = (basis.to(device) for basis in self.bases[layer.name])
        for name, a, g in self.cache:
            if name != layer.name:
                continue
            if a is None:
                found = sum_of_squares(g.to(device), inputs, outputs, temporary_bytes=limit)
            else:
                found = sum_of_squared_gradients(a.to(device), g.to(device), inputs, outputs, temporary_bytes=limit)
            total += found.to(total.device)

    def _loop(self) -> tuple[dict[str, Tensor], int]:
        """Squared gradients of the loose parameters, summed over some rows, and those rows' targets."""
        loose = self.plan.loose
        sums = {}
        for entry in loose:
            dtype = torch.float64 if entry.parameter.dtype == torch.float64 else torch.float32
            zeros = torch.zeros_like(entry.parameter, dtype=dtype, memory_format=torch.contiguous_format).detach()
            sums[entry.name] = zeros.to(self.factor_device or zeros.device)
        n_targets = 0
        positions = self.looped
        rows = self.source.select(positions).resized(1)
        for index, inputs in tqdm(rows, desc="curvature: row by row", disable=not self.progress):
            position = positions[index]
            loss, targets = self._loss(position, inputs)
            n_targets += targets
            gradients = parameter_gradients(loss, [e.parameter for e in loose], backward=self.needs_backward)
            for entry, gradient in zip(loose, gradients, strict=True):
                if gradient is None:
                    continue
                total = sums[entry.name]
                if gradient.is_sparse:
                    gradient = gradient.to_dense()
                squares = gradient.to(total.dtype).square().to(total.device)
                if not bool(squares.sum().isfinite()) and not bool(gradient.isfinite().all()):
                    raise NonFiniteGradientError(
                        f"The gradient of {entry.name!r} is NaN or infinite for row {int(self.row_ids[position[0]])} "
                        f"(position {self.start + int(position[0])} of the {self.source.name}). Remove or repair such rows."
                    )
                total += squares
            del gradients, gradient  # before the next row has its own
        return sums, n_targets

    # --- results ------------------------------------------------------------------------------------------------------

    def _blocks(self, weight_decay: float) -> list[Block]:
        blocks: list[Block] = []
        for layer in self.plan.kronecker:
            values = self._reduced(self.kronecker_sums.pop(layer.name))
            if (
                float(values.sum(dtype=torch.float64))
                <= (100 * torch.finfo(layer.dtype).eps) ** 2 * self.bounds[layer.name]
            ):
                # The positions' gradients cancel but for rounding (the bias of attention keys): no curvature.
                values = torch.zeros_like(values)
            values = values / self.n_targets + weight_decay
            inputs, outputs = self.bases[layer.name]
            blocks.append(KroneckerBlock(layer.name, layer.layout, inputs, outputs, values))
        for other in self.plan.diagonal:
            totals = self._diagonal(other)
            del self.diagonal_sums[other.name]
            found = {name: self._reduced(total) / self.n_targets + weight_decay for name, total in totals.items()}
            blocks.append(DiagonalBlock(other.name, found, other.reason))
        if self.plan.loose:
            loose = sorted(self.plan.loose, key=lambda entry: entry.name)
            sums, n_targets = self._loop()
            count = torch.tensor([n_targets], dtype=torch.float64, device=self._device)
            n_targets = max(round(float(self._reduced(count))), 1)
            for entry in loose:
                values = self._reduced(sums[entry.name]) / n_targets + weight_decay
                reason = f"{entry.reason}; measured on at most {LOOP_ROWS} rows"
                blocks.append(DiagonalBlock(entry.name, {entry.name: values}, reason))
        self._refuse_overflow(blocks)
        return blocks

    def _refuse_overflow(self, blocks: list[Block]) -> None:
        for block in blocks:
            if not all(bool(tensor.isfinite().all()) for tensor in block.tensors().values()):
                raise NonFiniteGradientError(
                    f"The curvature of layer {block.name!r} overflows although every row's gradient is finite. "
                    "Compute in a wider type, or scale the loss down."
                )

    def _demote(self, layer: Layer, reason: str) -> None:
        self.plan.demote(layer, reason)
        self.covariances.pop(layer.name, None)
        self.diagonal_sums.pop(layer.name, None)

    def _reduced(self, tensor: Tensor) -> Tensor:
        return self.reduce(tensor)

    @property
    def _device(self) -> torch.device:
        if self.factor_device is not None:
            return self.factor_device
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def _device_of(self, layer: Layer) -> torch.device:
        return self.factor_device or layer.parameter(next(iter(layer.parameters))).device

    def _on_factor_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.factor_device or tensor.device)

    def _all_on_factor_device(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._on_factor_device(total) for name, total in sums.items()}


def usual_cache_bytes(model: nn.Module, plan: LayerPlan) -> int:
    """What `cache_bytes=None` comes to: the cache is there while eigenvectors are found."""
    spared = spare_bytes(model.parameters()) - eigenvector_bytes(plan)
    return max(spared, FEWEST_CACHE_BYTES - divide_and_conquer_bytes(plan), 0)


def cached_size(shape: Sequence[int], columns: int, outputs: int) -> int:
    """Scalars that are kept of some rows' inputs `(groups, rows, positions, columns)` and output gradients."""
    groups, rows, positions = shape
    matrices = _kept_as_matrices(positions, columns, outputs)
    return groups * rows * (outputs * columns if matrices else positions * (outputs + columns))


def _kept_as_matrices(positions: int, columns: int, outputs: int) -> bool:
    return positions > 1 and outputs * columns <= positions * (outputs + columns)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors.values())) ** 0.5


def _one_row(value: Any, index: int, rows: int) -> Any:
    """A batch's row as a batch of one; tensors without a row dimension are kept."""
    if isinstance(value, Tensor):
        return value[index : index + 1] if value.dim() and value.shape[0] == rows else value
    if isinstance(value, Mapping):
        return {key: _one_row(item, index, rows) for key, item in value.items()}
    if isinstance(value, (list, tuple)) and len(value) == rows:
        return type(value)([value[index]])
    return value
