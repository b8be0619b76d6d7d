"""The report's figures as short tables for people: percent with one decimal, losses with three."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAXIMUM_ROWS = 10

_FIGURES = (
    ("retain_accuracy", "accuracy, retained rows (RA), %", 100),
    ("forget_accuracy", "accuracy, forget rows (FA), %", 100),
    ("held_out_accuracy", "accuracy, held-out rows, %", 100),
    ("test_accuracy", "accuracy, test rows (TA), %", 100),
    ("retain_loss", "loss, retained rows", None),
    ("forget_loss", "loss, forget rows", None),
    ("held_out_loss", "loss, held-out rows", None),
    ("test_loss", "loss, test rows", None),
    ("mia_auc", "membership AUC (MIA), %", 100),
)

Table = list[list[str]]


def number(value: Any, scale: int | None = None, digits: int = 1) -> str:
    """`value × scale` with `digits` decimals, without a scale `value` with three; a dash for None."""
    if value is None or value != value:
        return "–"
    if scale is not None:
        return f"{scale * value:.{digits}f}"
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.2e}"


def comparison(columns: Mapping[str, Mapping[str, Any]], gaps: Mapping[str, Mapping[str, Any] | None]) -> Table:
    """The models' figures side by side: a header, then at most ten rows; figures that no model has are left out.

    Args:
        columns: figures (see `hf_iau.evaluation.Figures`) by the column's title.
        gaps: the `hf_iau.evaluation.Gap` dictionary of each column that has one.
    """
    rows = [["", *columns]]
    for name, title, scale in _FIGURES:
        values = [figures.get(name) for figures in columns.values()]
        if any(value is not None for value in values):
            rows.append([title, *(number(value, scale) for value in values)])
    if any(gaps.values()):
        based_on_loss = any(gap and gap.get("based_on") == "loss" for gap in gaps.values())
        title = "mean gap to retrained, " + ("% of loss" if based_on_loss else "points")
        means = [(gaps.get(column) or {}).get("mean_absolute") for column in columns]
        rows.append([title, *(number(mean, 1, 2) for mean in means)])
    return rows


def intervals(columns: Mapping[str, Mapping[str, Any]]) -> Table:
    """The 95 % intervals of the models' accuracies and AUC side by side, in percent; a header alone where none has any.

    Args:
        columns: figures (see `hf_iau.evaluation.Figures`) by the column's title.
    """
    rows = [["95 % interval", *columns]]
    for name, title, scale in _FIGURES:
        found = [(figures.get("intervals") or {}).get(name) for figures in columns.values()]
        if any(found):
            rows.append([title, *(span(interval, scale) for interval in found)])
    return rows


def span(interval: Any, scale: int | None = None) -> str:
    """`(low, high)` × `scale` as "low – high", or "low to high" where one is negative; a dash for None."""
    if interval is None or None in interval:
        return "–"
    return (" – " if min(interval) >= 0 else " to ").join(number(end, scale) for end in interval)


def differences(gap: Mapping[str, Any] | None) -> Table:
    """The signed differences of a `Gap` dictionary that its mean averages, with their intervals if there are any."""
    found = (gap or {}).get("intervals") or {}
    rows = [["figure", "unlearned − retrained", *(["95 % interval"] if found else [])]]
    names = {"retain": "RA", "forget": "FA", "test": "TA"}
    for name in (gap or {}).get("compared", ()):
        value = (gap or {})[name]
        if name == "mia_auc":
            row = ["MIA", f"{value:+.1f} points"]
        else:
            split, kind = name.rsplit("_", 1)
            row = [names[split], f"{value:+.1f} points"] if kind == "accuracy" else [name, f"{value:+.1f} %"]
        rows.append([*row, *([span(found.get(name), 1)] if found else [])])
    return rows


def attacks(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> Table:
    """Each attack's AUC with its interval and its true positive rate at 1 % false positives, before and after."""
    rows = [["attack on", "AUC before, %", "AUC after, % (95 % interval)", "recognised at 1 % FPR, % (95 % interval)"]]
    for score, result in (after or {}).items():
        if result["auc"] is None:
            continue
        interval = "" if result["ci_low"] is None else f" ({span((result['ci_low'], result['ci_high']), 100)})"
        ends = (result.get("tpr_at_1_percent_fpr_low"), result.get("tpr_at_1_percent_fpr_high"))  # older reports: None
        recognised = "" if None in ends else f" ({span(ends, 100)})"
        rows.append(
            [
                score.replace("_", " "),
                number(((before or {}).get(score) or {}).get("auc"), 100),
                number(result["auc"], 100) + interval,
                number(result["tpr_at_1_percent_fpr"], 100) + recognised,
            ]
        )
    return rows


def costs(seconds: Mapping[str, float], peak_memory_bytes: Mapping[str, int]) -> Table:
    """Seconds and peak memory by phase, the longest phases first when there are more than ten."""
    names = list(dict.fromkeys([*seconds, *peak_memory_bytes]))
    if len(names) > MAXIMUM_ROWS:
        names = sorted(names, key=lambda name: -(seconds.get(name) or 0.0))[:MAXIMUM_ROWS]
    return [
        ["phase", "seconds", "peak memory"],
        *([name, _seconds(seconds.get(name)), size(peak_memory_bytes.get(name))] for name in names),
    ]


def values(diagnostics: Mapping[str, Any], prefix: str = "") -> Table:
    """The single values of nested diagnostics, named by their path; longer lists are left to the JSON file."""
    rows: Table = []
    for name, value in diagnostics.items():
        if isinstance(value, Mapping):
            rows.extend(values(value, f"{prefix}{name}."))
        elif not isinstance(value, list):
            rows.append([prefix + name, _single(value)])
        elif 0 < len(value) <= 8 and not any(isinstance(item, (list, Mapping)) for item in value):
            rows.append([prefix + name, ", ".join(map(_single, value))])
    return rows


def curves(diagnostics: Mapping[str, Any], prefix: str = "") -> dict[str, Table]:
    """The lists of like records in nested diagnostics, such as a calibration curve, by their path.

    At most ten records of each, evenly spread, the first and the last among them.
    """
    found: dict[str, Table] = {}
    for name, value in diagnostics.items():
        if isinstance(value, Mapping):
            found.update(curves(value, f"{prefix}{name}."))
        elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            keys = [key for key, item in value[0].items() if not isinstance(item, (list, Mapping))]
            step = max(1.0, (len(value) - 1) / (MAXIMUM_ROWS - 1))
            chosen = [value[round(i * step)] for i in range(min(len(value), MAXIMUM_ROWS))]
            if keys:
                found[prefix + name] = [keys, *([_single(item.get(key)) for key in keys] for item in chosen)]
    return found


def _single(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def size(count: float | None) -> str:
    """Bytes for people."""
    if count is None:
        return "–"
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if abs(count) >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"


def text(table: Table) -> str:
    """An aligned plain-text table."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def markdown(table: Table, words: bool = False) -> str:
    """A Markdown table; the columns after the first are flush right, or left where they hold `words`."""
    clean = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in table]
    head, *body = clean
    alignment = [":--", *(":--" if words else "--:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, alignment, *body))


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f}" if value >= 1 else f"{value:.3f}"
