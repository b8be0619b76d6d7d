"""Every refusal of a model, an adapter, a device, a data set or a loss, before anything is computed.

What a data set needs to be read at all (row numbers and a length) is refused by `RowSource` itself:
`rows.refuse_iterable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_iau.data.adapters import SUPPORTED, adapter_configs, adapter_owner, unsupported_reason
from hf_iau.data.digests import row_bytes, sample_positions
from hf_iau.data.model_mode import evaluation_mode
from hf_iau.data.precision import rounds_to_half
from hf_iau.data.row_loss import LABEL_COLUMNS, RowLoss
from hf_iau.data.rows import RowSource, refuse_iterable
from hf_iau.data.targets import labels_of, predicted_targets
from hf_iau.data.trainer_rows import trainer_rows
from hf_iau.errors import CoupledRowsError, RequestError, UnsupportedModelError

WITHOUT_FLOAT64 = ("mps",)
"""Kinds of devices that have no float64, in which norms and inner products are added up."""


# --- models -----------------------------------------------------------------------------------------------------------


def refuse_wrapped(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for a model in `nn.DataParallel`, FSDP1 or DeepSpeed."""
    if isinstance(model, nn.DataParallel):
        raise UnsupportedModelError(
            "The model is wrapped in nn.DataParallel, which splits batches behind the Trainer's back. Use one device, "
            "or launch one process a GPU with `accelerate launch`."
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedModelError(
            "The model is wrapped in FullyShardedDataParallel (FSDP1), which flattens its parameters. Use DDP, or "
            "torch.distributed.fsdp.fully_shard (FSDP2)."
        )
    if type(model).__module__.startswith("deepspeed") or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise UnsupportedModelError(
            "The model belongs to DeepSpeed, whose parameters and gradients are not visible. Use DDP, or "
            "torch.distributed.fsdp.fully_shard (FSDP2)."
        )


def refuse_inference_mode(what: str) -> None:
    """Raise `RequestError` inside `torch.inference_mode()`, where nothing has a gradient.

    Args:
        what: was called.
    """
    if torch.is_inference_mode_enabled():
        raise RequestError(
            f"{what} was called inside torch.inference_mode(), where nothing has a gradient: call it outside."
        )


def check_placement(model: nn.Module) -> None:
    """Refuse parameters that are not at hand, or lie where there is no float64.

    Raises:
        UnsupportedModelError: a parameter is offloaded (on the device "meta" between its uses), or on such a device.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"Parameter {name!r} is on the device 'meta': it was offloaded to the CPU or disk (device_map=), or "
                "never loaded, and has no gradient. Load the model whole: on one device, or with a device_map of "
                "accelerators that have room for all of it."
            )
        refuse_device(parameter.device.type)
        if parameter.numel() == 0:
            raise UnsupportedModelError(
                f"Parameter {name!r} has no elements (shape {tuple(parameter.shape)}), as parameters have whose values "
                "DeepSpeed (ZeRO-3) keeps elsewhere: load the whole weights, or leave the parameter out of the model."
            )


def refuse_device(kind: str) -> None:
    """Raise `UnsupportedModelError` for a kind of device that has no float64."""
    if kind in WITHOUT_FLOAT64:
        raise UnsupportedModelError(
            f"Device {kind!r} has no float64, in which this package adds up. Use the CPU: model.to('cpu'), "
            "TrainingArguments(use_cpu=True), or --cpu on the command line."
        )


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters that are not known to work, and those that do not take part in the model's output.

    Raises:
        UnsupportedModelError: an adapter is of an untested kind, merged into the base weights, or disabled.
    """
    for name, config in adapter_configs(model).items():
        unsupported = unsupported_reason(config)
        if unsupported is None:
            continue
        kind, reason = unsupported
        raise UnsupportedModelError(
            f"Adapter {name!r} is of kind {kind}, which is not supported: {reason}. Train LoRA (or one of "
            f"{', '.join(sorted(SUPPORTED - {'LORA'}))}), or merge it with model.merge_and_unload() and gather from "
            "the merged model with requires_grad=True on the weights that are to forget."
        )
    for name, module in model.named_modules() if adapter_owner(model) is not None else ():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged:
            raise UnsupportedModelError(
                f"Adapter {module.merged_adapters[0]!r} is merged into the base weights (layer {name!r}), so its own "
                "weights have no gradient and moving them would change nothing. Call model.unmerge_adapter(), or, "
                "since that leaves rounding in the base weights, load base model and adapter anew "
                "(PeftModel.from_pretrained(base, folder, is_trainable=True))."
            )
        if module.disable_adapters:
            raise UnsupportedModelError(
                f"The adapters are disabled (layer {name!r}), so their weights have no gradient. Leave the "
                "disable_adapter() context, or call model.enable_adapter_layers()."
            )


_PREFERENCES = "compares answers, with one another or with a reference model, or draws them anew"
_TRAINERS_REFUSED = {
    "RewardConfig": ("RewardTrainer", "is one of pairs of texts, collated as twice as many rows"),
    "PRMConfig": ("PRMTrainer", "is one of the steps of a row"),
    "SentenceTransformerTrainingArguments": (
        "SentenceTransformerTrainer",
        "is a module of its own over several texts a row, and most of its losses compare the rows of a batch "
        "(MultipleNegativesRankingLoss and others)",
    ),
    "SparseEncoderTrainingArguments": ("SparseEncoderTrainer", "compares the rows of a batch"),
    "CrossEncoderTrainingArguments": ("CrossEncoderTrainer", "is a module of its own over pairs of texts"),
} | {
    f"{name}Config": (f"{name}Trainer", _PREFERENCES)
    for name in (
        *("BCO", "CPO", "DPO", "Distillation", "GKD", "GOLD", "GRPO", "KTO", "MiniLLM", "NashMD", "ORPO", "OnlineDPO"),
        *("PPO", "RLOO", "SDFT", "SDPO", "XPO"),
    )
}


def refuse_trainer(args: TrainingArguments) -> None:
    """Refuse trainers of TRL and sentence-transformers whose rows or losses this package does not read, by their name.

    Args:
        args: training arguments, whose class tells which trainer they are for.

    Raises:
        UnsupportedModelError: packed rows, or such a trainer.
    """
    for kind in type(args).__mro__:
        refused = _TRAINERS_REFUSED.get(kind.__name__)
        if refused is not None and kind.__module__.startswith(("trl", "sentence_transformers")):
            raise UnsupportedModelError(
                f"{refused[0]} cannot forget rows: its loss {refused[1]}, so it is no sum over rows that this package "
                "could read. Fine-tune with Trainer, Seq2SeqTrainer or TRL's SFTTrainer, or remove the IAUCallback."
            )
    loss_type = getattr(args, "loss_type", None)
    if any(kind.__name__ == "SFTConfig" for kind in type(args).__mro__) and loss_type not in (None, "nll"):
        raise UnsupportedModelError(
            f"loss_type={loss_type!r} of TRL is not served: gathering would take the plain loss for it. Use "
            "loss_type='nll'."
        )
    for option in ("packing", "padding_free", "eval_packing"):
        if getattr(args, option, None):
            raise UnsupportedModelError(
                f"{option}=True puts several rows into one, which then cannot be told apart or forgotten: set "
                f"{option}=False. Sorting by length (group_by_length=True) spares padding as well."
            )


# --- rows -------------------------------------------------------------------------------------------------------------


def check_before_gathering(model: nn.Module, dataset: Any) -> None:
    """Refuse what has no row gradients, before any compute is spent."""
    refuse_wrapped(model)
    check_adapters(model)
    refuse_iterable(dataset, "training rows")
    if len(dataset) == 0:
        raise UnsupportedModelError("The training rows are empty: there is nothing to gather.")
    if not rows_are_deterministic(dataset):
        raise UnsupportedModelError(
            "The training rows change each time they are read (random augmentation in `set_transform` or "
            "`__getitem__`), so a row has no one gradient. Gather from the rows without augmentation: "
            "`IAUCallback(dataset=…)` or `hf_iau.gather(model, dataset_without_augmentation)`."
        )


def rows_are_deterministic(dataset: Dataset[Any] | datasets.Dataset, probes: int = 4) -> bool:
    """Whether a few rows read twice have the same content; random transforms (augmentation) do not.

    Raises:
        RequestError: a transform (`with_transform`) reads a column that was removed as unused.
    """
    try:
        return _same_twice(dataset, probes)
    except KeyError as error:
        if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
            raise RequestError(
                f"The transform of the data set (with_transform) reads the column {error}, which is not there: the "
                "Trainer removes columns that the model does not take. Set TrainingArguments("
                "remove_unused_columns=False)."
            ) from error
        raise


def _same_twice(dataset: Dataset[Any] | datasets.Dataset, probes: int) -> bool:
    positions = sample_positions(len(dataset), probes, seed=0)  # type: ignore[arg-type]
    return all(row_bytes(dataset[int(i)]) == row_bytes(dataset[int(i)]) for i in positions)


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
                f"The forget rows have label columns {others} and no `labels`: tasks with label columns of their own "
                "are not supported, but for question answering (start_positions and end_positions). Rename the column "
                "`labels` where it is one."
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
    row, forget_row = source.dataset[0], forget.dataset[0]
    if not isinstance(row, Mapping) or not isinstance(forget_row, Mapping):
        return
    needed = set(forget_row)
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        needed &= set(trainer._signature_columns or ())
    if not needed <= set(row):
        raise RequestError(
            f"The {source.name} have columns {sorted(row)} but the forget rows have {sorted(forget_row)}. Preprocess "
            "them alike."
        )


# --- losses -----------------------------------------------------------------------------------------------------------


def probe_targets(model: nn.Module, source: RowSource) -> None:
    """Look at one row, to refuse a task whose targets cannot be read before anything is computed.

    Args:
        model: the bare model.
        source: rows; the first is taken.

    Raises:
        UnsupportedModelError: the model's outputs or the row's labels are of no supported task.
    """
    with evaluation_mode(model), torch.no_grad():
        _, inputs = next(source.select([0]).passes_of_all(model))
        try:
            predicted_targets(model, inputs)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{error} Curvature needs to know what the model predicts; GatherConfig(fisher='empirical') makes do "
                "with losses, but a request's report does not."
            ) from error


