"""Histograms of row losses, before and after."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_iau.utils.optional import require

BINS = 40
_FLOOR = 1e-7  # what float32 can tell from a loss of 0
_COLORS = ("#c44e52", "#4c72b0")  # forget rows, unseen rows

Panels = Mapping[str, Mapping[str, np.ndarray]]


def common_bins(panels: Panels) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """The finite losses of every panel, and the edges of logarithmic bins that hold all of them.

    Args:
        panels: see `loss_histograms`.

    Returns:
        The losses by panel and set of rows, raised to at least 1e-7; the edges, shape `(BINS + 1,)`.
    """
    finite = {
        title: {name: np.clip(losses[np.isfinite(losses)], _FLOOR, None) for name, losses in sets.items()}
        for title, sets in panels.items()
    }
    pooled = np.concatenate([losses for sets in finite.values() for losses in sets.values()])
    low, high = (float(pooled.min()), float(pooled.max())) if len(pooled) else (_FLOOR, 1.0)
    return finite, np.geomspace(low * 0.99, max(high * 1.01, low * 1.1), BINS + 1)


def loss_histograms(panels: Panels) -> bytes:
    """A PNG with one panel a model and one histogram a set of rows, on common logarithmic bins.

    Args:
        panels: by the panel's title ("before", "after", "retrained"), the row losses, shape `(rows,)`, by the name of
            the set of rows; the first set is the forget rows. Losses that are not finite are left out.

    Where forgetting worked as retraining would, the forget rows' histogram lies where it lies for the retrained model
    (on exchangeable rows: over that of the unseen rows), and not beyond it.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("matplotlib", "An image of the histograms")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    finite, bins = common_bins(panels)
    figure = Figure(figsize=(0.6 + 3.6 * len(finite), 3.3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(finite), sharex=True, sharey=True, squeeze=False)[0]
    for axis, (title, sets) in zip(axes, finite.items(), strict=True):
        _draw(axis, sets, bins)
        axis.set_xscale("log")
        axis.set_title(f"{title} unlearning" if title in ("before", "after") else f"{title} model")
        axis.set_xlabel("loss of a row (dashed line: median)")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of the rows, %")
    top = axes[0].get_ylim()[1]
    axes[0].set_ylim(0, top * 1.3)  # room for the legends
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(axis: Any, sets: Mapping[str, np.ndarray], bins: np.ndarray) -> None:
    for position, (name, losses) in enumerate(sets.items()):
        if not len(losses):
            continue
        color = _COLORS[min(position, 1)]
        axis.hist(
            losses,
            bins=list(bins),
            weights=np.full(len(losses), 100 / len(losses)),
            histtype="stepfilled",
            alpha=0.45,
            color=color,
            edgecolor=color,
            label=f"{name} ({len(losses):,})",
        )
        axis.axvline(float(np.median(losses)), color=color, linestyle="--", linewidth=1.2)
