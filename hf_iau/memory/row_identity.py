"""Which rows were trained on, and which of them were forgotten: keyed fingerprints, never the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_iau.data.digests import row_digests
from hf_iau.data.targets import input_columns
from hf_iau.errors import AlreadyForgottenError, MemoryFileError, MemoryMismatchError, UnknownRowsError
from hf_iau.memory.fingerprints import weights_fingerprint
from hf_iau.memory.keys import Key, process_key

FINGERPRINT_BYTES = 16
# Candidates are found by the first 22 bits of a fingerprint, through a table of 4 MiB.
_TABLE_BITS = 22


@dataclass(frozen=True, eq=False)
class RowIdentity:
    """Keyed fingerprints of the training rows, in their order, and which of them are out.

    Identical rows have identical fingerprints: the rows are a multiset, in which copies are counted. Without the key
    nobody can tell which row a fingerprint belongs to; with it, anybody who guesses a row can. So fingerprints are
    pseudonymous personal data.

    Attributes:
        fingerprints: uint8, shape `(rows, 16)`.
        forgotten: bool, shape `(rows,)`.
        key_check: of the key that they were made with.
        training_run: name of the training run, from the key and the weights that it ended with.
    """

    fingerprints: np.ndarray
    forgotten: np.ndarray
    key_check: str
    training_run: str

    @classmethod
    def of(cls, key: Key, model: nn.Module, dataset: Any) -> RowIdentity:
        """The identity of all rows of `dataset`, none of them forgotten: one pass that reads every row.

        Args:
            key: the key of the fingerprints.
            model: the trained model; columns that it does not take do not count.
            dataset: the training rows.
        """
        return cls(
            keyed_fingerprints(key, model, dataset),
            np.zeros(len(dataset), dtype=bool),
            key.check,
            key.fingerprint(b"training run " + weights_fingerprint(model).encode()).hex(),
        )

    def __len__(self) -> int:
        return len(self.fingerprints)

    @property
    def of_process(self) -> bool:
        """Whether the key is this process's own, so that nothing is kept of the fingerprints when it ends."""
        return self.key_check == process_key().check

    def check_key(self, key: Key) -> None:
        """Raise `MemoryMismatchError` unless `key` is the one that the fingerprints were made with."""
        if key.check != self.key_check:
            raise MemoryMismatchError(
                f"The row fingerprints were made with key {self.key_check} but HF_IAU_KEY is key {key.check}: with it, "
                "no row would be recognised. Set the key that was set when the memory was gathered."
            )

    def copies(self, requested: np.ndarray) -> dict[bytes, tuple[int, int]]:
        """Training rows with each fingerprint in `requested` (uint8, `(m, 16)`), and how many of them are forgotten."""
        places_of = self._positions(requested)
        return {name: (len(places), int(self.forgotten[places].sum())) for name, places in places_of.items()}

    def check_request(
        self, requested: np.ndarray, positions: np.ndarray | None = None, again_allowed: bool = False
    ) -> None:
        """Raise unless every row of a request was trained on and is still in.

        Args:
            requested: keyed fingerprints of the request's rows, uint8, `(m, 16)`.
            positions: their row numbers, where they were named so: then it is these very copies that count.
            again_allowed: rows may be out already.

        Raises:
            UnknownRowsError: rows that were never trained on.
            AlreadyForgottenError: rows of which every copy is forgotten, or fewer are left than the request holds.
        """
        wanted = Counter(row.tobytes() for row in requested)
        copies = self.copies(requested)
        unknown = [i for i, row in enumerate(requested) if copies[row.tobytes()][0] == 0]
        if unknown:
            raise UnknownRowsError(
                f"{len(unknown)} of the {len(requested)} rows were never trained on in the run that the memory is of, "
                f"e.g. the one at position {unknown[0]}. Leave them out; or look whether they were preprocessed like "
                "the training rows; or, if the model had them in an earlier run, gather from the rows of both."
            )
        gone = 0
        if positions is not None:
            gone = int(self.forgotten[positions].sum())
        for name, count in wanted.items() if positions is None else ():
            trained, forgotten = copies[name]
            gone += min(forgotten, max(0, count - (trained - forgotten)))
        if gone and not again_allowed:
            raise AlreadyForgottenError(
                f"{gone} of the {len(requested)} rows were already forgotten by an earlier request: leave them out."
            )

    def still_in(self, requested: np.ndarray) -> np.ndarray:
        """Which rows of a request are still in (bool, `(m,)`): of several copies, as many as are left."""
        left = {name: trained - gone for name, (trained, gone) in self.copies(requested).items()}
        still_in = np.zeros(len(requested), dtype=bool)
        for i, row in enumerate(requested):
            name = row.tobytes()
            still_in[i] = left[name] > 0
            left[name] -= 1
        return still_in

    def positions(self, requested: np.ndarray) -> np.ndarray:
        """A row number in the training set for each row that is requested, no number twice; rows still in come first.

        Raises:
            UnknownRowsError: a row has fewer copies than were requested.
        """
        places = {
            name: sorted(positions, key=lambda i: (bool(self.forgotten[i]), i), reverse=True)
            for name, positions in self._positions(requested).items()
        }
        chosen = []
        for i, row in enumerate(requested):
            free = places[row.tobytes()]
            if not free:
                raise UnknownRowsError(f"The row at position {i} was never trained on, or less often than asked for.")
            chosen.append(free.pop())
        return np.asarray(chosen, dtype=np.int64)

    def without(self, requested: np.ndarray, positions: np.ndarray | None = None) -> RowIdentity:
        """The identity after a request: one copy more is forgotten for each row in `requested`.

        Args:
            requested: keyed fingerprints of the request's rows.
            positions: their row numbers, where the request named them so: then it is these that are marked.
        """
        forgotten = self.forgotten.copy()
        if positions is not None:
            forgotten[positions] = True
            return replace(self, forgotten=forgotten)
        left = Counter(row.tobytes() for row in requested)
        for name, places in self._positions(requested).items():
            free = [i for i in places if not forgotten[i]]
            forgotten[free[: left[name]]] = True
        return replace(self, forgotten=forgotten)

    def _positions(self, requested: np.ndarray) -> dict[bytes, list[int]]:
        positions: dict[bytes, list[int]] = {row.tobytes(): [] for row in requested}
        if not positions or not len(self):
            return positions
        table = np.zeros(1 << _TABLE_BITS, dtype=bool)
        table[_heads(requested)] = True
        for i in np.flatnonzero(table[_heads(self.fingerprints)]).tolist():
            name = self.fingerprints[i].tobytes()
            if name in positions:
                positions[name].append(i)
        return positions

    # --- files ----------------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What is written into the memory's tensor file."""
        return {
            "row_identity.fingerprints": torch.from_numpy(np.ascontiguousarray(self.fingerprints)),
            "row_identity.forgotten": torch.from_numpy(self.forgotten.astype(np.uint8)),
        }

    def metadata(self) -> dict[str, str]:
        """What is written into the memory's header."""
        return {"key_check": self.key_check, "training_run": self.training_run}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], metadata: Any) -> RowIdentity:
        """The identity that was written, after checking every part of it.

        Raises:
            MemoryFileError: a tensor is missing, of another type or shape, or the metadata are malformed.
        """
        fingerprints = tensors.get("row_identity.fingerprints")
        forgotten = tensors.get("row_identity.forgotten")
        if fingerprints is None or forgotten is None:
            raise MemoryFileError("The memory says that it has row fingerprints but holds none: it is corrupt.")
        rows = fingerprints.shape[0] if fingerprints.ndim else -1
        for name, tensor, shape in (
            ("fingerprints", fingerprints, (rows, FINGERPRINT_BYTES)),
            ("forgotten", forgotten, (rows,)),
        ):
            if tensor.dtype != torch.uint8 or tuple(tensor.shape) != shape:
                raise MemoryFileError(
                    f"row_identity.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected uint8 of shape "
                    f"{shape}: the memory is corrupt."
                )
        if bool((forgotten > 1).any()):
            raise MemoryFileError("row_identity.forgotten holds other numbers than 0 and 1: the memory is corrupt.")
        if not isinstance(metadata, dict) or not all(
            isinstance(metadata.get(name), str) for name in ("key_check", "training_run")
        ):
            raise MemoryFileError(f"'row_identity' in the memory is {metadata!r}, expected two strings: it is corrupt.")
        return cls(
            fingerprints.numpy(), forgotten.numpy().astype(bool), metadata["key_check"], metadata["training_run"]
        )


def keyed_fingerprints(key: Key, model: nn.Module, dataset: Any) -> np.ndarray:
    """Keyed fingerprints of all rows of `dataset`, as far as `model` sees them: uint8, `(rows, 16)`."""
    digests = row_digests(dataset, input_columns(model))
    fingerprints = bytearray().join(key.fingerprint(row.tobytes()) for row in digests)
    return np.frombuffer(fingerprints, dtype=np.uint8).reshape(-1, FINGERPRINT_BYTES)


def _heads(fingerprints: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(fingerprints).view(np.uint32)[:, 0]
    return words & np.uint32((1 << _TABLE_BITS) - 1)
