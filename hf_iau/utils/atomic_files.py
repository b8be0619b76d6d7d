"""Atomic writes: a reader sees the old content or the new, never a mix; private files are for their owner alone."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

PRIVATE_FILE = 0o600
PRIVATE_FOLDER = 0o700


def make_private_folder(folder: Path, ignored_by_git: bool = False) -> None:
    """Make `folder`, for its owner alone; with a `.gitignore` of everything in it, if asked for."""
    folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
    ignore = folder / ".gitignore"
    if ignored_by_git and not ignore.exists():
        with contextlib.suppress(OSError):  # a convenience: whatever comes next tells of a full disk
            ignore.write_text("# Private: personal data, see the documentation of hf-iau.\n*\n", encoding="utf-8")
            ignore.chmod(PRIVATE_FILE)


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
