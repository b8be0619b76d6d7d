"""What a report takes from measurements: counts, likeness to a retrained model, warnings, losses to draw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_iau.errors import RequestError
from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES, Figures
from hf_iau.evaluation.measurement import Measurement, rows_with_targets
from hf_iau.evaluation.model_agreement import agreement
from hf_iau.evaluation.retraining_gap import gap


def check_same_rows(models: Mapping[str, Measurement]) -> None:
    """Raise RequestError unless a second retrained model comes with a first, and all saw as many forget rows.

    Args:
        models: the measurements that are there, by "before", "after", "retrained" and "second_retrained".
    """
    if "second_retrained" in models and "retrained" not in models:
        raise RequestError("second_retrained was given without retrained: the noise floor lies between the two.")
    expected = len(models["before"].forget)
    for name, model in models.items():
        if len(model.forget) != expected:
            raise RequestError(
                f"{name} was measured on {len(model.forget)} forget rows, before on {expected}: measure every model on "
                "the same rows."
            )


def compared(
    models: Mapping[str, Measurement], figures: Mapping[str, Figures], bootstrap: int, seed: int
) -> dict[str, Any]:
    """The report's entries on retrained models, from `retrained` to `agreement`, None for what was not measured.

    Args:
        models: see `check_same_rows`.
        figures: of these models.
        bootstrap: resamples of each interval; 0 for none.
        seed: of the resampling.
    """
    reference, second = figures.get("retrained"), figures.get("second_retrained")
    if reference is None:
        return dict.fromkeys(("retrained", "gap", "gap_before", "noise_floor", "agreement"))
    return {
        "retrained": reference.to_dict(),
        "gap": gap(figures["after"], reference).to_dict(),
        "gap_before": gap(figures["before"], reference).to_dict(),
        "noise_floor": None
        if second is None
        else {"figures": second.to_dict(), "gap": gap(second, reference).to_dict()},
        "agreement": _agreements(models["after"], models["retrained"], bootstrap, seed),
    }


def row_counts(measurement: Measurement) -> dict[str, int | None]:
    """Rows of each set, None for one that was not measured, and targets of the forget rows."""

    def rows(split: str) -> int | None:
        predictions = getattr(measurement, split)
        return None if predictions is None else len(predictions)

    return {
        "forget_rows": len(measurement.forget),
        "forget_targets": int(measurement.forget.targets.sum()),
        "retain_rows_measured": rows("retain"),
        "held_out_rows": rows("held_out"),
        "test_rows": rows("test"),
    }


def _agreements(after: Measurement, retrained: Measurement, bootstrap: int, seed: int) -> dict[str, Any] | None:
    """`hf_iau.evaluation.Agreement` dictionaries by set of rows; None where no probabilities were kept."""
    found = {}
    for split in ("forget", "retain", "held_out", "test"):
        a, b = getattr(after, split), getattr(retrained, split)
        if a is None or b is None or a.probabilities is None or b.probabilities is None or not len(a):
            continue
        few = split == "forget" and after.per_row_suppressed  # a bootstrap of a few rows gives single rows away
        found[split] = agreement(a, b, 0 if few else bootstrap, seed).to_dict()
    return found or None


def measurement_warnings(
    before: Measurement, after: Measurement, calibrated: bool | None, diverged: Mapping[str, Any]
) -> list[str]:
    """What is missing or odd in the measurements, in sentences.

    Args:
        before, after: of the model.
        calibrated: see `hf_iau.report.UnlearningReport`.
        diverged: the figures after, which may be not finite.
    """
    found = []
    rows = rows_with_targets(after.forget)
    without = len(before.forget) - rows_with_targets(before.forget)
    if without:
        found.append(f"{without:,} of {len(before.forget):,} forget rows have no target and count in no figure.")
    if after.per_row_suppressed:
        found.append(
            f"Few forget rows ({rows}): figures are given as means alone, and the membership AUC is good to about "
            f"±{29 / max(rows, 1) ** 0.5:.0f} points (one standard error)."
        )
    if after.unseen is None:
        found.append("Neither test nor held-out rows were given: membership could not be measured.")
    elif calibrated and after.test is None:
        found.append(
            "No test rows were given: membership was measured against the held-out rows that the calibration looked at."
        )
    if after.retain is None:
        found.append("No retained rows were measured: damage to them does not show here.")
    broken = [name for name, value in diverged.items() if name.endswith("_loss") and _is_not_finite(value)]
    if broken:
        found.append(f"The model has diverged: {', '.join(broken)} after the request is not finite.")
    return found


def losses_to_draw(models: Mapping[str, Measurement]) -> dict[str, dict[str, np.ndarray]]:
    """Row losses, shape `(rows,)`, of the forget rows and of enough unseen rows, by model and set.

    Args:
        models: see `check_same_rows`; the second retrained model is left out.
    """
    return {name: _losses(model) for name, model in models.items() if name != "second_retrained"}


def _losses(measurement: Measurement) -> dict[str, np.ndarray]:
    losses = {"forget rows": measurement.forget.loss}
    unseen = measurement.unseen
    if unseen is not None and rows_with_targets(unseen) >= MINIMUM_ROWS_FOR_PER_ROW_FIGURES:
        losses["test rows" if measurement.unseen_split == "test" else "held-out rows"] = unseen.loss
    return losses


def _is_not_finite(value: float | None) -> bool:
    return value is not None and not bool(np.isfinite(value))
