"""Serving a request so that weights, memory and ledger have it wholly and once, or not at all."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
from filelock import FileLock, Timeout

from hf_iau.data.trainer_rows import model_of, trainer_rows
from hf_iau.deletion.journal import JOURNAL_NAME, Journal, JournalFile
from hf_iau.deletion.journaled_method import JournaledMethod
from hf_iau.deletion.ledger import LEDGER_NAME, Ledger, LedgerEntry
from hf_iau.deletion.milestones import passed
from hf_iau.deletion.queue import RequestQueue
from hf_iau.deletion.storage import RequestStorage, full_weights, storage_errors
from hf_iau.deletion.termination import Termination
from hf_iau.distributed import is_main_process, run_on_main_process
from hf_iau.errors import MissingMemoryError, RequestError, StorageError
from hf_iau.memory.fingerprints import data_fingerprint, weights_fingerprint
from hf_iau.memory.keys import Key, require_key
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.memory_files import MEMORY_FOLDER
from hf_iau.memory.row_identity import FINGERPRINT_BYTES, RowIdentity, keyed_fingerprints
from hf_iau.methods.context import ForgetContext
from hf_iau.report.report import UnlearningReport
from hf_iau.unlearn.rows import requested_rows
from hf_iau.unlearn.transaction import WeightTransaction
from hf_iau.utils.atomic_files import PRIVATE_FOLDER
from hf_iau.utils.jsonable import jsonable

if TYPE_CHECKING:
    from hf_iau.trainer.unlearning_trainer import UnlearningTrainer

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"


class RequestService:
    """Serves the requests of one trainer into its `output_dir`.

    A request is written beside what is there, flushed, sealed in a journal and only then moved into place. Until the
    journal is sealed a crash leaves the old state; from then on the new one, which the next request (or the next look at
    the memory) finishes moving. Only the main process writes.

    Args:
        trainer: whose model, memory and `output_dir` it is.

    Raises:
        ConfigError: there is no key.
    """

    def __init__(self, trainer: UnlearningTrainer) -> None:
        self.trainer = trainer
        self.folder = Path(trainer.args.output_dir or ".")
        self.key = require_key("unlearn(save=True)", self.folder)
        self.ledger = Ledger(self.folder / MEMORY_FOLDER / LEDGER_NAME, self.key)
        self.journal = JournalFile(self.folder, self.key)
        self.queue = RequestQueue(self.folder, self.key)
        self.storage = RequestStorage(trainer, self.folder, self.journal, self.ledger, self.queue)

    def serve(
        self,
        run: Callable[..., Any],
        forget_dataset: Any,
        forget_indices: Any,
        method: Any,
        config: Mapping[str, Any],
        request_id: str | None,
    ) -> tuple[LedgerEntry | None, Any]:
        """Serve a request once.

        Args:
            run: `run(method, keep)`: the trainer's own serving, with the method to use and what keeps the result.
            forget_dataset, forget_indices: the rows, as given.
            method: as found.
            config: its settings as a mapping, for the records.
            request_id: the caller's name for the request, or None.

        Returns:
            The ledger's entry, and what `run` returned, or None if the request was served before.

        Raises:
            RequestError: another request is being served, or `request_id` was served before, for other rows.
            StorageError: it could not be written; everything is as before.
        """
        trainer = self.trainer
        rows, _ = requested_rows(trainer.train_dataset, forget_dataset, forget_indices)
        if len(rows) == 0:
            return None, run(method, None)
        with Termination() as termination, self.alone():
            passed("locked")
            interrupted = self.recover()
            entries = self._catch_up()
            model = model_of(trainer)
            memory = trainer.memory
            self._identify(memory)
            identity = None if memory is None else memory.row_identity
            fingerprints = keyed_fingerprints(self.key, model, rows)
            name = request_name(self.key, fingerprints, request_id)
            run_name = "" if identity is None else identity.training_run
            before = weights_fingerprint(model)
            found = run_on_main_process(lambda: _served_before(entries, name, run_name, before), "the ledger")
            if found is not None:
                entry = LedgerEntry(**found)
                if sorted(entry.row_ids) != sorted(row.tobytes().hex() for row in fingerprints):
                    raise RequestError(
                        f"request_id={request_id!r} names a request of {entry.rows} rows that was served at {entry.time}, "
                        f"and the {len(rows)} rows given now are others: nothing was computed, and they are not "
                        "forgotten. Give them a request_id of their own, or leave it out."
                    )
                return entry, None
            self._check_room(memory)
            journal = Journal(
                request=name,
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                rows=len(rows),
                method=method.name,
                config=jsonable(config),
                weights_before=before,
                rows_name=request_name(self.key, fingerprints),
            )
            journaled = JournaledMethod(method, journal, self._found_before(interrupted, journal), self._note)
            kept: list[LedgerEntry] = []

            def keep(context: ForgetContext, newer: GradientMemory | None, report: UnlearningReport, card: Any) -> None:
                started = time.perf_counter()
                stored = run_on_main_process(
                    lambda: asdict(
                        self.storage.write(
                            journaled.journal, run_name, fingerprints, context, newer, report, card, termination
                        )
                    ),
                    "writing the request",
                )
                kept.append(LedgerEntry(**stored))
                report.seconds["save"] = time.perf_counter() - started

            output = run(journaled, keep)
        return kept[0], output

    def answer(self, forget_indices: Any, request_id: str | None) -> LedgerEntry | None:
        """The entry of a request of these rows that was served before, or of that name and some of these rows; else None.

        Args:
            forget_indices: numbers of rows that are all out by now.
            request_id: the caller's name for the request, or None.
        """
        rows, _ = requested_rows(self.trainer.train_dataset, None, forget_indices)
        with self.alone():
            self.recover()
            entries = self._catch_up()
            model, memory = model_of(self.trainer), self.trainer.memory
            identity = None if memory is None else memory.row_identity
            run_name = "" if identity is None else identity.training_run
            fingerprints = keyed_fingerprints(self.key, model, rows)
            name, weights = request_name(self.key, fingerprints, request_id), weights_fingerprint(model)
            found = run_on_main_process(lambda: _served_before(entries, name, run_name, weights), "the ledger")
        if found is None:
            return None
        entry = LedgerEntry(**found)
        others = Counter(entry.row_ids) - Counter(row.tobytes().hex() for row in fingerprints)
        return None if others else entry

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the lock of the output directory.

        Raises:
            RequestError: another request holds it.
            StorageError: the directory cannot be written to.
        """
        private = self.folder / MEMORY_FOLDER
        lock = FileLock(private / LOCK_NAME, timeout=0, mode=0o600)

        def acquire() -> None:
            try:
                private.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
                lock.acquire()
                if not os.access(self.folder, os.W_OK) or not os.access(private, os.W_OK):
                    raise PermissionError("no permission to write")
                if os.stat(self.folder).st_dev != os.stat(private).st_dev:
                    raise OSError(f"{private} lies on another file system, so files cannot be moved into place at once")
            except Timeout as error:
                raise RequestError(
                    f"Another request is being served in {self.folder} (it holds {private / LOCK_NAME}): wait until it "
                    "has ended, then run this one again."
                ) from error
            except OSError as error:
                raise StorageError(
                    f"output_dir={self.folder} cannot be written to ({error}): nothing was changed. Give a directory that "
                    "can."
                ) from error

        try:
            run_on_main_process(acquire, "the lock of the output directory")
            yield
        finally:
            lock.release()

    def recover(self) -> Journal | None:
        """Finish a request that was committed but not moved into place; tidy up after one that was not committed.

        To be called with the lock held. A model that still has the old weights gets the new ones.

        Returns:
            The journal of a request that was not committed, if there is one.
        """

        def tidy() -> dict[str, Any] | None:
            journal = self.journal.read()
            with storage_errors("An interrupted request was committed, but could not be moved into place", True):
                if journal is None or not journal.ready:
                    self.journal.clear_staged()
                else:
                    self.journal.finish(journal)
            return None if journal is None else asdict(journal)

        found = run_on_main_process(tidy, "finishing an interrupted request")
        journal = None if found is None else Journal(**found)
        if journal is None or not journal.ready:
            return journal
        logger.warning(
            "A request of %d rows, begun at %s, had been interrupted after it was committed; it is finished now.",
            journal.rows,
            journal.time,
        )
        trainer = self.trainer
        model = model_of(trainer)
        if weights_fingerprint(model) == journal.weights_before:
            self._load_weights(journal.weights_after)
        elif weights_fingerprint(model) == journal.weights_after:
            trainer.unlearning_state.adopt(self.folder / MEMORY_FOLDER)
        return None

    def _catch_up(self) -> list[LedgerEntry]:
        """Give a model from before the last request, which would undo it when saved, the weights that it left.

        Returns:
            The ledger's entries, on the main process.
        """
        entries: list[LedgerEntry] = []

        def read() -> dict[str, Any] | None:
            entries[:] = self.ledger.entries()
            return asdict(entries[-1]) if entries else None

        last = run_on_main_process(read, "the ledger")
        if last is not None and last["weights_before"] != last["weights_after"]:
            if weights_fingerprint(model_of(self.trainer)) == last["weights_before"]:
                self._load_weights(last["weights_after"])
        return entries

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
        trainer.unlearning_state.adopt(self.folder / MEMORY_FOLDER)

    def _cannot_load(self) -> StorageError:
        return StorageError(
            f"The model has the weights from before the last request in the ledger, and those that it left are not in "
            f"{self.folder}, or could not be loaded from there: load the model that was saved by that request, and give it "
            "to a new trainer. Serving on from here would bring the forgotten rows back."
        )

    # --- queue ------------------------------------------------------------------------------------------------------

    def enqueue(self, forget_dataset: Any, forget_indices: Any) -> int:
        """Add rows to the queue: none that waits there already, and no more copies of a row than are still in.

        A row number that waits is not added again. Rows that are given by their content add a further copy as long as
        there is one.

        Returns:
            How many rows wait now.

        Raises:
            UnknownRowsError: rows that were never trained on.
            AlreadyForgottenError: rows that are out already.
        """
        rows, positions = requested_rows(self.trainer.train_dataset, forget_dataset, forget_indices)
        with self.alone():
            self.recover()
            identity = self._known_rows()
            fingerprints = keyed_fingerprints(self.key, model_of(self.trainer), rows)
            identity.check_request(fingerprints)

            def add() -> list[int]:
                before = self.queue.read()
                after = before.with_asked(self.queue.asked(fingerprints, positions), identity)
                with storage_errors("The rows could not be queued"):
                    self.queue.write(after)
                return [len(after), len(after) - int(identity.still_in(before.fingerprints).sum())]

            waiting, added = run_on_main_process(add, "the queue")
        if added < len(rows) and is_main_process():
            logger.warning(
                "%d of the %d rows wait in the queue already and were not queued again.", len(rows) - added, len(rows)
            )
        return int(waiting)

    def queued_positions(self) -> np.ndarray:
        """Numbers in `train_dataset` of the rows that wait, int64."""
        with self.alone():
            self.recover()
            identity = self._known_rows()

            def read() -> list[list[int]]:
                waiting = self.queue.read().fingerprints
                return waiting[identity.still_in(waiting)].tolist()

            waiting = run_on_main_process(read, "the queue")
            return identity.positions(np.asarray(waiting, dtype=np.uint8).reshape(-1, FINGERPRINT_BYTES))

    def _known_rows(self) -> RowIdentity:
        memory = self.trainer.memory
        self._identify(memory)
        if memory is None or memory.row_identity is None:
            raise MissingMemoryError(
                "The queue names rows by their fingerprints, and the memory holds none: gather with HF_IAU_KEY set."
            )
        memory.row_identity.check_key(self.key)
        return memory.row_identity

    # --- before -----------------------------------------------------------------------------------------------------

    def _identify(self, memory: GradientMemory | None) -> None:
        """Give a memory that was gathered without a key the rows' identity, while it can still be known."""
        trainer = self.trainer
        if memory is None or memory.row_identity is not None or memory.forgotten_rows or trainer.train_dataset is None:
            return
        model = model_of(trainer)
        source = trainer_rows(trainer, trainer.train_dataset, "training rows", 1)
        if memory.data == data_fingerprint(model, source.dataset):
            memory.row_identity = RowIdentity.of(self.key, model, source.dataset)

    def _found_before(self, interrupted: Journal | None, journal: Journal) -> dict[str, Any] | None:
        """k, λ and c that the same request had found before it was interrupted."""
        if interrupted is None:
            return None
        if interrupted.request != journal.request:
            logger.warning(
                "A request of %d rows, begun at %s, was interrupted before it was committed, and is not served: run it "
                "again.",
                interrupted.rows,
                interrupted.time,
            )
            return None

        def made_with(one: Journal) -> tuple[Any, ...]:
            return one.rows_name, one.method, one.config, one.weights_before

        return interrupted.step if made_with(interrupted) == made_with(journal) else None

    def _check_room(self, memory: GradientMemory | None) -> None:
        model = model_of(self.trainer)
        needed = sum(p.numel() * p.element_size() for p in model.parameters()) + 2**20
        needed += memory.nbytes() if memory is not None else 0

        def look() -> None:
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise StorageError(
                    f"output_dir={self.folder} has {free / 2**20:.0f} MiB free, and the request needs "
                    f"{needed / 2**20:.0f} MiB for weights and memory beside the old ones: nothing was changed. Free some."
                )

        run_on_main_process(look, "room on the disk")

    def _note(self, journal: Journal) -> None:
        def write() -> None:
            with storage_errors("The request could not be noted in the journal"):
                self.journal.write(journal)

        run_on_main_process(write, "the journal")


