"""The receipt of a request that was run, for people: what was done and measured, without personal data."""

from __future__ import annotations

from typing import Any

from hf_iau.deletion.ledger import LedgerEntry
from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES
from hf_iau.report import explanations, tables
from hf_iau.report.pages import html_environment, markdown_environment

_OF_FORGET_ROWS = ("forget_accuracy", "forget_loss", "mia_auc")
_CALIBRATION = {"scale": "scale k", "damping": "damping λ", "retain_weight": "weight c of the retain correction"}
_NAMES = ("method", "weights before", "weights after")


def render_receipt(entry: LedgerEntry) -> str:
    """A ledger's entry as Markdown, without keyed ids.

    Figures of the forget rows are left out where these are fewer than `MINIMUM_ROWS_FOR_PER_ROW_FIGURES`.

    Args:
        entry: as the ledger holds it, with its `mac`.
    """
    values = _content(entry)
    rows = [[name, f"`{value}`{note}" if name in _NAMES else value] for name, value, note in values["facts"]]
    values["facts"] = tables.markdown([["", ""], *rows])
    values["figures"] = values["figures"] and tables.markdown(values["figures"])
    return markdown_environment("hf_iau.deletion").get_template("receipt.md.jinja").render(values)


def render_receipt_html(entry: LedgerEntry) -> str:
    """The same receipt as one HTML page, which needs no other file, no network and no script."""
    values = _content(entry)
    values["facts"] = [(name, value + note) for name, value, note in values["facts"]]
    return html_environment("hf_iau.deletion").get_template("receipt.html.jinja").render(values)


def _content(entry: LedgerEntry) -> dict[str, Any]:
    """All that a receipt shows, and nothing else of the entry."""
    few = entry.rows < MINIMUM_ROWS_FOR_PER_ROW_FIGURES
    verdict = entry.outcome.get("verdict")
    return {
        "number": entry.number,
        "time": entry.time.replace("T", " ").replace("+00:00", " UTC"),
        "request": f"{entry.rows:,} training row{' was' if entry.rows == 1 else 's were'} removed from this model's "
        "weights by approximate unlearning.",
        "verdict": verdict,
        "meaning": explanations.VERDICTS.get(verdict),
        "facts": _facts(entry),
        "figures": _figures(entry, few),
        "few": few,
        "minimum_rows": MINIMUM_ROWS_FOR_PER_ROW_FIGURES,
        "head": entry.mac,
        "versions": ", ".join(f"{name} {version}" for name, version in entry.versions.items()),
    }


def _facts(entry: LedgerEntry) -> list[tuple[str, str, str]]:
    """Name, value and what follows it."""
    calibration = entry.calibration or {}
    return [
        ("method", entry.method, ", in many short steps" if entry.outcome.get("multi_step") else ""),
        *((_CALIBRATION.get(name, name), f"{value:.4g}", "") for name, value in calibration.items()),
        ("weights before", entry.weights_before, ""),
        ("weights after", entry.weights_after, ""),
    ]


def _figures(entry: LedgerEntry, few: bool) -> tables.Table | None:
    columns = {
        moment: {
            name: value
            for name, value in entry.outcome.get(moment, {}).items()
            if not (few and name in _OF_FORGET_ROWS)
        }
        for moment in ("before", "after")
    }
    rows = tables.comparison(columns, {})
    return rows if len(rows) > 1 else None
