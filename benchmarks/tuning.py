"""How a baseline's setting is chosen: one rule and one number of attempts for all, by held-out rows alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.variants import options
from hf_iau import IAUError, UnlearningTrainer

TOLERATED_LOSS = 1.05
RULE = (
    f"Among the settings whose held-out loss is at most {TOLERATED_LOSS} times what it was before the request, the one "
    "at which the loss attack tells forget rows and held-out rows apart least (AUC nearest one half); if there is "
    "none, the one with the lowest held-out loss."
)


def tune(
    trainer: UnlearningTrainer, rows: np.ndarray, method: str, settings: Sequence[Any]
) -> tuple[Any, dict[str, Any]]:
    """Try each setting on the request and put the weights back.

    The trainer knows training and held-out rows; neither a retrained model nor a test row is within reach here.

    Args:
        trainer: of the model as it was trained, with the held-out rows as its `eval_dataset`.
        rows: numbers of the forget rows.
        method: as for `trainer.unlearn(method=…)`.
        settings: configurations of the method.

    Returns:
        The chosen configuration, and for the JSON what was tried and how long that took.

    Raises:
        IAUError: of the last setting, where every one fails.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    tried: list[dict[str, Any]] = []
    failure: IAUError | None = None
    for config in settings:
        trial: dict[str, Any] = {"setting": options(config)}
        try:
            report = trainer.unlearn(forget_indices=rows, method=method, config=config, dry_run=True).report
        except IAUError as error:  # a setting at which the model diverges
            failure = error
            tried.append(trial | {"auc": None, "held_out_loss": None, "loss_ratio": None, "error": str(error)})
            continue
        auc, loss = report.after["mia_auc_held_out"], report.after["held_out_loss"]
        ratio = None if loss is None else loss / report.before["held_out_loss"]
        tried.append(trial | {"auc": auc, "held_out_loss": loss, "loss_ratio": ratio, "error": None})
    if failure is not None and all(trial["error"] for trial in tried):
        raise failure
    best = choose(tried)
    return settings[best], {
        "rule": RULE,
        "chosen": tried[best]["setting"],
        "within_tolerance": _allowed(tried[best]),
        "tried": tried,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }


def choose(tried: Sequence[dict[str, Any]]) -> int:
    """Position of the setting that the rule picks among trials with `auc`, `held_out_loss` and `loss_ratio`.

    A trial that failed or diverged has None in them and is picked last.
    """
    allowed = [i for i, trial in enumerate(tried) if _allowed(trial)]
    if allowed:
        return min(allowed, key=lambda i: abs(tried[i]["auc"] - 0.5))
    return min(range(len(tried)), key=lambda i: (tried[i]["held_out_loss"] is None, tried[i]["held_out_loss"] or 0.0))


def _allowed(trial: dict[str, Any]) -> bool:
    return trial["auc"] is not None and trial["loss_ratio"] is not None and trial["loss_ratio"] <= TOLERATED_LOSS
