"""Collective operations over torch.distributed's default process group.

Without a process group, or with a world size of 1, every function here returns what it was given. Otherwise each
operation begins with an exchange of headers (`_exchange`): a rank that failed says so there, and all ranks raise its
error instead of waiting for it; ranks that are at different operations raise instead of reducing numbers that do not
belong together. Nothing is pickled: tensors are sent as they are, all else as JSON.
"""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import hf_iau.errors as errors
from hf_iau.errors import IAUError, ParallelError

_SHARED = "_raised_on_every_rank"
# Small tensors are summed in one go, up to this many bytes.
_BUCKET_BYTES = 32 * 2**20


SAME_START = "Seed every process alike, and load the same weights and rows in each."


def is_distributed() -> bool:
    """Whether there is a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def get_world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    """The rank of this process, from 0; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def is_main_process() -> bool:
    """Whether this is rank 0, which writes files and shows progress."""
    return get_rank() == 0


def shard_range(length: int, rank: int | None = None) -> range:
    """The positions below `length` that belong to `rank` (default: this one).

    Shards are contiguous, in the order of the ranks, hold every position once and differ by at most one in size.
    """
    world_size = get_world_size()
    rank = get_rank() if rank is None else rank
    return range(length * rank // world_size, length * (rank + 1) // world_size)


@contextlib.contextmanager
def sync_errors(what: str) -> Iterator[None]:
    """Run the block on every rank, or fail on every rank: an error of one is raised by all.

    Args:
        what: what the block does, for messages; the same on every rank.

    Raises:
        ParallelError: another rank failed with an error that is not this package's own, or is gone.
    """
    if not is_distributed():
        yield
        return
    try:
        yield
    except Exception as error:
        if getattr(error, _SHARED, False):
            raise
        raised = _announce(what, error)
        if raised is error:
            raise
        raise raised from error
    _exchange(what, 0)


def all_reduce_(tensors: Sequence[Tensor], what: str) -> None:
    """Sum each of `tensors` over the ranks, in place; every rank gets the same bits.

    Args:
        tensors: contiguous, of the same shapes and types on each rank.
        what: what they are, for messages.
    """
    if not is_distributed():
        return
    _exchange_same(what, sum(tensor.numel() for tensor in tensors))
    with _in_contact(what):
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous() and bucket[0].device.type == _device().type:
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).to(_device())
            dist.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))


def reduce_(tensors: Sequence[Tensor], dst: int, what: str) -> None:
    """Sum each of `tensors` over the ranks, in place on rank `dst`; on other ranks their content is lost."""
    if not is_distributed():
        return
    _exchange_same(what, sum(tensor.numel() for tensor in tensors))
    with _in_contact(what):
        for tensor in tensors:
            moved = tensor.to(_device()).contiguous()
            dist.reduce(moved, dst=dst)
            if get_rank() == dst and moved.data_ptr() != tensor.data_ptr():
                tensor.copy_(moved)


def broadcast_(tensor: Tensor, src: int, what: str) -> None:
    """Overwrite `tensor` with that of rank `src`."""
    if not is_distributed():
        return
    _exchange_same(what, tensor.numel())
    with _in_contact(what):
        moved = tensor.to(_device()).contiguous()
        dist.broadcast(moved, src=src)
        if moved.data_ptr() != tensor.data_ptr():
            tensor.copy_(moved)


def all_gather_arrays(
    arrays: Mapping[str, np.ndarray], about: Mapping[str, Any], what: str
) -> list[tuple[dict[str, np.ndarray], dict[str, Any]]]:
    """Every rank's arrays and JSON, in the order of the ranks."""
    if not is_distributed():
        return [(dict(arrays), dict(about))]
    contents = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    layout = {name: [array.dtype.str, list(array.shape)] for name, array in contents.items()}
    head = json.dumps({"about": dict(about), "arrays": layout}).encode()
    blob = struct.pack("<q", len(head)) + head + b"".join(array.tobytes() for array in contents.values())
    gathered = []
    for received in _gather_bytes(blob, what):
        start = 8 + struct.unpack("<q", received[:8])[0]
        header = json.loads(received[8:start])
        own: dict[str, np.ndarray] = {}
        for name, (kind, shape) in header["arrays"].items():
            size = int(np.prod(shape, dtype=np.int64))
            own[name] = np.frombuffer(received, dtype=kind, count=size, offset=start).reshape(shape).copy()
            start += own[name].nbytes
        gathered.append((own, header["about"]))
    return gathered


def broadcast_object(value: Any, what: str) -> Any:
    """Rank 0's `value` (JSON; numbers keep every bit)."""
    if not is_distributed():
        return value
    return json.loads(_gather_bytes(json.dumps(value).encode() if is_main_process() else b"", what)[0])


def run_on_main_process(work: Callable[[], Any], what: str) -> Any:
    """Do `work` on rank 0 alone; every rank gets its result (JSON), or raises its error."""
    result = None
    with sync_errors(what):
        if is_main_process():
            result = work()
    return broadcast_object(result, what)


