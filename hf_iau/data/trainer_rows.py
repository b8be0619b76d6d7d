"""A Trainer's model, and rows as that Trainer would hand them to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
from torch import nn
from torch.utils.data import Subset
from transformers import Trainer

from hf_iau.data.rows import RowSource, refuse_iterable, row_bytes, rows_are_deterministic, select_rows
from hf_iau.data.targets import labels_of
from hf_iau.data.wrappers import unwrapped
from hf_iau.errors import RequestError, UnsupportedModelError


def model_of(trainer: Trainer) -> nn.Module:
    """The trainer's bare model."""
    return unwrapped(trainer.accelerator.unwrap_model(trainer.model))


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


def refuse_random_rows(source: RowSource) -> None:
    """Raise `UnsupportedModelError` for rows that are augmented at random."""
    if not rows_are_deterministic(source.dataset):
        raise UnsupportedModelError(
            f"The {source.name} change each time they are read (random augmentation in `set_transform` or "
            "`__getitem__`), so a row has no one gradient. Pass the same rows without augmentation."
        )


def check_columns(trainer: Trainer, forget: RowSource) -> None:
    """Refuse forget rows that lack labels or columns of the training rows, or that are collated at random.

    Raises:
        RequestError: columns are missing.
        UnsupportedModelError: labels of an unknown kind, or a collator that draws at random.
    """
    row = forget.dataset[0]
    # Read anew each time, for a collator may change the rows that it is given.
    batch, again = (dict(forget.collator([forget.dataset[0]])) for _ in range(2))
    if row_bytes(batch) != row_bytes(again):
        raise UnsupportedModelError(
            f"data_collator={type(trainer.data_collator).__name__} collates the same row differently each time (random "
            "masking or augmentation), so a row has no one gradient. Use a collator without randomness."
        )
    # Looked for in the batch, for the collator may make the labels, as those of language models do.
    if labels_of(batch) is None:
        columns = sorted(row) if isinstance(row, Mapping) else sorted(batch)
        others = sorted(set(trainer.label_names) & set(batch))
        if others:
            raise UnsupportedModelError(
                f"The forget rows have label columns {others} and no `labels`: tasks with label columns of their own are "
                "not supported, but for question answering (start_positions and end_positions). Rename the column `labels` "
                "where it is one."
            )
        raise RequestError(
            f"The forget rows have columns {columns} and no labels, so they have no loss to unlearn. Pass rows "
            "as they were trained on, e.g. train_dataset.select(ids)."
        )
    if not isinstance(row, Mapping):
        return
    if trainer.train_dataset is None or len(trainer.train_dataset) == 0:  # type: ignore[arg-type]
        return
    trained = trainer_rows(trainer, trainer.train_dataset, "training rows", 1).dataset[0]
    if isinstance(trained, Mapping) and set(trained) != set(row):
        raise RequestError(
            f"The forget rows have columns {sorted(row)} but the training rows have {sorted(trained)}. Preprocess "
            "them alike, e.g. train_dataset.select(ids)."
        )


def check_same_columns(trainer: Trainer, source: RowSource | None, forget: RowSource) -> None:
    """Raise `RequestError` for rows beside the forget rows that lack one of their columns."""
    if source is None:
        return
    row, known = source.dataset[0], forget.dataset[0]
    if not isinstance(row, Mapping) or not isinstance(known, Mapping):
        return
    needed = set(known)
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        needed &= set(trainer._signature_columns or ())
    if not needed <= set(row):
        raise RequestError(
            f"The {source.name} have columns {sorted(row)} but the forget rows have {sorted(known)}. Preprocess "
            "them alike."
        )


def _selected(dataset: Any) -> Any:
    """A `Subset` of a `datasets.Dataset` as a `datasets.Dataset`, so that its unused columns can be removed."""
    if not isinstance(dataset, Subset):
        return dataset
    whole = _selected(dataset.dataset)
    return select_rows(whole, list(dataset.indices)) if isinstance(whole, datasets.Dataset) else dataset
