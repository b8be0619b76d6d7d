"""`python -m benchmarks.result_tables`: write the measured tables into the documents, from `docs/results/*.json`.

Every published figure lives in one of those files, with the command and the hardware that it came from. This module
renders each of them between its marks in `docs/results.md`, and the ones that the README shows into `README.md`, so
that a figure is never typed twice. `--collect OUT` first takes the figures of finished suites over from what
`benchmarks.run` wrote there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "docs" / "results.md", ROOT / "README.md")

DIFFERENCES = {"RA": "retain_accuracy", "FA": "forget_accuracy", "TA": "test_accuracy", "MIA": "mia_auc"}

UNBROKEN = "\N{NO-BREAK SPACE}"

Value = float | list[float] | str | None
"""A number, `[mean, standard deviation]`, Markdown, or nothing."""


@dataclass(frozen=True)
class Column:
    """How one column of a table is printed.

    Attributes:
        key: where a row holds its value.
        label: the heading.
        digits: behind the decimal point.
        signed: whether a plus sign is shown.
        bold: whether numbers are bold.
    """

    key: str
    label: str
    digits: int = 1
    signed: bool = False
    bold: bool = False

    def text(self, row: dict[str, Value]) -> str:
        """The cell of that row."""
        value = row.get(self.key)
        if value is None:
            return "–"
        if isinstance(value, str):
            return value
        shown = self._number(value) if not isinstance(value, list) else self._spread(*value)
        return f"**{shown}**" if self.bold else shown

    def _number(self, value: float) -> str:
        sign = "+" if self.signed and round(value, self.digits) != 0 else ""
        return f"{round(value, self.digits) + 0.0:{sign},.{self.digits}f}".replace("-", "−")

    def _spread(self, mean: float, deviation: float) -> str:
        return f"{self._number(mean)}{UNBROKEN}±{UNBROKEN}{deviation:.{self.digits}f}"


def table(result: dict[str, Any]) -> str:
    """A results file as a Markdown table, with its note, hardware and command below.

    Args:
        result: `columns` (see `Column`), `rows` (a value by key), and texts: `hardware`, `command`, `note`, each
        optional.
    """
    columns = [Column(**column) for column in result["columns"]]
    lines = ["| " + " | ".join(column.label for column in columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(column.text(row) for column in columns) + " |" for row in result["rows"]]
    below = [result[key] for key in ("note", "hardware") if result.get(key)]
    below += [f"`{result['command']}`"] if result.get("command") else []
    return "\n".join([*lines, "", " ".join(below)]).strip()


def filled(text: str, tables: dict[str, str]) -> str:
    """`text` with each table between its marks `<!-- NAME:begin -->` and `<!-- NAME:end -->`.

    Raises:
        ValueError: a mark has no table of its name, or its end is missing.
    """
    for name in re.findall(r"<!-- ([\w-]+):begin -->", text):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if name not in tables:
            raise ValueError(f"{begin}: there is no docs/results/{name}.json; there are {', '.join(sorted(tables))}.")
        if end not in text:
            raise ValueError(f"The page has {begin} but lacks {end}.")
        before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        text = f"{before}\n{tables[name]}\n{after}"
    return text


def read_tables(folder: Path = RESULTS) -> dict[str, str]:
    """Every results file as Markdown, by its name without `.json`."""
    return {path.stem: table(json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))}


# --- from finished cells ----------------------------------------------------------------------------------------------


def comparison(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a results file holds, from the cells of one work and scenario (see `benchmarks/README.md`).

    Signed differences to the model retrained from the same seed, in points; seconds are CPU seconds.
    """
    first = cells[0]
    once = list({cell["seed"]: cell for cell in sorted(cells, key=lambda c: c["seed"])}.values())
    by_method: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    rows = [_row("do nothing", [cell["gap_before"] for cell in once], seconds=0.0)]
    for name, mine in by_method.items():
        seconds = float(np.mean([cell["timing"]["unlearn_cpu_seconds"] for cell in mine]))
        rows.append(_row(f"`{name}`", [cell["gap"] for cell in mine], seconds=seconds))
    if first["noise_floor"] is not None:
        seconds = float(np.mean([cell["timing"]["retraining_cpu_seconds"] for cell in once]))
        rows.append(_row("retrained again (noise floor)", [cell["noise_floor"] for cell in once], seconds=seconds))
    hardware = first["hardware"]
    machine = hardware["accelerator"] or hardware["processor"]
    return {
        "columns": [
            {"key": "method", "label": "method"},
            {"key": "seeds", "label": "seeds", "digits": 0},
            *({"key": key, "label": key, "signed": True} for key in DIFFERENCES),
            {"key": "gap", "label": "gap", "digits": 2, "bold": True},
            {"key": "seconds", "label": "CPU seconds"},
        ],
        "rows": rows,
        "hardware": f"{machine}, {hardware['threads']} thread(s), torch {hardware['torch']}.",
        "command": re.sub(r"--(out|data|weights) \S+", lambda m: f"--{m[1]} {m[1].upper()}", first["command"]),
    }


def _row(name: str, gaps: Sequence[dict[str, Any]], *, seconds: float) -> dict[str, Value]:
    row: dict[str, Value] = {"method": name, "seeds": len(gaps), "seconds": round(seconds, 2)}
    for key, figure in {**DIFFERENCES, "gap": "mean_absolute"}.items():
        values = [gap[figure] for gap in gaps if gap[figure] is not None]
        if values:
            mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            row[key] = [round(mean, 3), round(deviation, 3)] if len(values) > 1 else round(mean, 3)
    return row


def collect(out: Path) -> list[Path]:
    """Write a results file for each suite and scenario whose cells lie below `out`; returns the files."""
    written = []
    for suite in sorted(path.parent for path in out.glob("*/cells") if any(path.glob("*.json"))):
        groups: dict[str, list[dict[str, Any]]] = {}
        for path in sorted((suite / "cells").glob("*.json")):
            cell = json.loads(path.read_text(encoding="utf-8"))
            groups.setdefault(cell["scenario"], []).append(cell)
        for scenario, cells in groups.items():
            name = suite.name if len(groups) == 1 else f"{suite.name}-{scenario}"
            target = RESULTS / f"{re.sub(r'[^a-z0-9-]+', '_', name.lower())}.json"
            found = comparison(cells)
            if target.is_file():  # the words below a table are a person's
                found["note"] = json.loads(target.read_text(encoding="utf-8")).get("note")
            target.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            written.append(target)
    return written


def main(
    out: Annotated[Path | None, typer.Option("--collect", help="Folder that benchmarks.run wrote into.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail where a page is out of date.")] = False,
) -> None:
    """Render `docs/results/*.json` into `docs/results.md` and `README.md`."""
    if out is not None:
        for path in collect(out):
            typer.echo(f"wrote {path.relative_to(ROOT)}")
    tables = read_tables()
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = filled(old, tables)
        if check and new != old:
            raise SystemExit(f"{page.relative_to(ROOT)} is out of date: run `python -m benchmarks.result_tables`.")
        page.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
