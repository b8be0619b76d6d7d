"""Deletion requests carried out so that weights, memory and ledger have each of them wholly and once, or not at all."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from filelock import FileLock, Timeout

from hf_iau.data.rows import select_rows
from hf_iau.data.trainer_rows import model_of, trainer_rows
from hf_iau.deletion.ids import all_forgotten, rows_of_ids, rows_still_in
from hf_iau.deletion.journal import Journal, JournalFile
from hf_iau.deletion.ledger import LEDGER_NAME, Ledger, LedgerEntry
from hf_iau.deletion.queue import RequestQueue
from hf_iau.deletion.storage import RECEIPT_FOLDER, RequestStorage, full_weights, storage_errors
from hf_iau.deletion.termination import Termination
from hf_iau.distributed import is_main_process, run_on_main_process
from hf_iau.errors import ConfigError, MissingMemoryError, RequestError, StorageError
from hf_iau.memory.fingerprints import data_fingerprint, weights_fingerprint
from hf_iau.memory.keys import Key, require_key
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.memory_files import MEMORY_FOLDER
from hf_iau.memory.row_identity import FINGERPRINT_BYTES, RowIdentity, keyed_fingerprints
from hf_iau.methods.base import find_method, makes_weights_anew
from hf_iau.report.report import UnlearningReport
from hf_iau.trainer.saving import rows_forgotten_on_disk, weights_on_disk
from hf_iau.trainer.unlearning_trainer import UnlearningTrainer
from hf_iau.unlearn.budget import FEWEST_ROWS
from hf_iau.unlearn.output import UnlearnOutput
from hf_iau.unlearn.prepare import resolve_rows
from hf_iau.unlearn.record import FinishedRequest
from hf_iau.unlearn.rows import NamedRows
from hf_iau.unlearn.transaction import WeightTransaction
from hf_iau.utils.atomic_files import make_private_folder

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"


@dataclass
class DeletionOutput(UnlearnOutput):
    """What `DeletionService.unlearn` returns.

    Attributes:
        entry: the ledger's entry of the request; None for one that named no rows.
    """

    entry: LedgerEntry | None = None

    def revert(self) -> None:
        """Refused: what the ledger has is final.

        Raises:
            RequestError: always.
        """
        raise RequestError("revert(): this request changed nothing, or was saved, which is final.")


class DeletionService:
    """Carries out deletion requests for one trainer: weights, memory, ledger and receipt change as one transaction.

    A request is written beside what is there, flushed, sealed in a journal and only then moved into place. Until the
    journal is sealed a crash leaves the old state; from then on the new one, which the next service of that
    `output_dir` finishes moving when it is made. Only the main process writes; in several processes all make the
    service and call it.

    Args:
        trainer: whose model, memory and `output_dir` it is.
        key: what row fingerprints and the ledger are made with: a `Key`, or a secret of at least 32 characters;
        default:
            the one in `HF_IAU_KEY` or in the file that `HF_IAU_KEY_FILE` names.
        id_column: the column of the trainer's `train_dataset` that says whose a row is, for `ids=`.

    Attributes:
        ledger: what was forgotten so far.

    Raises:
        ConfigError: there is no key, or it cannot be used.
        StorageError: an interrupted request that was committed could not be finished.
        RequestError: there is one, and another process is at work in `output_dir`.

    Examples:
        With `trainer` of the example of `UnlearningTrainer`; in production the key comes from `HF_IAU_KEY`:

        >>> from hf_iau import DeletionService
        >>> trainer.save_model()
        >>> service = DeletionService(trainer, key="an example that is 32 characters", id_column="user_id")
        >>> output = service.unlearn(forget_indices=[3, 17, 42], request_id="ticket-4711")
        >>> output.applied, output.entry.number, output.entry.rows
        (True, 1, 3)
        >>> service.unlearn(forget_indices=[3, 17, 42], request_id="ticket-4711").applied  # answered, not run again
        False
        >>> service.queue(forget_indices=[5])  # waits on disk
        >>> service.ledger.verify().count
        1
    """

    def __init__(
        self, trainer: UnlearningTrainer, key: Key | str | bytes | None = None, *, id_column: str | None = None
    ) -> None:
        self.trainer = trainer
        self.id_column = id_column
        self.folder = Path(trainer.args.output_dir or ".")
        self._key = _checked_key(key, self.folder)
        self.ledger = Ledger(self.folder / MEMORY_FOLDER / LEDGER_NAME, self._key)
        self._journal = JournalFile(self.folder, self._key)
        self._queue = RequestQueue(self.folder, self._key)
        self._storage = RequestStorage(trainer, self.folder, self._journal, self.ledger, self._queue)
        if run_on_main_process(self._journal.left_behind, "the journal"):
            with self._alone():
                self._recover()

    # --- requests ---------------------------------------------------------------------------------------------------

    def unlearn(
        self,
        forget_dataset: Any = None,
        *,
        forget_indices: Any = None,
        ids: Sequence[Any] | None = None,
        request_id: str | None = None,
        **settings: Any,
    ) -> DeletionOutput:
        """Make the model forget rows, and write weights, memory, ledger and receipt as one transaction.

        The same request run again is finished, or answered from the ledger, but never run twice; except by a method
        that makes the weights anew (`method="retrain"`), where an approximate one was not enough. A request cannot be
        reverted.

        Args:
            forget_dataset, forget_indices: as for `UnlearningTrainer.unlearn`.
            ids: instead, values of `id_column`, e.g. `["u17", "u23"]`: all of their rows, as far as they are still in.
                Rows that are left out are told in the report's warnings.
            request_id: your name for the request (kept only as a keyed hash); default: its rows.
            **settings: as for `UnlearningTrainer.unlearn`: method, config, held_out_dataset and so on.

        Returns:
            The report, the memory that belongs to the new weights, and the ledger's entry; `applied` is False where the
            ledger had the request already.

        Raises:
            RequestError: the request is at fault, another one is running, or `request_id` names one of other rows.
            AlreadyForgottenError: all rows of `ids` are forgotten, by other requests than this one.
            StorageError: it could not be written; everything is as before.
            IAUError: as `UnlearningTrainer.unlearn`.
        """
        _refuse_settings(settings)
        with Termination() as termination, self._alone():
            self._recover()
            entries = self._catch_up()
            memory = self.trainer.memory
            self._identify(memory)
            rows, notes, all_out = self._named(forget_dataset, forget_indices, ids)
            if len(rows) == 0:
                return DeletionOutput(**vars(self.trainer.unlearn(rows, **settings)))
            anew = find_method(settings.get("method", "iau"), settings.get("config"))[0]
            entry = self._entry_of(entries, rows, request_id, memory, exact=not all_out)
            if entry is not None and request_id is None and self._are_other_copies(rows, memory):
                entry = None
            if entry is not None and (entry.method == anew.name or not makes_weights_anew(anew)):
                return DeletionOutput(_report_of(entry), applied=False, memory=self.trainer.memory, entry=entry)
            if all_out and not makes_weights_anew(anew):
                raise all_forgotten(len(rows))
            self._check_room(memory)
            output = self._carry_out(rows, request_id, memory, termination, settings)
        _tell(output, notes)
        return output

    def _named(self, forget_dataset: Any, forget_indices: Any, ids: Any) -> tuple[NamedRows, list[str], bool]:
        """The rows of a request with their fingerprints, what is to be said of them, and whether all of them are out.

        Of `ids` those that are still in; where none is, all.
        """
        notes: list[str] = []
        all_out = False
        if ids is not None:
            if forget_dataset is not None or forget_indices is not None:
                raise RequestError("unlearn() was given ids= and other rows: pass one of them.")
            numbers = rows_of_ids(self.trainer.view.rows.given, self.id_column, ids)
            still, notes = rows_still_in(self.trainer.view, numbers, self._key) if len(numbers) else (numbers, [])
            all_out = len(numbers) > 0 and len(still) == 0
            forget_indices = numbers if all_out else still
        _refuse_no_rows("unlearn", forget_dataset, forget_indices)
        rows = resolve_rows(self.trainer.view, forget_dataset, forget_indices)
        fingerprints = keyed_fingerprints(self._key, model_of(self.trainer), rows.dataset)
        return replace(rows, fingerprints=fingerprints), notes, all_out

    def _are_other_copies(self, rows: NamedRows, memory: GradientMemory | None) -> bool:
        """Whether rows that are named by number are still in: copies of those that an earlier request was of."""
        trainer, identity = self.trainer, None if memory is None else memory.row_identity
        if memory is None or identity is None or rows.positions is None or trainer.train_dataset is None:
            return False
        source = trainer_rows(trainer, trainer.train_dataset, "training rows", 1)
        if memory.data != data_fingerprint(model_of(trainer), source.dataset):
            return False
        return not bool(identity.forgotten[rows.positions].all())

    def _carry_out(
        self,
        rows: NamedRows,
        request_id: str | None,
        memory: GradientMemory | None,
        termination: Termination,
        settings: dict[str, Any],
    ) -> DeletionOutput:
        journal = Journal(
            request=request_name(self._key, _fingerprints(rows), request_id),
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            rows=len(rows),
            weights_before=weights_fingerprint(model_of(self.trainer)),
        )
        run_name = _training_run(memory)
        written: list[LedgerEntry] = []

        def commit(request: FinishedRequest) -> None:
            started = time.perf_counter()
            entry = run_on_main_process(
                lambda: asdict(self._storage.write(journal, run_name, request, termination)), "writing the request"
            )
            written.append(LedgerEntry(**entry))
            self.trainer.unlearning_state.on_disk.add(entry["weights_after"])
            request.report.seconds["save"] = time.perf_counter() - started

        output = self.trainer.unlearn(rows, commit=commit, **settings)
        return DeletionOutput(output.report, output.applied, output.memory, entry=written[0])

    def _entry_of(
        self,
        entries: list[LedgerEntry],
        rows: NamedRows,
        request_id: str | None,
        memory: GradientMemory | None,
        exact: bool,
    ) -> LedgerEntry | None:
        """The ledger's entry of this request, or None where it has none.

        Args:
            entries: of the ledger, on the main process.
            rows: of the request, with fingerprints.
            request_id: the caller's name for it, or None.
            memory: in force.
            exact: whether a request of that name must be of exactly these rows; else of some of them, and one of others
                is not meant.
        """
        fingerprints = _fingerprints(rows)
        name = request_name(self._key, fingerprints, request_id)
        run_name, weights = _training_run(memory), weights_fingerprint(model_of(self.trainer))
        found = run_on_main_process(lambda: _last_entry(entries, name, run_name, weights), "the ledger")
        if found is None:
            return None
        entry = LedgerEntry(**found)
        named, given = Counter(entry.row_ids), Counter(row.tobytes().hex() for row in fingerprints)
        if not exact:
            return None if named - given else entry
        if named != given:
            raise RequestError(
                f"This request_id names a request of {entry.rows} rows that was carried out at {entry.time}, "
                f"and the {len(rows)} rows given now are others: nothing was computed, and they are not "
                "forgotten. Give them a request_id of their own, or leave it out."
            )
        return entry

    # --- queue ------------------------------------------------------------------------------------------------------

    def queue(
        self,
        forget_dataset: Any = None,
        *,
        forget_indices: Any = None,
        ids: Sequence[Any] | None = None,
        **settings: Any,
    ) -> DeletionOutput | None:
        """Have rows forgotten together with others: they wait on disk until there are 16, and are then one request.

        Small requests are better batched, for two versions of the weights differ by an image of the rows. Needs a
        memory that was gathered with the key. What waits is kept as keyed fingerprints alone. A row number that waits
        is not queued again; rows that are given by their content add a further copy as long as there is one.

        Args:
            forget_dataset, forget_indices, ids: as for `unlearn`.
            **settings: as for `unlearn`, for the case that the request is run now.

        Returns:
            What `unlearn` returned, or None where the rows wait.

        Raises:
            RequestError: the rows are named wrongly, or another request is running.
            UnknownRowsError: rows that were never trained on.
            AlreadyForgottenError: rows that are out already.
        """
        if ids is not None:
            if forget_dataset is not None or forget_indices is not None:
                raise RequestError("queue() was given ids= and other rows: pass one of them.")
            forget_indices = rows_of_ids(self.trainer.view.rows.given, self.id_column, ids)
        _refuse_no_rows("queue", forget_dataset, forget_indices)
        waiting = self._enqueue(forget_dataset, forget_indices)
        return self.serve_queue(**settings) if waiting >= FEWEST_ROWS else None

    def serve_queue(self, **settings: Any) -> DeletionOutput | None:
        """Run one request of the rows that wait, however few; None where none wait.

        Args:
            **settings: as for `unlearn`.
        """
        with self._alone():
            self._recover()
            identity = self._identity()

            def read() -> list[list[int]]:
                waiting = self._queue.read().fingerprints
                return waiting[identity.still_in(waiting)].tolist()

            waiting = run_on_main_process(read, "the queue")
        fingerprints = np.asarray(waiting, dtype=np.uint8).reshape(-1, FINGERPRINT_BYTES)
        rows = self._rows_of(fingerprints, identity)
        return self.unlearn(rows, **settings) if len(rows) else None

    def _rows_of(self, fingerprints: np.ndarray, identity: RowIdentity) -> NamedRows:
        """The rows with these fingerprints, wherever they are in the present training rows.

        Raises:
            RequestError: some are not there any more.
        """
        trainer = self.trainer
        if trainer.train_dataset is None:
            raise RequestError("The queue names training rows by their content, and the trainer has no train_dataset.")
        source = trainer_rows(trainer, trainer.train_dataset, "training rows", 1)
        memory = trainer.memory
        assert memory is not None
        if memory.data == data_fingerprint(model_of(trainer), source.dataset):
            positions = identity.positions(fingerprints)
            return NamedRows(select_rows(trainer.train_dataset, positions), positions, fingerprints)
        places: dict[bytes, list[int]] = {row.tobytes(): [] for row in fingerprints}
        for position, row in enumerate(keyed_fingerprints(self._key, model_of(trainer), source.dataset)):
            if row.tobytes() in places:
                places[row.tobytes()].append(position)
        missing = sum(not places[row.tobytes()] for row in fingerprints)
        if missing:
            raise RequestError(
                f"{missing} of the {len(fingerprints)} rows that wait are not in train_dataset any more, so they "
                "cannot be forgotten from it: give the trainer the training rows that the memory was made of."
            )
        used = {name: iter(found) for name, found in places.items()}
        chosen = [next(used[row.tobytes()], places[row.tobytes()][0]) for row in fingerprints]
        return NamedRows(select_rows(trainer.train_dataset, chosen), None, fingerprints)

    def _check_numbers(self, rows: NamedRows) -> None:
        """Raise `MemoryMismatchError` where row numbers may name other rows than they did when gathering."""
        trainer, memory = self.trainer, self.trainer.memory
        if rows.positions is not None and memory is not None and trainer.train_dataset is not None:
            source = trainer_rows(trainer, trainer.train_dataset, "training rows", 1)
            memory.check_data(model_of(trainer), source.dataset)

    def _enqueue(self, forget_dataset: Any, forget_indices: Any) -> int:
        """Add rows to the queue. Returns how many wait now."""
        rows = resolve_rows(self.trainer.view, forget_dataset, forget_indices)
        with self._alone():
            self._recover()
            identity = self._identity()
            fingerprints = keyed_fingerprints(self._key, model_of(self.trainer), rows.dataset)
            self._check_numbers(rows)
            identity.check_request(fingerprints, rows.positions)

            def add() -> list[int]:
                before = self._queue.read()
                after = before.with_asked(self._queue.asked(fingerprints, rows.positions), identity)
                with storage_errors("The rows could not be queued"):
                    self._queue.write(after)
                return [len(after), len(after) - int(identity.still_in(before.fingerprints).sum())]

            waiting, added = run_on_main_process(add, "the queue")
        if added < len(rows) and is_main_process():
            logger.warning(
                "%d of the %d rows wait in the queue already and were not queued again.", len(rows) - added, len(rows)
            )
        return int(waiting)

    def _identity(self) -> RowIdentity:
        memory = self.trainer.memory
        self._identify(memory)
        if memory is None or memory.row_identity is None:
            raise MissingMemoryError(
                "The queue names rows by their fingerprints, and the memory holds none: gather with HF_IAU_KEY set."
            )
        memory.row_identity.check_key(self._key)
        return memory.row_identity

    # --- before a request -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock of the output directory.

        Raises:
            RequestError: another request holds it.
            StorageError: the directory cannot be written to.
        """
        private = self.folder / MEMORY_FOLDER
        lock = FileLock(private / LOCK_NAME, timeout=0, mode=0o600)

        def acquire() -> None:
            try:
                make_private_folder(private, ignored_by_git=True)
                lock.acquire()
                if not os.access(self.folder, os.W_OK) or not os.access(private, os.W_OK):
                    raise PermissionError("no permission to write")
                if os.stat(self.folder).st_dev != os.stat(private).st_dev:
                    raise OSError(f"{private} lies on another file system, so files cannot be moved into place at once")
            except Timeout as error:
                raise RequestError(
                    f"Another request is running in {self.folder} (it holds {private / LOCK_NAME}): wait until it "
                    "has ended, then run this one again."
                ) from error
            except OSError as error:
                raise StorageError(
                    f"output_dir={self.folder} cannot be written to ({error}): nothing was changed. Give a directory "
                    "that can."
                ) from error

        try:
            run_on_main_process(acquire, "the lock of the output directory")
            yield
        finally:
            lock.release()

    def _recover(self) -> None:
        """Finish a request that was committed but not moved into place; tidy up after one that was not committed.

        To be called with the lock held. A model that still has the old weights gets the new ones.
        """

        def tidy() -> dict[str, Any] | None:
            journal = self._journal.read()
            if journal is None:
                if self._journal.clear_staged():
                    logger.warning(
                        "A request was interrupted before it was committed, and nothing of it was kept: run it again."
                    )
                return None
            with storage_errors("An interrupted request was committed, but could not be moved into place", True):
                self._journal.finish(journal)
            return asdict(journal)

        found = run_on_main_process(tidy, "finishing an interrupted request")
        if found is None:
            return
        journal = Journal(**found)
        logger.warning(
            "A request of %d rows, begun at %s, had been interrupted after it was committed; it is finished now.",
            journal.rows,
            journal.time,
        )
        now = weights_fingerprint(model_of(self.trainer))
        if now == journal.weights_after:
            self._adopt()
        elif now == journal.weights_before or now in self.trainer.unlearning_state.on_disk:
            self._load_weights(journal.weights_after)

    def _catch_up(self) -> list[LedgerEntry]:
        """Give a model from before the last request, which would undo it when saved, the weights that it left.

        Returns:
            The ledger's entries, on the main process.
        """
        entries: list[LedgerEntry] = []

        def read() -> dict[str, Any] | None:
            entries[:] = self.ledger.entries()
            self._check_receipts(len(entries))
            return asdict(entries[-1]) if entries else None

        last = run_on_main_process(read, "the ledger")
        there = run_on_main_process(lambda: weights_on_disk(self.folder / MEMORY_FOLDER), "the weights on disk")
        known = self.trainer.unlearning_state.on_disk
        if there is None or (last is None and not rows_forgotten_on_disk(self.folder / MEMORY_FOLDER)):
            return entries
        now = weights_fingerprint(model_of(self.trainer))
        before = None if last is None else last["weights_before"]
        if now == there:
            known.add(there)
        elif there not in known or now == before:  # another trainer has served requests since
            if now != before and now not in known:
                raise StorageError(
                    f"Requests were served in {self.folder} since this trainer was made, and its model was changed "
                    "since as well and not saved: going on would bring forgotten rows back. Load the model that lies "
                    "there and give it to a new trainer."
                )
            self._load_weights(there)
        return entries

    def _check_receipts(self, entries: int) -> None:
        """Raise `StorageError` where there are receipts of more entries than the ledger has."""
        found = (self.folder / MEMORY_FOLDER / RECEIPT_FOLDER).glob("[0-9]*.*")
        last = max((int(path.stem) for path in found if path.stem.isdigit()), default=0)
        if last > entries:
            raise StorageError(
                f"There is a receipt of entry {last} in {self.folder / MEMORY_FOLDER / RECEIPT_FOLDER}, and the ledger "
                f"{self.ledger.path} has {entries} entries: it was deleted or cut off, and going on would write over "
                "receipts. Restore it from a copy; if it is lost, move the receipts elsewhere."
            )

    def _load_weights(self, expected: str) -> None:
        trainer = self.trainer
        logger.warning("The model has the weights from before the last request: loading those in %s.", self.folder)
        with full_weights(trainer), WeightTransaction(model_of(trainer)):
            try:
                trainer._load_from_checkpoint(str(self.folder))
            except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
                raise self._cannot_load() from error
            if weights_fingerprint(model_of(trainer)) != expected:
                raise self._cannot_load()
        self._adopt()

    def _adopt(self) -> None:
        """Take what lies in the folder for the present state."""
        state, private = self.trainer.unlearning_state, self.folder / MEMORY_FOLDER
        state.adopt(private)
        there = weights_on_disk(private)
        state.on_disk |= set() if there is None else {there}

    def _cannot_load(self) -> StorageError:
        return StorageError(
            f"The model has the weights from before the last request in the ledger, and those that it left are not in "
            f"{self.folder}, or could not be loaded from there: load the model that was saved by that request, and "
            "give it to a new trainer. Going on from here would bring the forgotten rows back."
        )

    def _identify(self, memory: GradientMemory | None) -> None:
        """Give a memory that was gathered without a key the rows' identity, while it can still be known."""
        trainer = self.trainer
        if memory is None or (memory.row_identity is not None and not memory.row_identity.of_process):
            return
        earlier, memory.row_identity = memory.row_identity, None
        if trainer.train_dataset is None or (earlier is None and memory.forgotten_rows):
            return
        model = model_of(trainer)
        source = trainer_rows(trainer, trainer.train_dataset, "training rows", 1)
        if memory.data == data_fingerprint(model, source.dataset):
            identity = RowIdentity.of(self._key, model, source.dataset)
            memory.row_identity = identity if earlier is None else replace(identity, forgotten=earlier.forgotten)

    def _check_room(self, memory: GradientMemory | None) -> None:
        model = model_of(self.trainer)
        needed = sum(p.numel() * p.element_size() for p in model.parameters()) + 2**20
        needed += memory.nbytes() if memory is not None else 0

        def check() -> None:
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise StorageError(
                    f"output_dir={self.folder} has {free / 2**20:.0f} MiB free, and the request needs "
                    f"{needed / 2**20:.0f} MiB for weights and memory beside the old ones: nothing was changed. "
                    "Free some."
                )

        run_on_main_process(check, "room on the disk")


