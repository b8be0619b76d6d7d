"""One request, from the rows that are named to the report."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from hf_iau.data import RowSource
from hf_iau.data.model_mode import placed_on, preserved_random_state
from hf_iau.data.precision import compute_settings, memory_device, mixed_precision_of, resolve_precision
from hf_iau.distributed import full_parameters, is_main_process, is_sharded, sync_errors
from hf_iau.distributed.wrappers import unwrap_model
from hf_iau.errors import IAUError, MissingMemoryError, RequestError
from hf_iau.evaluation.measurement import Measurement, measure_model
from hf_iau.memory.fingerprints import package_versions
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.base import UnlearningMethod, config_values, makes_weights_anew
from hf_iau.methods.context import ROWS_LOOKED_AT, ForgetContext
from hf_iau.methods.iau.verdict import CHECK, OK
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.report.card import UnlearningCard
from hf_iau.report.report import UnlearningReport
from hf_iau.unlearn.budget import Budget, budget_after, few_rows_warning, judged
from hf_iau.unlearn.output import UnlearnOutput
from hf_iau.unlearn.prepare import check_loss, request_context, resolve_rows, test_rows
from hf_iau.unlearn.record import Commit, FinishedRequest, StepEffect, UnlearnRecord
from hf_iau.unlearn.rows import NamedRows
from hf_iau.unlearn.state import UnlearningState
from hf_iau.unlearn.sync import agree_on_request, settle_weights
from hf_iau.unlearn.transaction import WeightTransaction
from hf_iau.unlearn.update_memory import move_memory
from hf_iau.unlearn.view import TrainerView
from hf_iau.utils.timing import PhaseTimer

logger = logging.getLogger(__name__)

# Rows that a report measures; their accuracy is then good to about one point.
_MEASURED_RETAINED_ROWS = ROWS_LOOKED_AT
_MEASURED_HELD_OUT_ROWS = ROWS_LOOKED_AT


REASONS = ("random", "wrong-label")


@dataclass(frozen=True)
class Request:
    """What was asked for, as given to `UnlearningTrainer.unlearn`."""

    forget_dataset: Any
    forget_indices: Any
    held_out_dataset: Any = None
    retain_dataset: Any = None
    test_dataset: Any = None
    retrained_models: Sequence[nn.Module] = ()
    reason: str | None = None
    dry_run: bool = False


def run_request(
    view: TrainerView, request: Request, method: UnlearningMethod, config: Any, commit: Commit | None = None
) -> UnlearnOutput:
    """Change the trainer's model as asked, wholly or not at all, and report.

    Args:
        view: of the trainer whose model it is.
        request: what was asked for.
        method: how to forget.
        config: of that method.
        commit: is called while the changed weights are whole and not yet final; what it raises undoes the request.
    """
    with _conditions(view, method):
        timer = PhaseTimer(view.args.device)
        with timer.phase("check"):
            rows = resolve_rows(view, request.forget_dataset, request.forget_indices)
            if len(rows) == 0:
                return _nothing_to_forget(view, rows, method, config)
            context, test = _checked(view, request, rows, method, config, timer)
        output = _change_weights(view, request, context, test, method, config, commit)
    return output


def _checked(
    view: TrainerView, request: Request, rows: NamedRows, method: UnlearningMethod, config: Any, timer: PhaseTimer
) -> tuple[ForgetContext, RowSource | None]:
    """The context of a request that has passed every check, and the test rows."""
    again = makes_weights_anew(method)
    context = request_context(view, rows, request.held_out_dataset, request.retain_dataset, timer, again_allowed=again)
    context.reason = request.reason
    test = test_rows(view, context, request.test_dataset)
    try:
        method.check(context, config)
    except MissingMemoryError as error:
        raise view.missing_memory(error) from view.why_no_memory
    check_loss(context)
    agree_on_request(context, method.name, config_values(config))
    return context, test


def _change_weights(
    view: TrainerView,
    request: Request,
    context: ForgetContext,
    test: RowSource | None,
    method: UnlearningMethod,
    config: Any,
    commit: Commit | None,
) -> UnlearnOutput:
    model, timer = context.model, context.timer
    card = view.read_card()  # while the weights are those that it describes
    with timer.phase("measure_before"):
        splits = _measured_rows(context, test)
        before = measure_model(model, *splits)
        _refuse_broken_rows(before)
        predictions = zip(
            splits, (before.forget, before.retain, before.held_out), strict=False
        )  # no method's: test rows
        context.predicted |= {rows: seen for rows, seen in predictions if rows is not None and seen is not None}
    only_trained = getattr(method, "moves_only_trained", False)
    transaction = WeightTransaction(model, memory_device(None), only_trained=only_trained)
    context.weights = transaction.copies
    with transaction:
        with sync_errors("the update"):  # what fails in one process is rolled back in all
            outcome = method.run(context, config)
            settle_weights(model, transaction)
            with timer.phase("remember"):
                memory, effect = move_memory(context, outcome, transaction)
            with timer.phase("measure_after"):
                after = measure_model(model, *splits)
            retrained = _measured_retrained(view, request.retrained_models, splits, timer)
            report, record = _report(method, config, context, outcome, effect, memory, before, after, retrained)
        if request.dry_run:
            transaction.rollback()
            return UnlearnOutput(report, applied=False, memory=view.read_memory())
        card = card.with_report(report)
        if commit is not None:
            written = memory.on_main_process() if memory is not None else None
            with full_parameters(model):  # to be written
                commit(FinishedRequest(context, written, record, report, card))
        undo = _make_final(view.state, transaction, context, memory, card)
    if is_main_process():
        for sentence in report.warnings:
            logger.warning(sentence)
    return UnlearnOutput(report, applied=True, memory=memory, undo=undo)


@contextlib.contextmanager
def _conditions(view: TrainerView, method: UnlearningMethod) -> Iterator[None]:
    """Weights, random numbers, precision and errors as a request needs them, in every process."""
    model = view.model
    # Most methods are written for whole parameters.
    sharded = getattr(method, "works_on_shards", False) and is_sharded(model)
    whole = contextlib.nullcontext() if sharded else full_parameters(model)
    # Data sets and collators may draw numbers.
    with sync_errors("the request"), whole, preserved_random_state(model), _working_as_gathered(view):
        yield


def _working_as_gathered(view: TrainerView) -> contextlib.AbstractContextManager[None]:
    """The precision and memory device of the memory in force; without one, the precision of training."""
    try:
        memory = view.read_memory()
    except IAUError:  # raised again where the request is checked
        memory = None
    if memory is None:
        return compute_settings(resolve_precision("auto", mixed_precision_of(view.args), view.args.device))
    settings = memory.settings
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
    """The rows that a report measures, before and after."""

    forget: RowSource
    retain: RowSource | None
    held_out: RowSource | None
    test: RowSource | None


def _measured_rows(context: ForgetContext, test: RowSource | None) -> _MeasuredRows:
    retained = context.retained_to_predict(_MEASURED_RETAINED_ROWS, context.seed)
    return _MeasuredRows(context.forget_to_predict, retained, context.held_out_sample(_MEASURED_HELD_OUT_ROWS), test)


def _refuse_broken_rows(before: Measurement) -> None:
    """Raise `RequestError` for rows beside the forget rows whose loss is not finite before anything is done."""
    for name, seen in (("retained", before.retain), ("held-out", before.held_out), ("test", before.test)):
        if seen is None:
            continue
        counted = seen.targets > 0
        broken = counted & ~np.isfinite(seen.loss)
        if 0 < broken.sum() < counted.sum():
            raise RequestError(
                f"{int(broken.sum())} of the {len(broken)} {name} rows looked at have a loss that is not finite, e.g. "
                f"the one at position {int(np.flatnonzero(broken)[0])} of them: their inputs or labels hold NaN or "
                "infinity. Mend them or leave them out."
            )


def _measured_retrained(
    view: TrainerView, models: Sequence[nn.Module], rows: _MeasuredRows, timer: PhaseTimer
) -> list[Measurement]:
    measured: list[Measurement] = []
    if models:
        with timer.phase("measure_retrained"):
            for given in models:
                with placed_on(unwrap_model(given), view.args.device) as model:
                    measured.append(measure_model(model, *rows))
    return measured


def _report(
    method: UnlearningMethod,
    config: Any,
    context: ForgetContext,
    outcome: MethodOutcome,
    effect: StepEffect,
    memory: GradientMemory | None,
    before: Measurement,
    after: Measurement,
    retrained: list[Measurement],
) -> tuple[UnlearningReport, UnlearnRecord]:
    """What is told of a request: for people, and in types."""
    losses = [moment.figures(attacks=False, bootstrap=0) for moment in (before, after)]
    budget = budget_after(context, memory, losses[0], losses[1], effect.forecast_forget_loss_rise)
    own_reasons = outcome.step.reasons if outcome.step is not None else []
    verdict, reasons = judged(outcome.verdict, own_reasons, budget)
    if context.copies_left and verdict == OK:
        verdict, reasons = CHECK, [f"{context.copies_left} exact copies of forget rows stay in training"]
    report = UnlearningReport.build(
        method=method.name,
        config=config_values(config),
        seed=context.seed,
        counts=_counts(context),
        before=before,
        after=after,
        retrained=retrained[0] if retrained else None,
        second_retrained=retrained[1] if len(retrained) > 1 else None,
        seconds=context.timer.seconds,
        peak_memory_bytes=context.timer.peak_memory_bytes,
        diagnostics=_diagnostics(outcome, effect, budget, None if reasons == own_reasons else reasons),
        warnings=[*context.notes, *outcome.warnings],
        verdict=verdict,
        calibrated=outcome.calibrated,
    )
    advice = (few_rows_warning(len(context.forget)), None if budget is None else budget.sentence())
    report.warnings += [sentence for sentence in advice if sentence is not None]
    record = UnlearnRecord(
        method=method.name,
        config=report.config,
        seed=context.seed,
        effect=effect,
        step=outcome.step,
        before=_numbers(report.before),
        after=_numbers(report.after),
        calibrated=outcome.calibrated,
        verdict=verdict,
        reasons=reasons,
        budget=budget,
        versions=report.versions,
    )
    return report, record


def _diagnostics(
    outcome: MethodOutcome, effect: StepEffect, budget: Budget | None, reasons: list[str] | None
) -> dict[str, Any]:
    values = {"step_norm": effect.step_norm, "relative_step_norm": effect.relative_step_norm, **outcome.diagnostics}
    if effect.forecast_forget_loss_rise is not None:
        values["forecast_forget_loss_rise"] = effect.forecast_forget_loss_rise
    if budget is not None:
        values["budget"] = budget.to_dict()
    return values if reasons is None else values | {"reasons": reasons}


def _counts(context: ForgetContext) -> dict[str, int | None]:
    """Rows that no measurement counts."""
    told = {"left_out_rows": context.left_out, "copies_left": context.copies_left}
    return {"train_rows": _rows_in(context)} | {name: count for name, count in told.items() if count}


def _rows_in(context: ForgetContext) -> int | None:
    """How many training rows there were before the request, as far as that is known."""
    if context.memory is not None:
        return context.memory.n_rows
    return len(context.train) if context.train is not None else None


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: value
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _nothing_to_forget(view: TrainerView, rows: NamedRows, method: UnlearningMethod, config: Any) -> UnlearnOutput:
    asked = "names no rows" if not rows.left_out else "names only rows that the model was never trained on"
    sentences = [*rows.notes, f"The request {asked}: nothing was forgotten and no weight was changed."]
    warnings.warn(" ".join(sentences), stacklevel=4)  # where unlearn() was called
    report = UnlearningReport(
        method=method.name,
        config=config_values(config),
        seed=view.args.seed,
        counts={"forget_rows": 0} | ({"left_out_rows": rows.left_out} if rows.left_out else {}),
        before={},
        after={},
        warnings=sentences,
        versions=package_versions(),
    )
    return UnlearnOutput(report, applied=False, memory=view.read_memory())


def _make_final(
    state: UnlearningState,
    transaction: WeightTransaction,
    context: ForgetContext,
    memory: GradientMemory | None,
    card: UnlearningCard,
) -> Callable[[], None]:
    """Keep the changed weights and take note of the request. Returns the function that undoes both."""
    revert_weights = transaction.commit()
    forget_request = state.finished(context, memory, card)
    model, on_shards = context.model, is_sharded(context.model)  # and not the context, which holds batches

    def undo() -> None:
        with contextlib.nullcontext() if on_shards else full_parameters(model):
            revert_weights()
        forget_request()

    return undo
