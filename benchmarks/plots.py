"""Gap against seconds with its front, loss histograms, and ROC curves of the loss attack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullFormatter
from sklearn.metrics import roc_auc_score, roc_curve

from benchmarks.files import file_name, read_arrays
from benchmarks.results import DEFAULT_METHOD, Panel, front
from hf_iau.report.histograms import loss_histograms

_MARKERS = "oDv^<>pPXhHd8s"


def plot_gap_against_seconds(panels: Sequence[Panel], path: Path) -> None:
    """One panel a work and scenario: each method's mean gap over its mean seconds, and the front of the best bargains.

    Doing nothing is a dashed line, the distance of two retrained models a dotted one.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, axes = _figure(rows, columns, width=7.6, height=4.6)
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for axis, panel in zip(axes, panels, strict=False):
        for number, result in enumerate(panel.results):
            if not np.isfinite(result.gap):
                continue
            gaps = result.gaps()
            spread = float(np.std(gaps, ddof=1)) if len(gaps) > 1 else 0.0
            ours = result.name == DEFAULT_METHOD
            axis.errorbar(
                result.seconds,
                result.gap,
                yerr=spread,
                marker="*" if ours else _MARKERS[number % len(_MARKERS)],
                markersize=13 if ours else 6,
                color="black" if ours else colors[number % len(colors)],
                capsize=2,
                linestyle="",
                label=result.name,
            )
        floors = [cell["noise_floor"]["mean_absolute"] for cell in panel.once if cell["noise_floor"]]
        if floors:
            axis.plot(panel.retraining_seconds(), np.mean(floors), marker="s", color="grey", linestyle="")
            axis.annotate(
                "retrained again ",
                (panel.retraining_seconds(), float(np.mean(floors))),
                fontsize=7,
                ha="right",
                va="bottom",
            )
            axis.axhline(float(np.mean(floors)), color="grey", linewidth=0.8, linestyle=":")
        best = front([result for result in panel.complete if np.isfinite(result.gap)])
        axis.step(
            [result.seconds for result in best],
            [result.gap for result in best],
            where="post",
            color="black",
            linewidth=1.0,
            alpha=0.6,
            label="front",
        )
        before = float(np.mean([cell["gap_before"]["mean_absolute"] for cell in panel.once]))
        axis.axhline(before, color="black", linewidth=0.8, linestyle="--", label="do nothing")
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(LogFormatter())
        axis.set_ylim(0, 2 * before if before else None)  # a method that ruins the model is off the plot
        axis.set_title(f"{panel.work}, {panel.scenario}", fontsize=10)
        axis.set_xlabel("seconds of a request")
        axis.set_ylabel("gap to retrained (points)")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=130)


def plot_losses(panel: Panel, cells_folder: Path, folder: Path) -> list[Path]:
    """Histograms of row losses (one image a method) and ROC curves of the loss attack (one image), first seed."""
    seed = min(cell["seed"] for cell in panel.cells)
    shared = cells_folder / f"{file_name(panel.work, panel.scenario, f'seed{seed}', 'references')}.npz"
    if not shared.is_file():
        return []
    references = read_arrays(shared)
    if len(references["before_forget"]) < 2:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    curves = {name: (references[f"{name}_forget"], references[f"{name}_test"]) for name in ("before", "retrained")}
    written, drawn = [], [shared]
    for result in panel.results:
        path = cells_folder / f"{file_name(panel.work, panel.scenario, f'seed{seed}', result.name)}.npz"
        if seed not in result.seeds or not path.is_file():
            continue
        losses = read_arrays(path)
        curves[result.name] = (losses["forget"], losses["test"])
        sides = {"before": curves["before"], result.name: curves[result.name], "retrained": curves["retrained"]}
        image = folder / f"losses--{file_name(panel.work, panel.scenario, result.name)}.png"
        image.write_bytes(loss_histograms({name: {"forget rows": f, "test rows": t} for name, (f, t) in sides.items()}))
        written.append(image)
    roc = folder / f"roc--{file_name(panel.work, panel.scenario)}.png"
    if not _is_newer(roc, drawn):
        plot_roc(curves, f"{panel.work}, {panel.scenario}, seed {seed}", roc)
    return [*written, roc]


def plot_roc(losses: dict[str, tuple[np.ndarray, np.ndarray]], title: str, path: Path) -> None:
    """ROC curves of the loss attack, forget rows against test rows: linear, and where few are falsely accused.

    Args:
        losses: by model, the losses of the forget rows and of the test rows.
        title: of the figure.
        path: of the image.
    """
    figure, axes = _figure(1, 2, width=5.2, height=5.0)
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    for number, (name, (forget, test)) in enumerate(losses.items()):
        scores = -np.concatenate([forget, test]).astype(np.float64)
        if not np.isfinite(scores).all():
            continue
        members = np.repeat([1, 0], [len(forget), len(test)])
        false_positives, true_positives, _ = roc_curve(members, scores)
        style: dict[str, Any] = {"linewidth": 1.2}
        if name in ("before", "retrained"):
            style = {"linewidth": 2.2, "color": "black", "linestyle": "--" if name == "before" else "-"}
        else:
            style |= {"color": colors[number % len(colors)], "linestyle": ("-", "--")[number % 2]}
        label = f"{name} ({100 * roc_auc_score(members, scores):.1f})"
        for axis in axes:
            axis.plot(false_positives, true_positives, label=label, **style)
    for axis in axes:
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
        axis.set_xlabel("test rows called members")
        axis.set_ylabel("forget rows called members")
    axes[0].set_title(title, fontsize=10)
    axes[0].legend(fontsize=6, title="AUC × 100", title_fontsize=7)
    axes[1].set_xscale("log")
    axes[1].set_yscale("log")
    axes[1].set_xlim(1e-3, 1)
    axes[1].set_ylim(1e-3, 1)
    figure.savefig(path, dpi=130)


def _is_newer(image: Path, sources: Sequence[Path]) -> bool:
    """Whether an image was drawn after all that it shows."""
    return image.is_file() and all(image.stat().st_mtime_ns > path.stat().st_mtime_ns for path in sources)


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, Any]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()
