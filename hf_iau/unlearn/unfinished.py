"""A request that was committed and not moved into place: nothing is read or written before it is finished."""

from __future__ import annotations

from pathlib import Path

from hf_iau.errors import StorageError
from hf_iau.memory.memory_files import MEMORY_FOLDER

JOURNAL_NAME = "journal.json"


def refuse_unfinished(output_dir: str | Path | None) -> None:
    """Raise `StorageError` where a committed request lies in `output_dir` that an interruption left unfinished."""
    journal = Path(output_dir or ".") / MEMORY_FOLDER / JOURNAL_NAME
    if journal.is_file():
        raise StorageError(
            f"A request was committed to {journal.parent.parent} and interrupted before its files were moved into "
            f"place ({journal} tells which): make a DeletionService(trainer), which finishes it, before the memory "
            "is read or the model is saved."
        )
