"""One cell: one work, scenario, seed and method. Its JSON holds every figure, and is the sign that it is finished."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hf_iau
from benchmarks.hardware import hardware, peak_process_memory_bytes
from benchmarks.suites import Suite, Variant
from benchmarks.training import Case, ModelStore, TrainedModel, restore_moments
from hf_iau import GatherConfig, GradientMemory, UnlearningTrainer
from hf_iau.methods import find_method

logger = logging.getLogger(__name__)

SCHEMA = 1
_TOLERATED_LOSS = 1.05  # tuned settings may raise the held-out loss by no more than this factor


class CellStore:
    """The JSON files of a suite's cells.

    Args:
        folder: of the suite.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cells"

    def path(self, case: Case, variant: Variant) -> Path:
        """Where the cell's JSON lies."""
        parts = (case.work.name, case.scenario.name, f"seed{case.seed}", variant.name)
        return self.folder / ("--".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()) for part in parts) + ".json")

    def write(self, path: Path, cell: dict[str, Any]) -> None:
        """Write the file whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".staged")
        staged.write_text(json.dumps(cell, indent=1, allow_nan=False))
        staged.replace(path)

    def all(self) -> list[dict[str, Any]]:
        """Every finished cell."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))]


def run_cells(
    models: ModelStore,
    cells: CellStore,
    *,
    suite: Suite,
    case: Case,
    variants: Sequence[Variant],
    command: str,
    train_only: bool = False,
    redo: bool = False,
) -> None:
    """Run the cells of one case that are not finished yet.

    Args:
        models: trains or reads the models.
        cells: where results go.
        suite: of the case.
        case: work, scenario and seed.
        variants: the methods.
        command: as typed, for the JSON.
        train_only: stop after training.
        redo: run finished cells again.
    """
    wanted = [variant for variant in variants if redo or not cells.path(case, variant).is_file()]
    if not wanted:
        return
    original = models.original(case)
    references = [models.retrained(case)]
    if suite.floor:
        references.append(models.retrained_again(case))
    if train_only:
        return
    tokenizer = models.tokenizer(case.work)
    table = case.scenario.label is not None
    train = case.train.dataset(tokenizer, table=table)
    held_out = case.splits.held_out.dataset(tokenizer, table=table)
    test = case.splits.test.dataset(tokenizer, table=table)
    memories: dict[str, GradientMemory] = {}
    for variant in wanted:
        trainer = models.trainer(case.work, original.model, train, seed=case.seed, held_out=held_out, for_request=True)
        settings = json.dumps(variant.gather, sort_keys=True)
        if settings not in memories:
            if variant.gather.get("curvature") == "adam":
                restore_moments(trainer, original)
            memories[settings] = trainer.gather(GatherConfig(progress=False, **variant.gather))
        else:
            trainer = models.trainer(
                case.work,
                original.model,
                train,
                seed=case.seed,
                held_out=held_out,
                for_request=True,
                memory=memories[settings],
            )
        cell = _describe(suite, case, variant, command, original, references)
        cell |= _measure(trainer, case, variant, references, test)
        cells.write(cells.path(case, variant), cell)
        logger.info(
            "%s %s seed %d %s: gap %.2f (before %.2f, floor %.2f), %.1f s",
            *(case.work.name, case.scenario.name, case.seed, variant.name),
            cell["gap"]["mean_absolute"],
            cell["gap_before"]["mean_absolute"],
            cell["noise_floor"]["mean_absolute"] if cell["noise_floor"] else float("nan"),
            cell["timing"]["unlearn_seconds"],
        )
        del trainer
        gc.collect()


def _describe(
    suite: Suite, case: Case, variant: Variant, command: str, original: TrainedModel, references: list[TrainedModel]
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "command": command,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "suite": suite.name,
        "work": case.work.name,
        "settings": case.work.settings(),
        "scenario": case.scenario.name,
        "forget_rows": len(case.forget_rows),
        "forget_rows_digest": hashlib.sha256(case.forget_rows.tobytes()).hexdigest()[:16],
        "seed": case.seed,
        "method": variant.name,
        "method_name": variant.method,
        "method_config": variant.config,
        "gather_config": variant.gather,
        "hardware": hardware(),
        "source": _source_digest(),
        "training": {
            "original": original.record,
            "retrained": references[0].record,
            "retrained_again": references[1].record if len(references) > 1 else None,
        },
    }


