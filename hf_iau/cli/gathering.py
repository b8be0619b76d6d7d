"""`hf-iau gather` and `hf-iau estimate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from hf_iau.cli.inputs import load, training_arguments
from hf_iau.cli.options import GatherOptions, ModelOptions
from hf_iau.cli.output import Output
from hf_iau.cost_estimate import estimate
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.gathering import gather, memory_beside, memory_summary
from hf_iau.memory.memory_files import MEMORY_FOLDER


def run_gather(options: ModelOptions, what: GatherOptions, output: Path | None, out: Output) -> None:
    """Gather the memory of a model into `output`, else into `_iau` in the model's folder."""
    folder = output or Path(options.model) / MEMORY_FOLDER
    loaded = load(options)
    device = training_arguments(str(folder), options, quiet=out.as_json).device
    memory = gather(
        loaded.task.model.to(device),
        loaded.train,
        processing_class=loaded.task.processor,
        data_collator=loaded.task.collator,
        config=_config(options, what, progress=not out.as_json),
        previous=memory_beside(loaded.task.model, options.home),
    )
    memory.save(folder)
    values = {"memory": str(folder), **memory_summary(memory)}
    out.result(values, _two_columns(values))


def run_estimate(
    options: ModelOptions, what: GatherOptions, request_rows: int | None, held_out_rows: int, out: Output
) -> None:
    """Say what gathering and a request will cost."""
    loaded = load(options)
    device = training_arguments(".", options, quiet=out.as_json).device
    expected = estimate(
        loaded.task.model.to(device),
        loaded.train,
        _config(options, what, progress=False),
        request_rows=request_rows,
        held_out_rows=held_out_rows,
        processing_class=loaded.task.processor,
        data_collator=loaded.task.collator,
    )
    out.result(expected.to_dict(), str(expected))


def _config(options: ModelOptions, what: GatherOptions, progress: bool) -> GatherConfig:
    return GatherConfig(
        gradient_sum=what.gradient_sum,  # type: ignore[arg-type]
        curvature=what.curvature,  # type: ignore[arg-type]
        curvature_rows=what.curvature_rows,
        batch_size=options.batch_size,
        seed=options.seed,
        progress=progress,
    )


def _two_columns(values: dict[str, Any]) -> Table:
    table = Table("memory", "")
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{part.replace('_', ' ')} {figure}" for part, figure in value.items())
        table.add_row(name.replace("_", " "), str(value))
    return table
