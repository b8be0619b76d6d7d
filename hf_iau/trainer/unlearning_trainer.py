"""`UnlearningTrainer`: a Trainer that can also forget."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_iau.data import RowLoss
from hf_iau.data.row_loss import TrainerRowLoss, UserLossFunction
from hf_iau.data.rows import refuse_iterable, select_rows
from hf_iau.data.trainer_rows import model_of, trainer_rows
from hf_iau.data.validation import refuse_inference_mode
from hf_iau.distributed import full_parameters, is_main_process, is_sharded
from hf_iau.distributed.wrappers import unwrap_model
from hf_iau.errors import (
    ConfigError,
    MemoryFileError,
    MemoryMismatchError,
    MissingMemoryError,
    RequestError,
    UnsupportedModelError,
)
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.gathering import choose_row_loss, forgotten_before
from hf_iau.memory.keys import find_key
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.memory_files import MEMORY_FOLDER, MEMORY_HEADER
from hf_iau.memory.private_files import TRAINER_IGNORES, refuse_private_files
from hf_iau.methods.base import find_method
from hf_iau.report.card import UnlearningCard, card_metadata, task_of_model
from hf_iau.trainer.callback import (
    IAUCallback,
    UnaskedIAUCallback,
    announce_row_loss,
    announce_training_rows,
    refuse_unsupported_engines,
    rows_forgotten_by,
)
from hf_iau.trainer.regather import gather_remaining, remaining_rows
from hf_iau.trainer.restriction import GradientRestriction, RestrictionConfig
from hf_iau.trainer.row_numbers import row_numbers_carried
from hf_iau.trainer.saving import (
    forgotten_by_ledger,
    refuse_stale,
    rows_forgotten_on_disk,
    save_private_files,
    weights_on_disk,
)
from hf_iau.trainer.tracking import figures_to_log, without_printing
from hf_iau.trainer.upload import hub_errors_explained
from hf_iau.unlearn.output import UnlearnOutput
from hf_iau.unlearn.record import Commit
from hf_iau.unlearn.rows import TrainingRows
from hf_iau.unlearn.run import REASONS, Request, checked_models, run_request
from hf_iau.unlearn.state import UnlearningState
from hf_iau.unlearn.unfinished import refuse_unfinished
from hf_iau.unlearn.view import TrainerView

logger = logging.getLogger(__name__)

# Not in the trainer itself, which some searches of hyper-parameters pickle.
_LOCKS: weakref.WeakKeyDictionary[Trainer, threading.RLock] = weakref.WeakKeyDictionary()


class UnlearningTrainer(Trainer):
    """A drop-in `Trainer` that can forget training rows.

    Args:
        *args, **kwargs: as for `transformers.Trainer`. Without an `IAUCallback` among `callbacks=` one with the default
            `GatherConfig` is added; `remove_callback(IAUCallback)` trains without gathering.
        row_loss: `row_loss(model, inputs)`, each row's loss or their sum, where the objective is neither the model's
            own loss nor `compute_loss_func=` nor an overridden `compute_loss` that honours `num_items_in_batch`.
        memory: a `GradientMemory` of the model as it is now, gathered earlier; default: the callback's, else the one
            below `args.output_dir`, if there is one.
        restriction: gradient restriction in training: a `RestrictionConfig`, or its mode "exact" or
            "finite-difference"; default: none.

    Raises:
        ConfigError: `restriction` is none of these.
        UnsupportedModelError: a training engine or device whose gradients cannot be read (DeepSpeed, FSDP1, ...).

    Examples:
        >>> import datasets, tempfile
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from hf_iau import UnlearningTrainer
        >>> def rows(numbers):
        ...     tokens = [[2 + number % 11, 2 + number % 7, 2 + number % 5] for number in numbers]
        ...     return datasets.Dataset.from_dict({"input_ids": tokens, "labels": [t[0] % 2 for t in tokens]})
        >>> train, held_out = rows(range(64)), rows(range(64, 164))
        >>> sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=13, max_position_embeddings=8, **sizes))
        >>> folder = tempfile.mkdtemp()
        >>> args = TrainingArguments(folder, num_train_epochs=1, report_to="none", disable_tqdm=True, use_cpu=True)
        >>> trainer = UnlearningTrainer(model=model, args=args, train_dataset=train, eval_dataset=held_out)
        >>> output = trainer.train()
        {'train_runtime': ...}
        >>> trainer.memory.n_rows
        64
    """

    def __init__(
        self,
        *args: Any,
        row_loss: UserLossFunction | RowLoss | None = None,
        memory: GradientMemory | None = None,
        restriction: RestrictionConfig | str | None = None,
        **kwargs: Any,
    ) -> None:
        self.unlearning_state = UnlearningState(given=memory)
        self._given_row_loss = row_loss
        self._restriction_config = _restriction_config(restriction)
        self._restriction: GradientRestriction | None = None
        self._rows_left: tuple[Any, np.ndarray | None, int] | None = None
        with row_numbers_carried(self, UnlearningTrainer, args, kwargs) as carried:
            super().__init__(*carried.args, **carried.kwargs)
        self._given_rows = carried.rows
        self._note_what_is_on_disk()
        if self._gathering_callback() is None:
            self.add_callback(UnaskedIAUCallback())
        refuse_unsupported_engines(self.args)
        self.given_optimizer = self.optimizer is not None
        self.row_loss: RowLoss = self._choose_row_loss()
        if self.model is not None:
            self._prepare_model(self.model)

    # --- training -------------------------------------------------------------------------------------------------

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in `Trainer`; the new model's callbacks learn which loss is trained."""
        model = super().call_model_init(trial)
        if hasattr(self, "row_loss"):
            self._prepare_model(model)
        if self._rows_left is not None:
            announce_training_rows(unwrap_model(model), *self._rows_left)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`. The memory of an earlier run no longer fits afterwards and is dropped here.

        Rows that were forgotten are left out, also where another process served the request and the memory below
        `output_dir` knows which they were.

        Raises:
            RequestError: it is not known which rows were forgotten, they cannot be left out, or the checkpoint that is
                to be gone on from was written before.
        """
        if self.model is not None and not self.is_fsdp_enabled and is_sharded(self.model):
            raise UnsupportedModelError(
                "The model's parameters are sharded by fully_shard (FSDP2) already, which the Trainer cannot train. "
                "Let Accelerate shard it (`accelerate launch --use_fsdp --fsdp_version 2`), or train with a loop of "
                "your own, gather with hf_iau.gather(model, rows), and use this trainer to unlearn()."
            )
        with self._alone(), self._without_forgotten_rows(_checkpoint_asked(self, args, kwargs)):
            state = self.unlearning_state
            self.unlearning_state = UnlearningState(
                card=UnlearningCard(),
                forgotten=state.forgotten,
                forgotten_positions=state.forgotten_positions,
                on_disk=state.on_disk,
            )
            return super().train(*args, **kwargs)

    @contextlib.contextmanager
    def _without_forgotten_rows(self, checkpoint: Path | None) -> Iterator[None]:
        """Train on the rows that no request took out, and from no checkpoint that still knows the others.

        Raises:
            RequestError: which rows are out is not known, they cannot be left out, or `checkpoint` is from before.
        """
        count = max(self.unlearning_state.forgotten.total(), rows_forgotten_on_disk(self._private_folder))
        if checkpoint is not None and count > rows_forgotten_by(checkpoint):
            raise RequestError(
                f"resume_from_checkpoint={checkpoint}: it was written before {count - rows_forgotten_by(checkpoint)} "
                "rows were forgotten, so going on from it would bring them back. Train on from the model as it is "
                "(resume_from_checkpoint=None), and remove the checkpoint."
            )
        if self.model is None:
            yield
            return
        forgotten = self._forgotten_rows()
        whole, model = self.train_dataset, model_of(self)
        self._rows_left = (whole, forgotten, count)
        announce_training_rows(model, *self._rows_left)
        if forgotten is not None and forgotten.any():
            if is_main_process():
                logger.warning("%d forgotten rows are left out of this training.", int(forgotten.sum()))
            self.train_dataset = select_rows(whole, np.flatnonzero(~forgotten))
        try:
            yield
        finally:
            self.train_dataset = whole

    def _forgotten_rows(self) -> np.ndarray | None:
        """Which of `train_dataset`'s rows are out: bool, `(rows,)`; None where no request is known of."""
        state, memory = self.unlearning_state, None
        if self.train_dataset is None or self.model is None:
            return None
        with contextlib.suppress(MissingMemoryError, MemoryFileError, MemoryMismatchError):
            memory = self.memory
        by_ledger = memory is None and not state.forgotten and rows_forgotten_on_disk(self._private_folder) > 0
        if not state.forgotten and (memory is None or not memory.forgotten_rows) and not by_ledger:
            return None
        refuse_iterable(self.train_dataset, "training rows, some of which were forgotten,")
        source = trainer_rows(self, self.train_dataset, "training rows")
        if state.forgotten:
            return ~np.isin(np.arange(len(source)), remaining_rows(self.view, source))
        if by_ledger:  # a request has ended the memory
            key = find_key(self.args.output_dir)
            return forgotten_by_ledger(self._private_folder, key, model_of(self), source.dataset)
        return forgotten_before(model_of(self), source.dataset, memory)

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

    def _prepare_model(self, model: nn.Module) -> None:
        announce_row_loss(unwrap_model(model), self.row_loss)
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

        Raises:
            MissingMemoryError: an `IAUCallback` that was given could not gather.
            MemoryFileError: the one under `output_dir` cannot be read.
            StorageError: a committed request that was interrupted lies there; `DeletionService(trainer)` finishes it.
        """
        refuse_unfinished(self.args.output_dir)
        state, callback = self.unlearning_state, self._gathering_callback()
        if state.ended:
            return None
        if state.latest is None and state.given is None:
            if callback is not None and callback.failure is not None:
                # Where nobody asked for a memory there is none; else this raises, and says why.
                return None if isinstance(callback, UnaskedIAUCallback) else callback.memory
            gathered = callback is not None and callback.has_memory
            if not gathered and (self._private_folder / MEMORY_HEADER).is_file():
                state.given = GradientMemory.load(self._private_folder)
        return self._memory_read()

    def _memory_read(self) -> GradientMemory | None:
        """The same, but for one that lies below `output_dir` and was not read yet."""
        state, callback = self.unlearning_state, self._gathering_callback()
        if state.ended:
            return None
        gathered = callback.memory if callback is not None and callback.has_memory else None
        return state.latest or state.given or gathered

    @property
    def _private_folder(self) -> Path:
        return Path(self.args.output_dir or ".") / MEMORY_FOLDER

    def gather(self, config: GatherConfig | None = None, *, dataset: Any = None) -> GradientMemory:
        """Gather a memory now, at the model's present weights, from the training rows that were not forgotten.

        Args:
            config: what to gather; default: the callback's configuration, else `GatherConfig()`.
            dataset: the training rows without augmentation, when `train_dataset` is augmented at random.

        Returns:
            The memory, which is the one in force from now on; `save_model()` writes it.

        Raises:
            RequestError: there are no training rows.
            IAUError: as `hf_iau.gather`.
        """
        refuse_inference_mode("gather()")
        callback = self._gathering_callback()
        config = config or (callback.config if callback is not None else GatherConfig())
        rows = dataset if dataset is not None else self.train_dataset
        if rows is None:
            raise RequestError("gather(): the trainer has no train_dataset. Give it one, or pass dataset=.")
        with self._alone():
            memory = gather_remaining(self.view, config, rows, self._forgotten_rows() if dataset is None else None)
            self.unlearning_state.latest, self.unlearning_state.ended = memory, False
        return memory

    def rebase(self, config: GatherConfig | None = None) -> GradientMemory:
        """Gather anew at the present weights from the rows that are left, as the present memory was gathered.

        One bounded pass, after which the steps taken so far count no more; do it when a report advises it.

        Args:
            config: what to gather; default: the present memory's settings.

        Returns:
            The new memory, which is the one in force from now on.

        Raises:
            MissingMemoryError: there is no memory, and no `config`.
            ConfigError: the present memory's settings are of another version.
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; the memory that belongs to these weights is saved with them, under `_iau/`.

        Where a request has ended the memory, an old one that lies there is removed, for it is of other weights.
        Checkpoints (saved by the training loop itself) carry no memory. A model or memory that is spread over processes
        is saved by all of them together.

        Raises:
            StorageError: a committed request that was interrupted lies in `output_dir` (`DeletionService(trainer)`
                finishes it); or the folder holds a model that forgot rows since this trainer was made.
        """
        with self._alone():
            self._save_model(output_dir, _internal_call)

    def _save_model(self, output_dir: str | None, _internal_call: bool) -> None:
        beside_weights = not _internal_call and not self.is_in_train
        folder = Path(output_dir or self.args.output_dir or ".") / MEMORY_FOLDER
        if beside_weights:
            refuse_unfinished(self.args.output_dir)
            refuse_stale(folder, model_of(self), self.unlearning_state.on_disk, self._memory_read(), "output_dir")
        # Accelerate writes what it has sharded itself.
        alone = self.model is None or self.is_fsdp_enabled
        with contextlib.nullcontext() if alone else full_parameters(model_of(self)):
            super().save_model(output_dir, _internal_call)
        if beside_weights:
            self._save_private_files(folder, self.args.should_save)

    def _save_private_files(self, folder: Path, write: bool) -> None:
        save_private_files(model_of(self), self._memory_read(), self.unlearning_state, folder, write)
        if folder.resolve() == self._private_folder.resolve():
            self._note_what_is_on_disk()

    def _note_what_is_on_disk(self) -> None:
        there = weights_on_disk(self._private_folder)
        self.unlearning_state.on_disk |= set() if there is None else {there}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time changes this trainer's model, or reads it as a whole; others wait."""
        with _LOCKS.setdefault(self, threading.RLock()):
            yield

    def add_callback(self, callback: Any) -> None:
        """As in `Trainer`; an `IAUCallback` takes the place of the one that the trainer added itself."""
        if isinstance(callback, IAUCallback) or (isinstance(callback, type) and issubclass(callback, IAUCallback)):
            self.remove_callback(UnaskedIAUCallback)
        super().add_callback(callback)

    def _gathering_callback(self) -> IAUCallback | None:
        # Looked up each time: restoring callback states puts other objects into the handler.
        return next((cb for cb in self.callback_handler.callbacks if isinstance(cb, IAUCallback)), None)

    @property
    def view(self) -> TrainerView:
        """What a request uses of this trainer."""
        callback = self._gathering_callback()
        return TrainerView(
            trainer=self,
            row_loss=self.row_loss,
            state=self.unlearning_state,
            read_memory=lambda: self.memory,
            read_card=lambda: self.unlearning_card,
            rows=self._training_rows(),
            why_no_memory=None if callback is None else callback.failure,
        )

    def _training_rows(self) -> TrainingRows:
        same = self.train_dataset is self._given_rows.dataset
        return self._given_rows if same else TrainingRows.of(self.train_dataset)

    # --- forgetting -----------------------------------------------------------------------------------------------

    def unlearn(
        self,
        forget_dataset: Any = None,
        *,
        forget_indices: Sequence[int] | np.ndarray | Tensor | None = None,
        method: str = "iau",
        config: Any = None,
        held_out_dataset: Any = None,
        retain_dataset: Any = None,
        test_dataset: Any = None,
        retrained_model: nn.Module | Sequence[nn.Module] | None = None,
        reason: str | None = None,
        dry_run: bool = False,
        commit: Commit | None = None,
    ) -> UnlearnOutput:
        """Make the model forget training rows, and report how well it did.

        Weights and memory change in RAM alone; `save_model()` writes both, and `DeletionService` does it for requests
        that must never be lost or run twice. The update is applied whole or not at all: after any exception the weights
        are bit-identical to before.

        Args:
            forget_dataset: the rows to forget, e.g. `train_dataset.select(ids)`: rows of the data set that the trainer
                was given, or as they are trained on.
            forget_indices: instead, their numbers in the data set that the trainer was given (or one boolean for each
                of its rows), of which the memory must have been made.
            method: "iau" (curvature-aware, calibrated), "iau-paper", "iau-released", or any registered name.
            config: the method's configuration; default: its class with default values.
            held_out_dataset: rows never trained on, for calibration and report; default: `eval_dataset`.
            retain_dataset: all rows to be kept, for methods that would otherwise need an exact gradient sum.
            test_dataset: rows never trained on that nothing but the report looks at.
            retrained_model: a model trained without the forget rows, for comparison only; of several, the first is
                the reference and the next gives the noise floor between two retrained models.
            reason: why the rows are to go, which says what a model trained without them would make of them:
                "wrong-label" (nothing else supports their labels: wrong, or poisoned) or "random" (they are rows like
                any others); default: found out from the rows themselves.
            dry_run: do everything, report, and put the weights back.
            commit: is given a `FinishedRequest` while the changed weights are whole and not yet final, in every
                process; what it raises undoes the request.

        Returns:
            The report, `revert()`, and the memory that belongs to the new weights. The report's main figures also go to
            whatever `args.report_to` names, as `unlearn_…`.

        Raises:
            RequestError: the request itself is at fault (rows out of range, repeated, without labels, ...).
            ConfigError: unknown method or wrong configuration.
            MemoryMismatchError: the memory belongs to another model, data or loss.
            MissingMemoryError: the method needs something that was not gathered.
            NonFiniteGradientError: a forget row's gradient is NaN or infinite.
            StorageError: a committed request that was interrupted lies in `output_dir`.

        Examples:
            With `trainer` and `train` of the example of `UnlearningTrainer`:

            >>> result = trainer.unlearn(train.select([3, 17, 42]))
            >>> result.report.counts["forget_rows"], result.memory.n_rows
            (3, 61)
            >>> result.revert()  # every bit is as before
            >>> trainer.memory.n_rows
            64
            >>> trainer.unlearn(forget_indices=[3, 17, 42], dry_run=True).applied
            False
        """
        if commit is not None and dry_run:
            raise RequestError("commit= and dry_run=True contradict each other: leave one out.")
        if reason not in (None, *REASONS):
            raise RequestError(f"reason={reason!r} is unknown: give one of {', '.join(map(repr, REASONS))}, or None.")
        refuse_inference_mode("unlearn()")
        chosen, config = find_method(method, config)
        request = Request(
            forget_dataset=forget_dataset,
            forget_indices=forget_indices,
            held_out_dataset=held_out_dataset,
            retain_dataset=retain_dataset,
            test_dataset=test_dataset,
            retrained_models=checked_models(retrained_model),
            reason=reason,
            dry_run=dry_run,
        )
        with self._alone():
            output = run_request(self.view, request, chosen, config, commit)
        if output.undo is not None:
            output.undo = self._locked(output.undo)
            with without_printing(self):
                self.log(figures_to_log(output.report))
        return output

    def _locked(self, undo: Callable[[], None]) -> Callable[[], None]:
        def undo_alone() -> None:
            with self._alone():
                undo()

        return undo_alone

    # --- publishing -----------------------------------------------------------------------------------------------

    @property
    def unlearning_card(self) -> UnlearningCard:
        """What the model card tells of the requests so far, also by earlier processes: counts and means only."""
        state = self.unlearning_state
        if state.card is None:
            state.card = UnlearningCard.of_weights(self._private_folder, model_of(self))
        return state.card

    @unlearning_card.setter
    def unlearning_card(self, card: UnlearningCard) -> None:
        self.unlearning_state.card = card

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`; once a request was run the card has a section on unlearning, its figures and tags."""
        path = Path(self.args.output_dir or ".") / "README.md"
        earlier = card_metadata(path)
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self.unlearning_card.complete(path, task=task_of_model(model_of(self)), earlier=earlier)

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
        forgotten rows; see docs/how_to/publish.md for how to take them away before.

        Raises:
            PublishError: no token, no access, no connection, or a memory lies where it would be uploaded.
        """
        if self.is_world_process_zero():
            refuse_private_files(self.args.output_dir or ".", TRAINER_IGNORES)
        refuse_unfinished(self.args.output_dir)
        refuse_stale(
            self._private_folder, model_of(self), self.unlearning_state.on_disk, self._memory_read(), "output_dir"
        )
        self._save_private_files(self._private_folder, self.is_world_process_zero())
        with hub_errors_explained(self._repository()):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As in `Trainer`, which uploads whole checkpoint folders with `hub_strategy="checkpoint"`."""
        refuse_private_files(self.args.output_dir or ".", TRAINER_IGNORES)
        refuse_private_files(checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _repository(self) -> str:
        return self.args.hub_model_id or Path(self.args.output_dir or ".").absolute().name


def _checkpoint_asked(trainer: Trainer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Path | None:
    """The checkpoint that `train()` was asked to go on from, or None."""
    asked = args[0] if args else kwargs.get("resume_from_checkpoint", trainer.args.resume_from_checkpoint)
    if asked is True or asked in ("True", "true"):
        asked = get_last_checkpoint(trainer.args.output_dir or ".")
    return Path(asked) if asked else None


def _restriction_config(asked: RestrictionConfig | str | None) -> RestrictionConfig | None:
    config = RestrictionConfig(mode=asked) if isinstance(asked, str) else asked  # type: ignore[arg-type]
    if config is None:
        return None
    if not isinstance(config, RestrictionConfig):
        raise ConfigError(
            f"restriction={asked!r}: give a RestrictionConfig, or one of 'none', 'exact', 'finite-difference'."
        )
    return None if config.mode == "none" else config


__all__ = ["UnlearnOutput", "UnlearningTrainer"]
