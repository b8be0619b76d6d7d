"""A method serves one request, or several in a row, through the public API; what it cost and where the model ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.comparison import Comparison, MeasuredModel
from benchmarks.variants import Variant
from hf_iau import GatherConfig, UnlearningTrainer
from hf_iau.methods.base import find_method

CHECKPOINTS = (5, 10, 20)
"""After this many of several requests the gap is measured on the rows forgotten so far."""

_CALIBRATED = ("source", "scale", "damping", "retain_weight", "reached")


def serve(
    trainer: UnlearningTrainer,
    variant: Variant,
    config: Any,
    requests: Sequence[np.ndarray],
    comparison: Comparison,
) -> tuple[dict[str, Any], MeasuredModel]:
    """Serve the requests one after the other, measure, and put the weights back.

    Args:
        trainer: of the model as it was trained, with the memory that the method needs.
        variant: the method.
        config: its configuration; None for the defaults.
        requests: row numbers of each; together the case's forget rows.
        comparison: of the case.

    Returns:
        What the cell says, and the model after the last request as it was measured.

    Raises:
        IAUError: a request failed.
    """
    model: Any = trainer.model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    method, config = find_method(variant.method, config)
    forget_rows = np.sort(np.concatenate(requests))
    served: list[dict[str, Any]] = []
    checkpoints: list[dict[str, Any]] = []
    path = 0.0
    report: dict[str, Any] = {}
    try:
        for number, rows in enumerate(requests, start=1):
            started, cpu_started = time.perf_counter(), time.process_time()
            if number > 1 and variant.gather_again:
                trainer.gather(gather_config(variant))
            output = trainer.unlearn(forget_indices=rows, method=method.name, config=config)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            report = output.report.to_dict()
            del output  # holds a copy of the weights
            path += report["diagnostics"]["relative_step_norm"]
            served.append(one_request(report, seconds, cpu_seconds))
            if number in CHECKPOINTS and number < len(requests):
                so_far = np.isin(forget_rows, np.concatenate(requests[:number]))
                checkpoints.append(_checkpoint(comparison, model, so_far, number, path))
        after = comparison.measured(model)
        if len(requests) > 1:
            checkpoints.append(_checkpoint(comparison, model, np.ones(len(forget_rows), bool), len(requests), path))
    finally:
        model.load_state_dict(weights)
    calibration = report["diagnostics"].get("calibration") or {}
    cell = {
        "timing": {
            "unlearn_seconds": sum(request["seconds"] for request in served),
            "unlearn_cpu_seconds": sum(request["cpu_seconds"] for request in served),
            "unlearn_seconds_by_phase": _summed([request["seconds_by_phase"] for request in served]),
            "kind": "wall" if torch.cuda.is_available() else "cpu",
        },
        "peak_bytes_by_phase": report["peak_memory_bytes"],
        **comparison.against_retrained(after),
        "verdict": report["verdict"],
        "reasons": report["diagnostics"].get("reasons"),
        "calibrated": report["calibrated"],
        **{name: calibration.get(name) for name in ("scale", "damping", "retain_weight")},
        "relative_path": path,
        "diagnostics": report["diagnostics"],
        "config": report["config"],
        "warnings": report["warnings"],
        "versions": report["versions"],
        "requests": served if len(requests) > 1 else None,
        "checkpoints": checkpoints,
    }
    return cell, after


def gather_config(variant: Variant) -> GatherConfig:
    """What the variant's memory is gathered with."""
    return GatherConfig(progress=False, **(variant.gather or {}))


def one_request(report: dict[str, Any], seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """What a cell says of one request, from its report and its clocked seconds."""
    sides = ("forget_accuracy", "held_out_accuracy", "held_out_loss", "mia_auc_held_out")
    calibration = report["diagnostics"].get("calibration") or {}
    return {
        "rows": report["counts"]["forget_rows"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_by_phase": report["seconds"],
        "relative_step_norm": report["diagnostics"]["relative_step_norm"],
        "verdict": report["verdict"],
        "reasons": report["diagnostics"].get("reasons"),
        "calibration": {name: calibration.get(name) for name in _CALIBRATED} if calibration else None,
        "before": {name: report["before"][name] for name in sides},
        "after": {name: report["after"][name] for name in sides},
    }


def _checkpoint(comparison: Comparison, model: Any, so_far: np.ndarray, number: int, path: float) -> dict[str, Any]:
    """The gap on the rows forgotten so far, to the model that was retrained without all rows of all requests."""
    now, retrained = (comparison.on(m, so_far) for m in (comparison.measured(model), comparison.retrained))
    return {
        "requests": number,
        "rows": int(so_far.sum()),
        "relative_path": path,
        "gap": comparison.gap(now, retrained),
        "figures": now.to_dict(),
    }


def _summed(phases: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for entry in phases for name in entry)
    return {name: sum(entry.get(name, 0.0) for entry in phases) for name in names}
