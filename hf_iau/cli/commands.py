"""The commands. Each checks its arguments, then imports what does the work, and prints what that returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hf_iau.cli.options import (
    ComparisonOptions,
    DebugOption,
    ForgetOptions,
    GatherOptions,
    MethodOptions,
    ModelOptions,
    ResultOptions,
    SeedOption,
    spread,
)
from hf_iau.cli.output import Output, reported
from hf_iau.errors import RequestError

app = typer.Typer(
    name="hf-iau",
    help="Make a fine-tuned model forget training rows, without training it again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as the command `name`: option groups are spread, errors become messages and exit codes."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        app.command(name)(reported(spread(function)))
        return function

    return register


@command("gather")
def gather_command(
    model: ModelOptions,
    what: GatherOptions,
    out: Output,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where the memory is written; default: _iau in the model's folder.")
    ] = None,
) -> None:
    """Gather the memory of a trained model: what a later request will need."""
    if output is None and model.home is None:
        raise RequestError(f"{model.model!r} is no folder here: say by --output where the memory is to be written.")
    from hf_iau.cli.gathering import run_gather

    run_gather(model, what, output, out)


@command("estimate")
def estimate_command(
    model: ModelOptions,
    what: GatherOptions,
    out: Output,
    request_rows: Annotated[int | None, typer.Option(help="Rows of a request; default: a hundredth.", min=1)] = None,
    held_out_rows: Annotated[int, typer.Option(help="Rows that calibration may look at.", min=0)] = 2000,
) -> None:
    """Say what gathering and a request will cost, in bytes and seconds, before either is done."""
    from hf_iau.cli.gathering import run_estimate

    run_estimate(model, what, request_rows, held_out_rows, out)


@command("unlearn")
def unlearn_command(
    model: ModelOptions,
    forget: ForgetOptions,
    compare: ComparisonOptions,
    how: MethodOptions,
    result: ResultOptions,
    out: Output,
) -> None:
    """Make a model forget rows, and write the new model, its memory, its card and a report into a new folder."""
    result.check_in_place(model.home, how.memory)
    from hf_iau.cli.unlearning import run_unlearn

    run_unlearn(model, forget, compare, how, result, out)


@command("evaluate")
def evaluate_command(
    model: ModelOptions,
    forget: ForgetOptions,
    compare: ComparisonOptions,
    out: Output,
    retained_rows: Annotated[int, typer.Option(help="Retained rows to measure, drawn at random.", min=1)] = 2000,
) -> None:
    """Measure a model, changed or not, on forget, retained, held-out and test rows."""
    from hf_iau.cli.evaluating import run_evaluate

    run_evaluate(model, forget, compare, retained_rows, out)


@command("report")
def report_command(
    path: Annotated[Path, typer.Argument(help="A report.json, or the folder that it lies in.")],
    out: Output,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it in Markdown.")] = False,
) -> None:
    """Print a saved report."""
    if not path.exists():
        raise RequestError(f"There is no report at {path}: give a report.json, or the folder that it lies in.")
    from hf_iau.cli.records import show_report

    show_report(path, markdown, out)


@command("audit")
def audit_command(
    directory: Annotated[Path, typer.Argument(help="The folder that a model was saved in.")],
    out: Output,
    purge: Annotated[bool, typer.Option("--purge", help="Remove what can be removed, after a question.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """List what still holds the influence of forgotten rows, and remove it if asked."""
    _check_folder(directory)
    if purge and out.as_json and not yes:
        raise RequestError("--purge with --json cannot ask: add --yes.")
    from hf_iau.cli.records import run_audit

    run_audit(directory, purge, yes, out)


@command("ledger")
def ledger_command(
    directory: Annotated[Path, typer.Argument(help="The output directory that the ledger lies in.")],
    out: Output,
    head: Annotated[str | None, typer.Option(help="Head on a receipt: that entry must still be there.")] = None,
    count: Annotated[int | None, typer.Option(help="Count on the same receipt.", min=0)] = None,
) -> None:
    """Verify the ledger of requests, and list it. The key comes from HF_IAU_KEY or HF_IAU_KEY_FILE."""
    _check_folder(directory)
    from hf_iau.cli.records import show_ledger

    show_ledger(directory, head, count, out)


@command("demo")
def demo_command(
    debug: DebugOption = False,
    output: Annotated[Path, typer.Option("--output", help="Where the report is written.")] = Path("outputs/demo"),
    seed: SeedOption = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds of training, only to see that it runs.")
    ] = False,
) -> None:
    """A small vision transformer learns wrong labels by heart and forgets 80 of them: about a minute, no downloads."""
    from hf_iau.cli.demo import run_demo

    run_demo(output, seed=seed, quick=quick)


def _check_folder(directory: Path) -> None:
    if not directory.is_dir():
        raise RequestError(f"{directory} is no folder.")
