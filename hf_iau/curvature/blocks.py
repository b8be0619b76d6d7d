"""Blocks: the curvature of one layer as eigenvalues in a basis, and what can be done with them."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_iau.errors import MemoryFileError

PREFIX = "curvature."


@dataclass(frozen=True)
class MatrixLayout:
    """How a layer's weight and bias lie in one matrix a group, `(groups, outputs / groups, inputs [+ 1])`.

    The last column is the bias: the input is extended by a 1 (homogeneous coordinate). A weight or bias that is frozen
    (or tied to another module) has the name None and no columns.

    Attributes:
        weight: the weight's parameter name.
        weight_shape: its shape: `(outputs, inputs)`, `(inputs, outputs)` if `transposed`, or
            `(outputs, channels / groups, *kernel)`.
        bias: the bias's parameter name; its shape is `(outputs,)`.
        outputs: number of outputs of all groups together.
        groups: groups of a convolution, else 1.
        transposed: the weight is stored as `(inputs, outputs)` (`transformers.pytorch_utils.Conv1D`).
    """

    weight: str | None
    weight_shape: tuple[int, ...]
    bias: str | None
    outputs: int
    groups: int = 1
    transposed: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter names and shapes."""
        shapes = {}
        if self.weight is not None:
            shapes[self.weight] = self.weight_shape
        if self.bias is not None:
            shapes[self.bias] = (self.outputs,)
        return shapes

    @property
    def group_outputs(self) -> int:
        """Rows of a group's matrix."""
        return self.outputs // self.groups

    @property
    def weight_columns(self) -> int:
        """Columns that hold the weight."""
        return 0 if self.weight is None else math.prod(self.weight_shape) // self.outputs

    @property
    def columns(self) -> int:
        """Columns of a group's matrix."""
        return self.weight_columns + (self.bias is not None)

    def matrix(self, vector: Mapping[str, Tensor]) -> Tensor:
        """The parameters in `vector` as `(groups, group_outputs, columns)`; absent ones are zero."""
        some = next(vector[name] for name in self.shapes if name in vector)
        parts = []
        if self.weight is not None:
            weight = vector.get(self.weight)
            if weight is None:
                parts.append(some.new_zeros(self.groups, self.group_outputs, self.weight_columns))
            else:
                weight = weight.T if self.transposed else weight
                parts.append(weight.reshape(self.groups, self.group_outputs, self.weight_columns))
        if self.bias is not None:
            bias = vector.get(self.bias)
            shape = (self.groups, self.group_outputs, 1)
            parts.append(some.new_zeros(shape) if bias is None else bias.reshape(shape))
        return torch.cat(parts, dim=2)

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """The inverse of `matrix`."""
        parts = {}
        if self.weight is not None:
            weight = matrix[..., : self.weight_columns].reshape(self.outputs, -1)
            parts[self.weight] = weight.T.contiguous() if self.transposed else weight.reshape(self.weight_shape)
        if self.bias is not None:
            parts[self.bias] = matrix[..., -1].reshape(self.outputs)
        return parts

    def to_json(self) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "weight_shape": list(self.weight_shape),
            "bias": self.bias,
            "outputs": self.outputs,
            "groups": self.groups,
            "transposed": self.transposed,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> MatrixLayout:
        """Raises KeyError, TypeError or ValueError for anything but what `to_json` writes."""
        layout = cls(
            weight=value["weight"],
            weight_shape=tuple(int(size) for size in value["weight_shape"]),
            bias=value["bias"],
            outputs=int(value["outputs"]),
            groups=int(value["groups"]),
            transposed=bool(value["transposed"]),
        )
        if layout.groups < 1 or layout.outputs < 1 or layout.outputs % layout.groups or not layout.shapes:
            raise ValueError(f"outputs={layout.outputs} do not divide into groups={layout.groups}")
        shape = layout.weight_shape
        stored = shape[1:] if layout.transposed and len(shape) == 2 else () if layout.transposed else shape[:1]
        if layout.weight is not None and stored != (layout.outputs,):
            raise ValueError(f"a weight of shape {layout.weight_shape} has no {layout.outputs} outputs")
        return layout


