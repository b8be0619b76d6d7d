"""Which rows are forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scenario:
    """A kind of request. Exactly one of `rows`, `share` and `label` says which rows are meant.

    Attributes:
        name: in file names and tables.
        rows: this many random rows.
        share: this share of the rows, at random.
        label: all rows of this class.
        flipped: the rows chosen were trained on with a wrong label, and are forgotten for that.
    """

    name: str
    rows: int | None = None
    share: float | None = None
    label: int | None = None
    flipped: bool = False

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.rows, self.share, self.label)) != 1:
            raise ValueError(f"Scenario({self.name!r}): give exactly one of rows, share and label.")

    def forget_rows(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Sorted positions of the forget rows among the training rows with these labels."""
        if self.label is not None:
            return np.flatnonzero(labels == self.label)
        count = self.rows if self.rows is not None else round((self.share or 0.0) * len(labels))
        random = np.random.default_rng(100 + seed)
        return np.sort(random.choice(len(labels), count, replace=False))

    def training_labels(self, labels: np.ndarray, seed: int, n_classes: int) -> np.ndarray:
        """The labels that are trained on: the true ones, or with those of the forget rows made wrong."""
        if not self.flipped:
            return labels
        rows = self.forget_rows(labels, seed)
        shifts = np.random.default_rng(200 + seed).integers(1, n_classes, len(rows))
        wrong = labels.copy()
        wrong[rows] = (wrong[rows] + shifts) % n_classes
        return wrong


RANDOM_5_PERCENT = Scenario("random-5-percent", share=0.05)
SIZES = (
    Scenario("one-row", rows=1),
    Scenario("random-0.1-percent", share=0.001),
    Scenario("random-1-percent", share=0.01),
    Scenario("random-10-percent", share=0.10),
    Scenario("random-20-percent", share=0.20),
    Scenario("whole-class", label=3),
    Scenario("flipped-5-percent", share=0.05, flipped=True),
)
