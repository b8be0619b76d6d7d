"""The figures of one model on the four sets of rows, as numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hf_iau.evaluation.attacks import AttackResult
from hf_iau.evaluation.intervals import Interval

MINIMUM_ROWS_FOR_PER_ROW_FIGURES = 20
"""With fewer forget rows than this, only means over them are given: anything finer would describe single rows."""


@dataclass(frozen=True)
class Figures:
    """Figures of one model. A set of rows that was not measured has None, as accuracies of a regression have.

    Attributes:
        forget_accuracy: FA, share of the forget rows' targets predicted correctly, 0 to 1. A retrained model has about
            its test accuracy here, where the forget rows are like any others; lower than that is over-forgetting.
        retain_accuracy: RA, the same on (a sample of) the retained rows; higher is better.
        held_out_accuracy: the same on the held-out rows, which calibration may have seen.
        test_accuracy: TA, the same on the test rows, which nothing has seen; higher is better.
        forget_loss: mean plain loss a target of the forget rows (cross-entropy in nats; BCE; squared error). NaN when
            the model has diverged.
        retain_loss: the same on the retained rows.
        held_out_loss: the same on the held-out rows.
        test_loss: the same on the test rows.
        mia_auc: MIA, the AUC of the loss attack, forget rows against the test rows, or the held-out rows where there is
            no test set; 0 to 1, see `hf_iau.evaluation.attacks`.
        mia_auc_held_out: the same against the held-out rows.
        mia_auc_test: the same against the test rows.
        attacks: every attack by its score, against `attacks_against`; None when there are no unseen rows or fewer
            than `MINIMUM_ROWS_FOR_PER_ROW_FIGURES` forget rows.
        attacks_against: `"test"`, `"held_out"` or None.
        per_row_suppressed: whether there were too few forget rows for anything but means.
        intervals: 95 % intervals, `(low, high)`, of the accuracies and of `mia_auc` by the figure's name, in the
            figure's unit, as far as they were computed (see `hf_iau.evaluation.intervals`); None for none at all. They
            say how far the figure may be for other rows drawn like these, not what another training seed would change.
    """

    forget_accuracy: float | None = None
    retain_accuracy: float | None = None
    held_out_accuracy: float | None = None
    test_accuracy: float | None = None
    forget_loss: float | None = None
    retain_loss: float | None = None
    held_out_loss: float | None = None
    test_loss: float | None = None
    mia_auc: float | None = None
    mia_auc_held_out: float | None = None
    mia_auc_test: float | None = None
    attacks: dict[str, AttackResult] | None = None
    attacks_against: str | None = None
    per_row_suppressed: bool = False
    intervals: dict[str, Interval] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as a plain dictionary; NaN stays NaN."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.attacks is not None:
            values["attacks"] = {score: result.to_dict() for score, result in self.attacks.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Figures:
        """The figures of a dictionary made by `to_dict`, also after a trip through JSON (null reads as None)."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        attacks = known.get("attacks")
        if attacks is not None:
            known["attacks"] = {score: _attack_from(result) for score, result in attacks.items()}
        if known.get("intervals") is not None:
            known["intervals"] = {
                name: (low, high) for name, (low, high) in known["intervals"].items() if low is not None
            }
        return cls(**known)


def _attack_from(result: AttackResult | Mapping[str, Any]) -> AttackResult:
    if isinstance(result, AttackResult):
        return result
    values: dict[str, Any] = {name: float("nan") if value is None else value for name, value in result.items()}
    return AttackResult(**values)