def _measure(
    trainer: UnlearningTrainer, case: Case, variant: Variant, references: list[TrainedModel], test: Any
) -> dict[str, Any]:
    """Tune by held-out rows where the method has no default, time one plain request, then compare."""
    memory = trainer.memory
    assert memory is not None
    options = dict(variant.config)
    tuning = None
    if variant.tune is not None:
        tuning = _tune(trainer, case, variant)
        options[variant.tune] = tuning["chosen"]
    method, config = find_method(variant.method, None if not options else _config(variant.method, options))
    started, cpu_started = time.perf_counter(), time.process_time()
    plain = trainer.unlearn(row_indices=case.forget_rows, method=method.name, config=config, dry_run=True)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    compared = trainer.unlearn(
        row_indices=case.forget_rows,
        method=method.name,
        config=config,
        test_dataset=test,
        retrained_model=[reference.model for reference in references],
        dry_run=True,
    )
    report = compared.report.to_dict()
    calibration = report["diagnostics"].get("calibration") or {}
    retraining = references[0].record
    return {
        "timing": {
            "unlearn_seconds": seconds,
            "unlearn_cpu_seconds": cpu_seconds,
            "unlearn_seconds_by_phase": plain.report.seconds,
            "gather_seconds_by_phase": memory.seconds,
            "retraining_seconds": retraining["seconds"],
            "retraining_cpu_seconds": retraining["cpu_seconds"],
            "share_of_retraining": cpu_seconds / retraining["cpu_seconds"],
            "report_seconds_by_phase": report["seconds"],
        },
        "memory": {
            "peak_bytes_by_phase": report["peak_memory_bytes"],
            "peak_process_bytes": peak_process_memory_bytes(),
            "gradient_memory_bytes": memory.nbytes(),
        },
        "tuning": tuning,
        "figures": {
            "before": report["before"],
            "after": report["after"],
            "retrained": report["retrained"],
            "retrained_again": (report["noise_floor"] or {}).get("figures"),
        },
        "gap": report["gap"],
        "gap_before": report["gap_before"],
        "noise_floor": (report["noise_floor"] or {}).get("gap"),
        "agreement": report["agreement"],
        "verdict": report["verdict"],
        "reasons": report["diagnostics"].get("reasons"),
        "calibrated": report["calibrated"],
        "length": calibration.get("length"),
        "damping": calibration.get("damping"),
        "finish_weight": calibration.get("finish_weight"),
        "diagnostics": report["diagnostics"],
        "config": report["config"],
        "counts": report["counts"],
        "warnings": report["warnings"],
        "versions": report["versions"],
    }


def _config(method: str, options: dict[str, Any]) -> Any:
    from hf_iau.methods import IAUConfig, IAUPaperConfig, IAUReleasedConfig

    classes = {"iau": IAUConfig, "iau-paper": IAUPaperConfig, "iau-released": IAUReleasedConfig}
    return classes[method](**options)


def _tune(trainer: UnlearningTrainer, case: Case, variant: Variant) -> dict[str, Any]:
    """The value at which held-out rows and forget rows are hardest to tell apart, without ruining the held-out loss."""
    tried = []
    started = time.perf_counter()
    for value in variant.tuned_over:
        config = _config(variant.method, {**variant.config, variant.tune: value})
        report = trainer.unlearn(
            row_indices=case.forget_rows, method=variant.method, config=config, dry_run=True
        ).report
        before, after = report.before["held_out_loss"], report.after["held_out_loss"]
        distance = abs((report.after["mia_auc_held_out"] or 0.5) - 0.5)
        allowed = after is not None and after <= _TOLERATED_LOSS * before
        tried.append({"value": value, "distance": distance, "held_out_loss": after, "allowed": allowed})
    best = min(tried, key=lambda trial: (not trial["allowed"], trial["distance"]))
    return {"name": variant.tune, "chosen": best["value"], "tried": tried, "seconds": time.perf_counter() - started}


def _source_digest() -> str:
    """Digest of the package's own source, to tell apart results of two versions."""
    folder = Path(hf_iau.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
