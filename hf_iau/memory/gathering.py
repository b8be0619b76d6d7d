"""`gather`: make the memory of a model and the rows it was trained on."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from hf_iau.curvature import Curvature, fit_curvature
from hf_iau.data import (
    ModelRowLoss,
    OutputRowLoss,
    RowLoss,
    RowSource,
    SmoothedRowLoss,
    UserRowLoss,
    evaluation_mode,
    probe_additivity,
    probe_targets,
)
from hf_iau.data.digests import sample_positions
from hf_iau.data.precision import compute_settings
from hf_iau.data.row_loss import UserLossFunction
from hf_iau.data.rows import Collator, refuse_iterable
from hf_iau.data.targets import find_real_valued_labels, input_columns
from hf_iau.data.validation import check_before_gathering, check_placement, refuse_inference_mode, refuse_wrapped
from hf_iau.distributed import SAME_START, assert_same_on_ranks, is_sharded, sharded_passes, sync_errors
from hf_iau.distributed.wrappers import unwrap_model
from hf_iau.errors import ConfigError, MemoryFileError, MemoryMismatchError, RequestError, UnsupportedModelError
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.fingerprints import data_fingerprint, model_fingerprint
from hf_iau.memory.gradient_sum import GradientSum, sum_row_gradients, trainable_parameters
from hf_iau.memory.keys import find_key, process_key, require_key, warn_without_key
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.memory_files import MEMORY_FOLDER, MEMORY_HEADER
from hf_iau.memory.row_identity import RowIdentity, keyed_fingerprints

logger = logging.getLogger(__name__)


def gather(
    model: nn.Module,
    dataset: Any,
    *,
    data_collator: Collator | None = None,
    processing_class: Any = None,
    config: GatherConfig | None = None,
    row_loss: UserLossFunction | RowLoss | None = None,
    compute_loss_func: Callable[..., Tensor] | None = None,
    label_smoothing_factor: float = 0.0,
    optimizer: torch.optim.Optimizer | None = None,
    device: torch.device | str | None = None,
    previous: GradientMemory | None = None,
) -> GradientMemory:
    """Make the memory of a model that was trained without this package.

    The model must hold the weights that are to forget, `dataset` the rows it was trained on (without augmentation).

    Args:
        model: the fine-tuned model; left as it was found.
        dataset: the training rows, a map-style `datasets.Dataset` or torch `Dataset`.
        data_collator: as given to the Trainer; default: padding with `processing_class` when that is a tokenizer,
            else `default_data_collator`.
        processing_class: the tokenizer or image processor.
        config: what to gather; default `GatherConfig()`: EK-FAC factors from a bounded number of rows.
        row_loss: `row_loss(model, inputs)` returning each row's loss or their sum, where the objective was not the
            model's own loss.
        compute_loss_func: the Trainer's argument of that name, if the model was trained with one.
        label_smoothing_factor: the `TrainingArguments` value it was trained with.
        optimizer: for `curvature="adam"`, and to find coupled weight decay.
        device: where batches are moved; default: the model's device.
        previous: the memory that the model had, whose forgotten rows are left out; default: the one in the folder that
            the model was loaded from, if it is of these weights.

    Returns:
        The memory; keep it with `.save(dir)`.

    Raises:
        RequestError: rows were forgotten, and the previous memory does not know which.
        UnsupportedModelError: rows without numbers, random transforms, an unreadable loss.
        CoupledRowsError: the loss couples rows of a batch.
        NonFiniteGradientError: a row's gradient is NaN or infinite.

    Examples:
        With `model` and `train` of the example of `UnlearningTrainer`:

        >>> from hf_iau import GatherConfig, gather
        >>> memory = gather(model, train, config=GatherConfig(curvature_rows=32, progress=False))
        >>> memory.n_rows, memory.curvature.kind
        (64, 'ekfac')
    """
    config, model = config or GatherConfig(), unwrap_model(model)
    refuse_inference_mode("gather()")
    check_placement(model)
    loss = choose_row_loss(
        row_loss=row_loss, compute_loss_func=compute_loss_func, label_smoothing_factor=label_smoothing_factor
    )
    source = RowSource(
        keep_input_columns(model, dataset, "training rows"),
        data_collator or default_collator(processing_class),
        batch_size=config.batch_size or 32,
        device=device or next(model.parameters()).device,
        name="training rows",
    )
    previous = previous or memory_beside(model, getattr(model, "name_or_path", None))
    identity = identify_rows(model, source.dataset)
    forgotten = forgotten_before(model, source.dataset, previous)
    return gather_without(model, source, identity, forgotten, loss, config, optimizer)


def gather_without(
    model: nn.Module,
    source: RowSource,
    identity: RowIdentity | None,
    forgotten: np.ndarray,
    row_loss: RowLoss,
    config: GatherConfig,
    optimizer: torch.optim.Optimizer | None = None,
) -> GradientMemory:
    """Gather from the rows that were not forgotten; row numbers still name rows of the whole training set.

    Args:
        model, row_loss, config, optimizer: as for `build_memory`.
        source: all training rows.
        identity: theirs.
        forgotten: which of them are out: bool, `(rows,)`.
    """
    config, out = config.resolved(), bool(forgotten.any())
    remaining = source.select(np.flatnonzero(~forgotten)) if out else source
    memory = build_memory(model, remaining, row_loss, config, optimizer=optimizer)
    if out:
        memory.data = data_fingerprint(model, source.dataset)
        with compute_settings(config.pass_precision):
            memory.loss["probe"] = memory.probe_loss(model, row_loss, source)
        memory.forgotten_rows = int(forgotten.sum())
    memory.row_identity = None if identity is None else replace(identity, forgotten=forgotten)
    return memory


def forgotten_before(model: nn.Module, dataset: Any, previous: GradientMemory | None) -> np.ndarray:
    """Which rows of `dataset` the requests that `previous` has been through took out: bool, `(rows,)`.

    Raises:
        RequestError: some were, and it is not known which.
        ConfigError: they are known by a key that is not set.
    """
    none = np.zeros(len(dataset), dtype=bool)
    if previous is None or not previous.forgotten_rows:
        return none
    identity, same = previous.row_identity, previous.data == data_fingerprint(model, dataset)
    if identity is None:
        if not same:  # the caller's own choice of rows
            return none
        raise RequestError(
            f"{previous.forgotten_rows} of these {len(dataset)} rows were forgotten, and the memory, which was "
            "gathered without a key (HF_IAU_KEY), does not know which: gathering from all of them would count rows as "
            "kept that are not. Leave them out of the data set yourself."
        )
    if same:
        return identity.forgotten.copy()
    key = process_key() if identity.of_process else require_key("Knowing which rows were forgotten")
    identity.check_key(key)
    fingerprints = keyed_fingerprints(key, model, dataset)
    trained = {name for name, (rows, _) in identity.copies(fingerprints).items() if rows}
    known = np.asarray([row.tobytes() in trained for row in fingerprints], dtype=bool)
    return known & ~identity.still_in(fingerprints)


def memory_beside(model: nn.Module, folder: str | Path | None) -> GradientMemory | None:
    """The memory below `folder`, if there is one of the model's weights; one that cannot be read is told."""
    private = Path(folder or "") / MEMORY_FOLDER
    if not folder or not (private / MEMORY_HEADER).is_file():
        return None
    try:
        memory = GradientMemory.load(private)
    except (MemoryFileError, MemoryMismatchError) as error:
        logger.warning("The memory in %s cannot be read, so rows forgotten before are not known: %s", private, error)
        return None
    return memory if memory.model["weights"] == model_fingerprint(model)["weights"] else None


