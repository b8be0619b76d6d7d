"""Models, files and folders named on the command line, checked before anything is loaded."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from hf_iau.errors import RequestError

ROW_FILES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}
"""Suffixes of files of rows, and the loader of Datasets that reads each."""

_MODEL_FILES = ("config.json", "adapter_config.json")
_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+")
_MAX_IDS_BYTES = 2**30


def local_folder(name: str) -> Path | None:
    """The folder that a model's name is, or None for a model of the Hub."""
    path = Path(name)
    return path if path.is_dir() else None


def check_model(name: str) -> None:
    """Refuse a folder without a model, or a path to nothing; what may be a name on the Hub passes.

    Raises:
        RequestError: there is no model at that path.
    """
    path = Path(name)
    if path.is_dir():
        reason = None if any((path / file).is_file() for file in _MODEL_FILES) else "has no config.json"
    elif path.is_file():
        reason = "is a file"
    else:
        reason = "does not exist" if _is_surely_a_path(name) else None
    if reason is not None:
        raise RequestError(
            f"The model {name!r} cannot be loaded (it {reason}). Give a folder written by save_model(), "
            "or a name on the Hub."
        )


def check_rows(source: str) -> None:
    """Refuse a file or folder of rows that is not there or cannot be read; what may be a data set of the Hub passes.

    Raises:
        RequestError: there are no rows to read at that path.
    """
    name = source if Path(source).exists() else source.split(":", 1)[0]
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() not in ROW_FILES:
            raise unreadable_rows(source, "its suffix is not known")
        if not os.access(path, os.R_OK):
            raise unreadable_rows(source, "no permission to read it")
    elif not path.is_dir() and (path.suffix.lower() in ROW_FILES or _is_surely_a_path(name)):
        raise unreadable_rows(source, "there is no such file")


def unreadable_rows(source: str, reason: str) -> RequestError:
    """The error about rows that cannot be loaded."""
    return RequestError(
        f"The rows {source!r} cannot be loaded ({reason}). Give a file ({', '.join(ROW_FILES)}), a folder, or a data "
        "set of the Hub, with its split after a colon."
    )


def read_ids(path: str | Path, kind: type[int] | type[str] = int) -> list[Any]:
    """Ids from a file: one a line, or a JSON list.

    Args:
        path: the file.
        kind: what they are: whole numbers or texts.

    Raises:
        RequestError: the file cannot be read, holds no ids, or something that is none.
    """
    try:
        if Path(path).stat().st_size > _MAX_IDS_BYTES:
            raise RequestError(f"{path} is too large for a list of ids.")
        text = Path(path).read_text(encoding="utf-8-sig").strip()
        values = json.loads(text) if text.startswith("[") else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"The ids in {path} cannot be read ({error}): write one a line, or a JSON list.") from error
    ids = []
    for value in values:
        if value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise RequestError(f"{path} holds {value!r}, which is no id: write numbers or texts.")
        try:
            if kind is int and isinstance(value, str) and not _WHOLE_NUMBER.fullmatch(value):
                raise ValueError(value)  # int() takes 1_0 and other scripts' digits as well
            ids.append(kind(value))
        except ValueError as error:
            raise RequestError(
                f"{path} holds {value!r}, which is no whole number. Name a column by --id-column?"
            ) from error
    if not ids:
        raise RequestError(f"{path} is empty: write ids one a line, or as a JSON list.")
    return ids


def _is_surely_a_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or Path(name).is_absolute()
