"""A request as the methods see it, and what they answer."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from hf_iau.data import RowLoss, RowPredictions, RowSource
from hf_iau.data.row_loss import batch_rows
from hf_iau.data.targets import count_targets, labels_of
from hf_iau.errors import MissingMemoryError, RequestError
from hf_iau.memory.memory import GradientMemory
from hf_iau.utils.timing import PhaseTimer

ROWS_LOOKED_AT = 2000
"""Rows of each kind that calibration and a report look at, unless told otherwise: the standard error of an accuracy is
then 1.1 points at most, and that of the AUC between two such sets 0.9."""


@dataclass
class ForgetContext:
    """All that a method may use to run one request.

    Attributes:
        model: the bare model; a method changes it in place, inside a transaction.
        row_loss: ℓ.
        forget: the rows to forget.
        memory: what was gathered, checked against the model; None where there is none.
        train: all training rows (forget rows among them), where the trainer has them.
        forget_positions: the forget rows' numbers in `train`, where the request named them so.
        retain: all retained rows, only where the caller gave `retain_dataset`.
        held_out: rows that were never trained on, for calibration.
        copies_left: training rows that stay and are exact copies of forget rows.
        left_out: rows that were asked for and not trained on, and so are not among the forget rows.
        notes: sentences about the rows, for the report.
        excluded: digests of rows that are out: forgotten now or earlier.
        digests: digests of the forget rows, with how often each occurs.
        fingerprints: keyed fingerprints of the forget rows in their order, uint8 `(m, 16)`; None without a key.
        forgotten: digests of the rows that earlier requests took out, with how often each occurs.
        forgotten_positions: numbers by which earlier requests named rows; looked at first, and trusted no further.
        trainer: the Trainer that runs the request, for methods that train anew with its settings.
        weights: copies of the trained parameters as the request finds them, by name, which nothing may change; None
            where a method has to make its own.
        predicted: what the model makes of some rows at the weights that the request finds, where that was looked at.
        reason: why the rows are to go, as far as the caller says: "random" or "wrong-label"; None to find out.
        seed, progress, timer: as their names say.
    """

    model: nn.Module
    row_loss: RowLoss
    forget: RowSource
    memory: GradientMemory | None = None
    train: RowSource | None = None
    forget_positions: np.ndarray | None = None
    retain: RowSource | None = None
    held_out: RowSource | None = None
    copies_left: int = 0
    left_out: int = 0
    notes: list[str] = field(default_factory=list)
    excluded: set[bytes] = field(default_factory=set)
    digests: Counter[bytes] = field(default_factory=Counter)
    fingerprints: np.ndarray | None = None
    forgotten: Counter[bytes] = field(default_factory=Counter)
    forgotten_positions: tuple[int, ...] = ()
    label_counts: Mapping[str, int] | None = None
    trainer: Any = None
    weights: Mapping[str, Tensor] | None = None
    predicted: dict[RowSource, RowPredictions] = field(default_factory=dict)
    reason: str | None = None
    seed: int = 0
    progress: bool = False
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    def __post_init__(self) -> None:
        self._held_out_samples: dict[int, RowSource] = {}
        self._retained_samples: dict[bytes, RowSource] = {}

    @property
    def prediction_batch_size(self) -> int:
        """Rows a batch where no gradients are taken."""
        return self.held_out.batch_size if self.held_out is not None else self.forget.batch_size

    @functools.cached_property
    def forget_to_predict(self) -> RowSource:
        """The forget rows, in batches for where no gradients are taken."""
        return self.forget.resized(self.prediction_batch_size)

    def held_out_sample(self, size: int) -> RowSource | None:
        """At most `size` held-out rows, the same ones for whoever asks; None where there are none."""
        if self.held_out is None:
            return None
        size = min(size, len(self.held_out))
        if size not in self._held_out_samples:
            self._held_out_samples[size] = self.held_out.sample(size, self.seed, "held-out rows")
        return self._held_out_samples[size]

    def require_memory(self, method: str) -> GradientMemory:
        """The memory, or an error that says how to get one."""
        if self.memory is None:
            raise MissingMemoryError(
                f"method={method!r} needs a gradient memory and there is none. Train with callbacks=[IAUCallback()], "
                "give memory=hf_iau.gather(model, train_dataset), or load one with GradientMemory.load(dir)."
            )
        return self.memory

    def check_retained(self, method: str) -> None:
        """Raise `RequestError` where the retained rows are not at hand; looks at no row."""
        if self.retain is None and self.train is None:
            raise RequestError(
                f"method={method!r} needs the retained rows: there is neither retain_dataset= nor a train_dataset "
                "whose rows are the same each time they are read. Pass retain_dataset=, all rows to be kept."
            )

    def retained_rows(self, method: str, name: str = "retained rows") -> RowSource:
        """All rows to be kept: `retain` where given, else the training rows that no request took out.

        Of a row that occurs several times as many copies are left out as were forgotten.

        Args:
            method: who asks, for the error.
            name: what the rows are called in messages.

        Raises:
            RequestError: there are no such rows.
        """
        self.check_retained(method)
        if self.retain is not None:
            return self.retain
        assert self.train is not None
        positions = self.forget_positions
        gone = self.forgotten if positions is not None else self.forgotten + self.digests
        out = [] if positions is None else positions.tolist()
        kept = remaining_positions(self.train, gone, out, self.forgotten_positions)
        if not kept:
            raise RequestError(f"method={method!r} needs retained rows, and the request leaves none.")
        return self.train.select(kept, name)

    def count_forget_targets(self) -> int:
        """Targets of the forget rows: rows of a classifier, predicted tokens of a language model, two an answer."""
        return sum(count_targets(self.model, labels_of(inputs), batch_rows(inputs)) for _, inputs in self.forget)

    def retained_sample(self, size: int, seed: int, name: str = "retained rows") -> RowSource | None:
        """Up to `size` retained rows: drawn from `retain` where given, else training rows that are not excluded."""
        if self.retain is not None:
            return self.retain.sample(size, seed, name)
        positions = self._retained_positions(size, seed)
        return self.train.select(positions, name) if self.train is not None and len(positions) else None

    def retained_to_predict(self, size: int, seed: int) -> RowSource | None:
        """`retained_sample` in batches for where no gradients are taken; one source for whoever asks for the same rows,
        as all do where there are no more than `size`."""
        if self.retain is not None:
            return self.retain.sample(size, seed, "retained rows").resized(self.prediction_batch_size)
        positions = self._retained_positions(size, seed)
        if self.train is None or not len(positions):
            return None
        key = positions.tobytes()
        if key not in self._retained_samples:
            sample = self.train.select(positions, "retained rows")
            self._retained_samples[key] = sample.resized(self.prediction_batch_size)
        return self._retained_samples[key]

    def _retained_positions(self, size: int, seed: int) -> np.ndarray:
        """Numbers in `train` of up to `size` rows that are not excluded, ascending."""
        if self.train is None:
            return np.zeros(0, dtype=np.int64)
        out = set(self.forget_positions.tolist()) if self.forget_positions is not None else set()
        order = np.random.default_rng(seed).permutation(len(self.train))
        chosen: list[int] = []
        for position in order.tolist():
            if len(chosen) == size:
                break
            if position in out or (self.excluded and self.train.digest(position) in self.excluded):
                continue
            chosen.append(position)
        return np.sort(np.asarray(chosen, dtype=np.int64))


def remaining_positions(
    source: RowSource, gone: Mapping[bytes, int], out: Iterable[int] = (), likely: Iterable[int] = ()
) -> list[int]:
    """Positions of rows that are neither in `out` nor taken out with `gone`.

    Args:
        source: the rows.
        gone: digest → how many copies of that row are to be left out.
        out: positions to be left out.
        likely: positions where rows of `gone` are looked for first; once all are found, no further row is read.
    """
    left, skipped = Counter(gone), set(out)
    missing = left.total()

    def is_gone(position: int) -> bool:
        digest = source.digest(position)
        if left[digest] <= 0:
            return False
        left[digest] -= 1
        return True

    for position in likely:
        if missing and position < len(source) and position not in skipped and is_gone(position):
            skipped.add(position)
            missing -= 1
    kept = []
    for position in range(len(source)):
        if position in skipped:
            continue
        if missing and is_gone(position):
            missing -= 1
        else:
            kept.append(position)
    return kept
