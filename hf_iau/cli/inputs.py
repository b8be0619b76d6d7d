"""What the commands load: models, rows, requests, memories and settings, as they are named on the command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_iau.cli.task import KINDS, Task, load_task
from hf_iau.cli.task_rows import load_rows, read_ids
from hf_iau.cli.where import rows_where
from hf_iau.deletion.ids import rows_of_ids
from hf_iau.errors import ConfigError, RequestError
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


def load(
    model: str,
    train: str,
    held_out: str | None,
    test: str | None,
    input_column: list[str] | None,
    label_column: str,
    max_length: int | None,
    kind: str | None,
    trust_remote_code: bool,
) -> Loaded:
    """The model, and its rows as it takes them.

    Raises:
        ConfigError: an unknown kind of task.
        RequestError: rows or a model that cannot be loaded.
    """
    transformers_logging.set_verbosity_error()
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"--task {kind}: choose {', '.join(KINDS[:-1])} or {KINDS[-1]}.")
    raw = load_rows(train)
    others = [None if source is None else load_rows(source) for source in (held_out, test)]
    task = load_task(
        model,
        kind=kind,
        input_columns=tuple(input_column or ()),
        label_column=label_column,
        max_length=max_length,
        trust_remote_code=trust_remote_code,
    )
    prepared = [None if rows is None else task.prepare(rows) for rows in others]
    return Loaded(task, raw, task.prepare(raw), prepared[0], prepared[1])


@dataclass(frozen=True)
class NamedRows:
    """What is to be forgotten: row numbers, or ids of a column."""

    rows: np.ndarray
    id_column: str | None = None
    ids: tuple[Any, ...] = ()


def request_of(rows: datasets.Dataset, ids_file: Path | None, id_column: str | None, where: str | None) -> NamedRows:
    """The rows that the options name.

    Raises:
        RequestError: they name none, or contradict each other.
    """
    if (ids_file is None) == (where is None):
        raise RequestError("Say what to forget: either --ids-file or --where.")
    if where is not None:
        if id_column is not None:
            raise RequestError("--id-column goes with --ids-file; --where names its columns itself.")
        chosen = rows_where(rows, where)
        if len(chosen) == 0:
            raise RequestError(f"No training row meets the condition {where!r}.")
        return NamedRows(chosen)
    assert ids_file is not None
    if id_column is None:
        return NamedRows(np.asarray(read_ids(ids_file), dtype=np.int64))
    feature = rows.features.get(id_column)
    numbers = isinstance(feature, datasets.Value) and "int" in feature.dtype
    ids = read_ids(ids_file, int if numbers else str)
    return NamedRows(rows_of_ids(rows, id_column, ids), id_column, tuple(ids))


def training_arguments(folder: str, batch_size: int, seed: int, cpu: bool, quiet: bool) -> TrainingArguments:
    """For a trainer that only forgets."""
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        seed=seed,
        use_cpu=cpu,
        disable_tqdm=quiet,
        report_to="none",
        remove_unused_columns=True,
        dataloader_pin_memory=not cpu,
    )


def settings_of(text: str | None, option: str) -> dict[str, Any]:
    """An option's JSON object.

    Raises:
        ConfigError: it is none.
    """
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{option} {text!r} is no JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{option} {text!r}: give a JSON object, e.g. '{{\"eta\": 1e-6}}'.")
    return values


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
