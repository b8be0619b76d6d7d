"""A request as the methods see it, made from what the trainer has, and checked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from torch import nn

from hf_iau.data import RowSource, probe_additivity
from hf_iau.data.rows import refuse_iterable, row_bytes
from hf_iau.data.targets import find_real_valued_labels
from hf_iau.data.trainer_rows import optional_rows, trainer_rows
from hf_iau.data.validation import (
    check_adapters,
    check_columns,
    check_placement,
    refuse_random_rows,
    refuse_wrapped,
    rows_are_deterministic,
)
from hf_iau.distributed import is_sharded
from hf_iau.errors import AlreadyForgottenError, ConfigError, RequestError
from hf_iau.memory.fingerprints import data_fingerprint
from hf_iau.memory.gathering import count_labels
from hf_iau.memory.gradient_sum import trainable_parameters
from hf_iau.memory.keys import find_key
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.row_identity import keyed_fingerprints
from hf_iau.methods.context import ForgetContext
from hf_iau.unlearn.rows import NamedRows, forgotten_before, refuse_repeated_rows
from hf_iau.unlearn.state import UnlearningState
from hf_iau.unlearn.view import TrainerView
from hf_iau.utils.timing import PhaseTimer


def request_context(
    view: TrainerView,
    rows: NamedRows,
    held_out_dataset: Any,
    retain_dataset: Any,
    timer: PhaseTimer,
) -> ForgetContext:
    """The context of one request.

    Args:
        view: of the trainer that runs it.
        rows: to be forgotten.
        held_out_dataset, retain_dataset: as given to `unlearn`.
        timer: of the request.

    Raises:
        RequestError: the rows are at fault, or all are to be forgotten.
        AlreadyForgottenError: rows that earlier requests took out.
        MemoryMismatchError: the memory is of other weights, data or loss.
        ConfigError: the memory holds fingerprints, and there is no key.
    """
    trainer, args, state, positions = view.trainer, view.args, view.state, rows.positions
    for wrapped in (trainer.model, trainer.model_wrapped):
        if wrapped is not None:  # a compiled model has no truth value
            refuse_wrapped(wrapped)
    model = view.model
    check_adapters(model)
    check_placement(model)
    train = None
    if trainer.train_dataset is not None:
        refuse_iterable(trainer.train_dataset, "training rows")
        train = trainer_rows(trainer, trainer.train_dataset, "training rows")
        if not rows_are_deterministic(train.dataset):
            train = None
    forget = trainer_rows(trainer, rows.dataset, "forget rows")
    refuse_random_rows(forget)
    check_columns(trainer, forget)
    find_real_valued_labels(model, forget.dataset if train is None else train.dataset)
    memory = view.read_memory()
    if memory is not None:
        memory = memory.sharded_like(model) if is_sharded(model) else memory.unsharded()
        memory.check_model(model)
        memory = memory if is_sharded(model) else memory.placed_for(model)
        memory.check_loss(view.row_loss)
        if positions is not None and train is not None:
            memory.check_data(model, train.dataset)
    trainable_parameters(model, None if memory is None else list(memory.parameters))
    still_in = (
        memory.n_rows if memory is not None else len(train) - state.forgotten.total() if train is not None else None
    )
    if still_in is not None and len(forget) >= still_in:
        raise RequestError(
            f"The request is to forget {len(forget)} of {still_in} training rows, that is all of them: nothing would "
            "be left to keep. Start again from the pretrained weights instead."
        )
    digests = Counter(row_bytes(forget.dataset[i]) for i in range(len(forget)))
    refuse_repeated_rows(forget, digests, train)
    fingerprints = _fingerprints(args.output_dir, model, memory, forget, rows.fingerprints)
    _recall_forgotten(state, model, memory, train)
    again = forgotten_before(digests, state.forgotten, train)
    if again:
        raise AlreadyForgottenError(
            f"{again} of the {len(forget)} rows were already forgotten by an earlier request to this trainer: "
            "leave them out."
        )
    retain = None
    if retain_dataset is not None:
        retain = trainer_rows(trainer, retain_dataset, "retained rows")
        _check_retained(retain, len(forget), set(digests), still_in)
    held_out = optional_rows(
        trainer, held_out_dataset if held_out_dataset is not None else trainer.eval_dataset, "held-out rows"
    )
    return ForgetContext(
        model=model,
        row_loss=view.row_loss,
        forget=forget,
        memory=memory,
        train=train,
        forget_positions=positions,
        retain=retain,
        held_out=held_out,
        excluded=set(digests) | set(state.forgotten),
        digests=digests,
        fingerprints=fingerprints,
        forgotten=state.forgotten,
        forgotten_positions=state.forgotten_positions,
        trainer=trainer,
        label_counts=count_labels(forget.dataset),
        seed=args.seed,
        progress=not args.disable_tqdm,
        timer=timer,
    )


def check_loss(context: ForgetContext) -> None:
    """Check on a few rows that the loss is a sum over rows, and the one that the memory was made with.

    Raises:
        CoupledRowsError: it is none.
        MemoryMismatchError: it is another.
    """
    memory, train = context.memory, context.train
    if memory is None:
        probe_additivity(context.row_loss, context.model, context.forget)
    elif train is not None and (
        context.forget_positions is not None or memory.data == data_fingerprint(context.model, train.dataset)
    ):
        memory.check_probe(context.model, context.row_loss, train)


def _check_retained(retain: RowSource, forget_rows: int, digests: set[bytes], still_in: int | None) -> None:
    if len(retain) == 0:
        raise RequestError("retain_dataset is empty: pass the rows to be kept, or leave it out.")
    refuse_random_rows(retain)
    # A kept duplicate of a forget row is no mistake, as long as the two sets can be disjoint.
    if still_in is None or len(retain) + forget_rows > still_in:
        shared = sum(row_bytes(retain.dataset[i]) in digests for i in range(len(retain)))
        if shared:
            raise RequestError(
                f"retain_dataset has {len(retain)} rows, {shared} of which are forget rows: pass only the rows "
                "to be kept, e.g. train_dataset.select(the other ids)."
            )


def _fingerprints(
    output_dir: str | None,
    model: nn.Module,
    memory: GradientMemory | None,
    forget: RowSource,
    fingerprints: np.ndarray | None,
) -> np.ndarray | None:
    """Keyed fingerprints of the forget rows, given or made, checked against the memory's; None without a key."""
    identity = None if memory is None else memory.row_identity
    if fingerprints is not None:  # whoever made them has checked the key
        if identity is not None:
            identity.check_request(fingerprints)
        return fingerprints
    key = find_key(output_dir)
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


def _recall_forgotten(
    state: UnlearningState, model: nn.Module, memory: GradientMemory | None, train: RowSource | None
) -> None:
    """In a fresh process: learn from the memory which training rows earlier requests took out."""
    identity = None if memory is None else memory.row_identity
    if memory is None or identity is None or train is None or state.forgotten or not identity.forgotten.any():
        return
    if memory.data == data_fingerprint(model, train.dataset):
        gone = np.flatnonzero(identity.forgotten).tolist()
        state.forgotten = Counter(row_bytes(train.dataset[i]) for i in gone)
        state.forgotten_positions = tuple(gone)
