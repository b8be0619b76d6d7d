"""Which rows are forgotten."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scenario:
    """A kind of request. Exactly one of `rows`, `share`, `label` and `classes` says which rows are meant.

    Attributes:
        name: in file names and tables.
        rows: this many random rows.
        share: this share of the rows, at random.
        label: all rows of this class.
        classes: all rows of this many classes, drawn at random.
        flipped: the rows chosen were trained on with a wrong label, and are forgotten for that.
        requests: the rows are asked for in this many requests of equal size, one after the other.
    """

    name: str
    rows: int | None = None
    share: float | None = None
    label: int | None = None
    classes: int | None = None
    flipped: bool = False
    requests: int = 1

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.rows, self.share, self.label, self.classes)) != 1:
            raise ValueError(f"Scenario({self.name!r}): give exactly one of rows, share, label and classes.")
        if self.requests < 1:
            raise ValueError(f"Scenario({self.name!r}): requests={self.requests}, give at least 1.")

    def forget_rows(self, labels: np.ndarray, seed: int) -> np.ndarray:
        """Sorted positions of the forget rows among the training rows with these labels."""
        if self.label is not None:
            return np.flatnonzero(labels == self.label)
        random = np.random.default_rng(100 + seed)
        if self.classes is not None:
            return np.flatnonzero(np.isin(labels, random.choice(np.unique(labels), self.classes, replace=False)))
        count = self.rows if self.rows is not None else round((self.share or 0.0) * len(labels))
        return np.sort(random.choice(len(labels), count, replace=False))

    def split(self, rows: np.ndarray, seed: int) -> list[np.ndarray]:
        """The forget rows by request, each sorted: a seeded order of them, cut into `requests` parts."""
        if self.requests == 1:
            return [rows]
        order = np.random.default_rng(300 + seed).permutation(rows)
        return [np.sort(part) for part in np.array_split(order, self.requests)]

    def training_labels(self, labels: np.ndarray, seed: int, n_classes: int) -> np.ndarray:
        """The labels that are trained on: the true ones, or with those of the forget rows made wrong."""
        if not self.flipped:
            return labels
        rows = self.forget_rows(labels, seed)
        shifts = np.random.default_rng(200 + seed).integers(1, n_classes, len(rows))
        wrong = labels.copy()
        wrong[rows] = (wrong[rows] + shifts) % n_classes
        return wrong


RANDOM_1_PERCENT = Scenario("random-1-percent", share=0.01)
RANDOM_5_PERCENT = Scenario("random-5-percent", share=0.05)
RANDOM_10_PERCENT = Scenario("random-10-percent", share=0.10)
RANDOM_20_PERCENT = Scenario("random-20-percent", share=0.20)
WHOLE_CLASS = Scenario("whole-class", label=3)
FIVE_AUTHORS = Scenario("five-authors", classes=5)
FLIPPED_10_PERCENT = Scenario("flipped-10-percent", share=0.10, flipped=True)
# The rows of random-10-percent, so that the models retrained for it serve here too.
TWENTY_REQUESTS = Scenario("20-requests-of-0.5-percent", share=0.10, requests=20)
SIZES = (
    Scenario("one-row", rows=1),
    Scenario("random-0.1-percent", share=0.001),
    RANDOM_1_PERCENT,
    RANDOM_10_PERCENT,
    RANDOM_20_PERCENT,
    WHOLE_CLASS,
    Scenario("flipped-5-percent", share=0.05, flipped=True),
)
