"""What must never be uploaded."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub.utils import filter_repo_objects

from hf_iau.errors import PublishError
from hf_iau.memory.memory_files import MEMORY_FOLDER, MEMORY_HEADER, is_memory_file

# What `Trainer.push_to_hub` leaves out of `output_dir`; of a checkpoint folder it leaves out nothing.
TRAINER_IGNORES = ("_*", "checkpoint-*")


def refuse_private_files(folder: str | Path, ignored: tuple[str, ...] = ()) -> None:
    """Raise `PublishError` if an upload of `folder` would publish a memory or anything else below an `_iau/`.

    Args:
        folder: what is to be uploaded.
        ignored: patterns of what the upload leaves out, as in `HfApi.upload_folder`.
    """
    root = Path(folder)
    if not root.is_dir():
        return
    paths = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    uploaded = list(filter_repo_objects([path.as_posix() for path in paths], ignore_patterns=list(ignored)))
    private = sorted(name for name in uploaded if _is_private(Path(name)))
    if private:
        raise PublishError(
            f"The upload of {root} would publish {len(private)} private files of hf_iau, e.g. {private[0]}: memories "
            f"and ledgers hold gradients and fingerprints of training rows. Move them out of the folder, or delete "
            f"them; only {MEMORY_FOLDER}/ at the top of output_dir is left out by the Trainer."
        )
    for name in uploaded:
        if Path(name).name == "report.json" and tells_of_single_rows(root / name):
            raise PublishError(
                f"The upload of {root} would publish {name}, the report of a request of so few rows that its figures "
                f"tell of single ones: move report.json, report.md and report.html into {MEMORY_FOLDER}/, or delete "
                "them. The model card withholds such figures."
            )


def tells_of_single_rows(report: Path) -> bool:
    """Whether a saved report is of so few forget rows that its figures tell of single ones."""
    try:
        values = json.loads(report.read_text(encoding="utf-8"))
        return isinstance(values, dict) and values.get("per_row_suppressed") is True
    except (OSError, ValueError, RecursionError):
        return False


def _is_private(path: Path) -> bool:
    return MEMORY_FOLDER in path.parts or path.name == MEMORY_HEADER or is_memory_file(path.name)