def _checked_key(key: Key | str | bytes | None, folder: Path) -> Key:
    if key is None:
        return require_key("DeletionService", folder)
    if isinstance(key, Key):
        return key
    if not isinstance(key, (str, bytes)):
        raise ConfigError(
            f"key is a {type(key).__name__}: give a Key, a secret as str or bytes, or leave it out and set HF_IAU_KEY."
        )
    return Key.from_secret(key, "key")


def _refuse_no_rows(method: str, forget_dataset: Any, forget_indices: Any) -> None:
    if forget_dataset is None and forget_indices is None:
        raise RequestError(f"{method}() was given no rows: pass ids=, forget_indices= or forget_dataset=.")


def _refuse_settings(settings: dict[str, Any]) -> None:
    if settings.get("dry_run"):
        raise RequestError("A deletion request is written, so dry_run=True contradicts it: use trainer.unlearn().")
    for name in ("commit", "save"):
        if name in settings:
            raise RequestError(f"{name}= is no setting of a deletion request, which is always written: leave it out.")


def _tell(output: UnlearnOutput, notes: list[str]) -> None:
    output.report.warnings += notes
    if is_main_process():
        for sentence in notes:
            logger.warning(sentence)


def _fingerprints(rows: NamedRows) -> np.ndarray:
    assert rows.fingerprints is not None
    return rows.fingerprints