class Block(abc.ABC):
    """The curvature of one layer.

    Attributes:
        name: the layer's name in the model (a parameter's own name for parameters outside of known layers).
        reason: why the layer is not in Kronecker form, or None.
        owner: the number of the process that holds it for all; None where every process does.
    """

    kind: str = "block"
    owner: int | None = None

    def __init__(self, name: str, reason: str | None) -> None:
        self.name = name
        self.reason = reason

    @property
    @abc.abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the layer's trainable parameters."""

    @property
    @abc.abstractmethod
    def eigenvalues(self) -> list[Tensor]:
        """The eigenvalues Λ; together as many as there are scalars in the layer's parameters."""

    @abc.abstractmethod
    def apply(self, vector: Mapping[str, Tensor], transform: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Scale `vector` in the eigenbasis by `transform(Λ)`.

        Args:
            vector: some of the layer's parameters, on the block's device and of its dtype; absent ones count as zero.
            transform: maps a tensor of eigenvalues to the factors, of the same shape.

        Returns:
            A tensor for every parameter of the layer.
        """

    @property
    def damping_unit(self) -> float:
        """What a relative damping is relative to: the mean eigenvalue."""
        return self.mean_eigenvalue

    def solve(self, vector: Mapping[str, Tensor], shift: float, floor: float) -> dict[str, Tensor]:
        """(C + shift)⁻¹ `vector`, with Λ + shift kept above `floor`."""
        return self.apply(vector, lambda values: (values + shift).clamp_(min=floor).reciprocal_())

    @abc.abstractmethod
    def to(self, device: torch.device | str) -> Block:
        """The same block on another device."""

    @abc.abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything stored, by key (prefixed `curvature.`)."""

    @abc.abstractmethod
    def metadata(self) -> dict[str, Any]:
        """JSON that, with `tensors`, rebuilds the block."""

    @property
    def numel(self) -> int:
        """Scalars in the layer's parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def total(self) -> float:
        """Sum of the eigenvalues (the trace)."""
        return float(sum(float(values.double().sum()) for values in self.eigenvalues))

    @cached_property
    def smallest(self) -> float:
        """The smallest eigenvalue."""
        return min(float(values.min()) for values in self.eigenvalues if values.numel())

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of the eigenvalues."""
        return self.total / self.numel

    @property
    def rounding(self) -> float:
        """Eigenvalues up to here are rounding: the square of 100 machine epsilons, relative to the mean."""
        return (100 * torch.finfo(self.dtype).eps) ** 2 * self.mean_eigenvalue

    @property
    def dead(self) -> bool:
        """No row had a gradient here: every eigenvalue is zero."""
        return self.total == 0.0

    @property
    def device(self) -> torch.device:
        return self.eigenvalues[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.eigenvalues[0].dtype

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which vectors of `dtype` are scaled."""
        return torch.promote_types(self.dtype, dtype)

    def describe(self) -> dict[str, Any]:
        """The layer's line in `Curvature.layers`."""
        return {
            "name": self.name,
            "kind": self.kind,
            "parameters": list(self.shapes),
            "numel": self.numel,
            "factor_sizes": None,
            "mean_eigenvalue": self.mean_eigenvalue,
            "dead": self.dead,
            "reason": self.reason,
        }


class KroneckerBlock(Block):
    """Eigenvalue-corrected Kronecker curvature of a matrix-shaped layer (George et al. 2018, arXiv 1806.03884).

    For each group, C = (Q_S ⊗ Q_A) diag(Λ) (Q_S ⊗ Q_A)ᵀ.

    Args:
        name: the layer's name.
        layout: where weight and bias lie in the matrix.
        input_basis: Q_A, `(groups, columns, columns)`, eigenvectors in columns.
        output_basis: Q_S, `(groups, group_outputs, group_outputs)`.
        values: Λ, `(groups, group_outputs, columns)`.
    """

    kind = "kronecker"

    def __init__(
        self, name: str, layout: MatrixLayout, input_basis: Tensor, output_basis: Tensor, values: Tensor
    ) -> None:
        super().__init__(name, None)
        self.layout = layout
        self.input_basis = input_basis
        self.output_basis = output_basis
        self.values = values

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.layout.shapes

    @property
    def eigenvalues(self) -> list[Tensor]:
        return [self.values]

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype

    def apply(self, vector: Mapping[str, Tensor], transform: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        # Each product takes the place of the last.
        rotated = self.output_basis.mT @ self.layout.matrix(vector) @ self.input_basis
        rotated *= transform(self.values)
        rotated = self.output_basis @ rotated
        return self.layout.split(rotated @ self.input_basis.mT)

    def to(self, device: torch.device | str) -> KroneckerBlock:
        moved = (self.input_basis.to(device), self.output_basis.to(device), self.values.to(device))
        return KroneckerBlock(self.name, self.layout, *moved)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{PREFIX}{self.name}.input_basis": self.input_basis,
            f"{PREFIX}{self.name}.output_basis": self.output_basis,
            f"{PREFIX}{self.name}.eigenvalues": self.values,
        }

    def metadata(self) -> dict[str, Any]:
        return {"name": self.name, "kind": self.kind, "layout": self.layout.to_json()}

    def describe(self) -> dict[str, Any]:
        sizes = {
            "groups": self.layout.groups,
            "input": self.layout.columns,
            "output": self.layout.group_outputs,
        }
        return super().describe() | {"factor_sizes": sizes}


class DiagonalBlock(Block):
    """Diagonal curvature: mean squared gradient of each scalar.

    Args:
        name: the layer's name.
        values: Λ by parameter name, each of the parameter's shape.
        reason: why the layer is diagonal.
    """

    kind = "diagonal"

    def __init__(self, name: str, values: dict[str, Tensor], reason: str | None) -> None:
        super().__init__(name, reason)
        self.values = values

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(values.shape) for name, values in self.values.items()}

    @property
    def eigenvalues(self) -> list[Tensor]:
        return list(self.values.values())

    @cached_property
    def damping_unit(self) -> float:
        """Mean of the positive values: most of an embedding table was never looked up and says nothing."""
        positive = sum(int((values > 0).sum()) for values in self.values.values())
        return self.total / positive if positive else 0.0

    def apply(self, vector: Mapping[str, Tensor], transform: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {name: vector[name] * transform(values) for name, values in self.values.items() if name in vector}

    def solve(self, vector: Mapping[str, Tensor], shift: float, floor: float) -> dict[str, Tensor]:
        # A scalar that no fitted row moved (a token that none of them has) is not flat, only unseen: it is given the
        # curvature of an average seen one. With the damping alone a rare token's step would be without bound.
        def inverse(values: Tensor) -> Tensor:
            return torch.where(values > 0, values, self.damping_unit).add(shift).clamp_(min=floor).reciprocal_()

        return self.apply(vector, inverse)

    def to(self, device: torch.device | str) -> DiagonalBlock:
        return DiagonalBlock(self.name, {name: v.to(device) for name, v in self.values.items()}, self.reason)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{PREFIX}{name}.diagonal": values for name, values in self.values.items()}

    def metadata(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"name": self.name, "kind": self.kind, "shapes": shapes, "reason": self.reason}


class IdentityBlock(Block):
    """Curvature 1 everywhere; stores nothing."""

    kind = "identity"

    def __init__(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__(name, None)
        self._shapes = {key: tuple(shape) for key, shape in shapes.items()}
        self.one = torch.ones(())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    @property
    def eigenvalues(self) -> list[Tensor]:
        return [self.one]

    @cached_property
    def total(self) -> float:
        return float(self.numel)

    def apply(self, vector: Mapping[str, Tensor], transform: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {name: vector[name] * transform(self.one) for name in self._shapes if name in vector}

    def to(self, device: torch.device | str) -> IdentityBlock:
        moved = IdentityBlock(self.name, self._shapes)
        moved.one = self.one.to(device)
        return moved

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def metadata(self) -> dict[str, Any]:
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"name": self.name, "kind": self.kind, "shapes": shapes}


def read_block(metadata: Mapping[str, Any], tensors: dict[str, Tensor]) -> Block:
    """Rebuild a block, taking its tensors out of `tensors`.

    Raises:
        MemoryFileError: when something is missing or of the wrong shape or type, non-finite or negative.
    """
    try:
        name, kind = str(metadata["name"]), metadata["kind"]
        if kind == KroneckerBlock.kind:
            layout = MatrixLayout.from_json(metadata["layout"])
            groups, rows, columns = layout.groups, layout.group_outputs, layout.columns
            key = f"{PREFIX}{name}"
            parts = (
                _take(tensors, f"{key}.input_basis", (groups, columns, columns)),
                _take(tensors, f"{key}.output_basis", (groups, rows, rows)),
                _take(tensors, f"{key}.eigenvalues", (groups, rows, columns), positive=True),
            )
            if len({part.dtype for part in parts}) > 1:
                raise ValueError("its tensors are of several types")
            return KroneckerBlock(name, layout, *parts)
        if kind not in (DiagonalBlock.kind, IdentityBlock.kind):
            raise ValueError(f"unknown kind {kind!r}")
        shapes = {str(key): tuple(int(size) for size in shape) for key, shape in metadata["shapes"].items()}
        if not shapes:
            raise ValueError("it has no parameters")
        if kind == IdentityBlock.kind:
            return IdentityBlock(name, shapes)
        values = {key: _take(tensors, f"{PREFIX}{key}.diagonal", shape, positive=True) for key, shape in shapes.items()}
        return DiagonalBlock(name, values, metadata.get("reason"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, MemoryFileError):
            raise
        raise MemoryFileError(
            f"The curvature's entry {dict(metadata) if isinstance(metadata, Mapping) else metadata!r} is malformed "
            f"({type(error).__name__}: {error}). Gather the memory again."
        ) from error


def _take(tensors: dict[str, Tensor], key: str, shape: tuple[int, ...], *, positive: bool = False) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise MemoryFileError(f"The curvature's tensor {key!r} is missing. Gather the memory again.")
    problem = None
    if tuple(tensor.shape) != shape:
        problem = f"has shape {tuple(tensor.shape)} instead of {shape}"
    elif tensor.dtype not in (torch.float32, torch.float64):
        problem = f"has type {tensor.dtype} instead of float32 or float64"
    elif not bool(tensor.isfinite().all()):
        problem = "holds NaN or infinite values"
    elif positive and bool((tensor < 0).any()):
        problem = "holds negative eigenvalues"
    if problem is not None:
        raise MemoryFileError(f"The curvature's tensor {key!r} {problem}. Gather the memory again.")
    return tensor