def assert_same_on_ranks(value: str, what: str, remedy: str) -> None:
    """Make sure that `value` is the same on every rank.

    Raises:
        ParallelError: on every rank, if it is not.
    """
    if not is_distributed():
        return
    values = _gather_bytes(value.encode(), what)
    other = next((rank for rank, value_there in enumerate(values) if value_there != values[0]), None)
    if other is not None:
        raise _mark(ParallelError(f"Processes 0 and {other} of {get_world_size()} differ in {what}. {remedy}"))


# --- the exchange that goes before every operation --------------------------------------------------------------------


def _exchange(what: str, length: int, error: Exception | None = None) -> list[int]:
    """All-gather what each rank does next.

    Returns:
        The `length` of each rank.

    Raises:
        IAUError: on every rank, when one has failed or is at another operation.
    """
    text = b""
    if error is not None:
        text = json.dumps({"class": type(error).__name__, "message": str(error)}).encode()
    mine = [int(error is not None), zlib.crc32(what.encode()), len(text) if error is not None else length]
    with _in_contact(what):
        header = torch.tensor(mine, dtype=torch.int64, device=_device())
        received = [torch.empty_like(header) for _ in range(get_world_size())]
        dist.all_gather(received, header)
        headers = [other.tolist() for other in received]
        failed = [rank for rank, other in enumerate(headers) if other[0]]
        if failed:
            body = _bytes_tensor(text if get_rank() == failed[0] else b"", headers[failed[0]][2])
            dist.broadcast(body, src=failed[0])
            text_of_first = bytes(body.cpu().numpy())
    if failed:
        if error is not None and text == text_of_first:
            raise _mark(error)
        raise _mark(_rebuilt(json.loads(text_of_first), failed[0]))
    elsewhere = next((rank for rank, other in enumerate(headers) if other[1] != headers[0][1]), None)
    if elsewhere is not None:
        raise _mark(
            ParallelError(
                f"Process {get_rank()} of {get_world_size()} is at {what!r} and another one elsewhere: processes "
                f"0 and {elsewhere} have come apart. Call gather(), unlearn() and the like in every process, with the "
                "same arguments and in the same order."
            )
        )
    return [int(other[2]) for other in headers]


def _exchange_same(what: str, length: int) -> None:
    lengths = _exchange(what, length)
    if len(set(lengths)) > 1:
        raise _mark(
            ParallelError(
                f"The processes hold {lengths} numbers for {what!r}. Build the same model, with the same parameters "
                "trainable, in every process."
            )
        )


def _announce(what: str, error: Exception) -> Exception:
    """Send `error` to the other ranks; returns the one that this rank should raise."""
    try:
        _exchange(what, 0, error)
    except ParallelError as raised:
        # No other rank answers: this rank's own error is the better message.
        return _mark(error) if raised.__cause__ is not None else raised
    except Exception as raised:
        return raised
    raise AssertionError("an announced error is always raised")


def _rebuilt(sent: Mapping[str, str], rank: int) -> IAUError:
    kind = getattr(errors, sent["class"], None)
    if isinstance(kind, type) and issubclass(kind, IAUError):
        rebuilt: IAUError = kind(f"{sent['message']} (Found by process {rank}.)")
        return rebuilt
    return ParallelError(f"Process {rank} failed with {sent['class']}: {sent['message']}")


def _mark(error: Any) -> Any:
    setattr(error, _SHARED, True)
    return error


@contextlib.contextmanager
def _in_contact(what: str) -> Iterator[None]:
    """Say in plain words that another process is gone, or too slow for the process group's timeout."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise _mark(
            ParallelError(
                f"Process {get_rank()} of {get_world_size()} lost the others at {what!r} ({reason[0][:200]}). One of "
                "them ended, or took longer than the process group's timeout (`ddp_timeout` in TrainingArguments). "
                "Nothing is left half done: the weights are put back and files are whole. Start all processes again."
            )
        ) from error


def _device() -> torch.device:
    """Where the process group takes tensors from."""
    if "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _bytes_tensor(content: bytes, length: int) -> Tensor:
    """`content`, filled up with zeros to `length`."""
    padded = np.zeros(length, dtype=np.uint8)
    padded[: len(content)] = np.frombuffer(content, dtype=np.uint8)
    return torch.from_numpy(padded).to(_device())


def _gather_bytes(content: bytes, what: str) -> list[bytes]:
    lengths = _exchange(what, len(content))
    longest = max(lengths)
    if longest == 0:
        return [b""] * len(lengths)
    with _in_contact(what):
        mine = _bytes_tensor(content, longest)
        received = [torch.empty_like(mine) for _ in lengths]
        dist.all_gather(received, mine)
    return [other.cpu().numpy().tobytes()[:length] for other, length in zip(received, lengths, strict=True)]


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type and device, together at most `_BUCKET_BYTES` (a larger one is alone)."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bytes_of_tensor = tensor.numel() * tensor.element_size()
        alike = bool(bucket) and (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or size + bytes_of_tensor > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += bytes_of_tensor
    if bucket:
        yield bucket
