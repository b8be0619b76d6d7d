"""`UnlearningTrainer`: a Trainer that can also forget."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import Trainer

from hf_iau.errors import (
    AlreadyForgottenError,
    ConfigError,
    IAUError,
    MemoryFileError,
    MissingMemoryError,
    RequestError,
    UnsupportedModelError,
)
from hf_iau.forget import (
    ForgetContext,
    MethodOutcome,
    WeightTransaction,
    agree_on_request,
    first_order_rise,
    moved_gradient_sum,
    non_finite_parameter,
    settle_weights,
    step_norm,
    weights_norm,
)
from hf_iau.forget.request import remaining_positions
from hf_iau.gather import GatherConfig, IAUCallback
from hf_iau.gather.callback import announce_row_loss, refuse_unsupported_engines, unwrapped
from hf_iau.gather.gather import build_memory, choose_row_loss, count_labels, identify_rows
from hf_iau.gather.gradient_sum import trainable_parameters
from hf_iau.measure import Measurement, measure_model
from hf_iau.methods import find_method
from hf_iau.methods.base import UnlearningMethod
from hf_iau.objective import RowLoss, RowSource, probe_additivity
from hf_iau.objective.adapters import check_adapters
from hf_iau.objective.evaluation_mode import RandomState, placed_on
from hf_iau.objective.row_loss import TrainerRowLoss, UserLossFunction, describe_function
from hf_iau.objective.rows import refuse_iterable, row_bytes, rows_are_deterministic, select_rows
from hf_iau.objective.targets import look_for_real_labels
from hf_iau.objective.working import memory_device, working
from hf_iau.parallel import is_main_process, is_sharded, refuse_wrapped, together, whole_parameters
from hf_iau.phases import PhaseTimer
from hf_iau.publish.card import UnlearningCard, card_metadata, task_of_model
from hf_iau.publish.upload import hub_errors_explained
from hf_iau.remember import MEMORY_FOLDER, GradientMemory, RowIdentity, find_key, keyed_fingerprints
from hf_iau.remember.fingerprints import data_fingerprint, package_versions, weights_fingerprint
from hf_iau.remember.memory import MEMORY_HEADER, read_header, remove_memory
from hf_iau.remember.private import TRAINER_IGNORES, refuse_private_files
from hf_iau.report import UnlearningReport
from hf_iau.requests.budget import FEWEST_ROWS, record_budget
from hf_iau.requests.id_column import rows_of_ids
from hf_iau.requests.ledger import LedgerEntry
from hf_iau.requests.service import RequestService, finish_interrupted_request, report_of
from hf_iau.train.restriction import GradientRestriction, RestrictionConfig

logger = logging.getLogger(__name__)

# Rows that a report measures; their accuracy is then good to about one point.
_MEASURED_RETAINED_ROWS = 2000
_MEASURED_HELD_OUT_ROWS = 2000


@dataclass
class UnlearnOutput:
    """What `unlearn()` returns.

    Attributes:
        report: before, after and how; see `UnlearningReport`.
        applied: whether the weights were changed (False for an empty request, a dry run, and a request that was served
            before).
        memory: the memory of the changed model, or None where there was none.
        entry: the ledger's entry of a request with `save=True`.
    """

    report: UnlearningReport
    applied: bool
    memory: GradientMemory | None
    entry: LedgerEntry | None = None
    _undo: Callable[[], None] | None = None

    def revert(self) -> None:
        """Put the weights (bit for bit) and the memory back to what they were before the request.

        Raises:
            RequestError: nothing was applied, it was saved or reverted already, or the weights have moved since.
        """
        if self._undo is None:
            saved = " or was saved, which is final," if self.entry is not None else ""
            raise RequestError(f"revert(): this request changed nothing,{saved} or was reverted already.")
        self._undo()
        self._undo, self.applied = None, False


class UnlearningTrainer(Trainer):
    """A drop-in `Trainer` that can forget training rows.

    Args:
        *args, **kwargs: as for `transformers.Trainer`; add `callbacks=[IAUCallback()]` to gather a memory.
        row_loss: `row_loss(model, inputs)`, each row's loss or their sum, where the objective is neither the model's
            own loss nor `compute_loss_func=` nor an overridden `compute_loss` that honours `num_items_in_batch`.
        memory: a `GradientMemory` of the model as it is now, gathered earlier; default: the callback's, else the one
            below `args.output_dir`, if there is one.
        restriction: gradient restriction in training: a `RestrictionConfig`, or its mode "exact" or
            "finite-difference"; default: none.
        id_column: the column of `train_dataset` that says whose a row is, for `unlearn_by_id`.
    """

    def __init__(
        self,
        *args: Any,
        row_loss: UserLossFunction | RowLoss | None = None,
        memory: GradientMemory | None = None,
        restriction: RestrictionConfig | str | None = None,
        id_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.id_column = id_column
        self._given_row_loss = row_loss
        self._given_memory = memory
        self._memory_of_request: GradientMemory | None = None
        self._memory_ended = False
        self._forgotten: Counter[bytes] = Counter()
        self._forgotten_positions: tuple[int, ...] = ()
        self._unlearning_card: UnlearningCard | None = None
        self._given_restriction = restriction
        self._restriction_config: RestrictionConfig | None = None
        self._restriction: GradientRestriction | None = None
        super().__init__(*args, **kwargs)
        refuse_unsupported_engines(self.args)
        self.given_optimizer = self.optimizer is not None
        self.row_loss: RowLoss = self._choose_row_loss()
        self._restriction_config = self._choose_restriction()
        if self.model is not None:
            self._prepare_model(self.model)

    # --- training -------------------------------------------------------------------------------------------------

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in `Trainer`; the new model's callbacks learn which loss is trained."""
        model = super().call_model_init(trial)
        if hasattr(self, "row_loss"):
            self._prepare_model(model)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`. The memory of an earlier run no longer fits afterwards and is dropped here."""
        if self.model is not None and not self.is_fsdp_enabled and is_sharded(self.model):
            raise UnsupportedModelError(
                "The model's parameters are sharded by fully_shard (FSDP2) already, which the Trainer cannot train. Let "
                "Accelerate shard it (`accelerate launch --use_fsdp --fsdp_version 2`), or train with a loop of your own, "
                "gather with hf_iau.gather(model, rows), and use this trainer to unlearn()."
            )
        self._memory_of_request = None
        self._given_memory = None
        self._memory_ended = False
        self._forgotten = Counter()
        self._unlearning_card = UnlearningCard()
        restriction = self._choose_restriction()
        if restriction != self._restriction_config:  # a callback with restriction= was added or removed since
            self._restriction_config, self._restriction = restriction, None
            if self.model is not None:
                self._prepare_model(self.model)
        return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in `Trainer`, with gradient restriction where it was asked for."""
        if self._restriction is None:
            return super().training_step(model, inputs, num_items_in_batch=num_items_in_batch)
        return self._restricted_step(model, inputs, num_items_in_batch)

    def _restricted_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None
    ) -> Tensor:
        assert self._restriction is not None
        model.train()
        optimizer: Any = self.optimizer
        if hasattr(optimizer, "train") and callable(optimizer.train):
            optimizer.train()
        inputs = self._prepare_inputs(inputs)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None

        def compute_loss() -> Tensor:
            with self.compute_loss_context_manager():
                # A copy, for compute_loss takes the labels out of what it is given.
                loss: Any = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            return loss if scaled else loss / self.current_gradient_accumulation_steps

        return self._restriction.backward(model, compute_loss, self.accelerator.backward)

    @property
    def restriction_config(self) -> RestrictionConfig | None:
        """How gradients are restricted in training, or None."""
        return self._restriction_config

    def _choose_restriction(self) -> RestrictionConfig | None:
        callbacks = [cb.restriction for cb in self.callback_handler.callbacks if isinstance(cb, IAUCallback)]
        for asked in [self._given_restriction, *callbacks]:
            if asked is None:
                continue
            config = RestrictionConfig(mode=asked) if isinstance(asked, str) else asked  # type: ignore[arg-type]
            if not isinstance(config, RestrictionConfig):
                raise ConfigError(
                    f"restriction={asked!r}: give a RestrictionConfig, or one of 'none', 'exact', 'finite-difference'."
                )
            return None if config.mode == "none" else config
        return None

    def _prepare_model(self, model: nn.Module) -> None:
        announce_row_loss(unwrapped(model), self.row_loss)
        if self._restriction_config is not None:
            if self.args.optim in ("lomo", "adalomo"):
                raise ConfigError(
                    f"optim={self.args.optim!r} steps inside the backward pass: use another with restriction=."
                )
            self._restriction = GradientRestriction(
                self._restriction_config, model, mixed_precision=self.accelerator.mixed_precision
            )

    def _choose_row_loss(self) -> RowLoss:
        inherited = (Trainer.compute_loss, UnlearningTrainer.compute_loss)
        if self._given_row_loss is None and type(self).compute_loss not in inherited:
            return TrainerRowLoss(self)
        smoother = getattr(self, "label_smoother", None)
        return choose_row_loss(
            row_loss=self._given_row_loss,
            compute_loss_func=self.compute_loss_func,
            label_smoothing_factor=0.0 if smoother is None else self.args.label_smoothing_factor,
        )

    # --- memory ---------------------------------------------------------------------------------------------------

    @property
    def memory(self) -> GradientMemory | None:
        """The memory in force: after the last request, else the one given, gathered, or saved under `output_dir`.

        None after a request that made the weights anew (`method="retrain"`), until `gather()`.
        """
        if self._memory_ended:
            return None
        if self._memory_of_request is not None:
            return self._memory_of_request
        if self._given_memory is not None:
            return self._given_memory
        callback = self._gathering_callback()
        if callback is not None and (callback.has_memory or callback._failure is not None):
            return callback.memory
        folder = Path(self.args.output_dir or ".") / MEMORY_FOLDER
        finish_interrupted_request(self)
        if self._given_memory is None and (folder / "memory.json").is_file():
            self._given_memory = GradientMemory.load(folder)
        return self._given_memory

    def _adopt_memory_on_disk(self) -> None:
        """Take what lies below `output_dir` for the memory of the present weights, whatever was in force before."""
        folder = Path(self.args.output_dir or ".") / MEMORY_FOLDER
        found = (folder / "memory.json").is_file()
        self._given_memory = GradientMemory.load(folder) if found else None
        self._memory_of_request, self._memory_ended = None, not found
        self._forgotten, self._unlearning_card = Counter(), None

    def gather(self, config: GatherConfig | None = None, *, dataset: Any = None) -> GradientMemory:
        """Gather a memory now, at the model's present weights, from the training rows that were not forgotten.

        Args:
            config: what to gather; default: the callback's configuration, else `GatherConfig()`.
            dataset: the training rows without augmentation, when `train_dataset` is augmented at random.
        """
        callback = self._gathering_callback()
        config = config or (callback.config if callback is not None else GatherConfig())
        rows = dataset if dataset is not None else self.train_dataset
        if rows is None:
            raise RequestError("gather(): the trainer has no train_dataset. Give it one, or pass dataset=.")
        batch_size = config.batch_size or self.args.per_device_train_batch_size
        source = self._rows(rows, "training rows", batch_size)
        model = self._bare_model()
        identity = self._identity_of(model, source)
        kept = source
        if identity is not None and bool(identity.forgotten.any()):
            kept = source.select(np.flatnonzero(~identity.forgotten))
        elif self._forgotten:
            kept = source.select(positions := self._remaining(source))
            if identity is not None:
                identity = replace(identity, forgotten=~np.isin(np.arange(len(source)), positions))
        memory = build_memory(model, kept, self.row_loss, config, optimizer=self.optimizer)
        memory.row_identity = identity
        if len(kept) < len(source):
            # Row numbers still name rows of the whole training set.
            memory.data = data_fingerprint(model, source.dataset)
            with working(config.precision):
                memory.loss["probe"] = memory.probe_loss(model, self.row_loss, source)
            memory.forgotten_rows = len(source) - len(kept)
        self._memory_of_request, self._memory_ended = memory, False
        return memory

    def rebase(self, config: GatherConfig | None = None) -> GradientMemory:
        """Gather anew at the present weights, from the rows that were not forgotten, as the present memory was gathered.

        One bounded pass, after which the steps taken so far count no more; do it when a report advises it.

        Args:
            config: what to gather; default: the present memory's settings.

        Raises:
            MissingMemoryError: there is no memory, and no `config`.
        """
        memory = self.memory
        if config is None:
            if memory is None:
                raise MissingMemoryError("rebase(): there is no memory to gather anew: use gather().")
            try:
                config = GatherConfig(**memory.settings)
            except TypeError as error:
                raise ConfigError(
                    f"rebase(): the memory was gathered with settings that this version does not know ({error}): pass "
                    "config=GatherConfig(…)."
                ) from error
        return self.gather(config)

    def _remaining(self, source: RowSource) -> list[int]:
        return remaining_positions(source, self._forgotten, likely=self._forgotten_positions)

    def _identity_of(self, model: nn.Module, source: RowSource) -> RowIdentity | None:
        """The rows' identity in the memory of these weights, where that is of these rows; else a new one with a key."""
        with contextlib.suppress(MissingMemoryError, MemoryFileError):
            memory = self.memory
            known = None if memory is None else memory.row_identity
            if memory is not None and known is not None and memory.data == data_fingerprint(model, source.dataset):
                if memory.model["weights"] == weights_fingerprint(model):
                    return known
                if known.forgotten.any():
                    logger.warning(
                        "The memory that is there belongs to other weights; its %d forgotten rows are taken to have been "
                        "trained on again.",
                        int(known.forgotten.sum()),
                    )
        return identify_rows(model, source.dataset, self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; the memory that belongs to these weights is saved with them, under `_iau/`.

        Where a request has ended the memory, an old one that lies there is removed, for it is of other weights.
        Checkpoints (saved by the training loop itself) carry no memory. A model or memory that is spread over processes is
        saved by all of them together.
        """
        # Accelerate writes what it has sharded itself.
        alone = self.model is None or self.is_fsdp_enabled
        with contextlib.nullcontext() if alone else whole_parameters(self._bare_model()):
            super().save_model(output_dir, _internal_call)
        if not _internal_call and not self.is_in_train:
            folder = Path(output_dir or self.args.output_dir or ".") / MEMORY_FOLDER
            self._save_private_files(folder, self.args.should_save)

    def _save_private_files(self, folder: Path, write: bool) -> None:
        memory = self._memory_in_ram()
        memory = None if memory is None else memory.on_main_process()
        with whole_parameters(self._bare_model()):
            if write:
                self._write_private_files(folder, memory)

    def _write_private_files(self, folder: Path, memory: GradientMemory | None) -> None:
        if memory is not None:
            memory.save(folder)
        elif self._memory_ended and _memory_is_of_other_weights(folder, self._bare_model()):
            remove_memory(folder)
        if self._unlearning_card is not None:
            self._unlearning_card.save(folder, self._bare_model())

    def _memory_in_ram(self) -> GradientMemory | None:
        if self._memory_ended:
            return None
        callback = self._gathering_callback()
        gathered = callback.memory if callback is not None and callback.has_memory else None
        return self._memory_of_request or self._given_memory or gathered

    def _gathering_callback(self) -> IAUCallback | None:
        # Looked up each time: restoring callback states puts other objects into the handler.
        return next((cb for cb in self.callback_handler.callbacks if isinstance(cb, IAUCallback)), None)

    # --- forgetting -----------------------------------------------------------------------------------------------

    def unlearn(
        self,
        forget_dataset: Any = None,
        *,
        row_indices: Sequence[int] | np.ndarray | Tensor | None = None,
        method: str = "iau",
        config: Any = None,
        held_out_dataset: Any = None,
        retain_dataset: Any = None,
        test_dataset: Any = None,
        retrained_model: nn.Module | Sequence[nn.Module] | None = None,
        dry_run: bool = False,
        save: bool = False,
        request_id: str | None = None,
    ) -> UnlearnOutput:
        """Make the model forget training rows, and report how well it did.

        The update is applied whole or not at all: after any exception the weights are bit-identical to before.

        Args:
            forget_dataset: the rows to forget, e.g. `train_dataset.select(ids)`, with the training rows' columns.
            row_indices: instead, their numbers in `train_dataset`, which must be the set the memory was made of.
            method: "iau" (curvature-aware, calibrated), "iau-paper", "iau-released", or any registered name.
            config: the method's configuration; default: its class with default values.
            held_out_dataset: rows never trained on, for calibration and report; default: `eval_dataset`.
            retain_dataset: all rows to be kept, for methods that would otherwise need an exact gradient sum.
            test_dataset: rows never trained on that nothing but the report looks at.
            retrained_model: a model trained without the forget rows, for comparison only; of several, the first is
                the reference and the next gives the noise floor between two retrained models.
            dry_run: do everything, report, and put the weights back.
            save: write weights, memory and ledger into `output_dir` as one transaction: a crash leaves either the old
                ones or the new ones, and the same request run again is finished, or answered, but never served twice.
                Needs a key (`HF_IAU_KEY`). A saved request cannot be reverted.
            request_id: with `save=True`, your name for the request (kept only as a keyed hash); default: its rows.

        Returns:
            The report, `revert()`, and the memory that belongs to the new weights.

        Raises:
            RequestError: the request itself is at fault (rows out of range, repeated, without labels, ...).
            ConfigError: unknown method or wrong configuration.
            MemoryMismatchError: the memory belongs to another model, data or loss.
            MissingMemoryError: the method needs something that was not gathered.
            NonFiniteGradientError: a forget row's gradient is NaN or infinite.
            StorageError: with `save=True`, it could not be written; everything is as before.
        """
        chosen, config = find_method(method, config)
        models, model = _models(retrained_model), self._bare_model()

        def run(served: UnlearningMethod, keep: Callable[..., None] | None = None) -> UnlearnOutput:
            state = _random_state_kept(model)
            # Most methods are written for whole parameters.
            sharded = getattr(chosen, "works_on_shards", False) and is_sharded(model)
            whole = contextlib.nullcontext() if sharded else whole_parameters(model)
            with together("the request"), whole, state, self._working_as_gathered():
                return self._serve(
                    forget_dataset,
                    row_indices,
                    served,
                    config,
                    held_out_dataset,
                    retain_dataset,
                    test_dataset,
                    models,
                    dry_run,
                    keep,
                )

        if not save:
            if request_id is not None:
                raise RequestError("request_id= names a request in the ledger: give save=True with it.")
            return run(chosen)
        if dry_run:
            raise RequestError("save=True and dry_run=True contradict each other: leave one out.")
        service = RequestService(self)
        entry, output = service.serve(run, forget_dataset, row_indices, chosen, _plain(config), request_id)
        if output is None:
            assert entry is not None
            return UnlearnOutput(report_of(entry), applied=False, memory=self.memory, entry=entry)
        output.entry, output._undo = entry, None
        return output

    def unlearn_by_id(self, ids: Sequence[Any], **settings: Any) -> UnlearnOutput:
        """`unlearn` all rows of `train_dataset` whose `id_column` holds one of `ids`, as far as they are still in.

        With a key the memory knows which rows are out, without one only the trainer that served the requests does. Rows
        that are left out, and rows that may be out without this trainer knowing, are told in the report's warnings.

        Args:
            ids: values of that column, e.g. `["u17", "u23"]`.
            **settings: as for `unlearn`.

        Raises:
            RequestError: no `id_column`, or ids that no training row has.
            AlreadyForgottenError: all their rows are forgotten; with `save=True`, by other requests than this one.
        """
        positions = rows_of_ids(self.train_dataset, self.id_column, ids)
        still, notes = self._still_in(positions) if len(positions) else (positions, [])
        if len(positions) and not len(still):
            if settings.get("save"):
                entry = RequestService(self).answer(positions, settings.get("request_id"))
                if entry is not None:
                    return UnlearnOutput(report_of(entry), applied=False, memory=self.memory, entry=entry)
            raise AlreadyForgottenError(
                f"All {len(positions)} rows of these ids were already forgotten by an earlier request: there is nothing "
                "left to do."
            )
        output = self.unlearn(row_indices=still, **settings)
        output.report.warnings += notes
        if is_main_process():
            for sentence in notes:
                logger.warning(sentence)
        return output

    def _still_in(self, positions: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Those of the training rows at `positions` that no request took out, and what is to be said about the others."""
        memory, key = self.memory, find_key(self.args.output_dir)
        identity = None if memory is None else memory.row_identity
        notes = []
        if identity is not None and key is not None:
            identity.check_key(key)
            asked = keyed_fingerprints(key, self._bare_model(), select_rows(self.train_dataset, positions))
            still = positions[identity.still_in(asked)]
        else:
            still = positions
            if self._forgotten:
                source = self._rows(self.train_dataset, "training rows", self.args.per_device_train_batch_size)
                still = positions[np.isin(positions, self._remaining(source))]
            unknown = 0 if memory is None else memory.forgotten_rows - self._forgotten.total()
            if unknown > 0:
                notes.append(
                    f"{unknown} rows were forgotten before this trainer was made, and the memory, which was gathered "
                    "without a key (HF_IAU_KEY), does not know which: rows of these ids that are among them were "
                    "forgotten a second time. Then revert() it, and name the others by row_indices=."
                )
        if len(still) < len(positions):
            notes.append(
                f"{len(positions) - len(still)} of the {len(positions)} rows of these ids were forgotten by an earlier "
                f"request: this one is of the other {len(still)}."
            )
        return still, notes

    def queue(
        self, forget_dataset: Any = None, *, row_indices: Sequence[int] | None = None, ids: Any = None, **settings: Any
    ) -> UnlearnOutput | None:
        """Have rows forgotten together with others: they wait on disk until there are 16, and are then served at once.

        Small requests are better batched, for two versions of the weights differ by an image of the rows. Needs a key
        and a memory that was gathered with it. What waits is kept as keyed fingerprints alone; rows
        that wait already are not queued again.

        Args:
            forget_dataset, row_indices: as for `unlearn`.
            ids: instead, values of `id_column`.
            **settings: as for `unlearn`, for the case that the rows are served now.

        Returns:
            What `unlearn(save=True)` returned, or None where the rows wait.
        """
        if ids is not None:
            if forget_dataset is not None or row_indices is not None:
                raise RequestError("queue() was given ids= and other rows: pass one of them.")
            row_indices = rows_of_ids(self.train_dataset, self.id_column, ids)  # type: ignore[assignment]
        waiting = RequestService(self).enqueue(forget_dataset, row_indices)
        return self.serve_queue(**settings) if waiting >= FEWEST_ROWS else None

    def serve_queue(self, **settings: Any) -> UnlearnOutput | None:
        """Serve the rows that wait, however few, with `unlearn(save=True)`; None where none wait."""
        positions = RequestService(self).queued_positions()
        return self.unlearn(row_indices=positions, save=True, **settings) if len(positions) else None

    def _serve(
        self,
        forget_dataset: Any,
        row_indices: Any,
        method: UnlearningMethod,
        config: Any,
        held_out_dataset: Any,
        retain_dataset: Any,
        test_dataset: Any,
        retrained_models: list[nn.Module],
        dry_run: bool,
        keep: Callable[..., None] | None = None,
    ) -> UnlearnOutput:
        timer = PhaseTimer(self.args.device)
        with timer.phase("check"):
            forget_rows, positions = self._resolve_request(forget_dataset, row_indices)
            if len(forget_rows) == 0:
                return self._nothing_to_forget(method, config)
            context = self._context(forget_rows, positions, held_out_dataset, retain_dataset, timer)
            test = self._optional_rows(test_dataset, "test rows")
            for others in (context.retain, context.held_out, test):
                self._check_same_columns(others, context.forget)
            method.check(context, config)
            self._check_loss(context)
            agree_on_request(context, method.name, _plain(config))
        model = context.model
        card = self.unlearning_card  # read while the weights are those that it describes
        with timer.phase("measure_before"):
            retained = context.retained_sample(_MEASURED_RETAINED_ROWS, self.args.seed)
            if retained is not None:
                retained = retained.resized(self.args.per_device_eval_batch_size)
            measured, held_out = context.forget_to_predict, context.held_out_sample(_MEASURED_HELD_OUT_ROWS)
            splits = (measured, retained, held_out, test)
            before = measure_model(model, *splits)
            context.predicted[measured] = before.forget
            if held_out is not None and before.held_out is not None:
                context.predicted[held_out] = before.held_out
        only_trained = getattr(method, "moves_only_trained", False)
        transaction = WeightTransaction(model, memory_device(None), only_trained=only_trained)
        context.weights = transaction.copies
        undo: Callable[[], None] | None = None
        with transaction:
            with together("the update"):  # what fails in one process is rolled back in all
                outcome = method.run(context, config)
                settle_weights(model, transaction)
                memory, diagnostics = self._after(context, outcome, transaction)
                with timer.phase("measure_after"):
                    after = measure_model(model, *splits)
                report = self._report(
                    method, config, context, outcome, diagnostics, before, after, splits, retrained_models
                )
                record_budget(report, context, memory)
            if dry_run:
                transaction.rollback()
            else:
                card = card.with_report(report)
                if keep is not None:
                    kept = memory.on_main_process() if memory is not None else None
                    with whole_parameters(model):  # to be written
                        keep(context, kept, report, card)
                undo = self._commit(transaction, context, memory, card)
        if dry_run:
            return UnlearnOutput(report, applied=False, memory=self.memory)
        if is_main_process():
            for sentence in report.warnings:
                logger.warning(sentence)
        return UnlearnOutput(report, applied=True, memory=memory, _undo=undo)

    def _working_as_gathered(self) -> contextlib.AbstractContextManager[None]:
        """The precision and memory device of the memory in force."""
        try:
            memory = self.memory
        except IAUError:  # raised again where the request is checked
            memory = None
        settings = {} if memory is None else memory.settings
        return working(settings.get("precision"), settings.get("memory_device"))

    def _bare_model(self) -> nn.Module:
        return unwrapped(self.accelerator.unwrap_model(self.model))

    def _rows(self, dataset: Any, name: str, batch_size: int) -> RowSource:
        refuse_iterable(dataset, name)
        dataset = _selected(dataset)
        collator = self.data_collator
        custom = isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom"
        if isinstance(dataset, datasets.Dataset) and not custom:
            try:
                dataset = self._remove_unused_columns(dataset, description=name)
            except ValueError as error:
                raise RequestError(
                    f"The {name} have columns {dataset.column_names}, none of which the model takes. Preprocess them "
                    "like the training rows."
                ) from error
        else:
            collator = self._get_collator_with_removed_columns(collator, description=name)
        return RowSource(
            dataset,
            collator,
            batch_size=batch_size,
            device=self.args.device,
            name=name,
            num_workers=self.args.dataloader_num_workers,
        )

    def _optional_rows(self, dataset: Any, name: str) -> RowSource | None:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            if len(dataset) != 1:
                raise RequestError(
                    f"The {name} are a dictionary of {len(dataset)} data sets ({', '.join(dataset)}): name one, e.g. "
                    f"held_out_dataset=eval_dataset[{next(iter(dataset), 'name')!r}]."
                )
            dataset = next(iter(dataset.values()))
        source = self._rows(dataset, name, self.args.per_device_eval_batch_size)
        return source if len(source) else None

    def _resolve_request(self, forget_dataset: Any, row_indices: Any) -> tuple[Any, np.ndarray | None]:
        """The forget rows and, where they were named by number, their positions in `train_dataset`."""
        if (forget_dataset is None) == (row_indices is None):
            given = "neither" if forget_dataset is None else "both"
            raise RequestError(f"unlearn() was given {given}: pass either forget_dataset= or row_indices=.")
        if forget_dataset is not None:
            refuse_iterable(forget_dataset, "forget rows")
            return forget_dataset, None
        if self.train_dataset is None:
            raise RequestError(
                "row_indices= name rows of train_dataset, but the trainer has none: pass forget_dataset=."
            )
        refuse_iterable(self.train_dataset, "training rows")
        return _checked_positions(self.train_dataset, row_indices)

    def _context(
        self,
        forget_rows: Any,
        positions: np.ndarray | None,
        held_out_dataset: Any,
        retain_dataset: Any,
        timer: PhaseTimer,
    ) -> ForgetContext:
        args = self.args
        for wrapped in (self.model, self.model_wrapped):
            if wrapped is not None:  # a compiled model has no truth value
                refuse_wrapped(wrapped)
        model = self._bare_model()
        check_adapters(model)
        train = None
        if self.train_dataset is not None:
            refuse_iterable(self.train_dataset, "training rows")
            train = self._rows(self.train_dataset, "training rows", args.per_device_train_batch_size)
            if not rows_are_deterministic(train.dataset):
                train = None
        forget = self._rows(forget_rows, "forget rows", args.per_device_train_batch_size)
        _refuse_random_rows(forget)
        self._check_columns(forget)
        look_for_real_labels(model, forget.dataset if train is None else train.dataset)
        memory = self.memory
        if memory is not None:
            memory = memory.spread_like(model) if is_sharded(model) else memory.whole()
            memory.check_model(model)
            memory.check_loss(self.row_loss)
            if positions is not None and train is not None:
                memory.check_data(model, train.dataset)
        trainable_parameters(model, None if memory is None else list(memory.parameters))
        known = (
            memory.n_rows if memory is not None else len(train) - self._forgotten.total() if train is not None else None
        )
        if known is not None and len(forget) >= known:
            raise RequestError(
                f"The request is to forget {len(forget)} of {known} training rows, that is all of them: nothing would "
                "be left to keep. Start again from the pretrained weights instead."
            )
        digests = Counter(row_bytes(forget.dataset[i]) for i in range(len(forget)))
        _refuse_repeated_rows(forget, digests, train)
        fingerprints = self._fingerprints(model, memory, forget)
        self._recall_forgotten(model, memory, train)
        excluded = set(digests)
        again = _forgotten_before(digests, self._forgotten, train)
        if again:
            raise AlreadyForgottenError(
                f"{again} of the {len(forget)} rows were already forgotten by an earlier request to this trainer: "
                "leave them out."
            )
        retain = None
        if retain_dataset is not None:
            retain = self._rows(retain_dataset, "retained rows", args.per_device_train_batch_size)
            if len(retain) == 0:
                raise RequestError("retain_dataset is empty: pass the rows to be kept, or leave it out.")
            _refuse_random_rows(retain)
            # A kept duplicate of a forget row is no mistake, as long as the two sets can be disjoint.
            if known is None or len(retain) + len(forget) > known:
                shared = sum(row_bytes(retain.dataset[i]) in excluded for i in range(len(retain)))
                if shared:
                    raise RequestError(
                        f"retain_dataset has {len(retain)} rows, {shared} of which are forget rows: pass only the rows "
                        "to be kept, e.g. train_dataset.select(the other ids)."
                    )
        held_out = self._optional_rows(
            held_out_dataset if held_out_dataset is not None else self.eval_dataset, "held-out rows"
        )
        return ForgetContext(
            model=model,
            row_loss=self.row_loss,
            forget=forget,
            memory=memory,
            train=train,
            forget_positions=positions,
            retain=retain,
            held_out=held_out,
            excluded=excluded | set(self._forgotten),
            digests=digests,
            fingerprints=fingerprints,
            forgotten=self._forgotten,
            forgotten_positions=self._forgotten_positions,
            trainer=self,
            label_counts=count_labels(forget.dataset),
            seed=args.seed,
            progress=not args.disable_tqdm,
            timer=timer,
        )

    def _fingerprints(self, model: nn.Module, memory: GradientMemory | None, forget: RowSource) -> np.ndarray | None:
        """Keyed fingerprints of the forget rows, checked against the memory's; None without a key."""
        key = find_key(self.args.output_dir)
        identity = None if memory is None else memory.row_identity
        if key is None:
            if identity is not None:
                raise ConfigError(
                    f"The memory holds row fingerprints made with key {identity.key_check}, and neither HF_IAU_KEY nor "
                    "HF_IAU_KEY_FILE is set: set the key, or gather anew without one."
                )
            return None
        fingerprints = keyed_fingerprints(key, model, forget.dataset)
        if identity is not None:
            identity.check_key(key)
            identity.check_request(fingerprints)
        return fingerprints

    def _recall_forgotten(self, model: nn.Module, memory: GradientMemory | None, train: RowSource | None) -> None:
        """In a fresh process: learn from the memory which training rows earlier requests took out."""
        identity = None if memory is None else memory.row_identity
        if memory is None or identity is None or train is None or self._forgotten or not identity.forgotten.any():
            return
        if memory.data == data_fingerprint(model, train.dataset):
            gone = np.flatnonzero(identity.forgotten).tolist()
            self._forgotten = Counter(row_bytes(train.dataset[i]) for i in gone)
            self._forgotten_positions = tuple(gone)

    def _check_columns(self, forget: RowSource) -> None:
        """Refuse forget rows that lack labels or columns of the training rows, or that are collated at random."""
        row = forget.dataset[0]
        # Read anew each time, for a collator may change the rows that it is given.
        batch, again = (dict(forget.collator([forget.dataset[0]])) for _ in range(2))
        if row_bytes(batch) != row_bytes(again):
            raise UnsupportedModelError(
                f"data_collator={type(self.data_collator).__name__} collates the same row differently each time (random "
                "masking or augmentation), so a row has no one gradient. Use a collator without randomness."
            )
        # Looked for in the batch, for the collator may make the labels, as those of language models do.
        if "labels" not in batch:
            columns = sorted(row) if isinstance(row, Mapping) else sorted(batch)
            others = sorted(set(self.label_names) & set(batch))
            if others:
                raise UnsupportedModelError(
                    f"The forget rows have label columns {others} and no `labels`: question answering and other tasks "
                    "with label columns of their own are not supported. Rename the column `labels` where it is one."
                )
            raise RequestError(
                f"The forget rows have columns {columns} and no labels, so they have no loss to unlearn. Pass rows "
                "as they were trained on, e.g. train_dataset.select(ids)."
            )
        if not isinstance(row, Mapping):
            return
        if self.train_dataset is None or len(self.train_dataset) == 0:  # type: ignore[arg-type]
            return
        trained = self._rows(self.train_dataset, "training rows", 1).dataset[0]
        if isinstance(trained, Mapping) and set(trained) != set(row):
            raise RequestError(
                f"The forget rows have columns {sorted(row)} but the training rows have {sorted(trained)}. Preprocess "
                "them alike, e.g. train_dataset.select(ids)."
            )

    def _check_same_columns(self, source: RowSource | None, forget: RowSource) -> None:
        """Refuse rows beside the forget rows that lack one of their columns."""
        if source is None:
            return
        row, known = source.dataset[0], forget.dataset[0]
        if not isinstance(row, Mapping) or not isinstance(known, Mapping):
            return
        needed = set(known)
        if self.args.remove_unused_columns:
            self._set_signature_columns_if_needed()
            needed &= set(self._signature_columns or ())
        if not needed <= set(row):
            raise RequestError(
                f"The {source.name} have columns {sorted(row)} but the forget rows have {sorted(known)}. Preprocess "
                "them alike."
            )

    def _check_loss(self, context: ForgetContext) -> None:
        """A look at the loss of a few rows: is it a sum over rows, and the one that the memory was made with?"""
        memory, train = context.memory, context.train
        if memory is None:
            probe_additivity(self.row_loss, context.model, context.forget)
        elif train is not None and (
            context.forget_positions is not None or memory.data == data_fingerprint(context.model, train.dataset)
        ):
            memory.check_probe(context.model, self.row_loss, train)

    def _after(
        self, context: ForgetContext, outcome: MethodOutcome, transaction: WeightTransaction
    ) -> tuple[GradientMemory | None, dict[str, Any]]:
        """The memory that belongs to the moved weights, and figures about the move."""
        memory = outcome.memory or context.memory
        names = (
            list(memory.parameters)
            if memory is not None
            else [name for name, parameter in context.model.named_parameters() if parameter.requires_grad]
        )
        with context.timer.phase("remember"):
            bad = non_finite_parameter(context.model)
            if bad is not None:
                raise RequestError(
                    f"The update made {bad!r} non-finite, so it was not applied. Take a shorter step (smaller eta, lr or "
                    "length)."
                )
            move = transaction.moved(names)
            length = step_norm(move)
            relative = length / max(weights_norm(context.model, names), 1e-30)
            diagnostics = {"step_norm": length, "relative_step_norm": relative, **outcome.diagnostics}
            if memory is None or not outcome.keeps_memory:
                return None, diagnostics
            rows, targets = len(context.forget), outcome.forget_targets
            if targets is None:
                targets = context.count_forget_targets()
            if outcome.forget_sum is not None:
                diagnostics["forecast_forget_loss_rise"] = first_order_rise(outcome.forget_sum, move, targets)
            moved_sum = None
            if memory.gradient_sum is not None and memory.curvature is not None and outcome.forget_sum is not None:
                moved_sum = moved_gradient_sum(
                    memory.gradient_sum, outcome.forget_sum, memory.curvature, move, memory.n_targets - targets
                )
            outcome.forget_sum = None  # as large as the weights, and not needed any more
            newer = memory.after_step(
                context.model,
                rows=rows,
                targets=targets,
                relative_step=relative,
                gradient_sum=moved_sum,
                label_counts=context.label_counts,
            )
            if outcome.calibration is not None:
                newer.calibration = outcome.calibration
            if newer.row_identity is not None and context.fingerprints is not None:
                newer.row_identity = newer.row_identity.without(context.fingerprints, context.forget_positions)
        return newer, diagnostics

    def _commit(
        self,
        transaction: WeightTransaction,
        context: ForgetContext,
        memory: GradientMemory | None,
        card: UnlearningCard,
    ) -> Callable[[], None]:
        earlier = self._memory_of_request, self._memory_ended, self._forgotten, self._unlearning_card
        revert_weights = transaction.commit()
        self._memory_of_request = memory
        if memory is None:  # whatever lies below output_dir, or the callback holds, is of other weights
            self._memory_ended = True
        self._forgotten = self._forgotten + context.digests
        if context.forget_positions is not None:
            self._forgotten_positions += tuple(context.forget_positions.tolist())
        self._unlearning_card = card
        model = context.model  # and nothing else of the context, which holds batches

        on_shards = is_sharded(context.model)

        def undo() -> None:
            with contextlib.nullcontext() if on_shards else whole_parameters(model):
                revert_weights()
            self._memory_of_request, self._memory_ended, self._forgotten, self._unlearning_card = earlier

        return undo

    # --- publishing -----------------------------------------------------------------------------------------------

    @property
    def unlearning_card(self) -> UnlearningCard:
        """What the model card tells of the requests served so far, also by earlier processes: counts and means only."""
        if self._unlearning_card is None:
            folder = Path(self.args.output_dir or ".") / MEMORY_FOLDER
            self._unlearning_card = UnlearningCard.of_weights(folder, self._bare_model())
        return self._unlearning_card

    @unlearning_card.setter
    def unlearning_card(self, card: UnlearningCard) -> None:
        self._unlearning_card = card

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; once a request was served the card has a section on unlearning, its figures and tags."""
        path = Path(self.args.output_dir or ".") / "README.md"
        earlier = card_metadata(path)
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self.unlearning_card.complete(path, task=task_of_model(self._bare_model()), earlier=earlier)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`.

        Raises:
            PublishError: no token, no access, or no connection.
        """
        with hub_errors_explained(self._repository()):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`: weights, configuration and the model card are uploaded, `_iau/` is not.

        The memory that belongs to the weights is saved beside them first. Earlier revisions of the repository keep the
        forgotten rows; see docs/publishing.md for how to take them away before.

        Raises:
            PublishError: no token, no access, no connection, or a memory lies where it would be uploaded.
        """
        if self.is_world_process_zero():
            refuse_private_files(self.args.output_dir or ".", TRAINER_IGNORES)
        self._save_private_files(Path(self.args.output_dir or ".") / MEMORY_FOLDER, self.is_world_process_zero())
        with hub_errors_explained(self._repository()):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, which uploads whole checkpoint folders with `hub_strategy="checkpoint"`."""
        refuse_private_files(self.args.output_dir or ".", TRAINER_IGNORES)
        refuse_private_files(checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _repository(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir or ".").absolute().name

    # --- reporting ------------------------------------------------------------------------------------------------

    def _nothing_to_forget(self, method: UnlearningMethod, config: Any) -> UnlearnOutput:
        sentence = "The request names no rows: nothing was forgotten and no weight was changed."
        warnings.warn(sentence, stacklevel=4)
        report = UnlearningReport(
            method=method.name,
            config=_plain(config),
            seed=self.args.seed,
            counts={"forget_rows": 0},
            before={},
            after={},
            warnings=[sentence],
            versions=package_versions(),
        )
        return UnlearnOutput(report, applied=False, memory=self._memory_in_ram())

    def _report(
        self,
        method: UnlearningMethod,
        config: Any,
        context: ForgetContext,
        outcome: MethodOutcome,
        diagnostics: dict[str, Any],
        before: Measurement,
        after: Measurement,
        splits: tuple[RowSource, RowSource | None, RowSource | None, RowSource | None],
        retrained_models: list[nn.Module],
    ) -> UnlearningReport:
        retrained = []
        if retrained_models:
            with context.timer.phase("measure_retrained"):
                for given in retrained_models:
                    with placed_on(unwrapped(given), self.args.device) as model:
                        retrained.append(measure_model(model, *splits))
        memory = context.memory
        known = memory.n_rows if memory is not None else len(context.train) if context.train is not None else None
        counts = {"train_rows": known}
        return UnlearningReport.build(
            method=method.name,
            config=_plain(config),
            seed=self.args.seed,
            counts=counts,
            before=before,
            after=after,
            retrained=retrained[0] if retrained else None,
            second_retrained=retrained[1] if len(retrained) > 1 else None,
            seconds=context.timer.seconds,
            peak_memory_bytes=context.timer.peak_memory_bytes,
            diagnostics=diagnostics,
            warnings=outcome.warnings,
            verdict=outcome.verdict,
            calibrated=outcome.calibrated,
        )


def _checked_positions(train_dataset: Any, row_indices: Any) -> tuple[Any, np.ndarray]:
    """The rows of `train_dataset` that `row_indices` name, after checking every number."""
    positions = np.asarray(row_indices.cpu() if isinstance(row_indices, Tensor) else row_indices)
    if positions.size == 0:
        return select_rows(train_dataset, []), np.zeros(0, dtype=np.int64)
    if positions.ndim != 1 or positions.dtype.kind not in "iu":
        raise RequestError(
            f"row_indices has shape {positions.shape} and type {positions.dtype}: give a flat list of whole numbers."
        )
    n_rows = len(train_dataset)
    outside = positions[(positions < 0) | (positions >= n_rows)]
    if outside.size:
        raise RequestError(
            f"row_indices holds {outside.size} numbers outside 0..{n_rows - 1}, e.g. {int(outside[0])}: train_dataset "
            f"has {n_rows} rows."
        )
    values, counts = np.unique(positions, return_counts=True)
    if (counts > 1).any():
        raise RequestError(
            f"row_indices names {int((counts > 1).sum())} rows more than once, e.g. row {int(values[counts > 1][0])}: "
            "name each row once."
        )
    return select_rows(train_dataset, positions), positions.astype(np.int64)


def _memory_is_of_other_weights(folder: Path, model: nn.Module) -> bool:
    try:
        return bool(read_header(folder / MEMORY_HEADER)["model"]["weights"] != weights_fingerprint(model))
    except (IAUError, KeyError, TypeError):  # none, half of one, or one that cannot be read
        return True


def _selected(dataset: Any) -> Any:
    """A `Subset` of a `datasets.Dataset` as a `datasets.Dataset`, so that its unused columns can be removed."""
    if not isinstance(dataset, Subset):
        return dataset
    whole = _selected(dataset.dataset)
    return select_rows(whole, list(dataset.indices)) if isinstance(whole, datasets.Dataset) else dataset


def _refuse_random_rows(source: RowSource) -> None:
    if not rows_are_deterministic(source.dataset):
        raise UnsupportedModelError(
            f"The {source.name} change each time they are read (random augmentation in `set_transform` or "
            "`__getitem__`), so a row has no one gradient. Pass the same rows without augmentation."
        )


def _refuse_repeated_rows(forget: RowSource, digests: Counter[bytes], train: RowSource | None) -> None:
    """Refuse a row that the request holds more often than the training set does."""
    repeated = {digest: count for digest, count in digests.items() if count > 1}
    if isinstance(forget.dataset, Subset):
        numbers = [int(i) for i in forget.dataset.indices]
        twice = [number for number, count in Counter(numbers).items() if count > 1]
        if twice:
            raise RequestError(f"forget_dataset names row {twice[0]} more than once: name each row once.")
    if not repeated or train is None:
        return
    trained = Counter(d for i in range(len(train)) if (d := row_bytes(train.dataset[i])) in repeated)
    for digest, count in repeated.items():
        if count > trained[digest]:
            position = next(i for i in range(len(forget)) if row_bytes(forget.dataset[i]) == digest)
            raise RequestError(
                f"forget_dataset holds the row at position {position} {count} times but train_dataset only "
                f"{trained[digest]} times: name each row once."
            )


def _forgotten_before(digests: Counter[bytes], forgotten: Counter[bytes], train: RowSource | None) -> int:
    """How many rows of a request were forgotten earlier; a further copy of a forgotten row is not among them."""
    known = set(digests) & set(forgotten)
    if not known or train is None:
        return len(known)
    trained = Counter(d for i in range(len(train)) if (d := row_bytes(train.dataset[i])) in known)
    return sum(digests[digest] + forgotten[digest] > trained[digest] for digest in known)


def _models(retrained_model: Any) -> list[nn.Module]:
    """`retrained_model=` as a list, after checking that it holds models."""
    if retrained_model is None:
        return []
    models: list[Any] = [retrained_model] if isinstance(retrained_model, (nn.Module, str)) else list(retrained_model)
    for model in models:
        if not isinstance(model, nn.Module):
            raise RequestError(
                f"retrained_model={model!r} is a {type(model).__name__}: give a model (or two), e.g. "
                "AutoModelForSequenceClassification.from_pretrained(path)."
            )
    return models


@contextlib.contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Data sets and collators may draw numbers; afterwards every generator is where it was."""
    state = RandomState(model)
    try:
        yield
    finally:
        state.restore()


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as a mapping, with functions by name: their `repr` is another in each process."""
    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else {}
    return {name: describe_function(v)["function"] if callable(v) else v for name, v in values.items()}


__all__ = ["ConfigError", "MissingMemoryError", "UnlearnOutput", "UnlearningTrainer"]
