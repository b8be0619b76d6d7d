"""A suite's cells as Markdown: differences to the retrained model, ranks, the front, requests in a row, claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.answer_tables import answers_table
from benchmarks.claims import claims_table
from benchmarks.plots import plot_gap_against_seconds, plot_losses
from benchmarks.results import (
    DEFAULT_METHOD,
    UNOPTIMISED_ATTACK,
    Cell,
    Panel,
    Rank,
    Result,
    average_ranks,
    closer_and_faster,
    front,
    panels,
)
from benchmarks.suites import Suite
from benchmarks.tuning import RULE
from benchmarks.variants import OURS, PUBLISHED

_DIFFERENCES = {
    "RA": "retain_accuracy",
    "FA": "forget_accuracy",
    "TA": "test_accuracy",
    "MIA": "mia_auc",
}
_BEFORE, _FLOOR = "do nothing", "retrained again (noise floor)"
_PLACES = ("gap", "utility", "seconds", "mean")


def write_summary(cells: Sequence[Cell], suite: Suite, folder: Path) -> str:
    """Write `table.md`, `gap_against_seconds.png` and `plots/` into `folder` and return the table."""
    found = panels([cell for cell in cells if cell["suite"] == suite.name], suite)
    text = markdown(found, suite)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text)
    if found:
        plot_gap_against_seconds(found, folder / "gap_against_seconds.png")
    for panel in found:
        plot_losses(panel, folder / "cells", folder / "plots")
    return text


def markdown(found: Sequence[Panel], suite: Suite) -> str:
    """The tables of every work and scenario of the suite, in the suite's order."""
    parts = [f"# {suite.name}", ""]
    if not found:
        return "\n".join([*parts, "No cell is finished."])
    parts += [
        "Signed differences to the model retrained from the same seed, in percentage points, mean ± standard deviation "
        "over seeds. RA, FA, TA: accuracy on retained, forgotten and test rows. MIA: AUC of the loss attack, forgotten "
        "against test rows. Gap: mean of the four absolute differences, per seed. Entropy: AUC of an attack that "
        "nothing was optimised for. SVC: share of forgotten rows that the confidence attack of SalUn's tables calls "
        "unseen; SVC gap: the gap with it in place of MIA, which is the average gap of those tables. "
        "Seconds: one plain `unlearn()` call with its own report before and after, wall (CPU); tuning and the "
        "gathering of a memory are counted apart. Rank: mean of the places by gap, test accuracy and seconds.",
        "",
        f"How baselines are tuned: {RULE}",
        "",
    ]
    for panel in found:
        parts += _section(panel)
    parts += _ranks_over(found)
    consecutive = [panel for panel in found if any(cell["checkpoints"] for cell in panel.cells)]
    for panel in consecutive:
        parts += _requests_in_a_row(panel, [p for p in found if p.work == panel.work and p is not panel])
    return "\n".join(parts) + "\n"


def _section(panel: Panel) -> list[str]:
    once = panel.once
    first = once[0]
    hardware = first["hardware"]
    seeds = [cell["seed"] for cell in once]
    ranks = {rank.name: rank for rank in average_ranks(panel)}
    lines = [
        f"## {panel.work}, {panel.scenario} ({first['forget_rows']:,} rows)",
        "",
        f"Seeds {', '.join(map(str, seeds))}; {hardware['accelerator'] or hardware['processor']}, "
        f"{hardware['threads']} thread(s) of {hardware['cpu_count']} CPUs, torch {hardware['torch']}. Command: "
        f"`{first['command']}`.",
        "",
        "| method | RA | FA | TA | MIA | entropy | SVC | gap | SVC gap | seconds (CPU) | tuning, s | gathering, s | "
        "rank | setting |",
        "|---" * 14 + "|",
        _row(_BEFORE, once, lambda c: c["gap_before"], lambda c: c["figures"]["before"], ["0", "", "", "", ""]),
    ]
    for result in panel.results:
        cells = list(result.cells)
        name = result.name if len(cells) == len(seeds) else f"{result.name} ({len(cells)} seed{'s' * (len(cells) > 1)})"
        ends = [
            _seconds(cells, "unlearn"),
            f"{result.tuning_seconds:.0f}" if cells[0]["tuning"] else "",
            _gathering(cells),
            _rank(ranks.get(result.name)),
            _setting(cells),
        ]
        lines.append(_row(name, cells, lambda c: c["gap"], lambda c: c["figures"]["after"], ends))
    if first["noise_floor"] is not None:
        lines.append(
            _row(
                _FLOOR,
                once,
                lambda c: c["noise_floor"],
                lambda c: c["figures"]["retrained_again"],
                [_seconds(once, "retraining"), "", "", "", ""],
            )
        )
    absolute = [
        f"{letters} {_spread([100 * v for c in once if (v := c['figures']['retrained'][name]) is not None])}"
        for letters, name in _DIFFERENCES.items()
        if first["figures"]["retrained"][name] is not None
    ]
    svc = [100 * v for c in once if (v := c["figures"]["retrained"]["svc_mia"]) is not None]
    peaks = [max(cell["memory"]["peak_bytes_by_phase"].values(), default=0) for cell in panel.cells]
    return [
        *lines,
        "",
        f"Retrained models: {', '.join(absolute)}{f', SVC {_spread(svc)}' if svc else ''}. "
        f"Peak memory of a request above the process' own: {max(peaks) / 2**20:.0f} MB.",
        "",
        *answers_table(panel),
        *_front_sentences(panel),
        *_calibrations(panel),
        *_claims(panel),
    ]


