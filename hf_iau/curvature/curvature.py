"""The curvature of a model's mean row loss, layer by layer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from hf_iau.curvature.blocks import PREFIX, Block, read_block
from hf_iau.curvature.sharded_blocks import RemoteBlock, fetch_block, scale_by_owner, shard_blocks
from hf_iau.data.precision import full_float32
from hf_iau.distributed import sync_errors
from hf_iau.errors import ConfigError, MemoryFileError, MemoryMismatchError, MissingMemoryError
from hf_iau.utils.vectors import is_same_device

CurvatureKind = Literal["ekfac", "diagonal", "adam", "identity"]
KINDS: tuple[CurvatureKind, ...] = ("ekfac", "diagonal", "adam", "identity")
SCHEMA = 1


class Curvature:
    """C = (1 / targets) Σ_rows E[g gᵀ], g the gradient of a row's summed loss, block-diagonal over layers.

    Vectors are mappings from parameter name to tensor, with names and shapes of `model.named_parameters()` (trainable
    ones only). A vector may hold some of the parameters: the others count as zero and are left out of the result.

    Args:
        kind: "ekfac", "diagonal", "adam" or "identity".
        blocks: the layers' blocks, in model order.
        n_rows: rows it was fitted on (0 for "adam" and "identity").
        n_targets: their targets: rows of a classifier, tokens of a language model.
        details: further JSON about the fit.
    """

    def __init__(
        self,
        kind: str,
        blocks: Iterable[Block],
        *,
        n_rows: int = 0,
        n_targets: int = 0,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.kind = kind
        self.blocks: dict[str, Block] = {block.name: block for block in blocks}
        self.n_rows = n_rows
        self.n_targets = n_targets
        self.details = dict(details or {})
        self._block_of = {name: block for block in self.blocks.values() for name in block.shapes}
        self._global_mean: float | None = None

    @property
    def mean_eigenvalue(self) -> float:
        """Mean of all eigenvalues of all layers."""
        if self._global_mean is None:
            numel = sum(block.numel for block in self.blocks.values())
            self._global_mean = sum(block.total for block in self.blocks.values()) / max(numel, 1)
        return self._global_mean

    def solve(self, vector: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """(C + λ)⁻¹ `vector`, with λ = `damping` × mean eigenvalue of each layer.

        In diagonal layers the mean is over positive values, and values of zero (tokens that no fitted row has) count
        as that mean: they were not seen, which is not the same as flat.

        Layers without any curvature (`dead` in `layers()`) get a zero update. Elsewhere Λ + λ is kept above a tiny
        fraction (machine epsilon to the power 1.5) of the mean eigenvalue of the whole model.

        Args:
            vector: tensors by parameter name.
            damping: at least 0; 0 needs eigenvalues that are clearly positive, which a softmax output layer, for one,
                does not have (its gradients add up to zero over the classes).

        Returns:
            Tensors by parameter name, of `vector`'s dtypes and on its devices.

        Raises:
            ConfigError: for a negative or non-finite damping, and for 0 where a layer has eigenvalues of zero.
            MemoryMismatchError: for parameters of unknown name or other shape.
        """
        if not (math.isfinite(damping) and damping >= 0):
            raise ConfigError(f"damping={damping}: give a finite number of at least 0, e.g. 0.1.")
        result: dict[str, Tensor] = {}
        for block, part in self._parts(vector):
            if block.dead:
                result |= {name: torch.zeros_like(tensor) for name, tensor in part.items()}
                continue
            if damping == 0 and block.smallest <= block.rounding:
                raise ConfigError(
                    f"damping=0 with layer {block.name!r}, whose smallest eigenvalue ({block.smallest:g}) is zero or "
                    f"rounding (mean {block.mean_eigenvalue:g}): the step would be unbounded. Give a positive damping, "
                    "e.g. 0.1."
                )
            shift = damping * block.damping_unit
            floor = torch.finfo(block.dtype).eps ** 1.5 * self.mean_eigenvalue
            result |= self._apply(block, part, lambda b, v, s=shift, f=floor: b.solve(v, s, f))  # type: ignore[misc]
        return {name: result[name] for name in vector}

    def multiply(self, vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """C `vector`, without damping.

        Args:
            vector: tensors by parameter name.

        Returns:
            Tensors by parameter name, of `vector`'s dtypes and on its devices.

        Raises:
            MemoryMismatchError: for parameters of unknown name or other shape.
        """
        result: dict[str, Tensor] = {}
        for block, part in self._parts(vector):
            result |= self._apply(block, part, lambda b, v: b.apply(v, lambda values: values))
        return {name: result[name] for name in vector}

    def coverage(self) -> dict[str, int]:
        """Number of scalars by kind of block; they add up to all trainable parameters."""
        counts: dict[str, int] = {}
        for block in self.blocks.values():
            counts[block.kind] = counts.get(block.kind, 0) + block.numel
        return counts

    def layers(self) -> list[dict[str, Any]]:
        """A line for each layer, in model order.

        Keys: `name`, `kind`, `parameters` (names), `numel`, `factor_sizes` (`{"groups", "input", "output"}` or None),
        `mean_eigenvalue`, `dead` (no row had a gradient here) and `reason` (why it is not in Kronecker form, or None).
        """
        return [block.describe() for block in self.blocks.values()]

    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        stored = (tensor for block in self.blocks.values() for tensor in block.tensors().values())
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)

    def to(self, device: torch.device | str) -> Curvature:
        """The same curvature on another device; blocks that other processes hold stay where they are."""
        blocks = [block.to(device) for block in self.blocks.values()]
        for moved, block in zip(blocks, self.blocks.values(), strict=True):
            moved.owner = block.owner
        return Curvature(self.kind, blocks, n_rows=self.n_rows, n_targets=self.n_targets, details=self.details)

    def placed(self, homes: Mapping[str, torch.device]) -> Curvature:
        """The same curvature with each block, by name, on the given device; itself where all are there."""
        moved = {name for name, block in self.blocks.items() if not is_same_device(block.device, homes[name])}
        if not moved:
            return self
        blocks = [block.to(homes[name]) if name in moved else block for name, block in self.blocks.items()]
        return Curvature(self.kind, blocks, n_rows=self.n_rows, n_targets=self.n_targets, details=self.details)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds some of the blocks only."""
        return any(block.owner is not None for block in self.blocks.values())

    def unsharded(self) -> Curvature:
        """The curvature with all blocks in every process. Called by all of them."""
        if not self.is_sharded:
            return self
        blocks = [fetch_block(block) for block in self.blocks.values()]
        return Curvature(self.kind, blocks, n_rows=self.n_rows, n_targets=self.n_targets, details=self.details)

    def sharded(self) -> Curvature:
        """The curvature, of which every process holds all, with each block in one process."""
        blocks = shard_blocks(list(self.blocks.values()))
        return Curvature(self.kind, blocks, n_rows=self.n_rows, n_targets=self.n_targets, details=self.details)

    def tensors(self) -> dict[str, Tensor]:
        """All stored tensors, contiguous and without shared storage; keys are prefixed `curvature.`.

        Those of blocks that other processes hold are without content, on the device "meta".
        """
        tensors: dict[str, Tensor] = {}
        for block in self.blocks.values():
            for key, tensor in block.tensors().items():
                tensor = tensor.detach()
                if tensor.is_meta:
                    tensors[key] = tensor
                    continue
                whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
                tensors[key] = tensor if tensor.is_contiguous() and whole else tensor.contiguous().clone()
        return tensors

    def metadata(self) -> dict[str, Any]:
        """JSON that, with `tensors()`, rebuilds the curvature."""
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "n_rows": self.n_rows,
            "n_targets": self.n_targets,
            "details": self.details,
            "blocks": [block.metadata() for block in self.blocks.values()],
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Curvature:
        """Rebuild what `tensors()` and `metadata()` wrote.

        Args:
            tensors: by key; keys without the prefix `curvature.` are ignored.
            metadata: the JSON.

        Raises:
            MemoryFileError: naming what is missing, malformed, non-finite, negative or superfluous.
        """
        try:
            kind, schema = metadata["kind"], metadata["schema"]
            n_rows, n_targets = int(metadata["n_rows"]), int(metadata["n_targets"])
            entries = list(metadata["blocks"])
            details = dict(metadata.get("details") or {})
        except (KeyError, TypeError, ValueError) as error:
            raise MemoryFileError(
                f"The curvature's metadata is malformed ({type(error).__name__}: {error}). Gather the memory again."
            ) from error
        if schema != SCHEMA or kind not in KINDS or n_rows < 0 or n_targets < 0:
            raise MemoryFileError(
                f"The curvature's metadata has schema={schema!r}, kind={kind!r}, n_rows={n_rows}, "
                f"n_targets={n_targets}; this version reads schema {SCHEMA} and kinds {', '.join(KINDS)}. "
                "Gather the memory again."
            )
        left = {key: tensor for key, tensor in tensors.items() if key.startswith(PREFIX)}
        blocks = [read_block(entry, left) for entry in entries]
        names = [block.name for block in blocks]
        parameters = [name for block in blocks for name in block.shapes]
        for what, found in (("layers", names), ("parameters", parameters)):
            twice = sorted({name for name in found if found.count(name) > 1}) if len(set(found)) < len(found) else []
            if twice:
                raise MemoryFileError(f"The curvature lists {what} twice: {', '.join(twice)}. Gather the memory again.")
        if left:
            raise MemoryFileError(
                f"The curvature has tensors that its metadata does not name: {', '.join(sorted(left)[:5])}. "
                "Gather the memory again."
            )
        return cls(kind, blocks, n_rows=n_rows, n_targets=n_targets, details=details)

    def check(self) -> None:
        """Make sure that a positive damping gives finite steps.

        Raises:
            MissingMemoryError: when there is nothing to precondition with: no layers, no curvature in any layer, or
                NaN, infinite or negative curvature, naming the layer.
        """
        with sync_errors("a check of the curvature") if self.is_sharded else contextlib.nullcontext():
            self._check_blocks()
        if self.mean_eigenvalue == 0:
            raise MissingMemoryError(
                f"The curvature ({self.kind}) is zero in every one of its {len(self.blocks)} layers, so it is singular "
                "at any damping. Fit it on rows that have labels and on a model with trainable parameters."
            )

    def _check_blocks(self) -> None:
        for block in self.blocks.values():
            for tensor in () if isinstance(block, RemoteBlock) else block.tensors().values():
                if not bool(tensor.isfinite().all()):
                    raise MissingMemoryError(
                        f"The curvature of layer {block.name!r} holds NaN or infinite values. Fit it again; if that "
                        "does not help, look for rows with an infinite loss."
                    )
            if block.smallest < 0:
                raise MissingMemoryError(
                    f"The curvature of layer {block.name!r} has a negative eigenvalue ({block.smallest:g}), so steps "
                    "are not defined. Fit it again."
                )

    def _parts(self, vector: Mapping[str, Tensor]) -> list[tuple[Block, dict[str, Tensor]]]:
        """`vector`, split by block."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in vector.items():
            block = self._block_of.get(name)
            if block is None:
                raise MemoryMismatchError(
                    f"The vector has parameter {name!r}, which the curvature does not cover. Fit the curvature on this "
                    "model, with the same parameters trainable."
                )
            if tuple(tensor.shape) != block.shapes[name]:
                raise MemoryMismatchError(
                    f"Parameter {name!r} has shape {tuple(tensor.shape)} in the vector but {block.shapes[name]} in the "
                    "curvature. Fit the curvature on this model."
                )
            parts.setdefault(block.name, {})[name] = tensor
        return [(self.blocks[name], part) for name, part in parts.items()]

    @staticmethod
    def _apply(
        block: Block, part: dict[str, Tensor], operation: Callable[[Block, dict[str, Tensor]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if block.owner is not None:
            return scale_by_owner(block, part, lambda own, whole: Curvature._apply_here(own, whole, operation))
        return Curvature._apply_here(block, part, operation)

    @staticmethod
    def _apply_here(
        block: Block, part: dict[str, Tensor], operation: Callable[[Block, dict[str, Tensor]], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        moved = {
            name: tensor.detach().to(block.device, block.working_dtype(tensor.dtype)) for name, tensor in part.items()
        }
        with full_float32():
            scaled = operation(block, moved)
        return {name: scaled[name].to(tensor.device, tensor.dtype) for name, tensor in part.items()}

    def __repr__(self) -> str:
        covered = ", ".join(f"{kind}: {count:,}" for kind, count in self.coverage().items())
        return f"Curvature({self.kind}, layers={len(self.blocks)}, rows={self.n_rows}, {covered})"
