"""The files of a memory: a header in JSON and the tensors that it names, read with nothing taken on trust."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_iau.errors import MemoryFileError, MemoryMismatchError
from hf_iau.utils.atomic_files import file_digest, sync_folder

SCHEMA_VERSION = 5
MEMORY_FOLDER = "_iau"
MEMORY_HEADER = "memory.json"
TENSOR_FILE = re.compile(r"memory-[0-9a-f]{32}\.safetensors")
_PART_OF_MEMORY = re.compile(r"\.?memory-([0-9a-f]{32}|staged)\.safetensors.*|\.memory\.json\..*")
_MAX_HEADER_BYTES = 64 * 2**20
# As safetensors names types.
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.uint8: "U8", torch.int32: "I32"}


def check_fields(plain: Mapping[str, Any]) -> None:
    """Raise `MemoryFileError` unless every field of a header is of its kind."""

    def demand(name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise MemoryFileError(f"{name!r} in the memory is {plain[name]!r}, expected {expected}: it is corrupt.")

    for name in ("n_rows", "n_targets", "gradient_sum_rows", "forgotten_rows", "forgotten_targets"):
        demand(name, type(plain[name]) is int and 0 <= plain[name] < 2**63, "a whole number of at least 0")
    for name in ("gradient_sum_error", "relative_path", "curvature_path"):
        infinite = name == "gradient_sum_error" and plain[name] == math.inf  # of a sample of one batch
        demand(name, infinite or (_is_number(plain[name]) and plain[name] >= 0), "a number of at least 0")
    kinds = ("full", "sampled", "first-order", "none")
    demand("gradient_sum_kind", plain["gradient_sum_kind"] in kinds, f"one of {', '.join(kinds)}")
    keys = {"model": {"class", "architecture", "weights"}, "data": {"rows", "columns", "content"}, "loss": {"kind"}}
    for name in ("model", "data", "loss", "settings", "weight_decay", "seconds", "versions"):
        wanted = keys.get(name, set())
        demand(name, isinstance(plain[name], dict) and wanted <= plain[name].keys(), f"an object with {sorted(wanted)}")
    demand("model", all(isinstance(value, str) for value in plain["model"].values()), "an object of strings")
    for name in ("label_counts", "calibration", "held_out"):
        demand(name, plain[name] is None or isinstance(plain[name], dict), "an object or null")
    for name in ("weight_decay", "seconds"):
        demand(name, all(_is_number(value) for value in plain[name].values()), "an object of finite numbers")
    precision_known = plain["settings"].get("precision") in (None, "float32", "bfloat16")
    demand(
        "settings",
        precision_known and _is_device(plain["settings"].get("memory_device")),
        "an object of known settings",
    )
    counts = (plain["label_counts"] or {}).values()
    demand("label_counts", all(type(count) is int for count in counts), "null or an object of whole numbers")
    demand("loss", isinstance(plain["loss"].get("probe", 0.0), (int, float)), "an object whose `probe` is a number")
    held_out = plain["held_out"] or {"loss": 0.0, "content": ""}
    demand(
        "held_out",
        _is_number(held_out.get("loss")) and isinstance(held_out.get("content"), str),
        "null or an object with a number `loss` and a string `content`",
    )
    demand("data", isinstance(plain["data"]["content"], str), "an object whose `content` is a string")


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or (type(value) is int and abs(value) < 2**63)


def _is_device(value: Any) -> bool:
    try:
        return value is None or (isinstance(value, str) and bool(torch.device(value)))
    except RuntimeError:
        return False


def header_digest(header: Mapping[str, Any]) -> str:
    """Digest of a header's content, without the digest itself."""
    text = json.dumps({key: value for key, value in header.items() if key != "digest"}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def is_memory_file(name: str) -> bool:
    """Whether a file of that name holds tensors of a memory, or was left behind by writing one."""
    return _PART_OF_MEMORY.fullmatch(name) is not None


def remove_memory(directory: Path) -> None:
    """Remove a saved memory: its header first, so that a crash in between leaves no memory that could be loaded.

    Args:
        directory: the folder that it was saved in; may hold none.
    """
    if not directory.is_dir():
        return
    (directory / MEMORY_HEADER).unlink(missing_ok=True)
    sync_folder(directory)
    for path in directory.iterdir():
        if is_memory_file(path.name):
            path.unlink()
    sync_folder(directory)


def read_header(path: Path) -> dict[str, Any]:
    """The header of a saved memory, without its tensors.

    Raises:
        MemoryFileError: missing, truncated, corrupt or malformed.
        MemoryMismatchError: written by another schema version.
    """
    if not path.is_file():
        raise MemoryFileError(
            f"No gradient memory at {path}. Train with callbacks=[IAUCallback()], or call hf_iau.gather(...).save(dir)."
        )
    if path.stat().st_size > _MAX_HEADER_BYTES:
        raise MemoryFileError(f"{path} is {path.stat().st_size} bytes, too large for a memory's header: it is corrupt.")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        digest = header_digest(header) if isinstance(header, dict) else None
    except (OSError, ValueError, RecursionError) as error:
        raise MemoryFileError(f"{path} is not readable as JSON ({error}): it is corrupt or truncated.") from error
    if not isinstance(header, dict) or "schema_version" not in header:
        raise MemoryFileError(f"{path} is no gradient memory (no schema_version).")
    if header["schema_version"] != SCHEMA_VERSION:
        raise MemoryMismatchError(
            f"{path} has schema version {header['schema_version']!r}; this hf_iau reads version {SCHEMA_VERSION}. "
            "Install the hf-iau that wrote it, or gather anew."
        )
    if header.get("digest") != digest:
        raise MemoryFileError(f"{path} is corrupt: its digest is not that of its content.")
    return header


def read_tensors(folder: Path, entry: Any) -> dict[str, Tensor]:
    """The tensors that a header names.

    Args:
        folder: where the header lies.
        entry: its `tensors`.

    Raises:
        MemoryFileError: missing, truncated, corrupt or malformed.
    """
    name = entry["file"]
    if not isinstance(name, str) or not TENSOR_FILE.fullmatch(name):
        raise MemoryFileError(f"The memory names its tensor file {name!r}, which is no such name: it is corrupt.")
    path = folder / name
    if not path.is_file():
        raise MemoryFileError(f"The memory's tensor file {path} is missing.")
    try:
        if file_digest(path) != entry["digest"]:
            raise MemoryFileError(f"{path} is corrupt or truncated: its digest is not the one in {MEMORY_HEADER}.")
        tensors = load_file(path)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise MemoryFileError(f"{path} is not readable as safetensors ({error}).") from error
    if len(tensors) != entry["count"]:
        raise MemoryFileError(f"{path} holds {len(tensors)} tensors, expected {entry['count']}.")
    return tensors


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order in which safetensors writes them: widest type first, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def write_tensors_one_by_one(
    path: Path, like: Mapping[str, Tensor], contents: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write the file that `safetensors.torch.save_file` writes, holding one tensor at a time.

    Args:
        path: the file.
        like: name → a tensor of the shape and type, with or without content.
        contents: name and content, in `file_order`.
        metadata: for the file's header.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in file_order(like):
        stop = start + like[name].numel() * like[name].element_size()
        shape = {"dtype": _TYPES[like[name].dtype], "shape": list(like[name].shape)}
        header[name], start = shape | {"data_offsets": [start, stop]}, stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in contents:
            content = tensor.detach().cpu().contiguous()
            if content.shape != like[name].shape or content.dtype != like[name].dtype:
                raise ValueError(f"{name!r} is {content.dtype} of shape {tuple(content.shape)}, unlike its header")
            file.write(content.reshape(-1).view(torch.uint8).numpy().data)
