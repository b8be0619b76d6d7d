"""Rows from files and the Hub, and their labels as numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from hf_iau.cli.files import ROW_FILES, unreadable_rows
from hf_iau.errors import RequestError

_ENCODED = "__encoded_labels__"


def load_rows(source: str, *, configuration: str | None = None) -> datasets.Dataset:
    """The rows that `source` names.

    Args:
        source: a parquet, csv, tsv, json or jsonl file; a folder written by `save_to_disk`; a folder of images
            with a folder a class; or a data set of the Hub. A split may follow a colon, e.g. `imdb:test[:1000]`; else
            it is `train`.
        configuration: of a data set of the Hub that has several.

    Raises:
        RequestError: no such rows, or they cannot be read.
    """
    name, split = source, "train"
    if not Path(source).exists() and ":" in source:
        name, split = source.split(":", 1)
    path = Path(name)
    try:
        if path.is_dir() and (path / "state.json").is_file():
            return datasets.Dataset.load_from_disk(str(path))
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            files = {saved: str(path / saved / "*.arrow") for saved in splits}
            return datasets.load_dataset("arrow", data_files=files, split=split)
        if path.is_dir() and not any(path.glob("*.*")):
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
        if path.suffix.lower() in ROW_FILES and (path.is_file() or "/" not in name):
            return load_files({"rows": name}, split=split.replace("train", "rows", 1))
        return datasets.load_dataset(name, configuration, split=split)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise unreadable_rows(source, brief(error)) from error


def brief(error: Exception) -> str:
    """Kind and beginning of another library's error, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 400 else text[:399] + '…'}"


def load_files(files: Mapping[str, str], split: str | None = None) -> Any:
    """Local files of one format, read by their suffix.

    Args:
        files: name of the split → path.
        split: the one to return; default: all, by name.

    Raises:
        RequestError: a suffix that is not known.
    """
    suffixes = {Path(file).suffix.lower() for file in files.values()}
    suffix = next(iter(suffixes))
    if len(suffixes) != 1 or suffix not in ROW_FILES:
        raise RequestError(f"Files {', '.join(files.values())}: use one of {', '.join(ROW_FILES)} for all.")
    extra = {"sep": "\t"} if suffix == ".tsv" else {}
    return datasets.load_dataset(ROW_FILES[suffix], data_files=dict(files), split=split, **extra)


def label_names(column: str, *splits: datasets.Dataset | None) -> list[str]:
    """The classes' names: those of the data set's own label feature, else all that occur, sorted."""
    given = [split for split in splits if split is not None]
    feature = given[0].features[column]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    return [str(value) for value in sorted(set().union(*(split.unique(column) for split in given)))]


def encode_labels(rows: datasets.Dataset, column: str, names: list[str]) -> datasets.Dataset:
    """`rows` with the column `labels`, the classes' numbers."""
    if isinstance(rows.features[column], datasets.ClassLabel):
        return rows.rename_column(column, "labels") if column != "labels" else rows
    numbers = {name: number for number, name in enumerate(names)}
    encoded = [numbers[str(value)] for value in rows[column]]
    return rows.add_column(_ENCODED, encoded).remove_columns(column).rename_column(_ENCODED, "labels")


def rows_of_labels(rows: datasets.Dataset, column: str, label2id: Mapping[str, int], kind: str) -> datasets.Dataset:
    """`rows` with the column `labels` as a trained model numbers them.

    Args:
        rows: with a column of class names, class numbers, or numbers and lists of numbers.
        column: its name.
        label2id: the model's classes.
        kind: the model's `problem_type`; anything but "single_label_classification" leaves the values as they are.

    Raises:
        RequestError: no such column, or a label that the model does not know.
    """
    if column not in rows.column_names:
        raise RequestError(f"There is no column {column!r} of labels: the rows have {', '.join(rows.column_names)}.")
    if column != "labels" and "labels" in rows.column_names:
        raise RequestError(
            f"The rows have a column `labels` beside {column!r}: remove it, or name it as the labels' column."
        )
    feature = rows.features[column]
    if kind != "single_label_classification":
        return rows.rename_column(column, "labels") if column != "labels" else rows
    values = rows.with_format(None)[column]
    if isinstance(feature, datasets.ClassLabel) and set(feature.names) <= set(label2id):
        values = [value if value is None or value < 0 else feature.names[value] for value in values]
    known = {str(name): number for name, number in label2id.items()}
    numbers = set(known.values())
    encoded = []
    for position, value in enumerate(values):
        number = known.get(str(value), value if isinstance(value, int) and value in numbers else None)
        if number is None:
            raise RequestError(
                f"Row {position} has the label {value!r}, which the model does not know: it has "
                f"{', '.join(list(known)[:10])}{', …' if len(known) > 10 else ''}. Give the column that it was trained "
                "on."
            )
        encoded.append(number)
    return rows.add_column(_ENCODED, encoded).remove_columns(column).rename_column(_ENCODED, "labels")
