"""One cell: one work, scenario, seed and method. Its JSON holds every figure, and is the sign that it is finished."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import hf_iau
from benchmarks.comparison import Comparison
from benchmarks.files import file_name, write_arrays, write_json
from benchmarks.hardware import hardware, peak_process_memory_bytes
from benchmarks.requests import gather_config, serve
from benchmarks.suites import Suite, Work
from benchmarks.training import Case, ModelStore, TrainedModel, restore_moments
from benchmarks.tuning import tune
from benchmarks.variants import RETRAIN, Variant, options
from hf_iau import GradientMemory, IAUError, UnlearningTrainer

logger = logging.getLogger(__name__)

SCHEMA = 2


class CellStore:
    """The files of a suite: one JSON a cell, row losses beside it, and the forget rows' numbers.

    Args:
        folder: of the suite.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cells"
        self.forget_folder = folder / "forget_ids"

    def path(self, case: Case, variant: Variant) -> Path:
        """Where the cell's JSON lies."""
        return self.folder / (file_name(case.work.name, case.scenario.name, f"seed{case.seed}", variant.name) + ".json")

    def references(self, case: Case) -> Path:
        """Where the row losses of the model before and of the retrained one lie."""
        name = file_name(case.work.name, case.scenario.name, f"seed{case.seed}", "references")
        return self.folder / f"{name}.npz"

    def write_forget_rows(self, case: Case) -> None:
        """Publish which rows are forgotten, so that anyone can forget the same."""
        ids = case.splits.train_ids
        requests = [rows.tolist() for rows in case.requests]
        document = {
            "data": case.work.data,
            "scenario": case.scenario.name,
            "seed": case.seed,
            "meaning": "ids: numbers of the rows in the data set's own training split, from 0; rows: numbers among "
            "this benchmark's training rows; requests: the same by request",
            "training_rows": len(case.splits.train),
            "ids": ids[case.forget_rows].tolist(),
            "rows": case.forget_rows.tolist(),
            "requests": requests if len(requests) > 1 else None,
        }
        write_json(
            self.forget_folder / f"{file_name(case.work.name, case.scenario.name)}-seed{case.seed}.json", document
        )

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
) -> list[str]:
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

    Returns:
        A sentence on each cell whose method failed; the others are run all the same.
    """
    wanted = [variant for variant in variants if redo or not cells.path(case, variant).is_file()]
    if not wanted:
        return []
    original = models.original(case)
    references = [models.retrained(case)]
    if suite.floor:
        references.append(models.retrained_again(case))
    if train_only:
        return []
    cells.write_forget_rows(case)
    tokenizer = models.tokenizer(case.work)
    table = case.scenario.label is not None
    train = case.train.dataset(tokenizer, table=table)
    held_out = case.splits.held_out.dataset(tokenizer, table=table)
    comparison: Comparison | None = None
    memories: dict[str, GradientMemory] = {}
    failures = []
    for variant in wanted:
        trainer, memory = request_trainer(models, case.work, variant, original, train, held_out, memories)
        if comparison is None:
            comparison = Comparison(models, case, original, references, trainer.args.device)
            comparison.write_losses(cells.references(case))
        name = f"{case.work.name} {case.scenario.name} seed {case.seed} {variant.name}"
        try:
            config, tuning = configuration(models, trainer, case, variant)
            measured, after = serve(trainer, variant, config, case.requests, comparison)
        except IAUError as error:
            failures.append(f"{name}: {error}")
            logger.exception("%s failed", name)
            continue
        cell = _describe(suite, case, variant, command, original, references)
        cell |= {"tuning": tuning, **measured}
        cell["timing"] |= _beside_training(cell["timing"], memory, references[0].record)
        cell["memory"] = {
            "peak_bytes_by_phase": cell.pop("peak_bytes_by_phase"),
            "peak_process_bytes": peak_process_memory_bytes(),
            "gradient_memory_bytes": 0 if memory is None else memory.nbytes(),
        }
        path = cells.path(case, variant)
        write_arrays(path.with_suffix(".npz"), after.losses())
        write_json(path, cell)
        logger.info(
            "%s: gap %s (before %s, floor %s), %.1f s, tuning %.1f s",
            name,
            *(
                "–" if gap is None or gap["mean_absolute"] is None else f"{gap['mean_absolute']:.2f}"
                for gap in (cell["gap"], cell["gap_before"], cell["noise_floor"])
            ),
            cell["timing"]["unlearn_seconds"],
            (cell["tuning"] or {"seconds": 0.0})["seconds"],
        )
        del trainer
        gc.collect()
    return failures


def request_trainer(
    models: ModelStore,
    work: Work,
    variant: Variant,
    original: TrainedModel,
    train: Any,
    held_out: Any,
    memories: dict[str, GradientMemory],
) -> tuple[UnlearningTrainer, GradientMemory | None]:
    """A trainer of a trained model with the memory that the method needs.

    Args:
        models: makes the trainer.
        work: of the model.
        variant: the method.
        original: the model; its seed is the trainer's.
        train, held_out: data sets.
        memories: those gathered for this model so far, by their settings; a new one is added.

    Returns:
        The trainer and its memory, or None where the method needs none.
    """
    settings = json.dumps(variant.gather, sort_keys=True)
    trainer = models.trainer(
        work,
        original.model,
        train,
        seed=original.record["seed"],
        held_out=held_out,
        for_request=variant.method != RETRAIN,
        memory=memories.get(settings),
    )
    if variant.gather is None:
        return trainer, None
    if settings not in memories:
        if variant.gather.get("curvature") == "adam":
            restore_moments(trainer, original)
        memories[settings] = trainer.gather(gather_config(variant))
    return trainer, memories[settings]


def configuration(
    models: ModelStore, trainer: UnlearningTrainer, case: Case, variant: Variant
) -> tuple[Any, dict[str, Any] | None]:
    """The method's configuration: as given, or tuned on the case's first request."""
    if variant.method == RETRAIN:
        return models.retrain_config(case), None
    settings = variant.settings(case.work)
    if not settings:
        return variant.config, None
    return tune(trainer, case.requests[0], variant.method, settings)


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
        "group": variant.group,
        "method_config": options(variant.config),
        "settings_to_choose_among": [options(config) for config in variant.settings(case.work)],
        "gather_config": variant.gather,
        "hardware": hardware(),
        "source": source_digest(),
        "training": {
            "original": original.record,
            "retrained": references[0].record,
            "retrained_again": references[1].record if len(references) > 1 else None,
        },
    }


def _beside_training(
    timing: dict[str, Any], memory: GradientMemory | None, retraining: dict[str, Any]
) -> dict[str, Any]:
    return {
        "gather_seconds_by_phase": {} if memory is None else memory.seconds,
        "retraining_seconds": retraining["seconds"],
        "retraining_cpu_seconds": retraining["cpu_seconds"],
        "share_of_retraining": timing["unlearn_cpu_seconds"] / retraining["cpu_seconds"],
    }


@cache
def source_digest() -> str:
    """Digest of the package's own source, to tell apart results of two versions."""
    folder = Path(hf_iau.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
