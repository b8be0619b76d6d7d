"""Drawings for the HTML page as coordinates that a template turns into SVG: no image library, no script."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_iau.report.histograms import Panels, common_bins

WIDTH = 320
"""Width of every drawing in its own units; it scales to the column that it stands in."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 312.0, 12.0, 150.0
_STRIP_LEFT, _STRIP_RIGHT, _STRIP_TOP, _LINE = 104.0, 306.0, 14.0, 22.0
_MOST_TICKS = 4
_CLASSES = {"before": "before", "after": "after", "retrained": "retrained", "retrained again": "again"}


@dataclass(frozen=True)
class Histogram:
    """The losses of one set of rows.

    Attributes:
        name, rows: which rows, and how many have a finite loss.
        path: of the SVG element.
        median: x of the median, and in words.
        kind: "forget" or "unseen".
    """

    name: str
    rows: int
    path: str
    median: tuple[float, str]
    kind: str


@dataclass(frozen=True)
class Panel:
    """The histograms of one model, with ticks as pairs of a coordinate and its label."""

    title: str
    histograms: list[Histogram]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    height: int = 192
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM

    @property
    def description(self) -> str:
        """What can be seen, for those who do not see it."""
        sets = "; ".join(f"{h.name} ({h.rows:,}), median loss {h.median[1]}" for h in self.histograms)
        return f"Histogram of row losses, {self.title}: {sets or 'no finite losses'}."


@dataclass(frozen=True)
class Mark:
    """One model's value of a figure: its place, its interval's places, and the value in words."""

    title: str
    kind: str
    y: float
    x: float
    low: float | None
    high: float | None
    value: str


@dataclass(frozen=True)
class Strip:
    """One figure of all models on a line from 0 to 100 %."""

    name: str
    marks: list[Mark]
    aim: float | None
    ticks: list[tuple[float, str]]
    height: float
    left: float = _STRIP_LEFT
    right: float = _STRIP_RIGHT
    top: float = _STRIP_TOP

    @property
    def description(self) -> str:
        """What can be seen, for those who do not see it."""
        return f"{self.name}: " + ", ".join(f"{mark.title} {mark.value} %" for mark in self.marks) + "."


def histogram_panels(losses: Panels) -> list[Panel]:
    """The histograms of `hf_iau.report.histograms.loss_histograms`, as coordinates.

    Args:
        losses: by the panel's title, the row losses, shape `(rows,)`, by the name of the set; first the forget rows.
    """
    finite, bins = common_bins(losses)
    edges = np.interp(np.log(bins), np.log(bins[[0, -1]]), [_LEFT, _RIGHT])
    shares = {
        (title, name): 100 * np.histogram(values, bins)[0] / max(len(values), 1)
        for title, sets in finite.items()
        for name, values in sets.items()
    }
    top = max((float(share.max()) for share in shares.values()), default=0.0) or 1.0
    step = _round_step(top)
    y_ticks = [(_height(value, top), f"{value:g}") for value in np.arange(0, top + step / 2, step) if value <= top]
    panels = []
    for title, sets in finite.items():
        drawn = [
            Histogram(
                name=name,
                rows=len(values),
                path=_steps(edges, shares[title, name], top),
                median=(_place(float(np.median(values)), bins), f"{np.median(values):.2g}"),
                kind="forget" if position == 0 else "unseen",
            )
            for position, (name, values) in enumerate(sets.items())
            if len(values)
        ]
        panels.append(Panel(title, drawn, _decades(bins), y_ticks))
    return panels


def strips(columns: Mapping[str, Mapping[str, Any]], figures: Mapping[str, str]) -> list[Strip]:
    """One drawing a figure that some model has.

    Args:
        columns: figures of `hf_iau.evaluation.Figures`, fractions of 1, by the model's title.
        figures: names in words by the figure's key.
    """
    found = []
    for key, name in figures.items():
        marks: list[Mark] = []
        for title, values in columns.items():
            if values.get(key) is None:
                continue
            low, high = (values.get("intervals") or {}).get(key) or (None, None)
            marks.append(
                Mark(
                    title=title,
                    kind=_CLASSES.get(title, "again"),
                    y=_STRIP_TOP + _LINE * (len(marks) + 0.5),
                    x=_percent(values[key]),
                    low=None if low is None else _percent(low),
                    high=None if high is None else _percent(high),
                    value=f"{100 * values[key]:.1f}",
                )
            )
        if marks:
            aim = next((mark.x for mark in marks if mark.title == "retrained"), None)
            ticks = [(_percent(value / 100), str(value)) for value in (0, 25, 50, 75, 100)]
            found.append(Strip(name, marks, aim, ticks, height=_STRIP_TOP + _LINE * len(marks) + 22))
    return found


def _percent(fraction: float) -> float:
    return round(_STRIP_LEFT + (_STRIP_RIGHT - _STRIP_LEFT) * min(max(fraction, 0.0), 1.0), 1)


def _height(share: float, top: float) -> float:
    return round(_BOTTOM - (_BOTTOM - _TOP) * share / top, 1)


def _place(loss: float, bins: np.ndarray) -> float:
    return round(float(np.interp(math.log(loss), np.log(bins[[0, -1]]), [_LEFT, _RIGHT])), 1)


def _steps(edges: np.ndarray, shares: np.ndarray, top: float) -> str:
    path = f"M{edges[0]:.1f} {_BOTTOM:g}"
    for edge, share in zip(edges[1:], shares, strict=True):
        path += f"V{_height(share, top):g}H{edge:.1f}"
    return f"{path}V{_BOTTOM:g}Z"


def _round_step(top: float) -> float:
    """A round number of which two to five reach `top`."""
    rough = top / 4
    unit = 10 ** math.floor(math.log10(rough))
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)


def _decades(bins: np.ndarray) -> list[tuple[float, str]]:
    """Powers of ten within the bins, at most four; the two ends where there are fewer than two."""
    low, high = float(bins[0]), float(bins[-1])
    powers = list(range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1))
    if len(powers) < 2:
        return [(_place(value, bins), f"{value:.2g}") for value in (low, high)]
    powers = powers[:: math.ceil(len(powers) / _MOST_TICKS)]
    return [(_place(10.0**power, bins), f"{10.0**power:g}") for power in powers]
