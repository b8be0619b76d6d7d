"""Blocks that one process holds for all, so that each process holds its share of the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_iau.curvature.blocks import Block, read_block
from hf_iau.distributed import (
    all_gather_arrays,
    broadcast_,
    full_tensor,
    get_rank,
    get_world_size,
    shard_like,
    sync_errors,
    to_local,
)
from hf_iau.errors import ParallelError

Scaling = Callable[[Block, dict[str, Tensor]], dict[str, Tensor]]


class RemoteBlock(Block):
    """A block that another process holds: all of its description, none of its numbers.

    Args:
        owner: the rank of the process that holds it.
        description: what `_describe` says there.
    """

    def __init__(self, owner: int, description: Mapping[str, Any]) -> None:
        super().__init__(description["metadata"]["name"], description["reason"])
        self.kind = description["metadata"]["kind"]
        self.owner = owner
        self._description = description
        self._shapes = {name: tuple(shape) for name, shape in description["shapes"].items()}
        self.total, self.smallest = description["total"], description["smallest"]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    @property
    def eigenvalues(self) -> list[Tensor]:
        return []

    @property
    def damping_unit(self) -> float:
        return float(self._description["damping_unit"])

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self._description["dtype"])

    def apply(self, vector: Mapping[str, Tensor], transform: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        raise ParallelError(
            f"The curvature of {self.name!r} is held by process {self.owner} alone. Scale through the `Curvature`, in "
            "every process, which asks the one that holds it."
        )

    def to(self, device: torch.device | str) -> RemoteBlock:
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Tensors without content, on the device "meta"."""
        stored = self._description["tensors"].items()
        return {key: torch.empty(shape, dtype=_dtype(kind), device="meta") for key, (shape, kind) in stored}

    def metadata(self) -> dict[str, Any]:
        return dict(self._description["metadata"])

    def describe(self) -> dict[str, Any]:
        return dict(self._description["line"])


class Owners:
    """Which process holds which layer: each the next one that holds least."""

    def __init__(self) -> None:
        self._held = [0] * get_world_size()
        self._of: dict[str, int] = {}

    def assign(self, name: str, size: int) -> None:
        """Find an owner for a layer of `size` scalars; called alike in every process."""
        self._of[name] = self._held.index(min(self._held))
        self._held[self._of[name]] += size

    def __getitem__(self, name: str) -> int:
        return self._of[name]

    def is_here(self, name: str) -> bool:
        """Whether this process holds the layer."""
        return self._of[name] == get_rank()


def with_remote_blocks(blocks: Iterable[Block], owners: Owners, names: Iterable[str]) -> list[Block]:
    """All processes' blocks, those of others without their numbers.

    Args:
        blocks: those that this process holds.
        owners: who holds which.
        names: of all blocks, the same in every process.
    """
    own = {block.name: block for block in blocks}
    own_descriptions = {name: _describe(block) for name, block in own.items()}
    descriptions: dict[str, Any] = {}
    for _, described in all_gather_arrays({}, own_descriptions, "the curvature's layers"):
        descriptions |= described
    result: list[Block] = []
    for name in names:
        block = own[name] if owners.is_here(name) else RemoteBlock(owners[name], descriptions[name])
        block.owner = owners[name]
        result.append(block)
    return result


def shard_blocks(blocks: Iterable[Block]) -> list[Block]:
    """Blocks that every process has, each of them now held by one process; those that store nothing stay everywhere."""
    owners = Owners()
    sharded: list[Block] = []
    for block in blocks:
        stored = block.tensors()
        if not stored:
            sharded.append(block)
            continue
        owners.assign(block.name, sum(tensor.numel() for tensor in stored.values()))
        part: Block = RemoteBlock(owners[block.name], _describe(block))
        if owners.is_here(block.name):
            part = read_block(block.metadata(), stored)  # a block of its own: the one at hand stays whole
            part.owner = owners[block.name]
        sharded.append(part)
    return sharded


def fetch_block(block: Block) -> Block:
    """The whole block, in every process. Called by all of them."""
    if block.owner is None:
        return block
    tensors = {key: fetch_tensor(tensor, block.owner, key) for key, tensor in block.tensors().items()}
    return read_block(block.metadata(), tensors)


def fetch_tensor(tensor: Tensor, owner: int, what: str) -> Tensor:
    """The tensor of process `owner`, in every process."""
    device = "cpu" if tensor.is_meta else tensor.device
    found = tensor if owner == get_rank() else torch.empty_like(tensor, device=device)
    broadcast_(found, owner, what)
    return found


def scale_by_owner(block: Block, part: dict[str, Tensor], scale: Scaling) -> dict[str, Tensor]:
    """`scale(block, part)`, done by the process that holds the block; of sharded tensors each process gets its part.

    One layer is whole at a time, and in all processes.
    """
    assert block.owner is not None
    whole = {name: full_tensor(tensor.detach()) for name, tensor in part.items()}
    scaled: dict[str, Tensor] = {}
    with sync_errors(f"the curvature of {block.name}"):
        if block.owner == get_rank():
            scaled = scale(block, whole)
    result = {}
    for name, tensor in part.items():
        found = scaled[name].contiguous() if scaled else torch.empty_like(to_local(whole[name]))
        broadcast_(found, block.owner, f"the curvature times {name}")
        result[name] = shard_like(found, tensor)
    return result


def _describe(block: Block) -> dict[str, Any]:
    return {
        "metadata": block.metadata(),
        "reason": block.reason,
        "shapes": {name: list(shape) for name, shape in block.shapes.items()},
        "tensors": {key: [list(t.shape), _name(t.dtype)] for key, t in block.tensors().items()},
        "total": block.total,
        "smallest": block.smallest,
        "damping_unit": block.damping_unit,
        "dtype": _name(block.dtype),
        "line": block.describe(),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found
