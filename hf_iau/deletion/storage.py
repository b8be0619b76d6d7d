"""Writing what a request came to: everything beside what is there, then moved into place."""

from __future__ import annotations

import contextlib
import dataclasses
import filecmp
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from transformers import Trainer

from hf_iau.data.trainer_rows import model_of
from hf_iau.deletion.journal import Journal, JournalFile
from hf_iau.deletion.ledger import LEDGER_NAME, Ledger, LedgerEntry
from hf_iau.deletion.queue import QUEUE_NAME, RequestQueue
from hf_iau.deletion.receipt import render_receipt, render_receipt_html
from hf_iau.deletion.termination import Termination
from hf_iau.distributed import full_parameters
from hf_iau.errors import IAUError, StorageError
from hf_iau.memory.fingerprints import package_versions, weights_fingerprint
from hf_iau.memory.memory_files import MEMORY_FOLDER, MEMORY_HEADER, is_memory_file
from hf_iau.unlearn.record import FinishedRequest, UnlearnRecord
from hf_iau.utils.atomic_files import PRIVATE_FOLDER, file_digest, write_text_atomically
from hf_iau.utils.jsonable import jsonable

RECEIPT_FOLDER = "receipts"
_INDEX = "model.safetensors.index.json"


class RequestStorage:
    """Writes requests into one `output_dir`. All of it runs on the main process.

    Args:
        trainer: whose weights they are.
        folder: the `output_dir`.
        journal, ledger, queue: those that lie there.
    """

    def __init__(
        self, trainer: Trainer, folder: Path, journal: JournalFile, ledger: Ledger, queue: RequestQueue
    ) -> None:
        self._trainer, self._folder = trainer, folder
        self._journal, self._ledger, self._queue = journal, ledger, queue

    def write(
        self,
        journal: Journal,
        run_name: str,
        request: FinishedRequest,
        termination: Termination,
    ) -> LedgerEntry:
        """Write everything beside what is there, then move it into place.

        Args:
            journal: of the request, without what is only known once it is staged.
            run_name: keyed name of the training run.
            request: with the changed weights, and the keyed fingerprints of its rows.
            termination: is deferred from where the old state is no more.

        Raises:
            StorageError: it could not be written, or not be moved into place.
        """
        context, memory, fingerprints = request.context, request.memory, request.context.fingerprints
        assert fingerprints is not None
        staged = self._journal.staged
        private = staged / MEMORY_FOLDER
        try:
            with storage_errors("The request could not be written"):
                self._journal.clear_staged()
                for folder in (staged, private):
                    folder.mkdir(mode=PRIVATE_FOLDER)
                self._stage_weights(staged)
                if memory is not None:
                    memory.save(private)
                request.card.save(private, context.model)
                if memory is not None and memory.row_identity is not None and self._queue.path.exists():
                    waiting = self._queue.read().without_finished(fingerprints, memory.row_identity)
                    self._queue.write(waiting, private / QUEUE_NAME)
                after = weights_fingerprint(context.model)
                weights, removed = self._weight_files(journal.request)
                digests = {name: file_digest(staged / name) for name in weights if name.endswith(".safetensors")}
                entry = self._stage_entry(journal, run_name, fingerprints, after, request.record, private, digests)
                files = [*weights, *self._private_files()]
                for name in files:
                    _flush(staged / name)
                removed += self._outlived(files)
                # From here to the end SIGTERM waits: the old state is no more, and the new one not yet in place.
                termination.deferred = True
                journal = dataclasses.replace(journal, weights_after=after, files=files, removed=removed)
                self._journal.seal(journal)
            with storage_errors("The request was committed, but could not be moved into place", committed=True):
                self._journal.finish(journal)
            return entry
        except BaseException:
            with contextlib.suppress(IAUError):
                if self._journal.read() is None:
                    termination.deferred = False
                    self._journal.clear_staged()
            raise

    def _stage_weights(self, staged: Path) -> None:
        try:
            with full_weights(self._trainer):
                Trainer.save_model(self._trainer, str(staged), _internal_call=True)
        except RuntimeError as error:  # torch's own writer, on a full disk
            raise OSError(str(error)) from error

    def _stage_entry(
        self,
        journal: Journal,
        run_name: str,
        fingerprints: np.ndarray,
        after: str,
        record: UnlearnRecord,
        private: Path,
        files: dict[str, str],
    ) -> LedgerEntry:
        entry, text = self._ledger.extended(
            request=journal.request,
            training_run=run_name,
            rows=len(fingerprints),
            row_ids=[row.tobytes().hex() for row in fingerprints],
            method=record.method,
            config=record.config,
            calibration=None if record.step is None else record.step.values,
            weights_before=journal.weights_before,
            weights_after=after,
            outcome=jsonable(
                {
                    "before": record.before,
                    "after": record.after,
                    "seed": record.seed,
                    "verdict": record.verdict,
                    "calibrated": record.calibrated,
                    "multi_step": record.step is not None and record.step.values is None,
                    "step_norm": record.effect.step_norm,
                    "relative_step_norm": record.effect.relative_step_norm,
                    "budget": None if record.budget is None else record.budget.to_dict(),
                }
            ),
            versions=record.versions or package_versions(),
            files=files,
        )
        write_text_atomically(private / LEDGER_NAME, text)
        receipt = private / RECEIPT_FOLDER / f"{entry.number:05d}"
        receipt.parent.mkdir(mode=PRIVATE_FOLDER)
        write_text_atomically(receipt.with_suffix(".md"), render_receipt(entry))
        write_text_atomically(receipt.with_suffix(".html"), render_receipt_html(entry))
        return entry

    def _weight_files(self, request: str) -> tuple[list[str], list[str]]:
        """Staged files of the model in the order in which they are moved, and older ones that are to go.

        A single file of weights is replaced at once. Several get names of their own, and the index that names them is
        replaced at once, so that no reader ever finds old and new weights together.
        """
        staged = self._journal.staged
        removed: list[str] = []
        index = staged / _INDEX
        if index.is_file():
            values = json.loads(index.read_text(encoding="utf-8"))
            shards = sorted(set(values["weight_map"].values()))
            renamed = {name: name.replace("model-", f"model-{request[:8]}-", 1) for name in shards}
            for name, new in renamed.items():
                (staged / name).rename(staged / new)
            values["weight_map"] = {key: renamed[name] for key, name in values["weight_map"].items()}
            index.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            first = [*renamed.values(), _INDEX]
            removed = [path.name for path in self._folder.glob("model*.safetensors") if path.name not in first]
        else:
            first = sorted(path.name for path in staged.glob("*.safetensors"))
        others = sorted(path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file())
        others = [name for name in others if not name.startswith(f"{MEMORY_FOLDER}/") and name not in first]
        changed = []
        for name in others:
            target = self._folder / name
            # PEFT writes a model card of its own, which would replace the one that is there.
            if target.is_file() and (name == "README.md" or filecmp.cmp(staged / name, target, shallow=False)):
                continue
            changed.append(name)
        return first + changed, removed

    def _private_files(self) -> list[str]:
        """Staged files below `_iau/`: tensors before the header that names them."""
        staged = self._journal.staged
        names = [path.relative_to(staged).as_posix() for path in (staged / MEMORY_FOLDER).rglob("*") if path.is_file()]
        return sorted(names, key=lambda name: (not is_memory_file(Path(name).name), name))

    def _outlived(self, files: list[str]) -> list[str]:
        """Files of an older memory, of which no copy is to be left."""
        private = self._folder / MEMORY_FOLDER
        older = [path for path in private.iterdir() if is_memory_file(path.name)]
        if f"{MEMORY_FOLDER}/{MEMORY_HEADER}" not in files:  # no memory describes the new weights
            older.append(private / MEMORY_HEADER)
        names = [path.relative_to(self._folder).as_posix() for path in older]
        return [name for name in names if name not in files]


@contextlib.contextmanager
def full_weights(trainer: Any) -> Iterator[None]:
    """Inside, the weights are whole in every process, and the Trainer writes and reads them as it does in one."""
    with full_parameters(model_of(trainer)):
        sharded, trainer.is_fsdp_enabled = trainer.is_fsdp_enabled, False
        try:
            yield
        finally:
            trainer.is_fsdp_enabled = sharded


@contextlib.contextmanager
def storage_errors(what: str, committed: bool = False) -> Iterator[None]:
    """Errors of the file system as a `StorageError` that says what is left."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        left = (
            "mend the cause and run any request again, which finishes it"
            if committed
            else "weights, memory and ledger are as they were before; mend the cause and run the request again"
        )
        raise StorageError(f"{what} ({type(error).__name__}: {error}): {left}.") from error


def _flush(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
