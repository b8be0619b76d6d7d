"""Names of a suite's files, and writing them whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np


def file_name(*parts: str) -> str:
    """Names of works, scenarios and methods as one that every file system takes."""
    return "--".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()) for part in parts)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Strict JSON, with its folder where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".staged")
    staged.write_text(json.dumps(document, indent=1, allow_nan=False))
    staged.replace(path)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """A compressed `.npz` of plain numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".staged")
    with staged.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    staged.replace(path)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}
