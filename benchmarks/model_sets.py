"""`python -m benchmarks.model_sets --work W --models K --seed S --out DIR`: U-LiRA and KLoM over sets of real models.

One forget set. K originals are trained on all rows and unlearned by each method; two sets of K models are retrained
without the forget rows, from seeds of their own: one to compare with, one to show what a retrained set gets. A model
that was measured has a file and is not trained, unlearned or measured again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import PartialState
from torch import nn

from benchmarks.cells import CellStore, configuration, request_trainer, source_digest
from benchmarks.comparison import measured_rows
from benchmarks.files import file_name, read_arrays, write_arrays, write_json
from benchmarks.hardware import hardware, peak_process_memory_bytes
from benchmarks.model_set_scores import DO_NOTHING, RETRAINED_AGAIN, RETRAINED_SET, SIDES, markdown, scores
from benchmarks.requests import one_request
from benchmarks.run import groups_spelled_out, only, set_up
from benchmarks.scenarios import RANDOM_5_PERCENT, RANDOM_10_PERCENT, Scenario
from benchmarks.suites import CIFAR10_RESNET18, DIGITS, LENET, STANDARD, SYNTHETIC, Work
from benchmarks.training import SECOND_SEED, Case, ModelStore, TrainedModel
from benchmarks.variants import Variant, options
from hf_iau import GradientMemory, IAUError
from hf_iau.data import RowSource, evaluation_mode, read_targets
from hf_iau.metrics.model_sets import MINIMUM_MODELS, margins

logger = logging.getLogger("benchmarks.model_sets")

SCHEMA = 1
WORKS: dict[str, tuple[Work, Scenario]] = {
    "digits": (DIGITS, RANDOM_5_PERCENT),
    "lenet": (LENET, RANDOM_5_PERCENT),
    "resnet18": (CIFAR10_RESNET18, RANDOM_10_PERCENT),
    "synthetic": (SYNTHETIC, RANDOM_5_PERCENT),
}
"""The works and forget sets of the suites, so that models trained for one serve the other."""

METHODS = "iau;iau-released;fine-tune;neggrad-plus;salun;scrub"


def main(
    work: Annotated[str, typer.Option(help=f"One of: {', '.join(WORKS)}.")],
    out: Annotated[Path, typer.Option(help="Folder for models, cells, figures and the table.")],
    models: Annotated[int, typer.Option(help="Models a set; three sets are trained.", min=MINIMUM_MODELS)] = 16,
    seed: Annotated[int, typer.Option(help="Of the forget set and the first original.", min=0)] = 0,
    methods: Annotated[str, typer.Option(help="Methods or groups, separated by semicolons.")] = METHODS,
    data: Annotated[Path | None, typer.Option(help="Folder or file with the data; see benchmarks/README.md.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Train sets of models, unlearn, and tell unlearned from retrained models. What is finished is not run again."""
    set_up(threads)
    if work not in WORKS:
        raise typer.BadParameter(f"{work!r} is unknown: choose one of {', '.join(WORKS)}.", param_hint="--work")
    if models > SECOND_SEED:
        raise typer.BadParameter(f"{models}: retrained models have seeds from {SECOND_SEED} on.", param_hint="--models")
    variants = only(list(STANDARD), groups_spelled_out(methods, list(STANDARD)), "--methods")
    store = ModelStore(out / "models", data)
    folder = out / f"model_sets_{work}_seed{seed}"
    case = store.case(*WORKS[work], seed)
    command = shlex.join(["python", "-m", "benchmarks.model_sets", *sys.argv[1:]])
    document, failures = run_sets(store, folder, case, variants, models, command)
    write_json(folder / "figures.json", document)
    text = markdown(document)
    (folder / "table.md").write_text(text)
    typer.echo(text)
    for failure in failures:
        typer.echo(f"FAILED {failure}", err=True)
    if failures:
        raise typer.Exit(code=1)


def run_sets(
    models: ModelStore, folder: Path, case: Case, variants: Sequence[Variant], count: int, command: str
) -> tuple[dict[str, Any], list[str]]:
    """Train and unlearn what is missing, and score every set.

    Args:
        models: trains or reads the models.
        folder: where cells go.
        case: work, scenario with one request, and the seed of the forget set and of the first original.
        variants: the methods.
        count: models a set.
        command: as typed, for the JSON.

    Returns:
        All figures, for the JSON; and a sentence on each request that failed: its model is not in its set.
    """
    members = Members(models, folder, case, command)
    members.cells.write_forget_rows(case)
    first = case.seed + SECOND_SEED
    for name, start in ((RETRAINED_SET, first), (RETRAINED_AGAIN, first + count)):
        for seed in range(start, start + count):
            if not members.finished(name, seed):
                trained = models.retrained(case, seed)
                members.write(name, seed, trained, {})
    failures: list[str] = []
    for seed in range(case.seed, case.seed + count):
        failures += _unlearn_one(members, seed, variants)
    names = [DO_NOTHING, *(variant.name for variant in variants), RETRAINED_AGAIN, RETRAINED_SET]
    seeds = {name: range(case.seed, case.seed + count) for name in names}
    seeds |= {RETRAINED_SET: range(first, first + count), RETRAINED_AGAIN: range(first + count, first + 2 * count)}
    found = {name: list(members.read(name, seeds[name])) for name in names}
    return {
        "schema": SCHEMA,
        "command": command,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "work": case.work.name,
        "settings": case.work.settings(),
        "scenario": case.scenario.name,
        "forget_rows": len(case.forget_rows),
        "forget_rows_digest": _digest(case.forget_rows),
        "seed": case.seed,
        "models": count,
        "hardware": hardware(),
        "peak_process_bytes": peak_process_memory_bytes(),
        "sources": sorted({cell["source"] for cells in found.values() for cell, _ in cells}),
        "sets": scores(found, case.seed),
    }, failures


