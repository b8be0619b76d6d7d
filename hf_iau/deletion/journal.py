"""The journal: a request that is committed and not in place yet, so that a crash neither loses nor repeats it."""

from __future__ import annotations

import hmac
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hf_iau.errors import StorageError
from hf_iau.memory.keys import Key
from hf_iau.memory.memory_files import MEMORY_FOLDER
from hf_iau.unlearn.unfinished import JOURNAL_NAME
from hf_iau.utils.atomic_files import PRIVATE_FOLDER, sync_folder, write_text_atomically

STAGED_FOLDER = "staged"
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Journal:
    """A committed request: everything is staged, and whoever comes next finishes it.

    Nothing in it is a gradient or a row.

    Attributes:
        request: keyed name of the request.
        time: when it was begun, UTC, ISO 8601.
        rows: how many rows it forgets.
        weights_before, weights_after: fingerprints of the weights.
        files: staged files that are to be moved into the output directory, in this order; paths relative to both.
        removed: files of the output directory that are to go.
    """

    request: str
    time: str
    rows: int
    weights_before: str
    weights_after: str = ""
    files: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class JournalFile:
    """The journal of one output directory, and the files staged beside it.

    Args:
        output_dir: the directory that holds weights and `_iau/`.
        key: seals the journal, for it moves and removes files.
    """

    output_dir: Path
    key: Key = field(repr=False)

    @property
    def path(self) -> Path:
        """The journal's own file."""
        return self.output_dir / MEMORY_FOLDER / JOURNAL_NAME

    @property
    def staged(self) -> Path:
        """Where new files lie until they are moved."""
        return self.output_dir / MEMORY_FOLDER / STAGED_FOLDER

    def left_behind(self) -> bool:
        """Whether an interrupted request left a journal or staged files."""
        return self.path.is_file() or self.staged.exists()

    def read(self) -> Journal | None:
        """The journal, or None where no committed request waits to be finished.

        Raises:
            StorageError: it was damaged or edited, or sealed with another key.
        """
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                raise ValueError("too large")
            values = json.loads(self.path.read_bytes().decode("utf-8"))
            seal = values.pop("seal")
            if not isinstance(seal, str) or not hmac.compare_digest(seal.encode(), self._seal(values).encode()):
                raise ValueError("its seal is not that of its content, or was made with another key")
            return Journal(**values)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StorageError(
                f"The journal {self.path} of an interrupted request is not readable ({error}). Set the key that was "
                "set when the request was run; if the file is damaged, restore the output directory from a copy."
            ) from error

    def seal(self, journal: Journal) -> None:
        """Commit: make the staged files the new state. Whatever happens from here on, `finish` brings it about.

        Args:
            journal: with the staged files in the order in which they are to be moved.
        """
        for folder in sorted({path.parent for path in self.staged.rglob("*")} | {self.staged}):
            sync_folder(folder)
        values = json.loads(json.dumps(asdict(journal), allow_nan=False))
        text = json.dumps(values | {"seal": self._seal(values)}, sort_keys=True)
        write_text_atomically(self.path, text)

    def finish(self, journal: Journal) -> None:
        """Move what is still staged into place. May be begun any number of times, and ends in the same state."""
        folders = set()
        for name in journal.files:
            source, target = self._inside(self.staged, name), self._inside(self.output_dir, name)
            if source.exists():
                self._make_folder(target.parent)
                os.replace(source, target)
                folders.add(target.parent)
        for folder in folders:
            sync_folder(folder)
        for name in journal.removed:
            self._inside(self.output_dir, name).unlink(missing_ok=True)
        sync_folder(self.path.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the journal and whatever is staged."""
        self.path.unlink(missing_ok=True)
        sync_folder(self.path.parent)
        self.clear_staged()

    def clear_staged(self) -> bool:
        """Remove whatever is staged, and what a crash left of journals half written. Returns whether anything was."""
        there = self.staged.exists()
        shutil.rmtree(self.staged, ignore_errors=True)
        for left in self.path.parent.glob(f".{JOURNAL_NAME}.*"):
            left.unlink(missing_ok=True)
        return there

    def _make_folder(self, folder: Path) -> None:
        """Make a folder that files are moved into: only those below `_iau/` are closed to others."""
        private = self.output_dir / MEMORY_FOLDER
        if folder == private or private in folder.parents:
            folder.mkdir(exist_ok=True, mode=PRIVATE_FOLDER)
        else:
            folder.mkdir(parents=True, exist_ok=True)

    def _inside(self, folder: Path, name: str) -> Path:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise StorageError(f"The journal {self.path} names {name!r}, outside the output directory: it is corrupt.")
        return folder / parts

    def _seal(self, values: Mapping[str, Any]) -> str:
        text = json.dumps(values, sort_keys=True)
        return hmac.digest(self.key.ledger, f"journal {text}".encode(), "sha256").hex()
