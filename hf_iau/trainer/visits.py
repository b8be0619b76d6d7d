"""How often each training row was trained on."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from hf_iau.distributed import all_gather_arrays, is_main_process, to_local
from hf_iau.utils.atomic_files import unmasked, write_atomically

logger = logging.getLogger(__name__)

VISITS_FILE = "row_visits.safetensors"
"""In a checkpoint: how often each row had been trained on, and which weights that made. It holds counts alone."""

_COUNTS = "visits"
_WEIGHTS = "weights"
_NUMBERS_A_PARAMETER = 64


class VisitCounter:
    """Counts the rows of the batches that were trained on.

    Which rows a batch has is noted where its batch sampler draws it, in the main process. Much is drawn that is not
    trained on (workers and Accelerate read ahead, a run ends early, resuming skips), so a batch counts once the
    optimizer has taken the step that it is part of: batches are trained on in the order in which they are drawn.

    Args:
        rows: of the data set.
        earlier: counts of an earlier part of the run, `(rows,)`; None for none.
        skipped: batches that resuming draws and skips in its first pass.

    Attributes:
        known: whether the counts can be relied on.
        ended: whether training has come to its end.
        batch_size: rows a batch of the loader that is watched, where it says.
    """

    def __init__(self, rows: int, earlier: np.ndarray | None = None, skipped: int = 0) -> None:
        self._counts = np.zeros(rows, dtype=np.int32)
        if earlier is not None:
            self._counts[:] = earlier
        self._skipped = skipped
        self._drawn: deque[np.ndarray | None] = deque()
        self._waiting: list[np.ndarray] = []
        self._open = False
        self._sampler: Any = None
        self._kind: type[Any] | None = None
        self.known = True
        self.ended = False
        self.batch_size: int | None = None

    def watch(self, loader: Any) -> None:
        """Note what the batch sampler of `loader` draws, until `stop()`."""
        sampler = getattr(loader, "batch_sampler", None)
        if sampler is None:  # a batch sampler given as sampler=, with batch_size=None
            sampler = getattr(loader, "sampler", None)
        self.batch_size = getattr(sampler, "batch_size", None)
        several_at_once = type(loader).__name__ == "DataLoaderDispatcher"
        if sampler is None or several_at_once or getattr(loader, "use_stateful_dataloader", False):
            self._give_up(f"the batches of a {type(loader).__name__} cannot be watched")
            return
        self._sampler, self._kind = sampler, type(sampler)
        counter = self

        try:

            class Watched(type(sampler)):  # type: ignore[misc]  # a class that is known at run time alone
                __slots__ = ()

                def __iter__(self) -> Iterator[Any]:
                    drawn = counter._begin_pass()
                    for batch in super().__iter__():
                        drawn.append(_row_numbers(batch))
                        yield batch

            Watched.__name__ = type(sampler).__name__
            sampler.__class__ = Watched
        except TypeError:  # a class that allows no other in its place
            self._sampler = None
            self._give_up(f"batches drawn by a {type(sampler).__name__} cannot be watched")

    def stop(self) -> None:
        """Let the sampler be what it was."""
        if self._sampler is not None:
            self._sampler.__class__ = self._kind
        self._sampler = None

    def epoch_begins(self) -> None:
        """The pass over the rows that begins next is the one that is trained on; others (evaluation) are not noted."""
        self._drawn, self._waiting, self._open = deque(), [], True

    def _begin_pass(self) -> deque[np.ndarray | None]:
        drawn: deque[np.ndarray | None] = deque()
        if self._open:  # no batch of this epoch was trained on yet
            self._drawn = drawn
        return drawn

    def batch_ends(self) -> None:
        """A batch went forward and backward; whether it was trained on is known when its step ends."""
        self._open = False
        while self._skipped and self._drawn:
            self._drawn.popleft()
            self._skipped -= 1
        numbers = self._drawn.popleft() if self._drawn else None
        if numbers is None:
            self.known = False
        else:
            self._waiting.append(numbers)

    def step_ends(self, *, taken: bool = True) -> None:
        """The step of the last batches ended; `taken` is False where the optimizer skipped it."""
        self.batch_ends()
        numbers, self._waiting = self._waiting, []
        if not taken or not numbers:
            return
        try:
            np.add.at(self._counts, np.concatenate(numbers), 1)
        except (IndexError, ValueError, TypeError):  # no row numbers
            self.known = False

    def epoch_ends(self, *, whole: bool) -> None:
        """An epoch ended; a `whole` one leaves no batch over."""
        if whole and self._drawn:
            self.known = False

    def _give_up(self, reason: str) -> None:
        self.known = False
        if is_main_process():
            logger.warning("How often rows are trained on is not counted: %s. All rows count as trained on.", reason)

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

    def save(self, checkpoint: Path, model: nn.Module) -> None:
        """Write the counts into the folder of a checkpoint of `model`; by the main process, but all have to call."""
        counts = self.counts()
        if not is_main_process() or not checkpoint.is_dir():
            return
        if counts is None:  # what an earlier run left there is not of this one
            (checkpoint / VISITS_FILE).unlink(missing_ok=True)
            return
        content = torch.from_numpy(counts.astype(np.uint8) if counts.max(initial=0) < 256 else counts)
        about = {_WEIGHTS: _weights_sample(model)}
        write_atomically(
            checkpoint / VISITS_FILE, lambda path: save_file({_COUNTS: content}, path, about), unmasked(0o666)
        )


def visits_before(checkpoint: Path, rows: int, model: nn.Module) -> np.ndarray | None:
    """The counts in a checkpoint, for the main process, and zeros for the others.

    None where there are none, or where `model` was not loaded from that checkpoint.

    Args:
        checkpoint: its folder.
        rows: of the data set.
        model: as it is now.
    """
    if not is_main_process():
        return np.zeros(rows, dtype=np.int32)
    try:
        with safetensors.safe_open(checkpoint / VISITS_FILE, framework="pt") as file:
            of_weights = (file.metadata() or {}).get(_WEIGHTS)
            counts = file.get_tensor(_COUNTS)
    except (OSError, ValueError, safetensors.SafetensorError):
        return None
    fits = (
        tuple(counts.shape) == (rows,) and counts.dtype in (torch.uint8, torch.int32) and not bool((counts < 0).any())
    )
    return counts.numpy().astype(np.int32) if fits and of_weights == _weights_sample(model) else None


def _row_numbers(batch: Any) -> np.ndarray | None:
    """int64, `(rows,)`; None for what holds no whole numbers."""
    with contextlib.suppress(ValueError, TypeError):
        numbers = np.atleast_1d(np.asarray(batch))
        if numbers.ndim == 1 and numbers.dtype.kind in "iu":
            return numbers.astype(np.int64)
    return None


def _weights_sample(model: nn.Module) -> str:
    """A digest of a few numbers of each trained parameter, as far as this process holds it."""
    parts = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            flat = to_local(parameter.detach()).reshape(-1)
            parts.append(flat[:: max(1, len(flat) // _NUMBERS_A_PARAMETER)].double().cpu())
    numbers = torch.cat(parts).numpy().tobytes() if parts else b""
    return hashlib.blake2b(numbers, digest_size=16).hexdigest()