def _unlearn_one(members: Members, seed: int, variants: Sequence[Variant]) -> list[str]:
    """Measure one original before and after each method; returns what failed."""
    models, case = members.models, members.case
    wanted = [variant for variant in variants if not members.finished(variant.name, seed)]
    if not wanted and members.finished(DO_NOTHING, seed):
        return []
    original = models.original(case, seed)
    if not members.finished(DO_NOTHING, seed):
        members.write(DO_NOTHING, seed, original, {})
    weights = {name: tensor.clone() for name, tensor in original.model.state_dict().items()}
    tokenizer = models.tokenizer(case.work)
    train, held_out = case.train.dataset(tokenizer), case.splits.held_out.dataset(tokenizer)
    memories: dict[str, GradientMemory] = {}
    failures = []
    for variant in wanted:
        trainer, memory = request_trainer(models, case.work, variant, original, train, held_out, memories)
        try:
            if seed == case.seed or not variant.settings(case.work):
                config, tuning = configuration(models, trainer, case, variant)
            else:
                config, tuning = members.tuned(variant), None
            started, cpu_started = time.perf_counter(), time.process_time()
            output = trainer.unlearn(forget_indices=case.forget_rows, method=variant.method, config=config)
            seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
            report = output.report.to_dict()
            cell = {
                "method_config": options(config),
                "gather_config": variant.gather,
                "tuning": tuning,
                "request": one_request(report, seconds, cpu_seconds),
                "gather_seconds_by_phase": {} if memory is None else memory.seconds,
                "peak_bytes_by_phase": report["peak_memory_bytes"],
            }
            members.write(variant.name, seed, original, cell)
            del output  # holds a copy of the weights
        except IAUError as error:
            failures.append(f"{variant.name}, seed {seed}: {error}")
            logger.exception("%s, seed %d failed", variant.name, seed)
        finally:
            original.model.load_state_dict(weights)
        del trainer
        gc.collect()
    logger.info("original %d: %s", seed, ", ".join(variant.name for variant in wanted))
    return failures


@dataclass
class Members:
    """The measured models of all sets: for each a JSON and, beside it, the margins of the rows.

    Attributes:
        models: trains or reads the models.
        folder: where the files lie.
        case: work, scenario and forget set.
        command: as typed, for the JSON.
    """

    models: ModelStore
    folder: Path
    case: Case
    command: str

    def __post_init__(self) -> None:
        self.cells = CellStore(self.folder)
        self._sources: dict[str, RowSource] | None = None

    def finished(self, name: str, seed: int) -> bool:
        """Whether the model of that set and seed has been measured."""
        return self._path(name, seed).is_file()

    def write(self, name: str, seed: int, trained: TrainedModel, about: dict[str, Any]) -> None:
        """Measure the model as it is now, and write its margins and what is said about it."""
        case = self.case
        if self._sources is None:
            forget, retained, _, test = measured_rows(self.models, case, PartialState().device)
            self._sources = dict(zip(SIDES, (forget, retained, test), strict=True))
        model = trained.model.to(PartialState().device)
        found = {side: row_margins(model, source) for side, source in self._sources.items()}
        path = self._path(name, seed)
        cell = {
            "schema": SCHEMA,
            "command": self.command,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "work": case.work.name,
            "scenario": case.scenario.name,
            "forget_rows_digest": _digest(case.forget_rows),
            "first_seed": case.seed,
            "set": name,
            "seed": seed,
            "hardware": hardware(),
            "source": source_digest(),
            "training": trained.record,
            "peak_process_bytes": peak_process_memory_bytes(),
            **about,
        }
        write_arrays(path.with_suffix(".npz"), found)
        write_json(path, cell)

    def read(self, name: str, seeds: Sequence[int]) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
        """JSON and margins of each model of a set that has been measured."""
        for seed in seeds:
            if self.finished(name, seed):
                path = self._path(name, seed)
                yield json.loads(path.read_text()), read_arrays(path.with_suffix(".npz"))

    def tuned(self, variant: Variant) -> Any:
        """The configuration that was chosen on the first original.

        Raises:
            IAUError: the request of the first original failed, or the settings to choose among have changed since.
        """
        for cell, _ in self.read(variant.name, [self.case.seed]):
            for config in variant.settings(self.case.work):
                if options(config) == cell["method_config"]:
                    return config
        raise IAUError(
            f"{variant.name} has no setting from the first original (seed {self.case.seed}): it failed there, or its "
            f"settings have changed since; remove {self._path(variant.name, self.case.seed).name} to tune it again."
        )

    def _path(self, name: str, seed: int) -> Path:
        case = self.case
        parts = (case.work.name, case.scenario.name, name, f"seed{seed}")
        return self.cells.folder / f"{file_name(*parts)}.json"


def row_margins(model: nn.Module, source: RowSource) -> np.ndarray:
    """Margins of a source's rows, float64, `(rows,)`; see `hf_iau.metrics.model_sets.margins`."""
    found = []
    with evaluation_mode(model), torch.no_grad():
        for _, inputs in source:
            targets = read_targets(model, model(**inputs), inputs["labels"])
            found.append(margins(targets.logits.double().cpu().numpy(), targets.labels.cpu().numpy()))
    return np.concatenate(found)


def _digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.tobytes()).hexdigest()[:16]


if __name__ == "__main__":
    typer.run(main)
