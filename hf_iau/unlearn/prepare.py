"""A request as the methods see it, made from what the trainer has, and checked."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import numpy as np
from torch import nn

from hf_iau.data import RowSource, probe_additivity
from hf_iau.data.row_loss import batch_rows
from hf_iau.data.rows import refuse_iterable
from hf_iau.data.targets import IGNORED_LABEL, count_targets, find_real_valued_labels, labels_of
from hf_iau.data.trainer_rows import optional_rows, trainer_rows
from hf_iau.data.validation import (
    check_adapters,
    check_columns,
    check_placement,
    check_same_columns,
    refuse_random_rows,
    refuse_wrapped,
    rows_are_deterministic,
)
from hf_iau.distributed import is_sharded
from hf_iau.errors import (
    AlreadyForgottenError,
    ConfigError,
    MemoryFileError,
    MemoryMismatchError,
    MissingMemoryError,
    RequestError,
    UnknownRowsError,
)
from hf_iau.memory.fingerprints import data_fingerprint
from hf_iau.memory.gathering import count_labels
from hf_iau.memory.gradient_sum import trainable_parameters
from hf_iau.memory.keys import find_key, process_key
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.row_identity import RowIdentity, keyed_fingerprints
from hf_iau.methods.context import ForgetContext
from hf_iau.unlearn.rows import (
    NamedRows,
    forgotten_before,
    only_visited,
    refuse_repeated_rows,
    requested_rows,
    rows_apart,
    unequal_visits,
    without_targets,
)
from hf_iau.unlearn.state import UnlearningState
from hf_iau.unlearn.view import TrainerView
from hf_iau.utils.timing import PhaseTimer


def resolve_rows(view: TrainerView, forget_dataset: Any, forget_indices: Any) -> NamedRows:
    """The rows of a request that the model was trained on, and what is to be said of the others.

    Args:
        view: of the trainer that runs it.
        forget_dataset, forget_indices: as given to `unlearn`.

    Raises:
        RequestError: the rows are named wrongly.
        UnknownRowsError: rows that the trainer was never given.
    """
    if isinstance(forget_dataset, NamedRows):
        return forget_dataset
    rows = requested_rows(view.rows, forget_dataset, forget_indices, _visits(view))
    rows = _visited(view, rows) if rows.positions is None and len(rows) else rows
    return without_targets(rows, _without_labels(view, rows)) if len(rows) else rows


def _visits(view: TrainerView) -> np.ndarray | None:
    """How often each training row was trained on, where the memory knows it of the present rows; else None."""
    with contextlib.suppress(MissingMemoryError, MemoryFileError, MemoryMismatchError):
        memory, dataset = view.read_memory(), view.rows.dataset
        if memory is not None and memory.visits is not None and dataset is not None and not memory.visits.all():
            source = trainer_rows(view.trainer, dataset, "training rows")
            if memory.data == data_fingerprint(view.model, source.dataset):
                return _not_forgotten(memory.visits, memory.row_identity)
    return None


def _not_forgotten(visits: np.ndarray, identity: RowIdentity | None) -> np.ndarray:
    """The visits, and one where a row is out: it was left out of the last run because it was known before."""
    return visits if identity is None else np.maximum(visits, identity.forgotten)


def _visited(view: TrainerView, rows: NamedRows) -> NamedRows:
    """Rows that are given by their content, without those of which no copy was ever trained on."""
    with contextlib.suppress(MissingMemoryError, MemoryFileError, MemoryMismatchError, ConfigError, UnknownRowsError):
        memory = view.read_memory()
        identity = None if memory is None else memory.row_identity
        if memory is not None and identity is not None and memory.visits is not None and not memory.visits.all():
            key = process_key() if identity.of_process else find_key(view.args.output_dir)
            if key is not None:
                identity.check_key(key)
                source = trainer_rows(view.trainer, rows.dataset, "forget rows")
                places = identity.positions(keyed_fingerprints(key, view.model, source.dataset))
                return only_visited(rows, _not_forgotten(memory.visits, identity)[places] > 0)
    return rows


def _without_labels(view: TrainerView, rows: NamedRows) -> np.ndarray:
    """Which rows have no label that counts: bool, `(m,)`."""
    source = trainer_rows(view.trainer, rows.dataset, "forget rows")
    empty = np.zeros(len(rows), dtype=bool)
    for positions, inputs in source:
        labels = labels_of(inputs)
        if labels is None or labels.is_floating_point() or not bool((labels == IGNORED_LABEL).any()):
            continue
        for i, position in enumerate(positions.tolist()):
            empty[position] = len(labels) == batch_rows(inputs) and count_targets(view.model, labels[i : i + 1], 1) == 0
    return empty


def request_context(
    view: TrainerView,
    rows: NamedRows,
    held_out_dataset: Any,
    retain_dataset: Any,
    timer: PhaseTimer,
    *,
    again_allowed: bool = False,
) -> ForgetContext:
    """The context of one request.

    Args:
        view: of the trainer that runs it.
        rows: to be forgotten.
        held_out_dataset, retain_dataset: as given to `unlearn`.
        timer: of the request.
        again_allowed: rows that were forgotten before may be among them.

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
    asked = forget.digests()
    digests = Counter(row.tobytes() for row in asked)
    trained = None if train is None else Counter(row.tobytes() for row in train.digests())
    refuse_repeated_rows(forget, asked, trained)
    fingerprints = _fingerprints(args.output_dir, model, memory, forget, rows, again_allowed)
    _recall_forgotten(state, model, memory, train)
    again = _again(state, digests, trained, positions)
    if again and not again_allowed:
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
    for others in (retain, held_out):
        check_same_columns(trainer, others, forget)
    notes = list(rows.notes)
    known = trained if trained is not None else digests + state.forgotten
    held_out = _apart(held_out, known, "held_out_dataset", notes)
    copies_left = 0
    if trained is not None:
        copies_left = sum(trained[row] - count - state.forgotten[row] for row, count in digests.items())
        notes += [] if not copies_left else [_about_copies(copies_left)]
    if memory is not None and memory.row_identity is None and memory.forgotten_rows > state.forgotten.total():
        notes.append(
            f"{memory.forgotten_rows - state.forgotten.total()} rows were forgotten before this trainer was made, and "
            "the memory, which was gathered without a key (HF_IAU_KEY), does not know which: rows of this request that "
            "are among them are forgotten a second time."
        )
    unequal = None if memory is None else unequal_visits(memory.visits)
    if unequal is not None:
        notes.append(
            f"Training rows were met unequally often, {unequal[0]} to {unequal[1]} times (a sampler with weights?): "
            "here each counts once, so rows that were met more often are forgotten less far than the others."
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
        copies_left=copies_left,
        left_out=rows.left_out,
        notes=notes,
        excluded=set(digests) | set(state.forgotten),
        digests=digests,
        fingerprints=fingerprints,
        forgotten=state.forgotten - digests if again else state.forgotten,
        forgotten_positions=state.forgotten_positions,
        trainer=trainer,
        label_counts=count_labels(forget.dataset),
        seed=args.seed,
        progress=not args.disable_tqdm,
        timer=timer,
    )


