"""Layers: modules whose row gradients can be written down from their inputs and output gradients."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_iau.curvature.blocks import MatrixLayout
from hf_iau.distributed import class_name

FEWEST_SPARE_BYTES = 4 * 2**20

Call = tuple[Tensor, Tensor]
"""One call of a module in a forward pass: its input and the gradient of its output."""


def spare_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes that a fit may use to be faster: those of the trained weights' gradients, which training holds and a fit
    does not; at least `FEWEST_SPARE_BYTES`."""
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    return max(gradients, FEWEST_SPARE_BYTES)


class NotSeparableError(Exception):
    """The rows of a batch cannot be told apart in a module's input; the message says why."""


class Layer(abc.ABC):
    """A module with trainable parameters of its own.

    Args:
        name: the module's name.
        module: the module.
        parameters: the parameter names by attribute ("weight", "bias"); only trainable, untied ones.
        dtype: type in which statistics are accumulated.
    """

    reason: str | None = None
    """Why the layer is not in Kronecker form."""

    temporary_bytes: int = FEWEST_SPARE_BYTES
    """What temporary tensors stay near."""

    def __init__(self, name: str, module: nn.Module, parameters: Mapping[str, str], dtype: torch.dtype) -> None:
        self.name = name
        self.module = module
        self.parameters = dict(parameters)
        self.dtype = dtype
        self.accepts_merged_rows = False
        self.saw_merged_rows = False

    @abc.abstractmethod
    def add_squares(self, calls: list[Call], n_rows: int, sums: dict[str, Tensor]) -> None:
        """Add Σ_rows g² (g a row's gradient, elementwise) of one batch.

        Args:
            calls: every call of the module.
            n_rows: rows of the batch.
            sums: by parameter name, in the parameter's shape; added to in place.

        Raises:
            NotSeparableError: when the rows cannot be told apart.
        """

    def parameter(self, attribute: str) -> Tensor:
        return getattr(self.module, attribute)

    def new_sums(self) -> dict[str, Tensor]:
        """Zeros for `add_squares`."""
        parameters = {name: self.parameter(attribute) for attribute, name in self.parameters.items()}
        return {name: torch.zeros(p.shape, dtype=self.dtype, device=p.device) for name, p in parameters.items()}

    def by_row(self, tensor: Tensor, n_rows: int) -> Tensor:
        """`tensor` with its first dimension split into `(rows, rest)` where rows and positions were merged."""
        leading = tensor.shape[0] if tensor.dim() else 0
        if leading == n_rows:
            return tensor
        if leading == 0 or leading % n_rows or leading < n_rows:
            raise NotSeparableError(f"its input has leading dimension {leading} in a batch of {n_rows} rows")
        self.saw_merged_rows = True
        if not self.accepts_merged_rows:
            raise NotSeparableError(
                f"its input has leading dimension {leading} in a batch of {n_rows} rows, unlike in the probe"
            )
        return tensor.reshape(n_rows, leading // n_rows, *tensor.shape[1:])


class MatrixLayer(Layer):
    """A module that multiplies a matrix with a vector at each position: linear layers and convolutions."""

    layout: MatrixLayout

    @abc.abstractmethod
    def expand_call(self, call: Call, n_rows: int) -> tuple[Tensor, Tensor]:
        """`expand` for one call, with gradients as they come."""

    def expand(self, calls: list[Call], n_rows: int) -> tuple[Tensor, Tensor]:
        """Inputs a and output gradients g at every position of every call, so that a row's gradient is Σ g aᵀ.

        Args:
            calls: every call of the module.
            n_rows: rows of the batch.

        Returns:
            a, `(groups, rows, positions, columns)`, with the homogeneous 1 in the last column where the bias is
            trainable, and g, `(groups, rows, positions, group outputs)`.

        Raises:
            NotSeparableError: when the rows cannot be told apart.
        """
        inputs, gradients = [], []
        for call in calls:
            a, g = self.expand_call(call, n_rows)
            if a.shape[:-1] != g.shape[:-1]:
                raise NotSeparableError(f"its input {tuple(call[0].shape)} and output {tuple(call[1].shape)} differ")
            inputs.append(a)
            gradients.append(g)
        if len(inputs) == 1:
            return inputs[0], gradients[0]
        return torch.cat(inputs, dim=2), torch.cat(gradients, dim=2)

    def expand_in_chunks(self, calls: list[Call], n_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`expand` for some rows at a time, so that the patches of a convolution stay near `temporary_bytes`."""
        per_position = (self.layout.columns + self.layout.group_outputs) * self.layout.groups * self.dtype.itemsize
        positions = sum(g.numel() for _, g in calls) / (self.layout.outputs * n_rows)
        whole = all(x.dim() and x.shape[0] == g.shape[0] and x.shape[0] % n_rows == 0 for x, g in calls)
        chunks = _chunks(n_rows, int(positions * per_position), self.temporary_bytes) if whole else [(0, n_rows)]
        for start, stop in chunks:
            part = [
                tuple(t[start * (t.shape[0] // n_rows) : stop * (t.shape[0] // n_rows)] for t in call)
                if len(chunks) > 1
                else call
                for call in calls
            ]
            yield self.expand([(x, g) for x, g in part], stop - start)

    def add_squares(self, calls: list[Call], n_rows: int, sums: dict[str, Tensor]) -> None:
        for a, g in self.expand_in_chunks(calls, n_rows):
            for name, values in self.layout.split(
                sum_of_squared_gradients(a, g, temporary_bytes=self.temporary_bytes)
            ).items():
                sums[name] += values.to(sums[name].device)

    @property
    def largest_factor(self) -> int:
        return max(self.layout.columns, self.layout.group_outputs)


class LinearLayer(MatrixLayer):
    """`nn.Linear` and `transformers.pytorch_utils.Conv1D`."""

    def __init__(self, name: str, module: nn.Module, parameters: Mapping[str, str], dtype: torch.dtype) -> None:
        super().__init__(name, module, parameters, dtype)
        transposed = isinstance(module, Conv1D)
        # A frozen weight may be quantised, with a shape of its own: then only the bias counts.
        shape = tuple(self.parameter("weight").shape) if "weight" in parameters else (self.parameter("bias").numel(),)
        self.layout = MatrixLayout(
            weight=parameters.get("weight"),
            weight_shape=shape,
            bias=parameters.get("bias"),
            outputs=shape[1] if transposed and len(shape) == 2 else shape[0],
            transposed=transposed,
        )

    def expand_call(self, call: Call, n_rows: int) -> tuple[Tensor, Tensor]:
        if call[0].dim() < 2:
            raise NotSeparableError(f"its input has shape {tuple(call[0].shape)}, without a dimension for rows")
        a, g = (self.by_row(tensor, n_rows).reshape(n_rows, -1, tensor.shape[-1])[None] for tensor in call)
        a, g = a.to(self.dtype), g.to(self.dtype)
        if self.layout.bias is None:
            return a, g
        ones = g.new_ones(()).expand(*g.shape[:-1], 1)
        if self.layout.weight is None:
            return ones, g
        if a.shape[:-1] != g.shape[:-1]:
            return a, g  # refused by the caller
        return torch.cat([a, ones], dim=-1), g


class ConvolutionLayer(MatrixLayer):
    """`nn.Conv1d` and `nn.Conv2d`; each group has its own factors."""

    module: nn.Conv1d | nn.Conv2d

    def __init__(self, name: str, module: nn.Module, parameters: Mapping[str, str], dtype: torch.dtype) -> None:
        super().__init__(name, module, parameters, dtype)
        self.layout = MatrixLayout(
            weight=parameters.get("weight"),
            weight_shape=tuple(self.parameter("weight").shape),
            bias=parameters.get("bias"),
            outputs=self.module.out_channels,
            groups=self.module.groups,
        )

    def expand_call(self, call: Call, n_rows: int) -> tuple[Tensor, Tensor]:
        x, g = call
        layout, dimensions = self.layout, len(self.module.kernel_size)
        if x.dim() != dimensions + 2:
            raise NotSeparableError(f"its input has {x.dim()} dimensions instead of {dimensions + 2}")
        merged = x.shape[0]
        self.by_row(x, n_rows)
        g = g.reshape(n_rows, merged // n_rows, layout.groups, layout.group_outputs, -1)
        g = g.permute(2, 0, 1, 4, 3).reshape(layout.groups, n_rows, -1, layout.group_outputs).to(self.dtype)
        if layout.weight is None:
            return g.new_ones(()).expand(*g.shape[:-1], 1), g
        windows = self._windows(x)
        channels, kernel, places = windows.shape[1] // layout.groups, windows.shape[4:], windows.shape[2:4]
        # Columns first: so each is copied in long runs, and the 1 of the bias is a column of its own.
        columns = x.new_empty(layout.groups, layout.columns, merged, math.prod(places), dtype=self.dtype)
        patches = columns[:, : layout.weight_columns].view(layout.groups, channels, *kernel, merged, *places)
        patches.copy_(windows.unflatten(1, (layout.groups, channels)).permute(1, 2, 5, 6, 0, 3, 4))
        columns[:, layout.weight_columns :] = 1.0
        return columns.view(layout.groups, layout.columns, n_rows, -1).permute(0, 2, 3, 1), g

    def _windows(self, x: Tensor) -> Tensor:
        """A view of what the kernel sees at each place, `(rows, channels, height, width, *kernel)`."""
        module = self.module
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padding = module._reversed_padding_repeated_twice
        if any(padding):
            x = F.pad(x, padding, mode=mode)
        kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
        if len(kernel) == 1:
            x, kernel, dilation, stride = x[:, :, None], (1, *kernel), (1, *dilation), (1, *stride)
        for dimension in (0, 1):
            span = (kernel[dimension] - 1) * dilation[dimension] + 1
            x = x.unfold(2 + dimension, span, stride[dimension])
        return x[..., :: dilation[0], :: dilation[1]]


class NormalisationLayer(Layer):
    """A module that scales (and shifts) its normalised input: LayerNorm, BatchNorm in eval, GroupNorm, RMSNorm."""

    reason = "normalisation layer"

    def add_squares(self, calls: list[Call], n_rows: int, sums: dict[str, Tensor]) -> None:
        shape = next(iter(sums.values())).shape
        gradients = {attribute: torch.zeros((), dtype=self.dtype) for attribute in self.parameters}
        for x, g in calls:
            g = g.to(self.dtype)
            channels_last = isinstance(self.module, nn.LayerNorm) or not isinstance(self.module, _CHANNEL_NORMS)
            for attribute in self.parameters:
                values = g * self.normalised(x.to(self.dtype)) if attribute == "weight" else g
                values = self.by_row(values, n_rows).reshape(n_rows, -1, *values.shape[1:])
                if channels_last:
                    values = values.reshape(n_rows, -1, *shape).sum(dim=1)
                else:
                    values = values.reshape(n_rows, values.shape[1], shape[0], -1).sum(dim=(1, 3))
                gradients[attribute] = gradients[attribute].to(values.device) + values
        for attribute, name in self.parameters.items():
            sums[name] += gradients[attribute].square().sum(dim=0).to(sums[name].device)

    def normalised(self, x: Tensor) -> Tensor:
        """The input as it is before scale and shift."""
        module = self.module
        if isinstance(module, nn.LayerNorm):
            if tuple(x.shape[-len(module.normalized_shape) :]) != tuple(module.normalized_shape):
                raise NotSeparableError(f"it normalises other dimensions of {tuple(x.shape)} than the last")
            return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, None, None, module.eps)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            if module.running_mean is None or module.running_var is None:
                raise NotSeparableError("it normalises over the rows of a batch")
            mean, variance = module.running_mean.to(x.dtype), module.running_var.to(x.dtype)
            return F.batch_norm(x, mean, variance, None, None, False, 0.0, module.eps)
        shape = self.parameter("weight").shape
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if epsilon is None and isinstance(module, nn.RMSNorm):
            epsilon = torch.finfo(x.dtype).eps
        if not isinstance(epsilon, float):
            raise NotSeparableError(f"its kind, {type(module).__name__}, is not known")
        return F.rms_norm(x, tuple(shape), None, epsilon)


_CHANNEL_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)


class EmbeddingLayer(Layer):
    """`nn.Embedding`: the gradient of each (row, token) pair, squared."""

    reason = "embedding"
    module: nn.Embedding

    def add_squares(self, calls: list[Call], n_rows: int, sums: dict[str, Tensor]) -> None:
        tokens, gradients = [], []
        every_row = torch.arange(n_rows, device=calls[0][0].device)
        for ids, g in calls:
            ids = self.by_row(ids, n_rows).reshape(n_rows, -1).long()
            tokens.append((ids * n_rows + every_row[:, None]).reshape(-1))
            gradients.append(g.reshape(-1, g.shape[-1]).to(self.dtype))
        keys = torch.cat(tokens)
        flat = torch.cat(gradients)
        if keys.shape[0] != flat.shape[0]:
            raise NotSeparableError(
                f"its input {tuple(calls[0][0].shape)} and output {tuple(calls[0][1].shape)} differ"
            )
        live = flat.ne(0).any(dim=1)
        if self.module.padding_idx is not None:
            live &= keys.div(n_rows, rounding_mode="floor") != self.module.padding_idx
        keys, flat = keys[live], flat[live]
        if not keys.numel():
            return
        # Sorted sums over segments, because scattered additions are not deterministic on a GPU.
        order = keys.argsort(stable=True)
        pairs, lengths = keys[order].unique_consecutive(return_counts=True)
        by_pair = torch.segment_reduce(flat[order].contiguous(), "sum", lengths=lengths, axis=0)
        seen, lengths = pairs.div(n_rows, rounding_mode="floor").unique_consecutive(return_counts=True)
        by_token = torch.segment_reduce(by_pair.square_(), "sum", lengths=lengths, axis=0)
        total = sums[self.parameters["weight"]]
        total[seen.to(total.device)] += by_token.to(total.device)


@dataclass(frozen=True)
class LooseParameter:
    """A trainable parameter whose row gradients are measured one row at a time, and why."""

    name: str
    parameter: nn.Parameter
    reason: str


@dataclass
class LayerPlan:
    """Which parameters are measured how.

    Attributes:
        kronecker: layers that get Kronecker factors.
        diagonal: layers that get a diagonal in closed form.
        loose: parameters that get a diagonal by a loop over rows.
    """

    kronecker: list[MatrixLayer]
    diagonal: list[Layer]
    loose: list[LooseParameter]

    @property
    def layers(self) -> list[Layer]:
        return [*self.kronecker, *self.diagonal]

    def demote(self, layer: Layer, reason: str) -> None:
        """Measure the layer's parameters one row at a time instead."""
        self.kronecker = [other for other in self.kronecker if other is not layer]
        self.diagonal = [other for other in self.diagonal if other is not layer]
        for attribute, name in layer.parameters.items():
            parameter = layer.parameter(attribute)
            assert isinstance(parameter, nn.Parameter)
            self.loose.append(LooseParameter(name, parameter, reason))


ROOT = "<model>"


def plan_layers(model: nn.Module, *, kronecker: bool, max_factor_size: int) -> LayerPlan:
    """Decide how each trainable parameter is measured.

    Args:
        model: the bare model.
        kronecker: False makes every layer diagonal.
        max_factor_size: largest side of a Kronecker factor.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    temporary_bytes = spare_bytes(model.parameters())
    plan = LayerPlan([], [], [])
    planned: set[int] = set()
    for module_name, module in model.named_modules():
        own = {key: p for key, p in module._parameters.items() if p is not None and p.requires_grad}
        tied = {key: p for key, p in own.items() if owners[id(p)] > 1}
        for p in tied.values():
            if id(p) not in planned:
                plan.loose.append(LooseParameter(names[id(p)], p, "tied weights"))
                planned.add(id(p))
        free = {key: p for key, p in own.items() if key not in tied}
        if not free:
            continue
        layer_type = _layer_type(module)
        if layer_type is None or not set(free) <= {"weight", "bias"} or module._parameters.get("weight") is None:
            reason = f"no closed form for {class_name(module)}"
            plan.loose.extend(LooseParameter(names[id(p)], p, reason) for p in free.values())
            continue
        double = any(p.dtype == torch.float64 for p in free.values())
        dtype = torch.float64 if double else torch.float32
        layer = layer_type(module_name or ROOT, module, {key: names[id(p)] for key, p in free.items()}, dtype)
        layer.temporary_bytes = temporary_bytes
        if not isinstance(layer, MatrixLayer):
            plan.diagonal.append(layer)
        elif not kronecker:
            layer.reason = "kind='diagonal'"
            plan.diagonal.append(layer)
        elif layer.largest_factor > max_factor_size:
            layer.reason = f"factor of size {layer.largest_factor} larger than max_factor_size={max_factor_size}"
            plan.diagonal.append(layer)
        else:
            plan.kronecker.append(layer)
    return plan


def _layer_type(module: nn.Module) -> type[Layer] | None:
    if isinstance(module, (nn.Linear, Conv1D)):
        return LinearLayer
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return ConvolutionLayer
    if isinstance(module, nn.Embedding):
        # Learned positions are often made of it, with a forward that is given something else than the places looked up.
        plain = type(module).forward is nn.Embedding.forward
        return EmbeddingLayer if plain and not module.scale_grad_by_freq and module.max_norm is None else None
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm, *_CHANNEL_NORMS)) or type(module).__name__.endswith("RMSNorm"):
        return NormalisationLayer
    return None


def sum_of_squared_gradients(
    a: Tensor,
    g: Tensor,
    input_basis: Tensor | None = None,
    output_basis: Tensor | None = None,
    *,
    temporary_bytes: int,
) -> Tensor:
    """Σ_rows (Q_Sᵀ G_row Q_A)², elementwise, with G_row = Σ_positions g aᵀ.

    Args:
        a: `(groups, rows, positions, columns)`.
        g: `(groups, rows, positions, outputs)`.
        input_basis: Q_A, `(groups, columns, columns)`; the identity if None.
        output_basis: Q_S, `(groups, outputs, outputs)`; the identity if None.
        temporary_bytes: what temporaries stay near.

    Returns:
        `(groups, outputs, columns)`.
    """
    groups, rows, positions, columns = a.shape
    outputs = g.shape[-1]
    if input_basis is not None and output_basis is not None:
        rotate_first = positions * (columns**2 + outputs**2) <= outputs * columns * (outputs + columns)
        if positions > 1 and not rotate_first:
            total = a.new_zeros(groups, outputs, columns)
            for start, stop in _chunks(rows, groups * outputs * columns * a.element_size() * 2, temporary_bytes):
                matrices = row_gradients(a[:, start:stop], g[:, start:stop])
                total += sum_of_squares(matrices, input_basis, output_basis, temporary_bytes=temporary_bytes)
                del matrices  # before the next rows have theirs
            return total
        a = (a.reshape(groups, -1, columns) @ input_basis).reshape(a.shape)
        g = (g.reshape(groups, -1, outputs) @ output_basis).reshape(g.shape)
    if positions == 1:
        return g[:, :, 0].square().mT @ a[:, :, 0].square()
    total = a.new_zeros(groups, outputs, columns)
    # One row's matrix may itself be too large (a vocabulary): then take some of its outputs at a time.
    for low, high in _chunks(outputs, groups * columns * a.element_size(), temporary_bytes):
        for start, stop in _chunks(rows, groups * (high - low) * columns * a.element_size(), temporary_bytes):
            matrices = row_gradients(a[:, start:stop], g[:, start:stop, :, low:high])
            total[:, low:high] += matrices.square_().sum(dim=1)
            del matrices
    return total


def sum_of_squares(matrices: Tensor, input_basis: Tensor, output_basis: Tensor, *, temporary_bytes: int) -> Tensor:
    """Σ_rows (Q_Sᵀ G_row Q_A)² from `matrices` G, `(groups, rows, outputs, columns)`; temporaries stay near
    `temporary_bytes`."""
    total = torch.zeros_like(matrices[:, 0])
    size = math.prod(matrices.shape) // max(matrices.shape[1], 1) * matrices.element_size() * 2
    for start, stop in _chunks(matrices.shape[1], size, temporary_bytes):
        rotated = output_basis[:, None].mT @ matrices[:, start:stop] @ input_basis[:, None]
        total += rotated.square_().sum(dim=1)
        del rotated
    return total


def live_positions(g: Tensor) -> Tensor:
    """Positions that carry gradient, `(groups, rows, positions)` bool, from g, `(groups, rows, positions, outputs)`.

    Where a gradient vanishes by structure (padding, the first query of causal attention), rounding may leave some 1e-17
    of it in one batch and nothing in another, so zero means: tiny beside the row's largest.
    """
    size = g.abs().amax(dim=-1)
    return size > torch.finfo(g.dtype).eps ** 0.75 * size.amax(dim=-1, keepdim=True)


def row_gradients(a: Tensor, g: Tensor) -> Tensor:
    """G_row = Σ_positions g aᵀ, `(groups, rows, outputs, columns)`."""
    return g.mT @ a


def _chunks(length: int, bytes_each: int, most_bytes: int) -> list[tuple[int, int]]:
    """Ranges that cover `length` items, each within `most_bytes`."""
    size = max(1, most_bytes // max(bytes_each, 1))
    return [(start, min(start + size, length)) for start in range(0, length, size)]
