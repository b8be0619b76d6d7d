"""How often each training row was trained on."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hf_iau.distributed import all_gather_arrays, is_main_process

logger = logging.getLogger(__name__)

VISITS_FILE = "row_visits.npy"
"""In a checkpoint: how often each row had been trained on. It holds counts alone."""


class VisitCounter:
    """Counts the rows of the batches that were trained on.

    Which rows a batch has is noted where its batch sampler draws it, in the main process. Much is drawn that is not
    trained on (workers and Accelerate read ahead, a run ends early, resuming skips), so a batch counts once the step
    that it is part of has ended: batches are trained on in the order in which they are drawn.

    Args:
        rows: of the data set.
        earlier: counts of an earlier part of the run, `(rows,)`; None for none.
        skipped: batches that resuming draws and skips in its first pass.

    Attributes:
        known: whether the counts can be relied on.
    """

    def __init__(self, rows: int, earlier: np.ndarray | None = None, skipped: int = 0) -> None:
        self._counts = np.zeros(rows, dtype=np.int32)
        if earlier is not None:
            self._counts[:] = earlier
        self._skipped = skipped
        self._drawn: deque[list[int]] = deque()
        self._sampler: Any = None
        self._kind: type[Any] | None = None
        self.known = True
        self.ended = False

    def watch(self, loader: Any) -> None:
        """Note what the batch sampler of `loader` draws, until `stop()`."""
        sampler = getattr(loader, "batch_sampler", None)
        if sampler is None or type(loader).__name__ == "DataLoaderDispatcher":
            self.known = False
            return
        self._drawn.clear()
        self._sampler, self._kind = sampler, type(sampler)
        counter = self

        class Watched(type(sampler)):  # type: ignore[misc]  # a class that is known at run time alone
            def __iter__(self) -> Iterator[list[int]]:
                counter._drawn.clear()
                for batch in super().__iter__():
                    counter._drawn.append(list(batch))
                    yield batch

        Watched.__name__ = type(sampler).__name__
        try:
            sampler.__class__ = Watched
        except TypeError:  # a class whose instances cannot change it
            self.known, self._sampler = False, None

    def stop(self) -> None:
        """Let the sampler be what it was."""
        if self._sampler is not None:
            self._sampler.__class__ = self._kind
        self._sampler = None
        self.ended = True

    def trained(self) -> None:
        """A batch was trained on."""
        for _ in range(self._skipped):
            if self._drawn:
                self._drawn.popleft()
        self._skipped = 0
        if not self._drawn:
            self.known = False
            return
        try:
            np.add.at(self._counts, np.asarray(self._drawn.popleft(), dtype=np.int64), 1)
        except (IndexError, ValueError, TypeError):  # no row numbers
            self.known = False

    @property
    def rows(self) -> int:
        """Of the data set."""
        return len(self._counts)

    def own_counts(self) -> np.ndarray:
        """Of this process alone: int32, `(rows,)`."""
        return self._counts

    def counts(self) -> np.ndarray | None:
        """Of all processes together: int32, `(rows,)`; None where they are not known. All processes have to call."""
        parts = all_gather_arrays({"counts": self._counts}, {"known": self.known}, "the rows' visits")
        if not all(about["known"] for _, about in parts):
            return None
        return np.stack([arrays["counts"] for arrays, _ in parts]).sum(axis=0, dtype=np.int32)

    def save(self, checkpoint: Path) -> None:
        """Write the counts into a checkpoint's folder; by the main process, but all have to call."""
        counts = self.counts()
        if counts is not None and is_main_process() and checkpoint.is_dir():
            np.save(checkpoint / VISITS_FILE, counts.astype(np.uint8 if counts.max(initial=0) < 256 else np.int32))


def visits_before(checkpoint: Path, rows: int) -> np.ndarray | None:
    """The counts in a checkpoint, for the main process, and zeros for the others; None where there are none.

    Args:
        checkpoint: its folder.
        rows: of the data set.
    """
    try:
        counts = np.load(checkpoint / VISITS_FILE, allow_pickle=False)
    except (OSError, ValueError):
        return None
    if counts.shape != (rows,) or counts.dtype.kind not in "iu":
        return None
    return counts.astype(np.int32) if is_main_process() else np.zeros(rows, dtype=np.int32)