def identify_rows(model: nn.Module, dataset: Any, output_dir: str | Path | None = None) -> RowIdentity:
    """Keyed fingerprints of the training rows; without a key (said once) with one that ends with this process.

    Args:
        model: the trained model.
        dataset: the training rows.
        output_dir: where the memory will lie, which must not hold the key.
    """
    key = find_key(output_dir)
    if key is None:
        warn_without_key()
    return RowIdentity.of(key or process_key(), model, dataset)


def build_memory(
    model: nn.Module,
    source: RowSource,
    row_loss: RowLoss,
    config: GatherConfig,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> GradientMemory:
    """Gather from prepared rows; what `gather` and `IAUCallback` share.

    Args:
        model: the bare model.
        source: its training rows.
        row_loss: the objective.
        config: `resolved` for the training that is known of; `precision="auto"` is else without autocast.
        optimizer: of the training, where there is one.
    """
    config = config.resolved()
    decay = coupled_weight_decay(model, optimizer)
    if config.curvature == "adam" and is_sharded(model):
        raise UnsupportedModelError(
            "GatherConfig(curvature='adam') reads the optimizer's second moments, which fully_shard has spread over "
            "the processes. Use curvature='ekfac' or 'diagonal'."
        )
    with sync_errors("gathering"), compute_settings(config.pass_precision, config.memory_device), sharded_passes(model):
        return _build_memory(model, source, row_loss, config, optimizer, decay)


def _build_memory(
    model: nn.Module,
    source: RowSource,
    row_loss: RowLoss,
    config: GatherConfig,
    optimizer: torch.optim.Optimizer | None,
    decay: dict[str, float],
) -> GradientMemory:
    check_placement(model)
    check_before_gathering(model, source.dataset)
    find_real_valued_labels(model, source.dataset)
    parameters = trainable_parameters(model)
    probe_additivity(row_loss, model, source)
    if config.reads_targets:
        probe_targets(model, source)
    of_model, of_data = model_fingerprint(model), data_fingerprint(model, source.dataset)
    assert_same_on_ranks(str(of_model | of_data), "the model or training rows that they gather from", SAME_START)
    seconds: dict[str, float] = {}

    started = time.perf_counter()
    total, error, counted = _gather_sum(model, row_loss, source, config)
    seconds["gradient_sum"] = time.perf_counter() - started

    started = time.perf_counter()
    curvature = None
    if config.curvature != "none":
        rows = sample_positions(len(source), config.curvature_rows, config.seed)
        chosen = source.select(rows, name="curvature rows")
        curvature = estimate_curvature(model, chosen, rows, row_loss, config, decay, optimizer)
    seconds["curvature"] = time.perf_counter() - started

    n_targets = counted if counted is not None else _count_targets(model, row_loss, source, curvature)
    memory = GradientMemory(
        parameters={name: tuple(p.shape) for name, p in parameters.items()},
        n_rows=len(source),
        n_targets=n_targets,
        model=of_model,
        data=of_data,
        loss=dict(row_loss.fingerprint()),
        label_counts=count_labels(source.dataset),
        gradient_sum=None if total is None else total.tensors,
        gradient_sum_kind="full" if counted is not None else config.gradient_sum,
        gradient_sum_rows=0 if total is None else len(source) if counted is not None else config.sample_rows,
        gradient_sum_error=error,
        weight_decay=decay,
        curvature=curvature,
        settings=config.to_dict(),
        seconds=seconds,
    )
    memory.loss["probe"] = memory.probe_loss(model, row_loss, source)
    return memory


def estimate_curvature(
    model: nn.Module,
    rows: RowSource,
    row_ids: np.ndarray,
    row_loss: RowLoss,
    config: GatherConfig,
    decay: Mapping[str, float],
    optimizer: torch.optim.Optimizer | None = None,
) -> Curvature:
    """The curvature of some rows as `config` has it.

    Args:
        model: the bare model.
        rows: to estimate it on, in batches that fit gradients.
        row_ids: `(rows,)`, what the labels drawn for each row depend on.
        row_loss: the objective.
        config: a kind but "none", seed, devices.
        decay: parameter name → coefficient of a coupled L2 term.
        optimizer: for `curvature="adam"`.
    """
    assert config.curvature != "none"
    return fit_curvature(
        model,
        rows,
        kind=config.curvature,
        row_ids=row_ids,
        seed=config.seed,
        fisher=config.fisher,
        row_loss=row_loss,
        max_factor_size=config.max_factor_size,
        factor_device=config.factor_device or config.memory_device,
        optimizer=optimizer,
        weight_decay=max(decay.values(), default=0.0),
        progress=config.progress,
    )


def choose_row_loss(
    *,
    row_loss: UserLossFunction | RowLoss | None,
    compute_loss_func: Callable[..., Tensor] | None,
    label_smoothing_factor: float,
) -> RowLoss:
    """The objective that was trained, by the Trainer's own order of precedence."""
    if row_loss is not None:
        return row_loss if isinstance(row_loss, RowLoss) else UserRowLoss(row_loss)
    if compute_loss_func is not None:
        return OutputRowLoss(compute_loss_func)
    if label_smoothing_factor != 0.0:
        if not 0.0 < label_smoothing_factor < 1.0:
            raise ConfigError(f"label_smoothing_factor={label_smoothing_factor}: give a number from 0 to below 1.")
        return SmoothedRowLoss(label_smoothing_factor)
    return ModelRowLoss()


def default_collator(processing_class: Any) -> Collator:
    """The collator that the Trainer would choose."""
    if isinstance(processing_class, PreTrainedTokenizerBase):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def keep_input_columns(model: nn.Module, dataset: Any, name: str) -> Any:
    """`dataset` without the columns that the model's forward does not take (as the Trainer does).

    Raises:
        UnsupportedModelError: no column is left.
    """
    refuse_wrapped(model)
    refuse_iterable(dataset, name)
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    # A transform set with `set_transform` makes its own columns from the stored ones: leave those alone.
    if dataset.format["type"] == "custom":
        return dataset
    accepted = input_columns(model)
    used_columns = [column for column in dataset.column_names if column in accepted]
    if not used_columns:
        raise UnsupportedModelError(
            f"None of the columns {dataset.column_names} of the {name} is an argument of {type(model).__name__}."
            f"forward ({', '.join(sorted(accepted))}). Tokenize or preprocess the rows first."
        )
    return dataset.remove_columns([column for column in dataset.column_names if column not in accepted])


def coupled_weight_decay(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, float]:
    """Parameter name → coefficient of an L2 term that is part of the gradient (SGD, Adam), empty where decoupled."""
    inner = getattr(optimizer, "optimizer", optimizer)
    coupled = (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad)
    if not isinstance(inner, coupled) or isinstance(inner, torch.optim.AdamW):
        return {}
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay: dict[str, float] = {}
    for group in inner.param_groups:
        if group.get("weight_decay") and not group.get("decoupled_weight_decay", False):
            decay |= {names[p]: float(group["weight_decay"]) for p in group["params"] if p in names}
    return decay


def count_labels(dataset: Any) -> dict[str, int] | None:
    """Class → rows where a `datasets.Dataset` has one integer label a row; else None (no pass is spent on it)."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    column = next((name for name in ("labels", "label", "label_ids") if name in dataset.column_names), None)
    if column is None or not isinstance(dataset.features[column], (datasets.ClassLabel, datasets.Value)):
        return None
    values = np.asarray(dataset.with_format(None)[column])
    if values.dtype.kind not in "iu":
        return None
    return {str(label): count for label, count in sorted(Counter(values.tolist()).items())}


def _gather_sum(
    model: nn.Module, row_loss: RowLoss, source: RowSource, config: GatherConfig
) -> tuple[GradientSum | None, float, int | None]:
    """The sum, its standard error, and the exact number of targets where the pass counted them."""
    if config.gradient_sum == "none":
        return None, 0.0, None
    if config.gradient_sum == "full" or config.sample_rows >= len(source):
        total = sum_row_gradients(model, row_loss, source, progress=config.progress)
        return total, 0.0, total.n_targets
    rows = source.sample(config.sample_rows, config.seed + 1, name="sampled rows")
    sample = sum_row_gradients(model, row_loss, rows, progress=config.progress, track_batches=True)
    share = len(source) / sample.n_rows
    error = share * _standard_error(sample) * (1 - 1 / share) ** 0.5
    scaled = GradientSum(
        {name: tensor.mul_(share) for name, tensor in sample.tensors.items()},
        len(source),
        round(sample.n_targets * share),
        sample.loss * share,
    )
    return scaled, error, None


def _standard_error(sample: GradientSum) -> float:
    """Standard error, as a Euclidean norm, of a sample's sum, from the spread of its batches' sums."""
    batches = sample.batches
    if len(batches) < 2:
        return float("inf")
    rows = sum(count for count, _ in batches)
    spread = sum(squared / count for count, squared in batches) - sample.norm() ** 2 / rows
    trace = max(spread, 0.0) / (len(batches) - 1)  # trace of one row gradient's covariance
    return (rows * trace) ** 0.5


def _count_targets(model: nn.Module, row_loss: RowLoss, source: RowSource, curvature: Any) -> int:
    """Targets of all training rows: rows of a classifier; for tokens scaled up from the rows the curvature saw."""
    if curvature is not None and curvature.n_rows > 0:
        return max(1, round(curvature.n_targets * len(source) / curvature.n_rows))
    sample = source.sample(256, seed=0)
    with torch.no_grad(), evaluation_mode(model):
        targets = sum(row_loss(model, inputs)[1] for _, inputs in sample.passes_of_all(model))
    return max(1, round(targets * len(source) / len(sample)))


def memory_summary(memory: GradientMemory) -> Mapping[str, Any]:
    """A few figures about a memory, for logs."""
    return {
        "rows": memory.n_rows,
        "targets": memory.n_targets,
        "gradient_sum": memory.gradient_sum_kind,
        "curvature": None if memory.curvature is None else memory.curvature.kind,
        "megabytes": round(memory.nbytes() / 2**20, 1),
        "seconds": {name: round(value, 2) for name, value in memory.seconds.items()},
    }
