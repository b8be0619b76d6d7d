"""A Trainer's model, and rows as that Trainer would hand them to it."""

from __future__ import annotations

from typing import Any

import datasets
from torch import nn
from torch.utils.data import Subset
from transformers import Trainer

from hf_iau.data.rows import RowSource, refuse_iterable, select_rows
from hf_iau.data.targets import input_columns
from hf_iau.distributed.wrappers import unwrap_model
from hf_iau.errors import RequestError


def model_of(trainer: Trainer) -> nn.Module:
    """The trainer's bare model."""
    return unwrap_model(trainer.accelerator.unwrap_model(trainer.model))


def trainer_rows(trainer: Trainer, dataset: Any, name: str, batch_size: int | None = None) -> RowSource:
    """The rows of `dataset`, collated and stripped of unused columns as `trainer` does it.

    Args:
        trainer: whose collator, device and settings are used.
        dataset: a map-style data set.
        name: what the rows are called in messages.
        batch_size: rows a batch; default: the trainer's per-device training batch size.

    Raises:
        RequestError: no column is one that the model takes.
        UnsupportedModelError: rows without numbers.
    """
    refuse_iterable(dataset, name)
    dataset = _selected(dataset)
    collator = trainer.data_collator
    custom = isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"
    if isinstance(dataset, datasets.Dataset) and not custom:
        try:
            dataset = trainer._remove_unused_columns(dataset, description=name)
        except ValueError as error:
            raise RequestError(
                f"The {name} have columns {dataset.column_names}, none of which the model takes. Preprocess them "
                "like the training rows."
            ) from error
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description=name)
    return RowSource(
        dataset,
        collator,
        batch_size=batch_size or trainer.args.per_device_train_batch_size,
        device=trainer.args.device,
        name=name,
        num_workers=trainer.args.dataloader_num_workers,
        columns=input_columns(model_of(trainer)),
    )


def optional_rows(trainer: Trainer, dataset: Any, name: str) -> RowSource | None:
    """The same in batches for where no gradients are taken; None where there are no rows.

    Raises:
        RequestError: a dictionary of several data sets.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        if len(dataset) != 1:
            raise RequestError(
                f"The {name} are a dictionary of {len(dataset)} data sets ({', '.join(dataset)}): name one, e.g. "
                f"held_out_dataset=eval_dataset[{next(iter(dataset), 'name')!r}]."
            )
        dataset = next(iter(dataset.values()))
    source = trainer_rows(trainer, dataset, name, trainer.args.per_device_eval_batch_size)
    return source if len(source) else None


def _selected(dataset: Any) -> Any:
    """A `Subset` of a `datasets.Dataset` as a `datasets.Dataset`, so that its unused columns can be removed."""
    if not isinstance(dataset, Subset):
        return dataset
    whole = _selected(dataset.dataset)
    return select_rows(whole, list(dataset.indices)) if isinstance(whole, datasets.Dataset) else dataset
