"""What the pages of a report show, from the plain values of `report.json` alone: nothing else can slip in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES
from hf_iau.report import explanations, tables

Values = Mapping[str, Any]


def columns(report: Values) -> dict[str, dict[str, Any]]:
    """The figures of each model that was measured, by its column's title."""
    found = {"before": report["before"], "after": report["after"]}
    if report["retrained"] is not None:
        found["retrained"] = report["retrained"]
    if report["noise_floor"] is not None:
        found["retrained again"] = report["noise_floor"]["figures"]
    return found


def comparison(report: Values) -> tables.Table:
    """The figures of `columns` side by side, with their gaps."""
    gaps = {"before": report["gap_before"], "after": report["gap"]}
    if report["noise_floor"] is not None:
        gaps["retrained again"] = report["noise_floor"]["gap"]
    return tables.comparison(columns(report), gaps)


def compared_with(report: Values) -> str | None:
    """The set that the membership attack compared the forget rows with: "test", "held_out" or None."""
    after = report["after"]
    if after.get("mia_auc_test") is not None:
        return "test"
    return "held_out" if after.get("mia_auc") is not None else None


def standard_error(report: Values) -> float | None:
    """Standard error of the AUC at 50 %, in points: √((m + n + 1)/(12 m n)) × 100, about 29/√m for large n."""
    split = compared_with(report)
    m = report["counts"].get("forget_rows")
    n = report["counts"].get(f"{split}_rows") if split else None
    return 100 * float(((m + n + 1) / (12 * m * n)) ** 0.5) if m and n else None


def request(report: Values) -> str:
    """What was asked, as one sentence."""
    rows, of = report["counts"]["forget_rows"], report["counts"].get("train_rows")
    some = f"{rows:,}" if of is None else f"{rows:,} of {of:,} training"
    return f"{some} row{'' if rows == 1 and of is None else 's'} {'was' if rows == 1 else 'were'} to be forgotten."


def reasons(report: Values) -> list[str]:
    """What the verdict rests on, in sentences."""
    found = report["diagnostics"].get("reasons") or []
    return [found] if isinstance(found, str) else list(found)


def deed(report: Values) -> str:
    """What was done to the weights, as one sentence."""
    if not report["counts"]["forget_rows"]:
        return "No weight was changed."
    words = explanations.METHODS.get(report["method"])
    if "multi_step" in report["diagnostics"]:
        words = explanations.MULTI_STEP
    return f"The weights were changed by {words}." if words else "The weights were changed by the method named here."


def step(report: Values) -> list[tuple[str, str]]:
    """The step in numbers and words, as far as the method told of one."""
    diagnostics = report["diagnostics"]
    calibration = diagnostics.get("calibration")
    calibration = calibration if isinstance(calibration, Mapping) else {}
    found = []
    if calibration.get("source") is not None:
        source = str(calibration["source"])
        found.append(("step size rests on", explanations.SOURCES.get(source, source)))
    if "multi_step" not in diagnostics:
        names = {"scale": "scale k", "damping": "damping λ", "retain_weight": "weight c of the retain correction"}
        found += [
            (words, f"{calibration[name]:.4g}") for name, words in names.items() if calibration.get(name) is not None
        ]
    if diagnostics.get("step_norm") is not None:
        norm = f"{diagnostics['step_norm']:.4g}"
        if diagnostics.get("relative_step_norm") is not None:
            norm += f", {100 * diagnostics['relative_step_norm']:.2g} % of the norm of the weights"
        found.append(("length of the step", norm))
    return found


def counts(report: Values) -> list[tuple[str, str]]:
    """How many rows there were of each kind."""
    return [
        (
            explanations.COUNTS.get(name, name.replace("held_out", "held-out").replace("_", " ")),
            f"{count:,}" if isinstance(count, int) else str(count),
        )
        for name, count in report["counts"].items()
        if count is not None
    ]


def shared(report: Values) -> dict[str, Any]:
    """What the Markdown and the HTML page both show: tables as lists of rows of text, sentences, numbers."""
    diagnostics = {name: value for name, value in report["diagnostics"].items() if name != "reasons"}
    memory = report["peak_memory_bytes"]
    attacks = tables.attacks(report["before"].get("attacks"), report["after"].get("attacks"))
    single_values = tables.values(diagnostics)
    return {
        "report": report,
        "request": request(report),
        "reasons": reasons(report),
        "meaning": explanations.VERDICTS.get(report["verdict"]) if report["counts"]["forget_rows"] else None,
        "deed": deed(report),
        "step": step(report),
        "counts": counts(report),
        "four_figures": [
            words
            for key, words in explanations.FOUR_FIGURES.items()
            if any(figures.get(key) is not None for figures in columns(report).values())
        ],
        "comparison": comparison(report),
        "intervals": tables.intervals(columns(report)),
        "differences": tables.differences(report["gap"]),
        "attacks": attacks if len(attacks) > 1 else None,
        "costs": tables.costs(report["seconds"], memory) if report["seconds"] else None,
        "total_seconds": sum(value for value in report["seconds"].values() if value is not None),
        "total_memory": tables.size(max(memory.values(), default=None)),
        "diagnostics": [["figure", "value"], *single_values] if single_values else None,
        "curves": tables.curves(diagnostics),
        "unseen_rows": {"test": "test", "held_out": "held-out", None: None}[compared_with(report)],
        "standard_error": standard_error(report),
        "minimum_rows": MINIMUM_ROWS_FOR_PER_ROW_FIGURES,
        "guaranteed": explanations.GUARANTEED if report["counts"]["forget_rows"] else (),
        "not_guaranteed": explanations.not_guaranteed(report["calibrated"]),
        "number": tables.number,
    }
