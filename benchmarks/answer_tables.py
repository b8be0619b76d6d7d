"""TOFU's figures of a suite's cells as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.results import Cell, Panel

_PARTS = ("probability", "rouge_l_recall", "truth_ratio")


def answers_table(panel: Panel) -> list[str]:
    """One line a model: forget quality, utility, and what they are made of; empty where no cell has such figures."""
    once = [cell for cell in panel.once if cell.get("forget_quality") is not None]
    if not once:
        return []
    rows = [_row("do nothing", once, "before", "before")]
    for result in panel.results:
        found = [cell for cell in result.cells if cell.get("forget_quality") is not None]
        rows += [_row(result.name, found, "after", "after")] if found else []
    if once[0]["noise_floor"] is not None:
        rows.append(_row("retrained again (noise floor)", once, "retrained_again", "retrained_again"))
    rows.append(_row("retrained", once, None, "retrained"))
    quality = next(q for cell in once for q in cell["forget_quality"].values() if q is not None)
    utility = once[0]["figures"]["retrained"]["answers"]["utility"]
    missing = "" if utility["rouge_l_recall"] is not None else " ROUGE-L is left out: `rouge_score` is not installed."
    return [
        f"TOFU's figures. Forget quality: p of a Kolmogorov-Smirnov test of the {quality['rows']} forget rows' truth "
        "ratios against the retrained model's (above 0.05: not told apart), and the test's statistic. Forget rows: "
        "P(answer)^(1/tokens), ROUGE-L recall of the greedy answer, median truth ratio (about 1: does not know). Model "
        f"utility: harmonic mean of probability, ROUGE-L recall and max(0, 1 − truth ratio) on {utility['rows']} "
        f"retained rows.{missing}",
        "",
        "| model | forget quality | log10 | KS | forget rows: P | ROUGE-L | truth ratio | utility | retained rows: P | "
        "ROUGE-L | 1 − truth ratio |",
        "|---" * 11 + "|",
        *rows,
        "",
    ]


def _row(name: str, cells: Sequence[Cell], quality: str | None, figures: str) -> str:
    tests = [] if quality is None else [t for cell in cells if (t := cell["forget_quality"][quality]) is not None]
    answers = [cell["figures"][figures]["answers"] for cell in cells]
    columns = [
        ", ".join(f"{test['p_value']:.2g}" for test in tests),
        ", ".join(f"{test['log10_p_value']:.1f}" for test in tests if test["log10_p_value"] is not None),
        _mean([test["statistic"] for test in tests]),
        *(
            _mean([answer[f"forget_{key}"] for answer in answers])
            for key in ("probability", "rouge_l_recall", "truth_ratio")
        ),
        f"**{_mean([answer['utility']['utility'] for answer in answers])}**",
        *(_mean([answer["utility"][key] for answer in answers]) for key in _PARTS),
    ]
    return f"| {name} | " + " | ".join(column or "–" for column in columns) + " |"


def _mean(values: Sequence[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{np.mean(found):.2f}" if found else "–"
