"""`python -m benchmarks.run <suite> --seeds N --out DIR`: one JSON a cell, a table and a plot."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.cells import CellStore, run_cells
from benchmarks.suites import SUITES
from benchmarks.tables import write_summary
from benchmarks.training import ModelStore
from benchmarks.variants import GROUPS, Variant

logger = logging.getLogger("benchmarks")


def main(
    suite: Annotated[str, typer.Argument(help=f"One of: {', '.join(SUITES)}.")],
    out: Annotated[Path, typer.Option(help="Folder for models, cells, tables and plots.")],
    seeds: Annotated[int | None, typer.Option(help="How many seeds; default: the suite's own number.", min=1)] = None,
    methods: Annotated[
        str | None, typer.Option(help=f"Only these methods or groups ({', '.join(GROUPS)}), separated by semicolons.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder or file with the data; see benchmarks/README.md.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder with MiniLM's weights and tokenizer.")] = None,
    scenarios: Annotated[str | None, typer.Option(help="Only these scenarios, separated by semicolons.")] = None,
    ablation: Annotated[bool, typer.Option("--ablation", help="Also the suite's ablation variants.")] = False,
    train_only: Annotated[bool, typer.Option("--train-only", help="Train the models and stop.")] = False,
    redo_unlearning: Annotated[
        bool, typer.Option("--redo-unlearning", help="Run finished cells again; trained models are kept.")
    ] = False,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Train, forget, measure against retraining. Finished cells are not run again."""
    set_up(threads)
    if suite not in SUITES:
        raise typer.BadParameter(f"{suite!r} is unknown: choose one of {', '.join(SUITES)}.", param_hint="suite")
    chosen = SUITES[suite]
    variants = [*chosen.variants, *(chosen.ablation if ablation else ())]
    if methods is not None:
        methods = groups_spelled_out(methods, variants)
    variants = only(variants, methods, "--methods")
    picked = only(list(chosen.scenarios), scenarios, "--scenarios")
    models = ModelStore(out / "models", data, weights)
    cells = CellStore(out / chosen.name)
    command = shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]])
    failures: list[str] = []
    for seed in range(seeds if seeds is not None else chosen.seeds):
        for work in chosen.works:
            for scenario in picked:
                failures += run_cells(
                    models,
                    cells,
                    suite=chosen,
                    case=models.case(work, scenario, seed),
                    variants=variants,
                    command=command,
                    train_only=train_only,
                    redo=redo_unlearning,
                )
    if not train_only:
        table = write_summary(cells.all(), chosen, out / chosen.name)
        typer.echo(table)
    for failure in failures:
        typer.echo(f"FAILED {failure}", err=True)
    if failures:
        raise typer.Exit(code=1)


def set_up(threads: int) -> None:
    """Progress of the benchmark on standard error, and nothing of what the libraries say besides."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    for chatty in ("hf_iau", "transformers", "datasets", "accelerate", "httpx"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(threads)


def groups_spelled_out(names: str, variants: list[Variant]) -> str:
    """Names of methods, with each group replaced by its methods."""
    found: list[str] = []
    for name in names.split(";"):
        members = [variant.name for variant in variants if variant.group == name.strip()]
        found += members or [name]
    return ";".join(found)


def only(named: list, names: str | None, option: str) -> list:
    """Those of `named` whose names are asked for, separated by semicolons; all for None.

    Raises:
        typer.BadParameter: a name is unknown.
    """
    if names is None:
        return named
    asked = [name.strip() for name in names.split(";")]
    unknown = sorted(set(asked) - {item.name for item in named})
    if unknown:
        known = "; ".join(item.name for item in named)
        raise typer.BadParameter(f"{'; '.join(unknown)}: choose among {known}.", param_hint=option)
    return [item for item in named if item.name in asked]


if __name__ == "__main__":
    typer.run(main)
