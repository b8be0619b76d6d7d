"""Finished cells by work, scenario and method: means over seeds, ranks, and the front of gap against seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks.suites import Suite
from benchmarks.variants import RETRAIN

Cell = dict[str, Any]

DEFAULT_METHOD = "iau"
UNOPTIMISED_ATTACK = "entropy"
"""No method looks at it, and it ignores the label, so it is no function of the loss."""


@dataclass(frozen=True)
class Result:
    """One method on one work and scenario.

    Attributes:
        name: of the variant.
        cells: one a seed.
    """

    name: str
    cells: tuple[Cell, ...]

    @property
    def seeds(self) -> set[int]:
        """Seeds that are finished."""
        return {cell["seed"] for cell in self.cells}

    @property
    def method(self) -> str:
        """Name of the method, whatever its settings."""
        return str(self.cells[0]["method_name"])

    def gaps(self, key: str = "mean_absolute") -> list[float]:
        """A difference to the retrained model by seed, in points; infinite where the model diverged."""
        return [float("inf") if cell["gap"][key] is None else cell["gap"][key] for cell in self.cells]

    @property
    def gap(self) -> float:
        """Mean over seeds of the mean absolute gap."""
        return float(np.mean(self.gaps()))

    @property
    def removal(self) -> float:
        """Mean over seeds of the distance of the loss attack's AUC from the retrained model's, in points; 0 is best."""
        return float(np.mean(np.abs(self.gaps("mia_auc"))))

    @property
    def utility(self) -> float:
        """Mean over seeds of the test accuracy minus the retrained model's, in points; higher is better."""
        return float(np.mean([-np.inf if np.isinf(gap) else gap for gap in self.gaps("test_accuracy")]))

    @property
    def seconds(self) -> float:
        """Mean over seeds of what the request cost; see `seconds_of`."""
        return float(np.mean([seconds_of(cell) for cell in self.cells]))

    @property
    def tuning_seconds(self) -> float:
        """Mean over seeds of what finding the setting cost; 0 where nothing is tuned."""
        tuned = [cell for cell in self.cells if cell["tuning"]]
        return float(np.mean([_seconds(cell, cell["tuning"]) for cell in tuned])) if tuned else 0.0


@dataclass(frozen=True)
class Panel:
    """All methods on one work and scenario, in the suite's order.

    Attributes:
        work, scenario: names.
        results: one a method.
    """

    work: str
    scenario: str
    results: tuple[Result, ...]

    @property
    def cells(self) -> list[Cell]:
        """Every cell."""
        return [cell for result in self.results for cell in result.cells]

    @property
    def once(self) -> list[Cell]:
        """One cell a seed, for what is the same in all of them: the models before and retrained."""
        return list({cell["seed"]: cell for cell in sorted(self.cells, key=lambda c: c["seed"])}.values())

    @property
    def common_seeds(self) -> list[int]:
        """Seeds that every method is finished for; methods that lack the first seed do not count."""
        first = min(seed for result in self.results for seed in result.seeds)
        return sorted(set.intersection(*(result.seeds for result in self.results if first in result.seeds)))

    @property
    def complete(self) -> list[Result]:
        """Methods on the common seeds alone, so that all are compared on the same models."""
        seeds = set(self.common_seeds)
        return [
            Result(result.name, tuple(cell for cell in result.cells if cell["seed"] in seeds))
            for result in self.results
            if seeds <= result.seeds
        ]

    def of(self, name: str) -> Result | None:
        """The method of that name, if it is finished."""
        return next((result for result in self.results if result.name == name), None)

    def retraining_seconds(self) -> float:
        """Mean seconds of training the retrained model."""
        return float(np.mean([_seconds(cell, cell["timing"], "retraining_") for cell in self.once]))


@dataclass(frozen=True)
class Rank:
    """Places of one method among those compared, 1 is best; ties share the mean place.

    Attributes:
        name: of the variant.
        gap, utility, seconds: place by each.
    """

    name: str
    gap: float
    utility: float
    seconds: float

    @property
    def mean(self) -> float:
        """The average rank."""
        return (self.gap + self.utility + self.seconds) / 3


def panels(cells: Sequence[Cell], suite: Suite) -> list[Panel]:
    """The suite's cells in its order of works, scenarios and methods."""
    order = [variant.name for variant in suite.every_variant]
    found = []
    for work in suite.works:
        for scenario in suite.scenarios:
            chosen = [c for c in cells if (c["work"], c["scenario"]) == (work.name, scenario.name)]
            results = tuple(
                Result(name, tuple(sorted((c for c in chosen if c["method"] == name), key=lambda c: c["seed"])))
                for name in order
                if any(c["method"] == name for c in chosen)
            )
            if results:
                found.append(Panel(work.name, scenario.name, results))
    return found


def average_ranks(panel: Panel) -> list[Rank]:
    """Places by gap, utility and seconds of all methods on the common seeds, best average first.

    Retraining is the yardstick and takes no part.
    """
    compared = [result for result in panel.complete if result.method != RETRAIN]
    if not compared:
        return []
    places = [
        rankdata([key(result) for result in compared])
        for key in (lambda r: r.gap, lambda r: -r.utility, lambda r: r.seconds)
    ]
    ranks = [
        Rank(result.name, *(float(column[i]) for column in places))  # type: ignore[misc]
        for i, result in enumerate(compared)
    ]
    return sorted(ranks, key=lambda rank: rank.mean)


def front(results: Sequence[Result]) -> list[Result]:
    """Methods that no other is both closer to retraining and faster than, fastest first."""
    return sorted((r for r in results if not closer_and_faster(results, r)), key=lambda r: r.seconds)


def closer_and_faster(results: Sequence[Result], than: Result) -> list[Result]:
    """Methods with a smaller mean gap and fewer seconds."""
    return [r for r in results if r.gap < than.gap and r.seconds < than.seconds]


def seconds_of(cell: Cell) -> float:
    """Seconds of the request: wall seconds on an accelerator, else CPU seconds, which other programs disturb less."""
    return _seconds(cell, cell["timing"], "unlearn_")


def _seconds(cell: Cell, entry: dict[str, Any], prefix: str = "") -> float:
    return float(entry[f"{prefix}cpu_seconds" if cell["timing"]["kind"] == "cpu" else f"{prefix}seconds"])