def test_rows(view: TrainerView, context: ForgetContext, test_dataset: Any) -> RowSource | None:
    """The rows that the report alone looks at: in no context, so that no method does.

    Args:
        view: of the trainer that runs the request.
        context: of the request; learns what is to be said of the rows.
        test_dataset: as given to `unlearn`.

    Raises:
        RequestError: they are training rows, or lack columns.
    """
    test = optional_rows(view.trainer, test_dataset, "test rows")
    check_same_columns(view.trainer, test, context.forget)
    known = context.digests + context.forgotten
    if context.train is not None and test is not None:
        known = Counter(row.tobytes() for row in context.train.digests())
    return _apart(test, known, "test_dataset", context.notes)


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
        shared = sum(row.tobytes() in digests for row in retain.digests())
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
    rows: NamedRows,
    again_allowed: bool,
) -> np.ndarray | None:
    """Keyed fingerprints of the forget rows, given or made, checked against the memory's; None without a key."""
    identity = None if memory is None else memory.row_identity
    if rows.fingerprints is not None:  # whoever made them has checked the key
        if identity is not None:
            identity.check_request(rows.fingerprints, rows.positions, again_allowed)
        return rows.fingerprints
    key = process_key() if identity is not None and identity.of_process else find_key(output_dir)
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
        identity.check_request(fingerprints, rows.positions, again_allowed)
    return fingerprints


def _again(
    state: UnlearningState, digests: Counter[bytes], trained: Counter[bytes] | None, positions: np.ndarray | None
) -> int:
    """How many rows of a request an earlier one of this trainer took out."""
    if positions is not None and len(state.forgotten_positions) == state.forgotten.total():
        return int(np.isin(positions, state.forgotten_positions).sum())
    return forgotten_before(digests, state.forgotten, trained)


def _apart(source: RowSource | None, trained: Counter[bytes], argument: str, notes: list[str]) -> RowSource | None:
    """Rows that were never trained on, without chance copies of training rows, which are noted."""
    if source is None:
        return None
    apart, copies = rows_apart(source, source.digests(), trained, argument)
    if copies:
        notes.append(f"{copies} of the {len(source)} {source.name} are copies of training rows and were left out.")
    return apart


def _about_copies(copies: int) -> str:
    return (
        f"{copies} training rows that stay are exact copies of forget rows: a model trained without the forget rows "
        "would still know their content. If it is to go, name the copies too."
    )


def _recall_forgotten(
    state: UnlearningState, model: nn.Module, memory: GradientMemory | None, train: RowSource | None
) -> None:
    """In a fresh process: learn from the memory which training rows earlier requests took out."""
    identity = None if memory is None else memory.row_identity
    if memory is None or identity is None or train is None or state.forgotten or not identity.forgotten.any():
        return
    if memory.data == data_fingerprint(model, train.dataset):
        gone = np.flatnonzero(identity.forgotten).tolist()
        state.forgotten = Counter(train.digest(i) for i in gone)
        state.forgotten_positions = tuple(gone)
