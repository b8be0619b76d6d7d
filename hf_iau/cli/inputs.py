"""What the commands load: models, rows, requests and memories, as they are named on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_iau.cli.files import read_ids
from hf_iau.cli.options import ComparisonOptions, ForgetOptions, ModelOptions
from hf_iau.cli.task import Task, load_task
from hf_iau.cli.task_rows import load_rows
from hf_iau.cli.where import rows_where
from hf_iau.deletion.ids import rows_of_ids
from hf_iau.errors import RequestError
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.memory_files import MEMORY_FOLDER, MEMORY_HEADER


@dataclass(frozen=True)
class Loaded:
    """A task with its rows, raw and prepared."""

    task: Task
    raw: datasets.Dataset
    train: datasets.Dataset
    held_out: datasets.Dataset | None
    test: datasets.Dataset | None


def load(options: ModelOptions, compare: ComparisonOptions | None = None) -> Loaded:
    """The model, and its rows as it takes them.

    Raises:
        RequestError: rows or a model that cannot be loaded.
        UnsupportedModelError: a model of another kind than the command line serves.
    """
    transformers_logging.set_verbosity_error()
    raw = load_rows(options.train)
    sources = (None, None) if compare is None else (compare.held_out, compare.test)
    others = [None if source is None else load_rows(source) for source in sources]
    task = load_task(
        options.model,
        kind=options.task,  # type: ignore[arg-type]  # one of KINDS
        input_columns=tuple(options.input_column or ()),
        label_column=options.label_column,
        max_length=options.max_length,
        trust_remote_code=options.trust_remote_code,
    )
    held_out, test = (None if rows is None else task.prepare(rows) for rows in others)
    return Loaded(task, raw, task.prepare(raw), held_out, test)


@dataclass(frozen=True)
class NamedRows:
    """What is to be forgotten: row numbers, or ids of a column."""

    rows: np.ndarray
    id_column: str | None = None
    ids: tuple[Any, ...] = ()


def request_of(rows: datasets.Dataset, forget: ForgetOptions) -> NamedRows:
    """The rows that the options name.

    Raises:
        RequestError: they name none, or what is no row.
    """
    if forget.where is not None:
        chosen = rows_where(rows, forget.where)
        if len(chosen) == 0:
            raise RequestError(f"No training row meets the condition {forget.where!r}.")
        return NamedRows(chosen)
    assert forget.ids_file is not None
    if forget.id_column is None:
        return NamedRows(np.asarray(read_ids(forget.ids_file), dtype=np.int64))
    feature = rows.features.get(forget.id_column)
    numbers = isinstance(feature, datasets.Value) and "int" in feature.dtype
    ids = read_ids(forget.ids_file, int if numbers else str)
    return NamedRows(rows_of_ids(rows, forget.id_column, ids), forget.id_column, tuple(ids))


def training_arguments(folder: str, options: ModelOptions, quiet: bool) -> TrainingArguments:
    """For a trainer that only forgets."""
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        seed=options.seed,
        use_cpu=options.cpu,
        disable_tqdm=quiet,
        report_to="none",
        remove_unused_columns=True,
        dataloader_pin_memory=not options.cpu,
    )


def memory_of(home: Path | None, memory: Path | None) -> GradientMemory | None:
    """The memory in `--memory`, else the one in the model's folder, else None for methods that need none."""
    if memory is not None:
        return GradientMemory.load(memory)
    if home is None or not (home / MEMORY_FOLDER / MEMORY_HEADER).is_file():
        return None
    return GradientMemory.load(home / MEMORY_FOLDER)


def other_model(name: str, task: Task, trust_remote_code: bool) -> nn.Module:
    """A further model for the same task."""
    return load_task(name, kind=task.kind, trust_remote_code=trust_remote_code).model