def _row(
    name: str,
    cells: Sequence[Cell],
    gap_of: Callable[[Cell], Cell],
    figures_of: Callable[[Cell], Cell],
    ends: Sequence[str],
) -> str:
    gaps = [gap_of(cell) for cell in cells]
    columns = [_spread([g[key] for g in gaps if g[key] is not None], signed=True) for key in _DIFFERENCES.values()]
    entropy, svc = (
        [difference(figures_of(c), c["figures"]["retrained"]) for c in cells]
        for difference in (_attack_difference, _svc_difference)
    )
    for found in (entropy, svc):
        columns.append(_spread([value for value in found if value is not None], signed=True))
    columns.append(f"**{_spread([g['mean_absolute'] for g in gaps if g['mean_absolute'] is not None], 2)}**")
    columns.append(_spread([v for v in map(_svc_gap, gaps, svc) if v is not None], 2))
    return f"| {name} | " + " | ".join([*columns, *ends]) + " |"


def _front_sentences(panel: Panel) -> list[str]:
    """Who is on the front, and whether anyone is both closer and faster than the package's default."""
    complete = [result for result in panel.complete if np.isfinite(result.gap)]
    best = ", ".join(f"{r.name} ({r.gap:.2f} in {r.seconds:.1f} s)" for r in front(complete))
    seeds = panel.common_seeds
    over = "" if len(seeds) == len(panel.once) else f" and ranks, on seeds {', '.join(map(str, seeds))} of all methods"
    lines = [f"Front of gap against seconds{over}: {best}.", ""]
    ours = next((result for result in complete if result.name == DEFAULT_METHOD), None)
    if ours is None:
        return lines
    better = closer_and_faster([r for r in complete if r.method != DEFAULT_METHOD], ours)
    if better:
        names = ", ".join(f"{r.name} ({r.gap:.2f} in {r.seconds:.1f} s)" for r in better)
        sentence = f"Both closer and faster than `{DEFAULT_METHOD}` ({ours.gap:.2f} in {ours.seconds:.1f} s): {names}."
    else:
        ours_is = f"`{DEFAULT_METHOD}` ({ours.gap:.2f} in {ours.seconds:.1f} s)"
        sentence = f"No other method is both closer and faster than {ours_is}."
    return [*lines, sentence, ""]


def _calibrations(panel: Panel) -> list[str]:
    """What calibration found, of the methods that calibrate themselves."""
    calibrated = [result for result in panel.results if any(cell["scale"] is not None for cell in result.cells)]
    if not calibrated:
        return []
    lines = ["| calibrated | k | λ | c | ‖Δ‖/‖θ‖ | verdict |", "|---|---|---|---|---|---|"]
    for result in calibrated:
        columns = []
        for key in ("scale", "damping", "retain_weight", "relative_path"):
            columns.append(", ".join(f"{cell[key]:.3g}" for cell in result.cells if cell[key] is not None))
        columns.append(_counted([cell["verdict"] for cell in result.cells]))
        lines.append(f"| {result.name} | " + " | ".join(columns) + " |")
    return [*lines, ""]


def _claims(panel: Panel) -> list[str]:
    names = [r.name for r in panel.results if r.cells[0]["group"] in (PUBLISHED, OURS)]
    shown = [name for name in names if name in ("iau-paper", "iau-released", "iau-released, tuned", DEFAULT_METHOD)]
    table = claims_table(panel, shown)
    return ["The paper's claims, computed from these cells:", "", *table, ""] if table else []


def _ranks_over(found: Sequence[Panel]) -> list[str]:
    """Average ranks over all works and scenarios, of the methods that took part in each."""
    if len(found) < 2:
        return []
    by_panel = [{rank.name: rank for rank in average_ranks(panel)} for panel in found]
    names = [name for name in by_panel[0] if all(name in ranks for ranks in by_panel)]
    if not names:
        return []
    means = {name: [float(np.mean([getattr(r[name], k) for r in by_panel])) for k in _PLACES] for name in names}
    lines = [
        f"## Average ranks over the {len(found)} tables above",
        "",
        "| method | gap | test accuracy | seconds | mean |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(names, key=lambda n: means[n][-1]):
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in means[name]) + " |")
    return [*lines, ""]


