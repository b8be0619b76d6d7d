"""`hf-iau evaluate`."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from rich.table import Table
from torch import nn

from hf_iau.cli.inputs import Loaded, load, other_model, request_of, training_arguments
from hf_iau.cli.options import ComparisonOptions, ForgetOptions, ModelOptions
from hf_iau.cli.output import Output
from hf_iau.data import RowSource
from hf_iau.errors import RequestError
from hf_iau.evaluation.measurement import measure_model
from hf_iau.evaluation.retraining_gap import gap
from hf_iau.memory.gathering import default_collator, keep_input_columns
from hf_iau.report import tables


def run_evaluate(
    options: ModelOptions, forget: ForgetOptions, compare: ComparisonOptions, retained_rows: int, out: Output
) -> None:
    """Measure a model and those it is compared with, on the same rows."""
    loaded = load(options, compare)
    chosen = _rows_of(loaded, forget)
    device = training_arguments(".", options, quiet=out.as_json).device
    bare = loaded.task.model.to(device)
    splits = _splits(loaded, bare, chosen, options, retained_rows)
    figures = {"model": measure_model(bare, *splits).figures(seed=options.seed).to_dict()}
    for number, name in enumerate(compare.retrained or [], start=1):
        other = other_model(name, loaded.task, options.trust_remote_code).to(device)
        title = "retrained" if number == 1 else f"retrained {number}"
        figures[title] = measure_model(other, *splits).figures(seed=options.seed).to_dict()
    reference = figures.get("retrained")
    gaps = {
        title: None if reference is None or values is reference else gap(values, reference).to_dict()
        for title, values in figures.items()
    }
    out.result({"figures": figures, "gaps": gaps}, _rich(tables.comparison(figures, gaps)))


def _rows_of(loaded: Loaded, forget: ForgetOptions) -> np.ndarray:
    chosen = np.unique(request_of(loaded.raw, forget).rows)
    outside = chosen[(chosen < 0) | (chosen >= len(loaded.train))]
    if outside.size:
        raise RequestError(f"Row {outside[0]} is no row of --train, which has {len(loaded.train)}.")
    return chosen


def _splits(
    loaded: Loaded, model: nn.Module, chosen: np.ndarray, options: ModelOptions, retained_rows: int
) -> tuple[RowSource, RowSource | None, RowSource | None, RowSource | None]:
    """Forget, retained, held-out and test rows."""
    device = next(model.parameters()).device
    collator = loaded.task.collator or default_collator(loaded.task.processor)

    def source(rows: datasets.Dataset | None, name: str) -> RowSource | None:
        if rows is None or len(rows) == 0:
            return None
        kept = keep_input_columns(model, rows, name)
        return RowSource(kept, collator, batch_size=options.batch_size, device=device, name=name)

    forget = source(loaded.train.select(chosen), "forget rows")
    assert forget is not None
    others = np.setdiff1d(np.arange(len(loaded.train)), chosen)
    retained = source(loaded.train.select(others), "retained rows")
    if retained is not None:
        retained = retained.sample(retained_rows, options.seed)
    return forget, retained, source(loaded.held_out, "held-out rows"), source(loaded.test, "test rows")


def _rich(table: tables.Table) -> Table:
    head, *body = table
    made: Any = Table(head[0])
    for name in head[1:]:
        made.add_column(name, justify="right")
    for row in body:
        made.add_row(*row)
    return made
