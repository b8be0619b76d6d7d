"""`hf-iau report`, `hf-iau audit` and `hf-iau ledger`: what was written down, and what still lies about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from hf_iau.cli.output import ExitCode, Output
from hf_iau.deletion.artefacts import audit
from hf_iau.deletion.ledger import Ledger
from hf_iau.report import tables
from hf_iau.report.report import UnlearningReport


def show_report(path: Path, markdown: bool, out: Output) -> None:
    """Print a saved report."""
    report = UnlearningReport.load(path)
    out.result(report.to_dict(), report.to_markdown() if markdown else str(report))


def run_audit(directory: Path, purge: bool, yes: bool, out: Output) -> None:
    """List what still holds forgotten rows; with `purge`, remove it, after a question unless `yes`."""
    found = audit(directory)
    freed = None
    if purge and found.removable:
        if not yes:
            out.result({}, _findings(found.to_dict(), directory))
            size = tables.size(sum(finding.bytes for finding in found.removable))
            if not typer.confirm(f"Remove {len(found.removable)} of these, {size}, for good?", err=True):
                out.note("Nothing was removed.")
                raise typer.Exit(ExitCode.FOUND)
        freed = found.purge()
    values = found.to_dict() | {"bytes_freed": freed}
    text = _findings(found.to_dict(), directory) if found.findings else str(found)
    out.result(values, text)
    if freed is not None:
        out.note(f"{tables.size(freed)} removed.")
    if found.findings:
        raise typer.Exit(ExitCode.FOUND)


def show_ledger(directory: Path, head: str | None, count: int | None, out: Output) -> None:
    """Verify a ledger and list its entries."""
    ledger = Ledger.of(directory)
    verified = ledger.verify(head, count)
    entries = [
        {
            "number": entry.number,
            "time": entry.time,
            "method": entry.method,
            "rows": entry.rows,
            "verdict": entry.outcome.get("verdict"),
            "mac": entry.mac,
        }
        for entry in ledger.entries()
    ]
    table = Table("number", "time", "method", "rows", "verdict", "entry", caption=f"Verified. Head {verified.head}")
    for entry in entries:
        table.add_row(*(str(value) for value in [*list(entry.values())[:-1], f"{str(entry['mac'])[:16]}…"]))
    values = {"verified": True, "count": verified.count, "head": verified.head, "weights_match": verified.weights_match}
    out.result(values | {"entries": entries}, table)
    if not ledger.path.is_file():
        out.note(f"There is no ledger in {directory}: no request was served there by the deletion service.")
    if verified.weights_match is False or not ledger.path.is_file():
        raise typer.Exit(ExitCode.FOUND)


def _findings(values: dict[str, Any], root: Path) -> Table:
    table = Table("path", "kind", "size", "purge", "why")
    table.columns[0].overflow = "fold"
    for finding in values["findings"]:
        path = Path(finding["path"])
        inside = path.relative_to(root) if path.is_relative_to(root) else path
        row = [str(inside), finding["kind"], tables.size(finding["bytes"]), "yes" if finding["removable"] else "no"]
        table.add_row(*row, f"{finding['why']} {finding['remedy']}".strip())
    return table
