"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(help="The fine-tuned model or PEFT adapter: a folder, or a name on the Hub.")
]
TrainOption = Annotated[
    str, typer.Option("--train", help="The rows it was trained on, in their order: a file, folder or Hub name[:split].")
]
HeldOutOption = Annotated[
    str | None, typer.Option("--held-out", help="Rows like them that it never saw; the step is calibrated on them.")
]
TestOption = Annotated[str | None, typer.Option("--test", help="Test rows, for the report alone.")]
InputOption = Annotated[
    list[str] | None, typer.Option("--input-column", help="Column of texts or images; give it twice for text pairs.")
]
LabelOption = Annotated[str, typer.Option("--label-column", help="Column of the labels, numbers or names.")]
LengthOption = Annotated[int | None, typer.Option("--max-length", help="Longest text in tokens.", min=1)]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="text, image or language; default: what the model says.")
]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
BatchOption = Annotated[int, typer.Option("--batch-size", help="Rows a batch.", min=1)]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of samples.", min=0)]
CpuOption = Annotated[bool, typer.Option("--cpu", help="Use the processor even where there is an accelerator.")]
MemoryOption = Annotated[
    Path | None, typer.Option("--memory", help="Folder of the memory; default: _iau in the model's folder.")
]
IdsOption = Annotated[
    Path | None, typer.Option("--ids-file", help="What to forget: row numbers, one a line or a JSON list.")
]
IdColumnOption = Annotated[
    str | None, typer.Option("--id-column", help="With --ids-file: the column whose values the ids are.")
]
WhereOption = Annotated[str | None, typer.Option("--where", help='Instead: a condition, e.g. "label == 3".')]
RetrainedOption = Annotated[
    list[str] | None,
    typer.Option("--retrained", help="A model trained without the rows, to compare with; twice: noise floor."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show where an unexpected error came from.")]
