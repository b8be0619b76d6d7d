"""The commands. Each one loads what is named, calls one public function, and prints what it returns."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import typer
from rich.table import Table

from hf_iau.cli.inputs import NamedRows, load, memory_of, other_model, request_of, settings_of, training_arguments
from hf_iau.cli.options import (
    BatchOption,
    CpuOption,
    DebugOption,
    HeldOutOption,
    IdColumnOption,
    IdsOption,
    InputOption,
    JsonOption,
    LabelOption,
    LengthOption,
    MemoryOption,
    ModelArgument,
    RetrainedOption,
    SeedOption,
    TaskOption,
    TestOption,
    TrainOption,
    TrustOption,
    WhereOption,
)
from hf_iau.cli.output import ExitCode, Output, reported
from hf_iau.cli.task import local_folder
from hf_iau.cost_estimate import estimate
from hf_iau.data import RowSource
from hf_iau.deletion.artefacts import audit
from hf_iau.deletion.ids import all_forgotten, rows_still_in
from hf_iau.deletion.ledger import Ledger
from hf_iau.deletion.service import DeletionOutput, DeletionService
from hf_iau.errors import RequestError
from hf_iau.evaluation.measurement import measure_model
from hf_iau.evaluation.retraining_gap import gap
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.files import unmasked
from hf_iau.memory.fit import default_collator, describe_memory, gather, keep_input_columns
from hf_iau.memory.keys import find_key
from hf_iau.memory.memory_files import MEMORY_FOLDER
from hf_iau.methods.base import method_config
from hf_iau.methods.iau.verdict import RETRAIN
from hf_iau.report import tables
from hf_iau.report.card import UnlearningCard
from hf_iau.report.report import UnlearningReport
from hf_iau.trainer.unlearning_trainer import UnlearningTrainer
from hf_iau.unlearn.output import UnlearnOutput

app = typer.Typer(
    name="hf-iau",
    help="Make a fine-tuned model forget training rows, without training it again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# --- commands ---------------------------------------------------------------------------------------------------------


@app.command("gather")
def gather_command(
    model: ModelArgument,
    train: TrainOption,
    output: Annotated[
        Path | None, typer.Option("--output", help="Where the memory is written; default: _iau in the model's folder.")
    ] = None,
    gradient_sum: Annotated[str, typer.Option(help="exact, sampled or none.")] = GatherConfig.gradient_sum,
    curvature: Annotated[str, typer.Option(help="ekfac, diagonal, identity or none.")] = GatherConfig.curvature,
    curvature_rows: Annotated[
        int, typer.Option(help="Rows that the curvature is fitted on.")
    ] = GatherConfig.curvature_rows,
    input_column: InputOption = None,
    label_column: LabelOption = "label",
    max_length: LengthOption = None,
    task: TaskOption = None,
    trust_remote_code: TrustOption = False,
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    cpu: CpuOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Gather the memory of a trained model: what a later request will need."""
    out = Output(as_json, debug)
    with reported(out):
        folder = output or (local_folder(model) and Path(model) / MEMORY_FOLDER)
        if folder is None:
            raise RequestError(f"{model!r} is no folder here: say by --output where the memory is to be written.")
        loaded = load(model, train, None, None, input_column, label_column, max_length, task, trust_remote_code)
        device = training_arguments(str(folder), batch_size, seed, cpu, as_json).device
        memory = gather(
            loaded.task.model.to(device),
            loaded.train,
            processing_class=loaded.task.processor,
            data_collator=loaded.task.collator,
            config=GatherConfig(
                gradient_sum=gradient_sum,  # type: ignore[arg-type]
                curvature=curvature,  # type: ignore[arg-type]
                curvature_rows=curvature_rows,
                batch_size=batch_size,
                seed=seed,
                progress=not as_json,
            ),
        )
        memory.save(folder)
        values = {"memory": str(folder), **describe_memory(memory)}
        table = Table("memory", "")
        for name, value in values.items():
            table.add_row(name.replace("_", " "), str(value))
        out.result(values, table)


