"""`IAUCallback`: gather from a fine-tuning run without changing it."""

from __future__ import annotations

import json
import logging
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from hf_iau.data import RowLoss, RowSource, probe_additivity, probe_targets
from hf_iau.data.precision import compute_settings, mixed_precision_of
from hf_iau.data.row_loss import UserLossFunction
from hf_iau.data.validation import refuse_device, refuse_trainer
from hf_iau.distributed import sync_errors
from hf_iau.distributed.wrappers import unwrap_model
from hf_iau.errors import MissingMemoryError, UnsupportedModelError
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.gathering import (
    check_before_gathering,
    choose_row_loss,
    gather_without,
    identify_rows,
    keep_input_columns,
    memory_summary,
)
from hf_iau.memory.keys import find_key
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.memory_files import MEMORY_FOLDER
from hf_iau.memory.private_files import TRAINER_IGNORES, refuse_private_files
from hf_iau.trainer.visits import VISITS_FILE, VisitCounter, visits_before

logger = logging.getLogger(__name__)

# A callback is never told which trainer calls it. An UnlearningTrainer leaves its row loss here, under its model.
_ROW_LOSS_OF_MODEL: weakref.WeakKeyDictionary[nn.Module, RowLoss] = weakref.WeakKeyDictionary()


def announce_row_loss(model: nn.Module, row_loss: RowLoss) -> None:
    """Let callbacks that see `model` know the loss that its trainer uses."""
    _ROW_LOSS_OF_MODEL[model] = row_loss


@dataclass(frozen=True)
class TrainingRowsLeft:
    """What an `UnlearningTrainer` trains on.

    Attributes:
        dataset: all training rows, forgotten ones among them.
        forgotten: which of them are left out: bool, `(rows,)`; None where none is.
        count: how many rows requests took out so far, as far as any record tells.
    """

    dataset: Any
    forgotten: np.ndarray | None
    count: int


_ROWS_OF_MODEL: weakref.WeakKeyDictionary[nn.Module, TrainingRowsLeft] = weakref.WeakKeyDictionary()


def announce_training_rows(model: nn.Module, dataset: Any, forgotten: np.ndarray | None, count: int) -> None:
    """Let callbacks that see `model` know which rows its trainer leaves out; see `TrainingRowsLeft`."""
    _ROWS_OF_MODEL[model] = TrainingRowsLeft(dataset, forgotten, count)


@dataclass(frozen=True)
class _CountedRows:
    """Which rows counts are of: those of `dataset` that are `left` (bool, all of its rows), trained on by `model`."""

    model: weakref.ref[nn.Module]
    dataset: Any
    left: np.ndarray

    @classmethod
    def of(cls, model: nn.Module, dataset: Any) -> _CountedRows:
        """Those of `dataset`, which may be what its trainer left of all training rows."""
        rows = _ROWS_OF_MODEL.get(model)
        if rows is not None and rows.forgotten is not None and len(dataset) == int((~rows.forgotten).sum()):
            return cls(weakref.ref(model), rows.dataset, ~rows.forgotten)
        whole = dataset if rows is None or rows.dataset is None else rows.dataset
        return cls(weakref.ref(model), whole, np.ones(len(dataset), dtype=bool))

    def moved(self, counts: np.ndarray, before: _CountedRows) -> np.ndarray | None:
        """Counts of the rows of `before` as counts of these; None where they are of another data set."""
        prints = [getattr(rows.dataset, "_fingerprint", None) for rows in (self, before)]
        same = self.dataset is before.dataset or (prints[0] is not None and prints[0] == prints[1])
        if not same or len(self.left) != len(before.left):
            return None
        whole = np.zeros(len(self.left), dtype=np.int32)
        whole[before.left] = counts
        return whole[self.left]


_CHECKPOINT_NOTE = "forgotten_rows.json"


