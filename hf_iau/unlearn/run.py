"""One request, from the rows that are named to the report."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from hf_iau.data import RowSource
from hf_iau.data.model_mode import placed_on, preserved_random_state
from hf_iau.data.precision import compute_settings, memory_device
from hf_iau.data.trainer_rows import model_of, optional_rows
from hf_iau.data.validation import check_same_columns
from hf_iau.distributed import full_parameters, is_main_process, is_sharded, sync_errors
from hf_iau.distributed.wrappers import unwrap_model
from hf_iau.errors import IAUError, RequestError
from hf_iau.evaluation.measurement import Measurement, measure_model
from hf_iau.memory.fingerprints import package_versions
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.base import UnlearningMethod, config_values
from hf_iau.methods.context import ROWS_LOOKED_AT, ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.report.card import UnlearningCard
from hf_iau.report.report import UnlearningReport
from hf_iau.trainer.output import UnlearnOutput
from hf_iau.unlearn.budget import record_budget
from hf_iau.unlearn.prepare import check_loss, request_context
from hf_iau.unlearn.rows import requested_rows
from hf_iau.unlearn.sync import agree_on_request, settle_weights
from hf_iau.unlearn.transaction import WeightTransaction
from hf_iau.unlearn.update_memory import move_memory
from hf_iau.utils.timing import PhaseTimer

if TYPE_CHECKING:
    from hf_iau.trainer.unlearning_trainer import UnlearningTrainer

logger = logging.getLogger(__name__)

# Rows that a report measures; their accuracy is then good to about one point.
_MEASURED_RETAINED_ROWS = ROWS_LOOKED_AT
_MEASURED_HELD_OUT_ROWS = ROWS_LOOKED_AT

Keep = Callable[[ForgetContext, GradientMemory | None, UnlearningReport, UnlearningCard], None]
"""Writes what a request came to: context, memory, report and card, while the changed weights are whole."""


@dataclass(frozen=True)
class Request:
    """What was asked for, as given to `UnlearningTrainer.unlearn`."""

    forget_dataset: Any
    forget_indices: Any
    held_out_dataset: Any = None
    retain_dataset: Any = None
    test_dataset: Any = None
    retrained_models: Sequence[nn.Module] = ()
    dry_run: bool = False


def serve_request(
    trainer: UnlearningTrainer, request: Request, method: UnlearningMethod, config: Any, keep: Keep | None = None
) -> UnlearnOutput:
    """Change the trainer's model as asked, wholly or not at all, and report.

    Args:
        trainer: whose model it is.
        request: what was asked for.
        method: how to forget.
        config: of that method.
        keep: is to write what the request came to; what it raises undoes the request.
    """
    timer = PhaseTimer(trainer.args.device)
    with timer.phase("check"):
        forget_rows, positions = requested_rows(trainer.train_dataset, request.forget_dataset, request.forget_indices)
        if len(forget_rows) == 0:
            return _nothing_to_forget(trainer, method, config)
        context = request_context(
            trainer, forget_rows, positions, request.held_out_dataset, request.retain_dataset, timer
        )
        test = optional_rows(trainer, request.test_dataset, "test rows")
        for others in (context.retain, context.held_out, test):
            check_same_columns(trainer, others, context.forget)
        method.check(context, config)
        check_loss(context)
        agree_on_request(context, method.name, config_values(config))
    model = context.model
    card = trainer.unlearning_card  # read while the weights are those that it describes
    with timer.phase("measure_before"):
        splits = _measured_rows(context, test)
        before = measure_model(model, *splits)
        looked_at = zip(splits, (before.forget, before.retain, before.held_out), strict=False)  # test rows are no one's
        context.predicted |= {rows: seen for rows, seen in looked_at if rows is not None and seen is not None}
    only_trained = getattr(method, "moves_only_trained", False)
    transaction = WeightTransaction(model, memory_device(None), only_trained=only_trained)
    context.weights = transaction.copies
    undo: Callable[[], None] | None = None
    with transaction:
        with sync_errors("the update"):  # what fails in one process is rolled back in all
            outcome = method.run(context, config)
            settle_weights(model, transaction)
            with timer.phase("remember"):
                memory, diagnostics = move_memory(context, outcome, transaction)
            with timer.phase("measure_after"):
                after = measure_model(model, *splits)
            retrained = _measured_retrained(trainer, request.retrained_models, splits, timer)
            report = _report(method, config, context, outcome, diagnostics, before, after, retrained)
            record_budget(report, context, memory)
        if request.dry_run:
            transaction.rollback()
        else:
            card = card.with_report(report)
            if keep is not None:
                kept = memory.on_main_process() if memory is not None else None
                with full_parameters(model):  # to be written
                    keep(context, kept, report, card)
            undo = _commit(trainer, transaction, context, memory, card)
    if request.dry_run:
        return UnlearnOutput(report, applied=False, memory=trainer.memory)
    if is_main_process():
        for sentence in report.warnings:
            logger.warning(sentence)
    return UnlearnOutput(report, applied=True, memory=memory, undo=undo)


@contextlib.contextmanager
def serving_conditions(trainer: UnlearningTrainer, method: UnlearningMethod) -> Iterator[None]:
    """Weights, random numbers, precision and errors as a request needs them, in every process."""
    model = model_of(trainer)
    # Most methods are written for whole parameters.
    sharded = getattr(method, "works_on_shards", False) and is_sharded(model)
    whole = contextlib.nullcontext() if sharded else full_parameters(model)
    # Data sets and collators may draw numbers.
    with sync_errors("the request"), whole, preserved_random_state(model), _working_as_gathered(trainer):
        yield


def _working_as_gathered(trainer: UnlearningTrainer) -> contextlib.AbstractContextManager[None]:
    """The precision and memory device of the memory in force."""
    try:
        memory = trainer.memory
    except IAUError:  # raised again where the request is checked
        memory = None
    settings = {} if memory is None else memory.settings
    return compute_settings(settings.get("precision"), settings.get("memory_device"))


def checked_models(retrained_model: Any) -> list[nn.Module]:
    """`retrained_model=` as a list.

    Raises:
        RequestError: it holds something else than models.
    """
    if retrained_model is None:
        return []
    models: list[Any] = [retrained_model] if isinstance(retrained_model, (nn.Module, str)) else list(retrained_model)
    for model in models:
        if not isinstance(model, nn.Module):
            raise RequestError(
                f"retrained_model={model!r} is a {type(model).__name__}: give a model (or two), e.g. "
                "AutoModelForSequenceClassification.from_pretrained(path)."
            )
    return models


class _MeasuredRows(NamedTuple):
    """The rows that a report looks at, before and after."""

    forget: RowSource
    retain: RowSource | None
    held_out: RowSource | None
    test: RowSource | None


def _measured_rows(context: ForgetContext, test: RowSource | None) -> _MeasuredRows:
    retained = context.retained_to_predict(_MEASURED_RETAINED_ROWS, context.seed)
    return _MeasuredRows(context.forget_to_predict, retained, context.held_out_sample(_MEASURED_HELD_OUT_ROWS), test)


def _measured_retrained(
    trainer: UnlearningTrainer, models: Sequence[nn.Module], rows: _MeasuredRows, timer: PhaseTimer
) -> list[Measurement]:
    measured: list[Measurement] = []
    if models:
        with timer.phase("measure_retrained"):
            for given in models:
                with placed_on(unwrap_model(given), trainer.args.device) as model:
                    measured.append(measure_model(model, *rows))
    return measured


def _report(
    method: UnlearningMethod,
    config: Any,
    context: ForgetContext,
    outcome: MethodOutcome,
    diagnostics: dict[str, Any],
    before: Measurement,
    after: Measurement,
    retrained: list[Measurement],
) -> UnlearningReport:
    memory = context.memory
    known = memory.n_rows if memory is not None else len(context.train) if context.train is not None else None
    return UnlearningReport.build(
        method=method.name,
        config=config_values(config),
        seed=context.seed,
        counts={"train_rows": known},
        before=before,
        after=after,
        retrained=retrained[0] if retrained else None,
        second_retrained=retrained[1] if len(retrained) > 1 else None,
        seconds=context.timer.seconds,
        peak_memory_bytes=context.timer.peak_memory_bytes,
        diagnostics=diagnostics,
        warnings=outcome.warnings,
        verdict=outcome.verdict,
        calibrated=outcome.calibrated,
    )


def _nothing_to_forget(trainer: UnlearningTrainer, method: UnlearningMethod, config: Any) -> UnlearnOutput:
    sentence = "The request names no rows: nothing was forgotten and no weight was changed."
    warnings.warn(sentence, stacklevel=5)  # where unlearn() was called
    report = UnlearningReport(
        method=method.name,
        config=config_values(config),
        seed=trainer.args.seed,
        counts={"forget_rows": 0},
        before={},
        after={},
        warnings=[sentence],
        versions=package_versions(),
    )
    return UnlearnOutput(report, applied=False, memory=trainer.memory_in_ram)


def _commit(
    trainer: UnlearningTrainer,
    transaction: WeightTransaction,
    context: ForgetContext,
    memory: GradientMemory | None,
    card: UnlearningCard,
) -> Callable[[], None]:
    revert_weights = transaction.commit()
    forget_request = trainer.unlearning_state.served(context, memory, card)
    model, on_shards = context.model, is_sharded(context.model)  # and not the context, which holds batches

    def undo() -> None:
        with contextlib.nullcontext() if on_shards else full_parameters(model):
            revert_weights()
        forget_request()

    return undo