def request_name(key: Key, fingerprints: np.ndarray, request_id: str | None = None) -> str:
    """Keyed name of a request, 32 hexadecimal digits: of the caller's own name for it, else of its rows in any order."""
    if request_id is not None:
        content = b"named " + request_id.encode()
    else:
        content = b"rows " + b"".join(sorted(row.tobytes() for row in fingerprints))
    return hmac.digest(key.requests, content, "sha256").hex()[:32]


def _served_before(entries: list[LedgerEntry], name: str, run_name: str, weights: str) -> dict[str, Any] | None:
    """The last entry of that request in that training run."""
    for entry in reversed(entries):
        # Without a memory there is no telling one training run from the next, except by the weights.
        if (entry.request, entry.training_run) == (name, run_name) and (run_name or entry.weights_after == weights):
            return asdict(entry)
    return None


def report_of(entry: LedgerEntry) -> UnlearningReport:
    """What the ledger still knows of a request that was served before."""
    return UnlearningReport(
        method=entry.method,
        config=entry.config,
        seed=entry.outcome.get("seed", 0),
        counts={"forget_rows": entry.rows},
        before=entry.outcome.get("before", {}),
        after=entry.outcome.get("after", {}),
        diagnostics={"calibration": entry.calibration} if entry.calibration else {},
        warnings=[
            f"This request was served at {entry.time} already (entry {entry.number} of the ledger): nothing was changed. "
            "To have another copy of the same rows forgotten, give it a request_id of its own."
        ],
        versions=entry.versions,
        verdict=entry.outcome.get("verdict"),
        calibrated=entry.outcome.get("calibrated"),
    )


def finish_interrupted_request(trainer: UnlearningTrainer) -> None:
    """Finish a request that a crash kept from being moved into place, before the memory on disk is read."""
    if not (Path(trainer.args.output_dir or ".") / MEMORY_FOLDER / JOURNAL_NAME).is_file():
        return
    service = RequestService(trainer)
    journal = service.journal.read()
    if journal is None or not journal.ready:
        return
    with service.alone():
        service.recover()
