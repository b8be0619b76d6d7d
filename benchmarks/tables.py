"""A suite's cells as one Markdown table, with the noise floor beside it, and a plot of gap against seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suites import Suite

Cell = dict[str, Any]

_DIFFERENCES = {
    "RA": "retain_accuracy",
    "UA": "forget_accuracy",
    "TA": "test_accuracy",
    "MIA": "mia_auc",
}
_BEFORE, _FLOOR = "do nothing", "retrained again (noise floor)"
_UNOPTIMISED_ATTACK = "entropy"  # ignores the label, so it is no function of the loss


def write_summary(cells: Sequence[Cell], suite: Suite, folder: Path) -> str:
    """Write `table.md` and `gap_against_seconds.png` into `folder` and return the table."""
    cells = [cell for cell in cells if cell["suite"] == suite.name]
    text = markdown(cells, suite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text)
    if cells:
        plot_gap_against_seconds(cells, folder / "gap_against_seconds.png")
    return text


def markdown(cells: Sequence[Cell], suite: Suite) -> str:
    """The table of every work and scenario of the suite, in the suite's order."""
    parts = [f"# {suite.name}", ""]
    if not cells:
        return "\n".join([*parts, "No cell is finished."])
    parts += [
        "Signed differences to the model retrained from the same seed, in percentage points (RA, UA, TA: accuracy on "
        "retained, forgotten and test rows; MIA: AUC of the loss attack, forgotten against test rows; entropy attack: AUC "
        "of an attack that nothing was optimised for), mean ± standard deviation over seeds. Gap: mean of the four absolute differences, per seed. Seconds: one plain "
        "`unlearn()` call with calibration and its own before/after report, wall (CPU); the gradient memory is "
        "gathered once and timed apart.",
        "",
    ]
    for work in suite.works:
        for scenario in suite.scenarios:
            chosen = [c for c in cells if c["work"] == work.name and c["scenario"] == scenario.name]
            if chosen:
                parts += _section(chosen, suite)
    return "\n".join(parts) + "\n"