@app.command("estimate")
def estimate_command(
    model: ModelArgument,
    train: TrainOption,
    gradient_sum: Annotated[str, typer.Option(help="exact, sampled or none.")] = GatherConfig.gradient_sum,
    curvature: Annotated[str, typer.Option(help="ekfac, diagonal, identity or none.")] = GatherConfig.curvature,
    curvature_rows: Annotated[
        int, typer.Option(help="Rows that the curvature is fitted on.")
    ] = GatherConfig.curvature_rows,
    request_rows: Annotated[int | None, typer.Option(help="Rows of a request; default: a hundredth.", min=1)] = None,
    held_out_rows: Annotated[int, typer.Option(help="Rows that calibration may look at.", min=0)] = 2000,
    input_column: InputOption = None,
    label_column: LabelOption = "label",
    max_length: LengthOption = None,
    task: TaskOption = None,
    trust_remote_code: TrustOption = False,
    batch_size: BatchOption = 32,
    cpu: CpuOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what gathering and a request will cost, in bytes and seconds, before either is done."""
    out = Output(as_json, debug)
    with reported(out):
        loaded = load(model, train, None, None, input_column, label_column, max_length, task, trust_remote_code)
        device = training_arguments(".", batch_size, 0, cpu, as_json).device
        expected = estimate(
            loaded.task.model.to(device),
            loaded.train,
            GatherConfig(
                gradient_sum=gradient_sum,  # type: ignore[arg-type]
                curvature=curvature,  # type: ignore[arg-type]
                curvature_rows=curvature_rows,
                batch_size=batch_size,
                progress=False,
            ),
            request_rows=request_rows,
            held_out_rows=held_out_rows,
            processing_class=loaded.task.processor,
            data_collator=loaded.task.collator,
        )
        out.result(expected.to_dict(), str(expected))


@app.command("unlearn")
def unlearn_command(
    model: ModelArgument,
    train: TrainOption,
    output: Annotated[
        Path | None, typer.Option("--output", help="A new folder for the model that has forgotten.")
    ] = None,
    held_out: HeldOutOption = None,
    test: TestOption = None,
    ids_file: IdsOption = None,
    id_column: IdColumnOption = None,
    where: WhereOption = None,
    method: Annotated[str, typer.Option(help="Name of the method.")] = "iau",
    config: Annotated[str | None, typer.Option(help="Its settings, a JSON object.")] = None,
    retrained: RetrainedOption = None,
    memory: MemoryOption = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place", help="Instead of --output: change MODEL itself, in one transaction with the ledger."
        ),
    ] = False,
    request_id: Annotated[str | None, typer.Option(help="With --in-place: your name for the request.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report, and write nothing but the report.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Write no model when the verdict is `retrain`.")] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Repository on the Hub to push the new model to.")] = None,
    input_column: InputOption = None,
    label_column: LabelOption = "label",
    max_length: LengthOption = None,
    task: TaskOption = None,
    trust_remote_code: TrustOption = False,
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    cpu: CpuOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a model forget rows, and write the new model, its memory, its card and a report into a new folder."""
    out = Output(as_json, debug)
    with reported(out):
        home = local_folder(model)
        _check_destination(home, output, memory, in_place=in_place, dry_run=dry_run, strict=strict)
        settings = None if config is None else method_config(method, settings_of(config, "--config"))
        loaded = load(model, train, held_out, test, input_column, label_column, max_length, task, trust_remote_code)
        request = request_of(loaded.raw, ids_file, id_column, where)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = UnlearningTrainer(
                model=loaded.task.model,
                args=training_arguments(str(home) if in_place else scratch, batch_size, seed, cpu, as_json),
                train_dataset=loaded.train,
                eval_dataset=loaded.held_out,
                processing_class=loaded.task.processor,
                data_collator=loaded.task.collator,
                memory=None if in_place else memory_of(home, memory),
            )
            if home is not None and not in_place:
                trainer.unlearning_card = UnlearningCard.of_weights(home / MEMORY_FOLDER, loaded.task.model)
            others = [other_model(name, loaded.task, trust_remote_code) for name in retrained or []]
            asked: dict[str, Any] = {
                "method": method,
                "config": settings,
                "test_dataset": loaded.test,
                "retrained_model": others or None,
            }
            result = _run(trainer, request, asked, in_place=in_place, request_id=request_id, dry_run=dry_run)
            entry = result.entry if isinstance(result, DeletionOutput) else None
            withheld = strict and result.report.verdict == RETRAIN
            if output is not None and trainer.is_world_process_zero():
                _write(trainer, result.report, output, home, with_model=not dry_run and not withheld)
            elif in_place and result.applied and trainer.is_world_process_zero():
                result.report.save(home)  # type: ignore[arg-type]
                trainer.create_model_card()
            trainer.accelerator.wait_for_everyone()
            if push_to_hub is not None and not dry_run and not withheld:
                trainer.args.hub_model_id, trainer.args.output_dir = push_to_hub, str(home if in_place else output)
                trainer.push_to_hub(commit_message=f"Forget {result.report.counts['forget_rows']} rows on request")
        values = {
            "applied": result.applied and not withheld,
            "output": str(home) if in_place else None if output is None else str(output),
            "ledger_entry": None if entry is None else {"number": entry.number, "mac": entry.mac},
            "pushed_to": None if dry_run or withheld else push_to_hub,
            "report": result.report.to_dict(),
        }
        text = str(result.report) + (f"\n\nWritten to {output}" if output is not None else "")
        out.result(values, text)
        if withheld:
            out.note("--strict: the verdict is `retrain`, so no model was written.")
            raise typer.Exit(ExitCode.RETRAIN)
        if in_place and not result.applied:
            out.note("The ledger says that this request was served before: nothing was changed.")
        elif home is not None and not dry_run:
            known = "Other things" if in_place else f"The model in {home}, and other things,"
            out.note(f"{known} may still know the rows: see `hf-iau audit {home}`.")


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    train: TrainOption,
    held_out: HeldOutOption = None,
    test: TestOption = None,
    ids_file: IdsOption = None,
    id_column: IdColumnOption = None,
    where: WhereOption = None,
    retrained: RetrainedOption = None,
    retained_rows: Annotated[int, typer.Option(help="Retained rows to measure, drawn at random.", min=1)] = 2000,
    input_column: InputOption = None,
    label_column: LabelOption = "label",
    max_length: LengthOption = None,
    task: TaskOption = None,
    trust_remote_code: TrustOption = False,
    batch_size: BatchOption = 32,
    seed: SeedOption = 0,
    cpu: CpuOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a model, changed or not, on forget, retained, held-out and test rows."""
    out = Output(as_json, debug)
    with reported(out):
        loaded = load(model, train, held_out, test, input_column, label_column, max_length, task, trust_remote_code)
        chosen = np.unique(request_of(loaded.raw, ids_file, id_column, where).rows)
        outside = chosen[(chosen < 0) | (chosen >= len(loaded.train))]
        if outside.size:
            raise RequestError(f"Row {outside[0]} is no row of --train, which has {len(loaded.train)}.")
        device = training_arguments(".", batch_size, seed, cpu, as_json).device
        bare = loaded.task.model.to(device)

        def source(rows: datasets.Dataset | None, name: str) -> RowSource | None:
            if rows is None or len(rows) == 0:
                return None
            kept = keep_input_columns(bare, rows, name)
            collator = loaded.task.collator or default_collator(loaded.task.processor)
            return RowSource(kept, collator, batch_size=batch_size, device=device, name=name)

        forget = source(loaded.train.select(chosen), "forget rows")
        retained = source(loaded.train.select(np.setdiff1d(np.arange(len(loaded.train)), chosen)), "retained rows")
        assert forget is not None
        if retained is not None:
            retained = retained.sample(retained_rows, seed)
        splits = (forget, retained, source(loaded.held_out, "held-out rows"), source(loaded.test, "test rows"))
        figures = {"model": measure_model(bare, *splits).figures(seed=seed).to_dict()}
        for number, name in enumerate(retrained or [], start=1):
            other = other_model(name, loaded.task, trust_remote_code).to(device)
            title = "retrained" if number == 1 else f"retrained {number}"
            figures[title] = measure_model(other, *splits).figures(seed=seed).to_dict()
        reference = figures.get("retrained")
        gaps = {
            title: None if reference is None or values is reference else gap(values, reference).to_dict()
            for title, values in figures.items()
        }
        out.result({"figures": figures, "gaps": gaps}, _rich(tables.comparison(figures, gaps)))


@app.command("report")
def report_command(
    path: Annotated[Path, typer.Argument(help="A report.json, or the folder that it lies in.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print it in Markdown.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print a saved report."""
    out = Output(as_json, debug)
    with reported(out):
        report = UnlearningReport.load(path)
        out.result(report.to_dict(), report.to_markdown() if markdown else str(report))


@app.command("audit")
def audit_command(
    directory: Annotated[Path, typer.Argument(help="The folder that a model was saved in.")],
    purge: Annotated[bool, typer.Option("--purge", help="Remove what can be removed, after a question.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List what still holds the influence of forgotten rows, and remove it if asked."""
    out = Output(as_json, debug)
    with reported(out):
        found = audit(directory)
        freed = None
        if purge and found.removable:
            if not yes:
                if as_json:
                    raise RequestError("--purge with --json cannot ask: add --yes.")
                out.result({}, _findings(found.to_dict(), directory))
                size = tables.size(sum(finding.bytes for finding in found.removable))
                if not typer.confirm(f"Remove {len(found.removable)} of these, {size}, for good?", err=True):
                    out.note("Nothing was removed.")
                    raise typer.Exit(ExitCode.FOUND)
            freed = found.purge()
        values = found.to_dict() | {"bytes_freed": freed}
        text = _findings(found.to_dict(), directory) if found.findings else str(found)
        out.result(values, text)
        if freed is not None:
            out.note(f"{tables.size(freed)} removed.")
        if found.findings:
            raise typer.Exit(ExitCode.FOUND)


@app.command("ledger")
def ledger_command(
    directory: Annotated[Path, typer.Argument(help="The output directory that the ledger lies in.")],
    head: Annotated[str | None, typer.Option(help="Head on a certificate: that entry must still be there.")] = None,
    count: Annotated[int | None, typer.Option(help="Count on the same certificate.", min=0)] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Verify the ledger of requests, and list it. The key comes from HF_IAU_KEY or HF_IAU_KEY_FILE."""
    out = Output(as_json, debug)
    with reported(out):
        if not directory.is_dir():
            raise RequestError(f"{directory} is no folder.")
        ledger = Ledger.of(directory)
        verified = ledger.verify(head, count)
        entries = [
            {
                "number": entry.number,
                "time": entry.time,
                "method": entry.method,
                "rows": entry.rows,
                "verdict": entry.outcome.get("verdict"),
                "mac": entry.mac,
            }
            for entry in ledger.entries()
        ]
        table = Table("number", "time", "method", "rows", "verdict", "entry", caption=f"Verified. Head {verified.head}")
        for entry in entries:
            table.add_row(*(str(value) for value in [*list(entry.values())[:-1], f"{str(entry['mac'])[:16]}…"]))
        out.result({"verified": True, "count": verified.count, "head": verified.head, "entries": entries}, table)


@app.command("demo")
def demo_command(
    output: Annotated[Path, typer.Option("--output", help="Where the report is written.")] = Path("outputs/demo"),
    seed: SeedOption = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds of training, only to see that it runs.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """A small vision transformer learns wrong labels by heart and forgets 80 of them: about a minute, no downloads."""
    with reported(Output(debug=debug)):
        from hf_iau.cli.demo import run_demo  # scikit-learn and its data are needed here alone

        run_demo(output, seed=seed, quick=quick)


# --- helpers ----------------------------------------------------------------------------------------------------------


def _run(
    trainer: UnlearningTrainer,
    request: NamedRows,
    asked: dict[str, Any],
    *,
    in_place: bool,
    request_id: str | None,
    dry_run: bool,
) -> UnlearnOutput:
    """The request, written into the model's folder as one transaction or carried out in memory alone."""
    if in_place:
        service = DeletionService(trainer, id_column=request.id_column)
        chosen: dict[str, Any] = {"forget_indices": request.rows} if request.id_column is None else {"ids": request.ids}
        return service.unlearn(**chosen, request_id=request_id, **asked)
    if request_id is not None:
        raise RequestError("--request-id names a request in the ledger: give it with --in-place.")
    rows, notes = request.rows, list[str]()
    if request.id_column is not None and len(rows):
        rows, notes = rows_still_in(trainer.view, request.rows, find_key(trainer.args.output_dir))
        if not len(rows):
            raise all_forgotten(len(request.rows))
    output = trainer.unlearn(forget_indices=rows, dry_run=dry_run, **asked)
    output.report.warnings += notes
    return output


def _check_destination(
    home: Path | None, output: Path | None, memory: Path | None, *, in_place: bool, dry_run: bool, strict: bool
) -> None:
    """Refuse a request that does not say where its result goes, before anything is loaded."""
    if in_place:
        if home is None or output is not None or memory is not None or dry_run or strict:
            raise RequestError(
                "--in-place changes the model's own folder, with the memory there: give a folder as MODEL, and neither "
                "--output, --memory, --dry-run nor --strict."
            )
        return
    if output is None and not dry_run:
        raise RequestError(
            "Say where the new model goes: --output FOLDER, --in-place, or --dry-run for the report alone."
        )
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RequestError(f"--output {output} exists and is not empty: name a new folder. The old model is kept.")


def _write(
    trainer: UnlearningTrainer, report: UnlearningReport, output: Path, home: Path | None, *, with_model: bool
) -> None:
    """Write everything beside `output` and move it into place at the end, so that a crash leaves nothing half done."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        if with_model:
            if home is not None and (home / "README.md").is_file():
                shutil.copy(home / "README.md", staged)  # what the model was made of is known from there
            trainer.save_model(str(staged))
            trainer.args.output_dir = str(staged)
            trainer.create_model_card(model_name=output.name)
        report.save(staged)
        staged.chmod(unmasked(0o777))
        staged.replace(output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _rich(table: tables.Table) -> Table:
    head, *body = table
    made = Table(head[0])
    for name in head[1:]:
        made.add_column(name, justify="right")
    for row in body:
        made.add_row(*row)
    return made


def _findings(values: dict[str, Any], root: Path) -> Table:
    table = Table("path", "kind", "size", "purge", "why")
    table.columns[0].overflow = "fold"
    for finding in values["findings"]:
        path = Path(finding["path"])
        inside = path.relative_to(root) if path.is_relative_to(root) else path
        row = [str(inside), finding["kind"], tables.size(finding["bytes"]), "yes" if finding["removable"] else "no"]
        table.add_row(*row, f"{finding['why']} {finding['remedy']}".strip())
    return table
