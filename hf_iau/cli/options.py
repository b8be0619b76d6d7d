"""Options that several commands share, in groups; each group looks at its values before anything is loaded.

A command names groups as its parameters, and `spread` turns each into the options it is made of. Nothing here imports
PyTorch, Transformers or Datasets, so that `--help` and every refusal of an argument answer at once.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from hf_iau.cli.condition import parse_condition
from hf_iau.cli.files import check_model, check_rows, local_folder, read_ids
from hf_iau.errors import ConfigError, MemoryFileError, RequestError

Kind = Literal["text", "image", "language"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GRADIENT_SUMS = ("full", "sampled", "none")
CURVATURES = ("ekfac", "diagonal", "identity", "none")
METHODS = (
    *("bad-teacher", "fine-tune", "fisher-forgetting", "gradient-ascent", "iau", "iau-paper", "iau-released"),
    *("influence-cg", "l1-sparse", "neggrad-plus", "npo", "random-labels", "retrain", "salun", "scrub", "ssd"),
    "unrolling-sgd",
)
"""What `hf_iau.available_methods()` returns."""

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show where an unexpected error came from.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of samples.", min=0)]


@dataclass(frozen=True)
class ModelOptions:
    """The model and its rows."""

    model: Annotated[str, typer.Argument(help="The fine-tuned model or PEFT adapter: a folder, or a name on the Hub.")]
    train: Annotated[
        str,
        typer.Option("--train", help="The rows it was trained on, in their order: a file, folder or Hub name[:split]."),
    ]
    input_column: Annotated[
        list[str] | None,
        typer.Option("--input-column", help="Column of texts or images; give it twice for text pairs."),
    ] = None
    label_column: Annotated[str, typer.Option("--label-column", help="Column of the labels, numbers or names.")] = (
        "label"
    )
    max_length: Annotated[int | None, typer.Option("--max-length", help="Longest text in tokens.", min=1)] = None
    task: Annotated[
        str | None, typer.Option("--task", help="text, image or language; default: what the model says.")
    ] = None
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
    ] = False
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows a batch.", min=1)] = 32
    seed: SeedOption = 0
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the processor even where there is an accelerator.")] = False

    def __post_init__(self) -> None:
        if self.task is not None:
            check_choice("--task", self.task, KINDS)
        check_model(self.model)
        check_rows(self.train)

    @property
    def home(self) -> Path | None:
        """The model's folder, or None for a model of the Hub."""
        return local_folder(self.model)


@dataclass(frozen=True)
class GatherOptions:
    """What is gathered.

    The defaults are those of `hf_iau.GatherConfig`.
    """

    gradient_sum: Annotated[str, typer.Option(help="full, sampled or none.")] = "sampled"
    curvature: Annotated[str, typer.Option(help="ekfac, diagonal, identity or none.")] = "ekfac"
    curvature_rows: Annotated[int, typer.Option(help="Rows that the curvature is fitted on.", min=1)] = 1024

    def __post_init__(self) -> None:
        check_choice("--gradient-sum", self.gradient_sum, GRADIENT_SUMS)
        check_choice("--curvature", self.curvature, CURVATURES)


@dataclass(frozen=True)
class ForgetOptions:
    """The rows to forget."""

    ids_file: Annotated[
        Path | None, typer.Option("--ids-file", help="What to forget: row numbers, one a line or a JSON list.")
    ] = None
    id_column: Annotated[
        str | None, typer.Option("--id-column", help="With --ids-file: the column whose values the ids are.")
    ] = None
    where: Annotated[str | None, typer.Option("--where", help='Instead: a condition, e.g. "label == 3".')] = None

    def __post_init__(self) -> None:
        if (self.ids_file is None) == (self.where is None):
            raise RequestError("Say what to forget: either --ids-file or --where.")
        if self.where is not None:
            if self.id_column is not None:
                raise RequestError("--id-column goes with --ids-file; --where names its columns itself.")
            parse_condition(self.where)
        if self.ids_file is not None:
            read_ids(self.ids_file, int if self.id_column is None else str)


@dataclass(frozen=True)
class ComparisonOptions:
    """Other rows and models to measure."""

    held_out: Annotated[
        str | None,
        typer.Option("--held-out", help="Rows like them that it never saw; the step is calibrated on them."),
    ] = None
    test: Annotated[str | None, typer.Option("--test", help="Test rows, for the report alone.")] = None
    retrained: Annotated[
        list[str] | None,
        typer.Option("--retrained", help="A model trained without the rows, to compare with; twice: noise floor."),
    ] = None

    def __post_init__(self) -> None:
        for rows in (self.held_out, self.test):
            if rows is not None:
                check_rows(rows)
        for model in self.retrained or ():
            check_model(model)


