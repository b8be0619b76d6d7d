"""Row numbers of the data set that a trainer is given, carried through whatever the trainer makes of it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
from transformers import Trainer

from hf_iau.errors import ConfigError
from hf_iau.unlearn.rows import NUMBER_COLUMN, TrainingRows


@dataclass
class CarriedNumbers:
    """The arguments that a trainer is made with, and afterwards its training rows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: TrainingRows = field(default_factory=lambda: TrainingRows.of(None))


@contextlib.contextmanager
def row_numbers_carried(
    trainer: Trainer, own: type[Trainer], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[CarriedNumbers]:
    """While `trainer` is made: its training rows carry their numbers, in a column that is gone afterwards.

    Classes that prepare their rows when they are made (TRL's SFTTrainer tokenises, drops and cuts) keep a column that
    they do not know. A plain Trainer leaves its rows alone, and nothing is done.

    Args:
        trainer: the trainer, not yet made.
        own: the class whose `__init__` this is called in.
        args, kwargs: what the next class's `__init__` is to be given.

    Raises:
        ConfigError: a column of that name is there already.
    """
    carried = CarriedNumbers(args, kwargs)
    following = type(trainer).__mro__[type(trainer).__mro__.index(own) + 1]
    place = None if "train_dataset" in kwargs else _position(following, "train_dataset")
    given = kwargs.get("train_dataset") if place is None else args[place] if place < len(args) else None
    numbered = None
    if following is not Trainer and isinstance(given, datasets.Dataset) and len(given):
        numbered = _numbered(given)
        if place is None:
            carried.kwargs = kwargs | {"train_dataset": numbered}
        else:
            carried.args = (*args[:place], numbered, *args[place + 1 :])
    yield carried
    now = trainer.train_dataset
    if now is given or now is numbered or now is None or following is Trainer:
        trainer.train_dataset = given if now is numbered else now
        carried.rows = TrainingRows.of(trainer.train_dataset)
        return
    numbers = None
    if isinstance(now, datasets.Dataset) and NUMBER_COLUMN in now.column_names:
        numbers = np.asarray(now.with_format(None)[NUMBER_COLUMN], dtype=np.int64)
        trainer.train_dataset = now.remove_columns(NUMBER_COLUMN)
    cut = getattr(trainer, "cut_row_numbers", np.zeros(0, dtype=np.int64))
    carried.rows = TrainingRows(trainer.train_dataset, given, numbers, following.__name__, cut)


def _numbered(dataset: datasets.Dataset) -> datasets.Dataset:
    if NUMBER_COLUMN in dataset.column_names:
        raise ConfigError(f"train_dataset has a column {NUMBER_COLUMN!r}, which is this package's own: rename it.")
    return dataset.add_column(NUMBER_COLUMN, np.arange(len(dataset)))


def _position(trainer_class: type[Trainer], name: str) -> int:
    """Where `name` stands among the positional arguments of `trainer_class`; beyond them if it does not."""
    names = [
        p.name
        for p in inspect.signature(trainer_class.__init__).parameters.values()
        if p.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ][1:]
    return names.index(name) if name in names else len(names) + 10**6
