"""Small requests waiting for company: keyed row names on disk, forgotten together."""

from __future__ import annotations

import hmac
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hf_iau.errors import StorageError
from hf_iau.memory.keys import Key
from hf_iau.memory.memory_files import MEMORY_FOLDER
from hf_iau.memory.row_identity import FINGERPRINT_BYTES, RowIdentity
from hf_iau.utils.atomic_files import PRIVATE_FOLDER, write_text_atomically

QUEUE_NAME = "queue.json"
_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True, eq=False)
class WaitingRows:
    """Rows in the queue, oldest first.

    Attributes:
        fingerprints: keyed fingerprints of their content, uint8, `(m, 16)`.
        named: keyed names of the row numbers that they were asked for by, "" where they were asked for by content.
    """

    fingerprints: np.ndarray
    named: list[str]

    def __len__(self) -> int:
        return len(self.fingerprints)

    def select(self, kept: np.ndarray) -> WaitingRows:
        """The rows for which `kept` (bool, `(m,)`) is true."""
        return WaitingRows(self.fingerprints[kept], [name for name, keep in zip(self.named, kept, strict=True) if keep])

    def with_asked(self, asked: WaitingRows, identity: RowIdentity) -> WaitingRows:
        """These rows and those `asked` for: no row number twice, and no more copies of a row than are still in."""
        new = asked.select(np.asarray([not name or name not in self.named for name in asked.named], dtype=bool))
        both = WaitingRows(np.concatenate([self.fingerprints, new.fingerprints]), self.named + new.named)
        return both.select(identity.still_in(both.fingerprints))

    def without_finished(self, finished: np.ndarray, identity: RowIdentity) -> WaitingRows:
        """The rows that wait on after a request.

        Args:
            finished: keyed fingerprints of the request's rows, each of which takes one waiting copy along.
            identity: of the training rows after the request.
        """
        gone = Counter(row.tobytes() for row in finished)
        kept = np.ones(len(self), dtype=bool)
        for i, row in enumerate(self.fingerprints):
            if gone[row.tobytes()] > 0:
                gone[row.tobytes()] -= 1
                kept[i] = False
        left = self.select(kept)
        return left.select(identity.still_in(left.fingerprints))


@dataclass(frozen=True)
class RequestQueue:
    """Rows that are to be forgotten with the next request, as keyed fingerprints and keyed row numbers.

    Args:
        output_dir: the directory that holds weights and `_iau/`.
        key: seals the file, so that nobody else can have rows forgotten.
    """

    output_dir: Path
    key: Key = field(repr=False)

    @property
    def path(self) -> Path:
        """The queue's file."""
        return self.output_dir / MEMORY_FOLDER / QUEUE_NAME

    def read(self) -> WaitingRows:
        """The rows that wait.

        Raises:
            StorageError: the file was damaged or edited, or made with another key.
        """
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                raise ValueError("too large")
            values = json.loads(self.path.read_bytes().decode("utf-8"))
            rows, named = values["rows"], values["named"]
            if not hmac.compare_digest(str(values["seal"]).encode(), self._seal(rows, named).encode()):
                raise ValueError("its seal is not that of its content, or was made with another key")
            if len(rows) != len(named):
                raise ValueError("rows and their names differ in number")
            content = b"".join(bytes.fromhex(row) for row in rows)
        except FileNotFoundError:
            content, named = b"", []
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise StorageError(
                f"The queue {self.path} is not readable ({error}). Set the key that it was made with; if it is "
                "damaged, delete it and queue the requests again."
            ) from error
        return WaitingRows(np.frombuffer(bytearray(content), dtype=np.uint8).reshape(-1, FINGERPRINT_BYTES), named)

    def write(self, waiting: WaitingRows, path: Path | None = None) -> None:
        """Write the queue, flushed to disk.

        Args:
            waiting: all rows that wait.
            path: another file than the queue's own.
        """
        path = path or self.path
        path.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        rows = [row.tobytes().hex() for row in waiting.fingerprints]
        text = json.dumps({"rows": rows, "named": waiting.named, "seal": self._seal(rows, waiting.named)})
        write_text_atomically(path, text)

    def asked(self, fingerprints: np.ndarray, positions: np.ndarray | None) -> WaitingRows:
        """Rows of a request as they would wait.

        Args:
            fingerprints: keyed fingerprints of their content, uint8, `(m, 16)`.
            positions: their row numbers, int64 `(m,)`, where they were asked for by these.
        """
        if positions is None:
            return WaitingRows(fingerprints, [""] * len(fingerprints))
        return WaitingRows(
            fingerprints, [self._keyed(f"row {number}")[: 2 * FINGERPRINT_BYTES] for number in positions.tolist()]
        )

    def _seal(self, rows: Sequence[str], named: Sequence[str]) -> str:
        return self._keyed(json.dumps([rows, named]))

    def _keyed(self, content: str) -> str:
        return hmac.digest(self.key.requests, f"queue {content}".encode(), "sha256").hex()