@dataclass(frozen=True)
class MethodOptions:
    """How it is forgotten."""

    method: Annotated[str, typer.Option(help="Name of the method.")] = "iau"
    config: Annotated[str | None, typer.Option(help="Its settings, a JSON object.")] = None
    reason: Annotated[
        str | None,
        typer.Option(help="Why the rows are to go: 'wrong-label' or 'random'; default: found out."),
    ] = None
    memory: Annotated[
        Path | None, typer.Option("--memory", help="Folder of the memory; default: _iau in the model's folder.")
    ] = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"--method {self.method!r} is unknown: choose one of {', '.join(METHODS)}.")
        if self.reason not in (None, "random", "wrong-label"):
            raise ConfigError(f"--reason {self.reason!r} is unknown: give 'wrong-label' or 'random', or leave it out.")
        if self.memory is not None and not self.memory.is_dir():
            raise MemoryFileError(f"No gradient memory at {self.memory}: make one with `hf-iau gather`.")
        _ = self.settings

    @property
    def settings(self) -> dict[str, Any] | None:
        """`--config` as a dictionary, or None where it was not given.

        Raises:
            ConfigError: it is no JSON object.
        """
        if self.config is None:
            return None
        try:
            values = json.loads(self.config)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--config {self.config!r} is no JSON ({error}).") from error
        if not isinstance(values, dict):
            raise ConfigError(f"--config {self.config!r}: give a JSON object, e.g. '{{\"eta\": 1e-6}}'.")
        return values


@dataclass(frozen=True)
class ResultOptions:
    """Where the model that has forgotten goes."""

    output: Annotated[Path | None, typer.Option("--output", help="A new folder for the model that has forgotten.")] = (
        None
    )
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Instead of --output: change MODEL itself, in one transaction with the ledger."
        ),
    ] = False
    request_id: Annotated[str | None, typer.Option(help="With --in-place: your name for the request.")] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report, and write nothing but the report.")] = False
    strict: Annotated[bool, typer.Option("--strict", help="Write no model when the verdict is `retrain`.")] = False
    push_to_hub: Annotated[str | None, typer.Option(help="Repository on the Hub to push the new model to.")] = None

    def __post_init__(self) -> None:
        if self.in_place:
            return
        if self.output is None and not self.dry_run:
            raise RequestError(
                "Say where the new model goes: --output FOLDER, --in-place, or --dry-run for the report alone."
            )
        if self.request_id is not None:
            raise RequestError("--request-id names a request in the ledger of the model's folder: it needs --in-place.")
        output = self.output
        if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise RequestError(f"--output {output} exists and is not empty: name a new folder. The old model is kept.")

    def check_in_place(self, home: Path | None, memory: Path | None) -> None:
        """Refuse options that contradict `--in-place`, where it was given.

        Args:
            home: the model's folder, if it is one.
            memory: `--memory`.

        Raises:
            RequestError: there is no such folder, or another place was named as well.
        """
        others = self.output is not None or memory is not None or self.dry_run or self.strict
        if self.in_place and (home is None or others):
            raise RequestError(
                "--in-place changes the model's own folder, with the memory there: give a folder as MODEL, and neither "
                "--output, --memory, --dry-run nor --strict."
            )


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{option} {value}: choose {', '.join(choices[:-1])} or {choices[-1]}.")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the fields of each option group in place of the group, as Typer reads them.

    A parameter whose annotation is a dataclass is a group. Groups are made, and so checked, in their order.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    groups = {name: hints[name] for name in parameters if is_dataclass(hints[name])}
    flat: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        if name in groups:
            flat += _parameters(groups[name])
        else:
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(command)
    def spread_out(**given: Any) -> None:
        made = {
            name: group(**{parameter.name: given.pop(parameter.name) for parameter in _parameters(group)})
            for name, group in groups.items()
        }
        command(**made, **given)

    spread_out.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    spread_out.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    return spread_out


def _parameters(group: Any) -> Iterator[inspect.Parameter]:
    """The group's fields as parameters; in `--help` they stand together under the group's docstring."""
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        hint, info = hints[field.name].__origin__, copy.copy(hints[field.name].__metadata__[0])
        if isinstance(info, OptionInfo):
            info.rich_help_panel = str(group.__doc__).splitlines()[0].removesuffix(".")
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=Annotated[hint, info],
        )
