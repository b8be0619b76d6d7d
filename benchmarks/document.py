"""`python -m benchmarks.document --out OUT`: put the measured tables into `docs/benchmark.md`, between their marks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer


def main(
    out: Annotated[Path, typer.Option(help="Folder that benchmarks.run wrote into.")],
    page: Annotated[Path, typer.Option(help="The page with marks `<!-- SUITE:begin -->` and `<!-- SUITE:end -->`.")] = (
        Path("docs/benchmark.md")
    ),
) -> None:
    """Replace what lies between the marks of each suite by the tables of its `table.md`."""
    text = page.read_text()
    for suite in re.findall(r"<!-- (\w+):begin -->", text):
        table = out / suite / "table.md"
        if table.is_file():
            text = filled(text, suite, table.read_text())
            typer.echo(f"{suite}: from {table}")
        else:
            typer.echo(f"{suite}: no {table}, left as it was")
    page.write_text(text)


def filled(text: str, suite: str, table: str) -> str:
    """`text` with the sections of a suite's table between its marks, its headings one level lower.

    Raises:
        ValueError: a mark is missing.
    """
    begin, end = f"<!-- {suite}:begin -->", f"<!-- {suite}:end -->"
    if begin not in text or end not in text:
        raise ValueError(f"The page lacks {begin} or {end}.")
    sections = table[table.index("\n## ") :].strip().replace("\n## ", "\n### ")
    # What is typed differs from machine to machine by its folders alone.
    sections = re.sub(r"--(out|data|weights) [^\s`]+", lambda m: f"--{m.group(1)} {m.group(1).upper()}", "#" + sections)
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    return f"{before}\n{sections}\n{after}"


if __name__ == "__main__":
    typer.run(main)