def rows_forgotten_by(checkpoint: Path) -> int:
    """How many rows had been forgotten when a checkpoint was written; 0 where it does not say."""
    try:
        return int(json.loads((checkpoint / _CHECKPOINT_NOTE).read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


class IAUCallback(TrainerCallback):
    """Gathers, at the end of fine-tuning, what a later request to forget rows needs.

    Works on a plain `Trainer(callbacks=[IAUCallback()])`; an `UnlearningTrainer` adds one itself. The memory is made
    once, in `on_train_end` and so after `load_best_model_at_end`, kept as `.memory` and saved under
    `<output_dir>/_iau/`, which `push_to_hub` never uploads. Nothing is read off `param.grad` during training (it is
    clipped, scaled by a divisor that depends on model and version, and taken at older weights), so training itself is
    not slowed down and checkpoints hold nothing of it.

    What can be refused is refused in `on_train_begin`, before compute is spent. If gathering itself fails after
    training, the trained model is not lost with it: the error is logged, and raised when the memory is asked for.

    Args:
        config: what to gather; default `GatherConfig()`.
        row_loss: `row_loss(model, inputs)`, each row's loss or their sum, for a plain Trainer whose objective is not
            the model's own (`compute_loss_func=` is not visible to callbacks; `UnlearningTrainer` needs none of this).
        dataset: the training rows without augmentation, when the Trainer's own are augmented at random.
        save: write the memory below `output_dir`.

    Examples:
        With `model`, `args` and `train` of the example of `UnlearningTrainer`:

        >>> from transformers import Trainer
        >>> from hf_iau import GatherConfig, IAUCallback
        >>> callback = IAUCallback(GatherConfig(gradient_sum="full", progress=False))
        >>> output = Trainer(model=model, args=args, train_dataset=train, callbacks=[callback]).train()
        {'train_runtime': ...}
        >>> callback.memory.gradient_sum_kind
        'full'
    """

    # Training is the same without it, so retraining need not repeat it.
    only_watches = True

    def __init__(
        self,
        config: GatherConfig | None = None,
        *,
        row_loss: UserLossFunction | RowLoss | None = None,
        dataset: Any = None,
        save: bool = True,
    ) -> None:
        self.config = config or GatherConfig()
        self.row_loss = row_loss
        self.dataset = dataset
        self.save = save
        self._memory: GradientMemory | None = None
        self._visits: VisitCounter | None = None
        self._counted_rows: _CountedRows | None = None
        self.failure: Exception | None = None
        self._finished = False

    @property
    def memory(self) -> GradientMemory:
        """The memory of the last finished training run.

        Raises:
            MissingMemoryError: no run has finished, or gathering failed (the failure is its cause).
        """
        if self._memory is None:
            if self.failure is not None:
                raise MissingMemoryError(
                    f"Gathering failed after training: {self.failure} The trained model is unharmed; mend the cause "
                    "and call hf_iau.gather(model, train_dataset)."
                ) from self.failure
            raise MissingMemoryError("There is no memory yet: call trainer.train(), or use hf_iau.gather(...).")
        return self._memory

    @property
    def has_memory(self) -> bool:
        """Whether `.memory` can be had."""
        return self._memory is not None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # auto_find_batch_size enters the loop again and again; every entry starts afresh.
        self._memory, self.failure, self._finished = None, None, False
        model = unwrap_model(kwargs["model"])
        refuse_unsupported_engines(args)
        with sync_errors("the check before training"):
            find_key(args.output_dir)  # a key that cannot be used is better refused now than after training
            source = self._source(args, model, kwargs["train_dataloader"])
            check_before_gathering(model, source.dataset)
            config = self._resolved_config(args)
            with compute_settings(config.pass_precision, config.memory_device):
                probe_additivity(self._choose_loss(args, model), model, source)
                if config.reads_targets:
                    probe_targets(model, source)

        self._watch_visits(args, state, model, kwargs["train_dataloader"])

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        # The last thing that a run logs. A pruned hyper-parameter trial gets on_train_end without it.
        self._finished = self._finished or "train_runtime" in (logs or {})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._visits is not None:
            self._visits.stop()
            self._best_visits(args, state, unwrap_model(kwargs["model"]))
            self._visits.ended = True
        if state.is_hyper_param_search and not self._finished:
            return
        model = unwrap_model(kwargs["model"])
        try:
            with sync_errors("gathering"):  # nobody reads the files before they are written
                source = self._source(args, model, kwargs["train_dataloader"])
                loss = self._choose_loss(args, model)
                identity = identify_rows(model, source.dataset, args.output_dir)
                rows = _ROWS_OF_MODEL.get(model)
                forgotten = np.zeros(len(source), dtype=bool)
                if rows is not None and rows.forgotten is not None and len(rows.forgotten) == len(source):
                    forgotten = rows.forgotten
                config = self._resolved_config(args)
                self._memory = gather_without(model, source, identity, forgotten, loss, config, kwargs.get("optimizer"))
                self._memory.visits = self._counted(forgotten)
                if self.save and (args.should_save or self._memory.is_sharded):
                    self._memory.save(Path(args.output_dir or ".") / MEMORY_FOLDER)
            logger.info("Gathered a gradient memory: %s", dict(memory_summary(self._memory)))
        except Exception as error:  # whatever it is, the training that has just ended is not to be lost with it
            self.failure = error
            logger.error("Gathering failed after training; the model is unharmed. %s: %s", type(error).__name__, error)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._visits is not None:
            self._visits.epoch_begins()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._visits is not None:
            self._visits.epoch_ends(whole=not (control.should_training_stop or control.should_epoch_stop))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._visits is not None:  # float16 skips steps whose gradients overflow
            self._visits.step_ends(taken=not getattr(kwargs.get("optimizer"), "step_was_skipped", False))

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._visits is not None:
            self._visits.batch_ends()

    def _watch_visits(self, args: TrainingArguments, state: TrainerState, model: nn.Module, loader: Any) -> None:
        """Begin to count, or go on: after an out-of-memory error, a checkpoint, or an earlier run of the same model."""
        before, counted = self._visits, self._counted_rows
        if before is not None:
            before.stop()
        if counted is None or counted.model() is not model:
            before = None
        try:
            rows = len(loader.dataset)
        except TypeError:  # refused elsewhere
            self._visits = None
            return
        self._counted_rows = now = _CountedRows.of(model, loader.dataset)
        earlier, known, skipped = None, True, 0
        if state.global_step > 0 and not args.ignore_data_skip:
            steps = max(-(-len(loader) // args.gradient_accumulation_steps), 1)
            skipped = (state.global_step % steps) * args.gradient_accumulation_steps
        following = VisitCounter(rows, None, skipped)
        following.watch(loader)
        # auto_find_batch_size begins the loop again, with smaller batches and the weights as they are.
        smaller = before and not before.ended and (following.batch_size or 0) < (before.batch_size or 0)
        if state.global_step > 0 and not (args.auto_find_batch_size and smaller):
            folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            earlier = visits_before(folder, rows, model)
            known = earlier is not None
            if not known:
                logger.warning(
                    "How often rows were trained on before step %d is not known (%s has no %s, or is not the "
                    "checkpoint that training goes on from): all rows count as trained on.",
                    state.global_step,
                    folder,
                    VISITS_FILE,
                )
        elif before is not None and counted is not None:
            earlier = now.moved(before.own_counts(), counted)
            known = before.known and earlier is not None
            if earlier is None:
                logger.warning("This model was trained on other rows before: all rows count as trained on.")
        self._visits = following
        if earlier is not None:
            following.own_counts()[:] = earlier
        following.known &= known

    def _best_visits(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Where the best checkpoint was loaded at the end: the counts that belong to it."""
        best = state.best_model_checkpoint
        if self._visits is None or not args.load_best_model_at_end or best is None:
            return
        earlier = visits_before(Path(best), self._visits.rows, model)
        if earlier is None:
            logger.warning(
                "How often rows had been trained on in the best checkpoint is not known (%s has no %s of these "
                "weights): all rows count as trained on.",
                best,
                VISITS_FILE,
            )
        known = self._visits.known and earlier is not None
        self._visits = VisitCounter(self._visits.rows, earlier)
        self._visits.known = known

    def _counted(self, forgotten: np.ndarray) -> np.ndarray | None:
        """How often each of the rows that are gathered from was trained on; None where it is not known."""
        counts = None if self._visits is None else self._visits.counts()
        if counts is None or len(counts) not in (len(forgotten), int((~forgotten).sum())):
            return None
        if len(counts) == len(forgotten):
            return counts
        whole = np.zeros(len(forgotten), dtype=np.int32)
        whole[~forgotten] = counts
        return whole

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        rows = _ROWS_OF_MODEL.get(unwrap_model(kwargs["model"])) if kwargs.get("model") is not None else None
        folder = Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if self._visits is not None:
            self._visits.save(folder, unwrap_model(kwargs["model"]))
        if rows is not None and rows.count and args.should_save and folder.is_dir():
            (folder / _CHECKPOINT_NOTE).write_text(json.dumps({"rows": rows.count}), encoding="utf-8")

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        refuse_private_files(args.output_dir or ".", TRAINER_IGNORES)
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):  # uploaded as a whole
            refuse_private_files(Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def _resolved_config(self, args: TrainingArguments) -> GatherConfig:
        return self.config.resolved(mixed_precision_of(args), args.device)

    def _choose_loss(self, args: TrainingArguments, model: nn.Module) -> RowLoss:
        if self.row_loss is None and model in _ROW_LOSS_OF_MODEL:
            return _ROW_LOSS_OF_MODEL[model]
        return choose_row_loss(
            row_loss=self.row_loss, compute_loss_func=None, label_smoothing_factor=args.label_smoothing_factor
        )

    def _source(self, args: TrainingArguments, model: nn.Module, loader: Any) -> RowSource:
        dataset = self.dataset if self.dataset is not None else loader.dataset
        rows = _ROWS_OF_MODEL.get(model)
        if self.dataset is None and rows is not None and rows.forgotten is not None:
            dataset = rows.dataset
        if args.remove_unused_columns:  # else a loss or collator may use columns that the model does not take
            dataset = keep_input_columns(model, dataset, "training rows")
        return RowSource(
            dataset,
            loader.collate_fn,
            batch_size=self.config.batch_size or args.per_device_train_batch_size,
            device=args.device,
            name="training rows",
        )


class UnaskedIAUCallback(IAUCallback):
    """The callback that an `UnlearningTrainer` adds where none was given: what it cannot do, it says, and trains on."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As its base; what would be refused there is told once, and kept as `failure`."""
        try:
            super().on_train_begin(args, state, control, **kwargs)
        except Exception as error:  # whatever it is: nobody has asked for a memory
            self.failure = error
            logger.warning(
                "No gradient memory will be gathered after this training, so unlearn(method='iau') will have none: %s",
                error,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """As its base, unless that was given up when training began."""
        if self.failure is None:
            super().on_train_end(args, state, control, **kwargs)


def refuse_unsupported_engines(args: TrainingArguments) -> None:
    """Refuse training engines whose gradients or parameters this package does not read, before training starts."""
    refuse_trainer(args)
    refuse_device(args.device.type)
    if args.n_gpu > 1:
        raise UnsupportedModelError(
            f"The Trainer would use nn.DataParallel over n_gpu={args.n_gpu} devices in one process. Set "
            "CUDA_VISIBLE_DEVICES to one device, or launch one process a GPU with `accelerate launch`."
        )
    if getattr(args, "deepspeed", None):
        raise UnsupportedModelError("deepspeed=… is not supported: parameters and gradients are not visible. Use DDP.")
    variables = {name: os.environ.get(name, "") for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")}
    chosen = {name: value for name, value in variables.items() if value.lower() in ("1", "true", "yes", "on")}
    if getattr(args, "fsdp", None):
        chosen.pop("ACCELERATE_USE_FSDP", None)  # Accelerate sets it then
        settings = getattr(args, "fsdp_plugin_args", None) or {}
        if int(settings.get("fsdp_version", 1)) != 2 or (getattr(args, "fsdp_config", None) or {}).get("xla"):
            raise UnsupportedModelError(
                f"fsdp={args.fsdp!r} is not supported as it is set up: FSDP1 (and that of XLA) flattens parameters. "
                "Use FSDP2 (fsdp_config={'version': 2}), or DDP."
            )
    elif "ACCELERATE_USE_FSDP" in chosen and os.environ.get("FSDP_VERSION", "1") == "2":
        del chosen["ACCELERATE_USE_FSDP"]
    for variable, value in chosen.items():
        raise UnsupportedModelError(
            f"{variable}={value} is set, by `accelerate launch` or by hand, but neither DeepSpeed nor FSDP1 is "
            "supported. Launch with DDP (`accelerate launch --multi_gpu`) or with FSDP2 (`--use_fsdp "
            "--fsdp_version 2`)."
        )
