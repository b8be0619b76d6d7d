"""Small requests waiting for company: keyed row names on disk, served together."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hf_iau.errors import StorageError
from hf_iau.remember.files import PRIVATE_FOLDER, write_text_atomically
from hf_iau.remember.keys import Key
from hf_iau.remember.memory import MEMORY_FOLDER
from hf_iau.remember.row_identity import FINGERPRINT_BYTES, RowIdentity

QUEUE_NAME = "queue.json"
_MAX_BYTES = 256 * 2**20


@dataclass(frozen=True)
class RequestQueue:
    """Rows that are to be forgotten with the next request, as keyed fingerprints, oldest first.

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

    def read(self) -> np.ndarray:
        """Keyed fingerprints of the waiting rows, uint8, `(m, 16)`.

        Raises:
            StorageError: the file was damaged or edited, or made with another key.
        """
        try:
            if self.path.stat().st_size > _MAX_BYTES:
                raise ValueError("too large")
            values = json.loads(self.path.read_bytes().decode("utf-8"))
            rows = values["rows"]
            if not hmac.compare_digest(str(values["seal"]).encode(), self._seal(rows).encode()):
                raise ValueError("its seal is not that of its content, or was made with another key")
            content = b"".join(bytes.fromhex(row) for row in rows)
        except FileNotFoundError:
            content = b""
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise StorageError(
                f"The queue {self.path} is not readable ({error}). Set the key that it was made with; if it is damaged, "
                "delete it and queue the requests again."
            ) from error
        return np.frombuffer(bytearray(content), dtype=np.uint8).reshape(-1, FINGERPRINT_BYTES)

    def write(self, waiting: np.ndarray, path: Path | None = None) -> None:
        """Write the queue, flushed to disk.

        Args:
            waiting: keyed fingerprints, uint8, `(m, 16)`.
            path: another file than the queue's own.
        """
        path = path or self.path
        path.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        rows = [row.tobytes().hex() for row in waiting]
        text = json.dumps({"rows": rows, "seal": self._seal(rows)})
        write_text_atomically(path, text)

    def left(self, identity: RowIdentity) -> np.ndarray:
        """The waiting rows that are still in, after a request that left `identity`."""
        waiting = self.read()
        return waiting[identity.still_in(waiting)]

    def _seal(self, rows: Sequence[str]) -> str:
        return hmac.digest(self.key.requests, f"queue {json.dumps(rows)}".encode(), "sha256").hex()