def _requests_in_a_row(panel: Panel, others: Sequence[Panel]) -> list[str]:
    """Several requests against one of the same rows, and the drift along the way."""
    first = next(cell for cell in panel.cells if cell["checkpoints"])
    steps = [point["requests"] for point in first["checkpoints"]]
    digests = {cell["forget_rows_digest"] for cell in panel.cells}
    single = next((p for p in others if {c["forget_rows_digest"] for c in p.cells} == digests), None)
    lines = [
        f"## {panel.work}, {panel.scenario}: drift",
        "",
        "Gap on the rows forgotten so far, to the model retrained without the rows of all requests; the path is the "
        "summed length of all steps relative to the weights.",
        "",
        "| method | "
        + " | ".join(f"gap after {n}" for n in steps)
        + " | one request of the same rows | seconds a request: "
        "first, mean, last | path | verdicts |",
        "|---" * (len(steps) + 5) + "|",
    ]
    for result in panel.results:
        cells = [cell for cell in result.cells if cell["checkpoints"]]
        if not cells:
            continue
        columns = [
            _spread([g for c in cells if (g := c["checkpoints"][i]["gap"]["mean_absolute"]) is not None], 2)
            for i in range(len(steps))
        ]
        at_once = single.of(result.name) if single is not None else None
        columns.append("–" if at_once is None else _spread(at_once.gaps(), 2))
        key = "cpu_seconds" if cells[0]["timing"]["kind"] == "cpu" else "seconds"
        seconds = np.asarray([[request[key] for request in cell["requests"]] for cell in cells])
        columns.append(f"{seconds[:, 0].mean():.1f}, {seconds.mean():.1f}, {seconds[:, -1].mean():.1f}")
        columns.append(_spread([cell["relative_path"] for cell in cells], 2))
        columns.append(_counted([request["verdict"] for cell in cells for request in cell["requests"]]))
        lines.append(f"| {result.name} | " + " | ".join(columns) + " |")
    return [*lines, ""]


def _seconds(cells: Sequence[Cell], timed: str) -> str:
    wall, cpu = ([cell["timing"][f"{timed}_{kind}"] for cell in cells] for kind in ("seconds", "cpu_seconds"))
    return f"{np.mean(wall):.1f} ({np.mean(cpu):.1f})"


def _gathering(cells: Sequence[Cell]) -> str:
    seconds = [sum(cell["timing"]["gather_seconds_by_phase"].values()) for cell in cells]
    return f"{np.mean(seconds):.1f}" if any(cell["gather_config"] is not None for cell in cells) else ""


def _rank(rank: Rank | None) -> str:
    return "" if rank is None else f"{rank.mean:.1f}"


def _setting(cells: Sequence[Cell]) -> str:
    """What tuning chose, as far as the settings differ; the seeds' choices in their order."""
    tried = [cell["settings_to_choose_among"] for cell in cells if cell["tuning"] is not None]
    if not tried:
        return ""
    names = [name for name in tried[0][0] if len({repr(setting[name]) for setting in tried[0]}) > 1]
    chosen = [cell["tuning"]["chosen"] for cell in cells if cell["tuning"]]
    texts = [", ".join(_short(setting[name]) for name in names) for setting in chosen]
    beyond = sum(not cell["tuning"]["within_tolerance"] for cell in cells if cell["tuning"])
    mark = f" ({beyond} beyond the tolerated loss)" if beyond else ""
    return f"{', '.join(names)}: {'; '.join(dict.fromkeys(texts))}{mark}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _counted(verdicts: Sequence[str | None]) -> str:
    return ", ".join(f"{verdict} ×{count}" for verdict, count in Counter(v for v in verdicts if v).most_common())


def _attack_difference(figures: Cell | None, retrained: Cell) -> float | None:
    sides = [((side or {}).get("attacks") or {}).get(UNOPTIMISED_ATTACK) for side in (figures, retrained)]
    if any(side is None or side["auc"] is None for side in sides):
        return None
    return 100 * (sides[0]["auc"] - sides[1]["auc"])


def _svc_gap(gap: Cell, svc: float | None) -> float | None:
    """The average gap of SalUn's tables: the gap with the SVC attack in place of the loss attack."""
    values = [gap[name] for name in ("retain_accuracy", "forget_accuracy", "test_accuracy")] + [svc]
    return None if None in values else float(np.mean(np.abs(values)))


def _svc_difference(figures: Cell | None, retrained: Cell) -> float | None:
    sides = [(side or {}).get("svc_mia") for side in (figures, retrained)]
    return None if None in sides else 100 * (sides[0] - sides[1])


def _spread(values: Sequence[float], digits: int = 1, *, signed: bool = False) -> str:
    if not values:
        return "–"
    sign = "+" if signed else ""
    mean = f"{np.mean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


__all__ = ["Result", "markdown", "write_summary"]
