"""The main figures of a request, for whatever tracks the training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

from hf_iau.report.report import UnlearningReport

_OF_FORGET_ROWS = ("forget_accuracy", "forget_loss", "mia_auc")
_FIGURES = (*_OF_FORGET_ROWS, "retain_accuracy", "test_accuracy", "retain_loss", "held_out_loss")


def figures_to_log(report: UnlearningReport) -> dict[str, Any]:
    """Rows, seconds, verdict, figures before and after, and the gap; of so few rows that a mean over them tells of one,
    no figure of the forget rows."""
    logs: dict[str, Any] = {
        "unlearn_rows": report.counts["forget_rows"],
        "unlearn_seconds": round(sum(report.seconds.values()), 3),
    }
    if report.verdict is not None:
        logs["unlearn_verdict"] = report.verdict
    for when, figures in (("before", report.before), ("after", report.after)):
        for name in _FIGURES:
            value, of_forget_rows = figures.get(name), name in _OF_FORGET_ROWS
            if (
                isinstance(value, (int, float))
                and math.isfinite(value)
                and not (of_forget_rows and report.per_row_suppressed)
            ):
                logs[f"unlearn_{name}_{when}"] = value
    gap = (report.gap or {}).get("mean_absolute")
    if gap is not None and not report.per_row_suppressed:
        logs["unlearn_gap"] = gap
    return logs


@contextlib.contextmanager
def without_printing(trainer: Trainer) -> Iterator[None]:
    """Nothing of what is logged inside is printed: the caller has the report."""
    handler = trainer.callback_handler
    every = handler.callbacks
    handler.callbacks = [cb for cb in every if not isinstance(cb, (PrinterCallback, ProgressCallback))]
    try:
        yield
    finally:
        handler.callbacks = every
