"""`hf-iau unlearn`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import typer

from hf_iau.cli.inputs import Loaded, NamedRows, load, memory_of, other_model, request_of, training_arguments
from hf_iau.cli.options import ComparisonOptions, ForgetOptions, MethodOptions, ModelOptions, ResultOptions
from hf_iau.cli.output import ExitCode, Output
from hf_iau.deletion.ids import all_forgotten, rows_still_in
from hf_iau.deletion.service import DeletionOutput, DeletionService
from hf_iau.memory.keys import find_key
from hf_iau.memory.memory_files import MEMORY_FOLDER
from hf_iau.methods.base import method_config
from hf_iau.methods.iau.verdict import RETRAIN
from hf_iau.report.card import UnlearningCard
from hf_iau.report.report import UnlearningReport
from hf_iau.trainer.unlearning_trainer import UnlearningTrainer
from hf_iau.unlearn.output import UnlearnOutput
from hf_iau.utils.atomic_files import PRIVATE_FOLDER, unmasked


def run_unlearn(
    options: ModelOptions,
    forget: ForgetOptions,
    compare: ComparisonOptions,
    how: MethodOptions,
    result: ResultOptions,
    out: Output,
) -> None:
    """Make a model forget rows, write what was asked for, and tell of it."""
    settings = None if how.settings is None else method_config(how.method, how.settings)
    loaded = load(options, compare)
    request = request_of(loaded.raw, forget)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _trainer(options, loaded, how, result, scratch, quiet=out.as_json)
        asked: dict[str, Any] = {
            "method": how.method,
            "config": settings,
            "reason": how.reason,
            "test_dataset": loaded.test,
            "retrained_model": _others(options, compare, loaded),
        }
        done = _run_request(trainer, request, asked, result)
        withheld = result.strict and done.report.verdict == RETRAIN
        _keep(trainer, done, options.home, result, withheld=withheld)
        trainer.accelerator.wait_for_everyone()
        if result.push_to_hub is not None and not result.dry_run and not withheld:
            trainer.args.hub_model_id = result.push_to_hub
            trainer.args.output_dir = str(options.home if result.in_place else result.output)
            trainer.push_to_hub(commit_message=f"Forget {done.report.counts['forget_rows']} rows on request")
    _tell(done, options.home, result, out, withheld=withheld)


def _trainer(
    options: ModelOptions,
    loaded: Loaded,
    how: MethodOptions,
    result: ResultOptions,
    scratch: str,
    quiet: bool,
) -> UnlearningTrainer:
    """A trainer in the model's own folder, or in an empty one."""
    home = options.home
    trainer = UnlearningTrainer(
        model=loaded.task.model,
        args=training_arguments(str(home) if result.in_place else scratch, options, quiet=quiet),
        train_dataset=loaded.train,
        eval_dataset=loaded.held_out,
        processing_class=loaded.task.processor,
        data_collator=loaded.task.collator,
        memory=None if result.in_place else memory_of(home, how.memory),
    )
    if home is not None and not result.in_place:
        trainer.unlearning_card = UnlearningCard.of_weights(home / MEMORY_FOLDER, loaded.task.model)
    return trainer


def _others(options: ModelOptions, compare: ComparisonOptions, loaded: Loaded) -> list[Any] | None:
    """The retrained models to compare with, or None."""
    models = [other_model(name, loaded.task, options.trust_remote_code) for name in compare.retrained or []]
    return models or None


def _run_request(
    trainer: UnlearningTrainer, request: NamedRows, asked: dict[str, Any], result: ResultOptions
) -> UnlearnOutput:
    """The request, written into the model's folder as one transaction or carried out in memory alone."""
    if result.in_place:
        service = DeletionService(trainer, id_column=request.id_column)
        chosen: dict[str, Any] = {"forget_indices": request.rows} if request.id_column is None else {"ids": request.ids}
        return service.unlearn(**chosen, request_id=result.request_id, **asked)
    rows, notes = request.rows, list[str]()
    if request.id_column is not None and len(rows):
        rows, notes = rows_still_in(trainer.view, request.rows, find_key(trainer.args.output_dir))
        if not len(rows):
            raise all_forgotten(len(request.rows))
    output = trainer.unlearn(forget_indices=rows, dry_run=result.dry_run, **asked)
    output.report.warnings += notes
    return output


def _keep(
    trainer: UnlearningTrainer, done: UnlearnOutput, home: Path | None, result: ResultOptions, *, withheld: bool
) -> None:
    """Write the report, and beside it the new model unless it is not wanted."""
    if not trainer.is_world_process_zero():
        return
    if result.output is not None:
        _write(trainer, done.report, result, home, with_model=not result.dry_run and not withheld)
    elif result.in_place and done.applied:
        assert home is not None
        done.report.save(_report_folder(done.report, home, result))
        trainer.create_model_card()


def _write(
    trainer: UnlearningTrainer, report: UnlearningReport, result: ResultOptions, home: Path | None, *, with_model: bool
) -> None:
    """Write everything beside the output and move it into place at the end: a crash leaves nothing half done."""
    output = result.output
    assert output is not None
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        if with_model:
            if home is not None and (home / "README.md").is_file():
                shutil.copy(home / "README.md", staged)  # what the model was made of is known from there
            trainer.save_model(str(staged))
            trainer.args.output_dir = str(staged)
            trainer.create_model_card(model_name=output.name)
        folder = _report_folder(report, staged, result)
        folder.mkdir(exist_ok=True, mode=PRIVATE_FOLDER)
        report.save(folder)
        staged.chmod(unmasked(0o777))
        staged.replace(output)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _report_folder(report: UnlearningReport, home: Path, result: ResultOptions) -> Path:
    """Where a report goes: before a push, one that tells of single rows lies where nothing is uploaded from."""
    return home / MEMORY_FOLDER if report.per_row_suppressed and result.push_to_hub is not None else home


def _tell(done: UnlearnOutput, home: Path | None, result: ResultOptions, out: Output, *, withheld: bool) -> None:
    """Print the result, and what is left to do; ends with `ExitCode.RETRAIN` where the model was withheld."""
    folder = home if result.in_place else result.output
    entry = done.entry if isinstance(done, DeletionOutput) else None
    values = {
        "applied": done.applied and not withheld,
        "output": None if folder is None else str(folder),
        "ledger_entry": None if entry is None else {"number": entry.number, "mac": entry.mac},
        "pushed_to": None if result.dry_run or withheld else result.push_to_hub,
        "report": done.report.to_dict(),
    }
    out.result(values, str(done.report) + (f"\n\nWritten to {result.output}" if result.output is not None else ""))
    if withheld:
        out.note("--strict: the verdict is `retrain`, so no model was written.")
        raise typer.Exit(ExitCode.RETRAIN)
    if result.in_place and not done.applied:
        out.note("The ledger says that this request was carried out before: nothing was changed.")
    elif home is not None and not result.dry_run:
        if not result.in_place:
            out.note(f"The model in {home} is as it was, and still knows the rows.")
        out.note(f"Other things may still know the rows: see `hf-iau audit {folder}`.")
