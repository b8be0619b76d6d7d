"""Writing files so that a reader sees the old content or the new, never a mix, and, of private ones, nobody else either."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700
# As safetensors names them.
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.uint8: "U8"}


def write_atomically(path: Path, write: Callable[[Path], None], mode: int = PRIVATE_FILE) -> None:
    """Call `write(temporary path)` beside `path`, flush it to disk and move it into place, with `mode`.

    The temporary file is removed if `write` raises.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for text, in UTF-8."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_public_atomically(path: Path, content: bytes) -> Path:
    """`write_atomically` for what others may read, as far as the user's umask lets them; makes folders where missing.

    Returns:
        `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomically(path, write, mode=unmasked(0o666))
    return path


def unmasked(mode: int) -> int:
    """What the user's umask leaves of a mode."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, where the platform can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_digest(path: Path) -> str:
    """BLAKE2b digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order in which safetensors writes them: widest type first, then by name."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def write_one_by_one(
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