def _section(cells: Sequence[Cell], suite: Suite) -> list[str]:
    first = cells[0]
    seeds = sorted({cell["seed"] for cell in cells})
    hardware = first["hardware"]
    lines = [
        f"## {first['work']}, {first['scenario']} ({first['forget_rows']:,} rows)",
        "",
        f"Seeds {', '.join(map(str, seeds))}; {hardware['processor']}, {hardware['threads']} thread(s) of "
        f"{hardware['cpu_count']} CPUs, torch {hardware['torch']}. Command: `{first['command']}`.",
        "",
        "| method | RA | UA | TA | MIA | entropy attack | gap | seconds (CPU) | k | λ | c | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_seed = {cell["seed"]: cell for cell in cells}
    once = [by_seed[seed] for seed in seeds]
    lines.append(_row(_BEFORE, once, lambda c: c["gap_before"], lambda c: c["figures"]["before"], None))
    order = [variant.name for variant in (*suite.variants, *suite.ablation)]
    for name in sorted({cell["method"] for cell in cells}, key=order.index):
        chosen = [cell for cell in cells if cell["method"] == name]
        lines.append(_row(name, chosen, lambda c: c["gap"], lambda c: c["figures"]["after"], "unlearn"))
    if once[0]["noise_floor"] is not None:
        lines.append(
            _row(_FLOOR, once, lambda c: c["noise_floor"], lambda c: c["figures"]["retrained_again"], "retraining")
        )
    absolute = [
        f"{letters} {_spread([100 * v for c in once if (v := c['figures']['retrained'][name]) is not None])}"
        for letters, name in _DIFFERENCES.items()
        if once[0]["figures"]["retrained"][name] is not None
    ]
    gathering = {}
    for cell in cells:
        phases = cell["timing"]["gather_seconds_by_phase"]
        for phase, value in phases.items():
            if value > 1e-3:
                gathering.setdefault(phase, []).append(value)
    peaks = [_peak(cell) for cell in cells]
    return [
        *lines,
        "",
        f"Retrained models: {', '.join(absolute)}.",
        "Gathering: " + ", ".join(f"{phase} {_spread(values, 1)} s" for phase, values in gathering.items()) + ". "
        f"Peak memory of a request above the process' own: {max(peaks) / 2**20:.0f} MB.",
        "",
    ]


def _row(
    name: str,
    cells: Sequence[Cell],
    gap_of: Callable[[Cell], Cell],
    figures_of: Callable[[Cell], Cell],
    timed: str | None,
) -> str:
    gaps = [gap_of(cell) for cell in cells]
    columns = [_spread([g[key] for g in gaps if g[key] is not None], signed=True) for key in _DIFFERENCES.values()]
    attacks = [_attack_difference(figures_of(c), c["figures"]["retrained"]) for c in cells]
    columns.append(_spread([value for value in attacks if value is not None], signed=True))
    columns.append(f"**{_spread([g['mean_absolute'] for g in gaps], 2)}**")
    if timed is None:
        columns.append("0")
    else:
        wall = [cell["timing"][f"{timed}_seconds"] for cell in cells]
        cpu = [cell["timing"][f"{timed}_cpu_seconds"] for cell in cells]
        columns.append(f"{np.mean(wall):.2f} ({np.mean(cpu):.2f})")
    if timed == "unlearn":
        for key in ("length", "damping", "finish_weight"):
            found = [cell[key] for cell in cells if cell[key] is not None]
            columns.append(", ".join(f"{value:.3g}" for value in found))
        verdicts = Counter(cell["verdict"] or "" for cell in cells)
        columns.append(", ".join(f"{verdict} ×{count}" for verdict, count in verdicts.most_common() if verdict))
    else:
        columns += ["", "", "", ""]
    return f"| {name} | " + " | ".join(columns) + " |"


def plot_gap_against_seconds(cells: Sequence[Cell], path: Path) -> None:
    """One panel a work and scenario: each method's mean gap over its mean seconds, retraining, and doing nothing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sorted({(cell["work"], cell["scenario"]) for cell in cells})
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (work, scenario) in zip(axes, panels, strict=False):
        chosen = [c for c in cells if (c["work"], c["scenario"]) == (work, scenario)]
        for name in sorted({cell["method"] for cell in chosen}):
            mine = [cell for cell in chosen if cell["method"] == name]
            _point(axis, name, _timings(mine, "unlearn_seconds"), [c["gap"]["mean_absolute"] for c in mine])
        floors = [c["noise_floor"]["mean_absolute"] for c in chosen if c["noise_floor"]]
        if floors:
            _point(axis, "retrained again", _timings(chosen, "retraining_seconds"), floors, marker="s")
            axis.axhline(float(np.mean(floors)), color="grey", linewidth=0.8, linestyle=":")
        before = float(np.mean([c["gap_before"]["mean_absolute"] for c in chosen]))
        axis.axhline(before, color="black", linewidth=0.8, linestyle="--", label="do nothing")
        axis.set_xscale("log")
        axis.set_ylim(bottom=0)
        axis.set_title(f"{work}, {scenario}", fontsize=10)
        axis.set_xlabel("seconds")
        axis.set_ylabel("gap to retrained (points)")
        axis.legend(fontsize=7)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=130)


def _point(axis: Any, name: str, seconds: Sequence[float], gaps: Sequence[float], marker: str = "o") -> None:
    spread = float(np.std(gaps, ddof=1)) if len(gaps) > 1 else 0.0
    axis.errorbar(np.mean(seconds), np.mean(gaps), yerr=spread, marker=marker, capsize=3, linestyle="", label=name)


def _timings(cells: Iterable[Cell], key: str) -> list[float]:
    return [cell["timing"][key] for cell in cells]


def _attack_difference(figures: Cell | None, retrained: Cell) -> float | None:
    """AUC of an attack that calibration did not look at, in points above the retrained model's."""
    sides = [((side or {}).get("attacks") or {}).get(_UNOPTIMISED_ATTACK) for side in (figures, retrained)]
    if any(side is None or side["auc"] is None for side in sides):
        return None
    return 100 * (sides[0]["auc"] - sides[1]["auc"])


def _peak(cell: Cell) -> float:
    return max(cell["memory"]["peak_bytes_by_phase"].values(), default=0)


def _spread(values: Sequence[float], digits: int = 1, *, signed: bool = False) -> str:
    if not values:
        return "–"
    sign = "+" if signed else ""
    mean = f"{np.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"