def probe_additivity(row_loss: RowLoss, model: nn.Module, source: RowSource, *, rows: int = 6) -> float:
    """Check that a batch's loss is the sum of its rows' losses, without which no row can be forgotten.

    Args:
        row_loss: the loss.
        model: the bare model.
        source: rows to probe with; a few are taken, spread evenly, and the first ones of different classes.
        rows: how many of either.

    Returns:
        The sum of the probed rows' losses taken one by one.

    Raises:
        CoupledRowsError: when the two differ by more than rounding (contrastive losses, MoE auxiliary losses, a
            class-weighted *mean*).
    """
    spread = np.linspace(0, len(source) - 1, num=min(rows, len(source)), dtype=np.int64)
    probe = source.select(np.unique([*spread, *first_of_each_class(source)[:rows]]))
    with evaluation_mode(model), torch.no_grad():
        singles = [float(row_loss(model, inputs)[0]) for _, inputs in probe.resized(1).passes_of_all(model)]
        _, everything = next(probe.resized(len(probe)).passes_of_all(model))
        batched = float(row_loss(model, everything)[0])
    tolerance = 3e-2 if rounds_to_half(model) else 1e-3
    scale = sum(abs(loss) for loss in singles)
    apart = not np.isfinite(scale) and np.isfinite(batched)
    if apart or (np.isfinite(scale) and abs(batched - sum(singles)) > tolerance * scale + 1e-6):
        raise CoupledRowsError(
            f"The loss ({row_loss.fingerprint()['kind']}) of a batch of {len(probe)} rows is {batched:.6g} but its "
            f"rows' losses add up to {sum(singles):.6g}: rows are coupled within a batch (a contrastive or mixture-of-"
            "experts auxiliary loss, or a class-weighted mean). Give a loss that is a sum over rows: "
            "`compute_loss_func(outputs, labels, num_items_in_batch)` dividing its *sum* by `num_items_in_batch`, or "
            "`row_loss=`."
        )
    return float(sum(singles))


def first_of_each_class(source: RowSource, rows: int = 256) -> list[int]:
    """Positions of the first row of each class, as far as `rows` evenly spread rows (or a label column) show it.

    Empty where rows have no one class.
    """
    dataset = source.dataset
    first: dict[int, int] = {}
    if isinstance(dataset, datasets.Dataset):
        for column in LABEL_COLUMNS:
            if column in dataset.column_names and isinstance(
                dataset.features[column], (datasets.ClassLabel, datasets.Value)
            ):
                values = np.asarray(dataset.with_format(None)[column])
                if values.dtype.kind in "iub":
                    return sorted(np.unique(values, return_index=True)[1].tolist())
    for position in np.unique(np.linspace(0, len(source) - 1, num=min(rows, len(source)), dtype=np.int64)):
        row = dataset[int(position)]
        label = next((row[key] for key in LABEL_COLUMNS if key in row), None) if isinstance(row, Mapping) else None
        if isinstance(label, (Tensor, np.ndarray, np.generic)) and label.ndim == 0:
            label = label.item()
        if isinstance(label, int):
            first.setdefault(label, int(position))
    return sorted(first.values())
