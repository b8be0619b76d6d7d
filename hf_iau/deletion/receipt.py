"""The certificate of a request, for people: what was done and measured, without personal data."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_iau.deletion.ledger import LedgerEntry
from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES
from hf_iau.report import tables

_FIGURES = {
    "forget_accuracy": "accuracy, forget rows",
    "forget_loss": "loss, forget rows",
    "mia_auc": "membership AUC",
    "retain_accuracy": "accuracy, retained rows",
    "retain_loss": "loss, retained rows",
    "held_out_accuracy": "accuracy, held-out rows",
    "held_out_loss": "loss, held-out rows",
    "test_accuracy": "accuracy, test rows",
    "test_loss": "loss, test rows",
}
_OF_FORGET_ROWS = ("forget_accuracy", "forget_loss", "mia_auc")


def certificate(entry: LedgerEntry) -> str:
    """A ledger's entry as Markdown, without keyed ids; figures of few forget rows are left out."""
    few = entry.rows < MINIMUM_ROWS_FOR_PER_ROW_FIGURES
    before, after = entry.outcome.get("before", {}), entry.outcome.get("after", {})
    environment = Environment(
        loader=PackageLoader("hf_iau.deletion", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    return environment.get_template("receipt.md.jinja").render(
        entry=entry,
        calibration=[(name.replace("_", " "), f"{value:.4g}") for name, value in (entry.calibration or {}).items()],
        verdict=entry.outcome.get("verdict") or "–",
        figures=[
            (name, _text(before.get(figure)), _text(after.get(figure)))
            for figure, name in _FIGURES.items()
            if (before.get(figure) is not None or after.get(figure) is not None)
            and not (few and figure in _OF_FORGET_ROWS)
        ],
        few=few,
        minimum_rows=MINIMUM_ROWS_FOR_PER_ROW_FIGURES,
        versions=", ".join(f"{name} {version}" for name, version in entry.versions.items()),
    )


def _text(value: Any) -> str:
    return "–" if value is None else tables.number(value)