def _training_run(memory: GradientMemory | None) -> str:
    """Keyed name of the training run that the memory's rows were part of; "" where it is not known."""
    return "" if memory is None or memory.row_identity is None else memory.row_identity.training_run


def request_name(key: Key, fingerprints: np.ndarray, request_id: str | None = None) -> str:
    """Keyed name of a request, 32 hexadecimal digits: of the caller's name for it, else of its rows in any order."""
    if request_id is not None:
        content = b"named " + request_id.encode()
    else:
        content = b"rows " + b"".join(sorted(row.tobytes() for row in fingerprints))
    return hmac.digest(key.requests, content, "sha256").hex()[:32]


def _last_entry(entries: list[LedgerEntry], name: str, run_name: str, weights: str) -> dict[str, Any] | None:
    """The last entry of that request in that training run."""
    for entry in reversed(entries):
        # Without a memory there is no telling one training run from the next, except by the weights.
        same_run = bool(run_name) and entry.training_run == run_name
        if entry.request == name and (same_run or entry.weights_after == weights):
            return asdict(entry)
    return None


def _report_of(entry: LedgerEntry) -> UnlearningReport:
    """What the ledger still knows of a request that was carried out before."""
    return UnlearningReport(
        method=entry.method,
        config=entry.config,
        seed=entry.outcome.get("seed", 0),
        counts={"forget_rows": entry.rows},
        before=entry.outcome.get("before", {}),
        after=entry.outcome.get("after", {}),
        diagnostics={"calibration": entry.calibration} if entry.calibration else {},
        warnings=[
            f"This request was carried out at {entry.time} already (entry {entry.number} of the ledger): nothing was "
            "changed. To have another copy of the same rows forgotten, give it a request_id of its own."
        ],
        versions=entry.versions,
        verdict=entry.outcome.get("verdict"),
        calibrated=entry.outcome.get("calibrated"),
    )
