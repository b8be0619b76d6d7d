"""`iau`, the default: one curvature-aware step whose length is calibrated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from hf_iau.calibrate import (
    Calibration,
    Directions,
    ShiftTest,
    Trial,
    TrialRunner,
    Walk,
    calibrate,
    conservative_calibration,
    find_near_duplicates,
    finish,
    shift_test,
    walk,
)
from hf_iau.calibrate.calibration import find_length
from hf_iau.calibrate.trial import auc_distance, class_share_distance
from hf_iau.calibrate.walk import DEAR
from hf_iau.errors import CalibrationError, ConfigError, MemoryFileError, MissingMemoryError, RequestError
from hf_iau.forget import ForgetContext, MethodOutcome, apply_step, step_norm, weights_norm
from hf_iau.gather.gradient_sum import GradientSum, sum_row_gradients
from hf_iau.methods.base import add_weight_decay, register_method
from hf_iau.methods.verdict import judge
from hf_iau.objective import RowPredictions, RowSource, predict_rows
from hf_iau.objective.rows import row_bytes
from hf_iau.parallel import of_main_process
from hf_iau.remember import GradientMemory

# A forget set of this size sets its own target, if it passes the shift test: the standard error of its AUC is 2 points.
ENOUGH_FORGET_ROWS = 200
_FEWEST_HELD_OUT_ROWS = 100
_REFERENCE_ROWS = 2000
_OVERLAP_ROWS = 4000
# Proxies are at most a tenth of the training rows: the step for more would be long, and no guide to a small request's.
_PROXY_SHARE = 10
_FEWEST_WALKED_ROWS = 50
_WALK_DAMPINGS = (0.001, 0.01)
_CLASS_TOLERANCE = 0.01
# Memories may be moved this far, relative to the weights, before an earlier calibration is not trusted any more.
_CALIBRATION_RANGE = 0.05


@dataclass(frozen=True)
class IAUConfig:
    """Configuration of `iau`. None means: calibrated.

    Parameters that control the step:
        length, damping, finish_weight, max_relative_step.
    Parameters that control calibration:
        calibrate_on, damping_range, finish_weights, proxy_rows, held_out_rows, walk, recalibrate.

    Raises:
        ConfigError: a value is out of range.
    """

    length: float | None = field(
        default=None, metadata={"help": "k, the length of the step; 1 is the influence function's (Newton's)."}
    )
    damping: float | None = field(
        default=None, metadata={"help": "λ, relative to each layer's mean eigenvalue of the curvature."}
    )
    finish_weight: float | None = field(
        default=None, metadata={"help": "c, how much of the training's own unfinished step is taken along (0 = none)."}
    )
    max_relative_step: float = field(
        default=0.5, metadata={"help": "Longest step allowed, relative to the norm of the weights."}
    )
    calibrate_on: str = field(
        default="auto",
        metadata={
            "help": "'proxies' (random training rows), 'forget-rows', or 'auto': the forget rows where there are at "
            "least 200 that look like any other training rows, else proxies."
        },
    )
    damping_range: Sequence[float] = field(
        default=(1e-3, 10.0), metadata={"help": "Smallest and largest λ that calibration may choose."}
    )
    finish_weights: Sequence[float] = field(default=(0.003, 0.01, 0.03), metadata={"help": "c to be tried beside 0."})
    proxy_rows: Sequence[int] = field(default=(512, 256), metadata={"help": "Size of each proxy draw."})
    held_out_rows: int = field(default=2000, metadata={"help": "Most held-out rows looked at in a trial."})
    walk: bool = field(
        default=True,
        metadata={
            "help": "Where one step does not arrive, or costs the held-out rows more than a tenth of their loss, and "
            "the request has at least 50 rows that look like any others, take many short steps instead."
        },
    )
    recalibrate: bool = field(default=False, metadata={"help": "Calibrate anew though the memory knows the answer."})

    def __post_init__(self) -> None:
        for name, least in {"length": 0.0, "damping": 0.0, "finish_weight": 0.0}.items():
            value = getattr(self, name)
            if value is not None and (not math.isfinite(value) or value < least):
                raise ConfigError(
                    f"IAUConfig({name}={value}): give a finite number >= {least:g}, or None to calibrate."
                )
        if not 0 < self.max_relative_step <= 10:
            raise ConfigError(
                f"IAUConfig(max_relative_step={self.max_relative_step}): give a number above 0, e.g. 0.5."
            )
        if self.calibrate_on not in ("auto", "proxies", "forget-rows"):
            raise ConfigError(
                f"IAUConfig(calibrate_on={self.calibrate_on!r}): choose 'auto', 'proxies' or 'forget-rows'."
            )
        if len(self.damping_range) != 2 or not 0 < self.damping_range[0] <= self.damping_range[1] < math.inf:
            raise ConfigError(
                f"IAUConfig(damping_range={self.damping_range}): give a smallest and a largest positive number."
            )
        if not self.proxy_rows or any(rows < 20 for rows in self.proxy_rows):
            raise ConfigError(f"IAUConfig(proxy_rows={self.proxy_rows}): give one or more sizes of at least 20 rows.")
        if self.held_out_rows < _FEWEST_HELD_OUT_ROWS:
            raise ConfigError(
                f"IAUConfig(held_out_rows={self.held_out_rows}): give at least {_FEWEST_HELD_OUT_ROWS}, for the "
                "attack's error to stay below 3 points."
            )

    @property
    def is_given(self) -> bool:
        """Whether k and λ were both given, so that nothing is calibrated."""
        return self.length is not None and self.damping is not None


@register_method
class IAU:
    """Δ = (C+λ)⁻¹(k·Σ_f − c·Σ_D)/n_r with remembered curvature C; k, λ and c calibrated without a retrained model.

    With k = c = 1 and C the Hessian of the retained rows this is the Newton step to their optimum. C is the EK-FAC
    approximation of the true Fisher (George et al. 2018; Grosse et al. 2023); a request costs one pass over its rows,
    and calibration about 20 evaluations of a few thousand rows.
    """

    name: ClassVar[str] = "iau"
    config_class: ClassVar[type] = IAUConfig
    citation: ClassVar[str] = (
        "after Liu et al. 2025 (arXiv 2507.23257), with EK-FAC curvature (George et al. 2018; Grosse et al. 2023)"
    )

    def check(self, context: ForgetContext, config: IAUConfig) -> None:
        memory = context.require_memory(self.name)
        memory.require_curvature(self.name)
        if config.finish_weight and not _has_finish_sum(memory):
            raise MissingMemoryError(
                f"IAUConfig(finish_weight={config.finish_weight}) needs the gradient sum of the training rows, which "
                "this memory does not hold (or too noisily): gather with GatherConfig(gradient_sum='exact'), or leave "
                "finish_weight out."
            )
        if config.is_given or context.held_out is None:
            return
        if len(context.held_out) < _FEWEST_HELD_OUT_ROWS:
            raise CalibrationError(
                f"held_out_dataset has {len(context.held_out)} rows, too few to calibrate with: give at least "
                f"{_FEWEST_HELD_OUT_ROWS} rows that were never trained on (2,000 are better), or set IAUConfig(length=…, "
                "damping=…) yourself."
            )
        _refuse_overlap(context)

    def run(self, context: ForgetContext, config: IAUConfig) -> MethodOutcome:
        memory = context.require_memory(self.name)
        curvature = memory.require_curvature(self.name)
        names = list(memory.parameters)
        with context.timer.phase("gradient"):
            forget = sum_row_gradients(
                context.model, context.row_loss, context.forget, names=names, progress=context.progress
            )
            add_weight_decay(context, forget)
            finish = _finish_sum(context, memory)
        directions = Directions(curvature, forget.tensors, finish, memory.n_targets - forget.n_targets)
        with context.timer.phase("calibration"):
            known_before = 0.0
            known = context.retained_sample(_REFERENCE_ROWS, context.seed + 7)
            if known is not None:
                known = known.resized(context.prediction_batch_size).keep_batches()
                known_before = _share_correct(context, known)
            duplicates = self._near_duplicates(context, known)
            held_out = None
            if context.held_out is not None:
                held_out = context.held_out.sample(config.held_out_rows, context.seed, "held-out rows").keep_batches()
            calibration, notes = self._calibrate(context, config, memory, directions, held_out, known)
            found = calibration
            path: Walk | None = None
            if held_out is not None and not config.is_given:
                calibration = self._finish(context, config, directions, calibration, held_out, notes)
                path = self._walk(context, config, directions, calibration, held_out, notes)
            found_by_main = of_main_process(
                [calibration.length, calibration.damping, calibration.finish_weight], "k, λ and c"
            )
            calibration.length, calibration.damping, calibration.finish_weight = found_by_main
        notes |= duplicates | {"warnings": [*notes["warnings"], *duplicates.get("warnings", [])]}
        with context.timer.phase("update"):
            if path is not None:
                step = path.step
                notes["walk"] = {"steps": path.steps, "one_step": _summary(calibration)}
                calibration = _of_walk(calibration, path)
            else:
                step = self._bounded_step(context, config, directions, calibration)
            apply_step(context.model, step)
        lost = 0.0
        if known is not None:
            with context.timer.phase("calibration"):
                lost = known_before - _share_correct(context, known)
            notes["retained_accuracy_lost"] = lost
        lead = self._lead(context, held_out, notes)
        notes["accuracy_lead_of_forget_rows"] = lead
        relative = step_norm(step) / max(weights_norm(context.model, names), 1e-300)
        verdict, reasons = judge(
            calibration=calibration,
            relative_step=relative,
            share_forgotten=(memory.forgotten_rows + len(context.forget)) / (memory.forgotten_rows + memory.n_rows),
            kronecker_share=_kronecker_share(memory),
            whole_class=notes.get("whole_class"),
            halvings=calibration.halvings,
            retained_accuracy_lost=lost,
            accuracy_lead=lead,
        )
        return MethodOutcome(
            forget_sum=forget.tensors,
            forget_targets=forget.n_targets,
            diagnostics={
                "forget_gradient_norm": forget.norm(),
                "calibration": calibration.to_dict(),
                "curvature": {"kind": curvature.kind, "rows": curvature.n_rows, "parameters": curvature.coverage()},
                "reasons": reasons,
                **notes,
            },
            calibrated=calibration.source not in ("uncalibrated",),
            verdict=verdict,
            warnings=notes.pop("warnings", []),
            # A request that had to be walked says nothing about one step for the next.
            calibration=memory.calibration if path is not None else _to_remember(found, config, memory, notes),
        )

    # --- calibration ----------------------------------------------------------------------------------------------

    def _calibrate(
        self,
        context: ForgetContext,
        config: IAUConfig,
        memory: GradientMemory,
        directions: Directions,
        held_out: RowSource | None,
        known_rows: RowSource | None,
    ) -> tuple[Calibration, dict[str, Any]]:
        notes: dict[str, Any] = {"warnings": []}
        if config.is_given:
            assert config.length is not None and config.damping is not None
            return Calibration(config.length, config.damping, config.finish_weight or 0.0, source="given"), notes
        if held_out is None:
            notes["warnings"].append(
                "There are no held-out rows, so the step was not calibrated: a short, norm-bounded one was taken. Pass "
                "held_out_dataset= (or eval_dataset=) to calibrate."
            )
            return _uncalibrated(context, config, directions), notes
        label = _whole_class(context, memory, known_rows)
        if label is not None:
            notes["whole_class"] = label
            return self._calibrate_class(context, config, directions, held_out, label, notes), notes
        remembered = _remembered(config, memory)
        if remembered is not None:
            return remembered, notes
        known = None
        if known_rows is not None and len(known_rows) >= ENOUGH_FORGET_ROWS:
            # A large sample of retained rows, before the step: how much better a known row is treated.
            known = predict_rows(context.model, known_rows)
        advantage = None if known is None else auc_distance(known, predict_rows(context.model, held_out.keep_batches()))
        notes["advantage_of_training_rows"] = advantage
        shift = self._shift(context, known)
        notes["shift_test"] = None if shift is None else shift.to_dict()
        own = len(context.forget) >= ENOUGH_FORGET_ROWS and shift is not None and shift.passed
        if config.calibrate_on == "forget-rows" or (config.calibrate_on == "auto" and own):
            runner = TrialRunner(context.model, directions, _for_prediction(context.forget, held_out), held_out)
            return self._search(runner, "forget rows", config, advantage), notes
        if context.train is None and context.retain is None:
            notes["warnings"].append(
                "The trainer has no train_dataset to draw proxy rows from, so the forget rows themselves set the "
                "target; that is unreliable for few or unusual rows."
            )
            runner = TrialRunner(context.model, directions, _for_prediction(context.forget, held_out), held_out)
            return self._search(runner, "forget rows", config, None), notes
        return self._calibrate_on_proxies(context, config, memory, directions, held_out, advantage), notes

    def _search(self, runner: TrialRunner, source: str, config: IAUConfig, advantage: float | None) -> Calibration:
        start = _start(runner, advantage)
        return calibrate(
            runner,
            source=source,
            damping=config.damping,
            damping_range=(config.damping_range[0], config.damping_range[1]),
            max_relative_step=config.max_relative_step,
            length=config.length,
            start=start,
        )

    def _calibrate_on_proxies(
        self,
        context: ForgetContext,
        config: IAUConfig,
        memory: GradientMemory,
        directions: Directions,
        held_out: RowSource,
        advantage: float | None,
    ) -> Calibration:
        """k, λ and c that make random training rows look held-out; the later draws find k alone, at the same λ."""
        calibration: Calibration | None = None
        for draw, size in enumerate(config.proxy_rows):
            share = max(1, min(size, (memory.n_rows - len(context.forget)) // _PROXY_SHARE))
            proxies = context.retained_sample(share, context.seed + 1000 + draw, "proxy rows")
            if proxies is None or len(proxies) < 2:
                continue
            total = sum_row_gradients(
                context.model,
                context.row_loss,
                proxies,
                names=list(memory.parameters),
                progress=context.progress,
            )
            add_weight_decay(context, total)
            of_proxies = Directions(
                directions.curvature, total.tensors, directions.finish_sum, memory.n_targets - total.n_targets
            )
            runner = TrialRunner(context.model, of_proxies, _for_prediction(proxies, held_out), held_out)
            if calibration is None:
                calibration = self._search(runner, "proxies", config, advantage)
                continue
            if config.length is not None:
                break
            start = _start(runner, advantage)
            trial, reached = find_length(
                runner,
                calibration.damping,
                calibration.finish_weight,
                start=start,
                tolerance=calibration.tolerance or 0.005,
                max_relative_step=config.max_relative_step,
                guess=calibration.length,
                trials=3,
            )
            if reached:
                calibration.lengths.append(trial.length)
                calibration.draws.append(len(proxies))
            calibration.curve += [t.to_dict() for t in runner.trials]
        if calibration is None:
            raise CalibrationError(
                "There are no retained training rows to use as proxies. Give the trainer its train_dataset, or set "
                "IAUConfig(length=…, damping=…)."
            )
        weights = np.asarray(calibration.draws, dtype=float)
        logs = np.log(np.maximum(calibration.lengths, 1e-12))
        calibration.length = float(np.exp(np.average(logs, weights=weights)))
        return calibration

    def _calibrate_class(
        self,
        context: ForgetContext,
        config: IAUConfig,
        directions: Directions,
        held_out: RowSource,
        label: int,
        notes: dict[str, Any],
    ) -> Calibration:
        """A whole class goes: its share on its own held-out rows falls to its rate on the others."""
        predicted = predict_rows(context.model, held_out)
        own = predicted.label == label
        notes["warnings"].append(
            f"Every row of class {label} is to be forgotten. One step cannot remove a class as retraining would: retrain "
            "if you can."
        )
        if int(own.sum()) < 10 or int((~own).sum()) < 10:
            return _uncalibrated(context, config, directions)
        runner = TrialRunner(
            context.model, directions, None, held_out, criterion=class_share_distance(label), kept=~own
        )
        return calibrate(
            runner,
            source="class share",
            damping=config.damping,
            damping_range=(config.damping_range[0], config.damping_range[1]),
            max_relative_step=config.max_relative_step,
            length=config.length,
            tolerance=_CLASS_TOLERANCE,
            start=_start(runner, None),
        )

    def _near_duplicates(self, context: ForgetContext, retained: RowSource | None) -> dict[str, Any]:
        """Rows that stay but look like forget rows: a retrained model would know those, so the target is too low."""
        found = None if retained is None else find_near_duplicates(context.forget, retained, context.seed)
        if found is None:
            return {}
        notes: dict[str, Any] = {"near_duplicates": found.to_dict()}
        if found.similar:
            notes["warnings"] = [
                f"{found.similar} of {found.forget_rows} forget rows looked at have near-duplicates among "
                f"{found.retained_rows} retained rows looked at. A retrained model would still know those: forget the "
                "duplicates too, if they are to go."
            ]
        return notes

    def _shift(self, context: ForgetContext, known: RowPredictions | None) -> ShiftTest | None:
        if known is None or len(context.forget) < 20:
            return None
        rows = context.forget.sample(_REFERENCE_ROWS, context.seed).resized(context.prediction_batch_size)
        return shift_test(predict_rows(context.model, rows), known)

    # --- the step -------------------------------------------------------------------------------------------------

    def _finish(
        self,
        context: ForgetContext,
        config: IAUConfig,
        directions: Directions,
        calibration: Calibration,
        held_out: RowSource,
        notes: dict[str, Any],
    ) -> Calibration:
        """c for the request's own step, and a look at what it does to the held-out rows."""
        kept = None
        if "whole_class" in notes:
            kept = predict_rows(context.model, held_out).label != notes["whole_class"]
        return finish(
            TrialRunner(context.model, directions, None, held_out, criterion=lambda *_: 0.0, kept=kept),
            calibration,
            finish_weights=tuple(sorted(w for w in config.finish_weights if w > 0)) if directions.finish_sum else (),
            max_relative_step=config.max_relative_step,
            finish_weight=config.finish_weight,
        )

    def _lead(self, context: ForgetContext, held_out: RowSource | None, notes: dict[str, Any]) -> float | None:
        """How much better the forget rows are still predicted than held-out rows, where they are like any others."""
        shift = notes.get("shift_test")
        if held_out is None or shift is None or not shift["passed"] or len(context.forget) < _FEWEST_WALKED_ROWS:
            return None
        with context.timer.phase("calibration"):
            rows = context.forget.resized(context.prediction_batch_size)
            return _share_correct(context, rows) - _share_correct(context, held_out)

    def _walk(
        self,
        context: ForgetContext,
        config: IAUConfig,
        directions: Directions,
        calibration: Calibration,
        held_out: RowSource,
        notes: dict[str, Any],
    ) -> Walk | None:
        """Many short steps in place of one that does not arrive, or that costs the held-out rows too much."""
        shift = notes.get("shift_test")
        before, after = calibration.held_out_loss_before, calibration.held_out_loss
        if (
            not config.walk
            or shift is None
            or not shift["passed"]
            or len(context.forget) < _FEWEST_WALKED_ROWS
            or before is None
            or after is None
            or (calibration.reached and after <= (1.0 + DEAR) * before)
        ):
            return None
        advantage = notes.get("advantage_of_training_rows")
        offset = 0.0
        if advantage is not None:
            rows = context.forget.resized(context.prediction_batch_size)
            offset = auc_distance(predict_rows(context.model, rows), predict_rows(context.model, held_out)) - advantage
        found: Walk | None = None
        low, high = config.damping_range
        dampings = sorted({min(max(damping, low), high) for damping in _WALK_DAMPINGS})
        for damping in dampings if config.damping is None else (config.damping,):
            path = walk(
                context.model,
                context.row_loss,
                directions,
                context.forget,
                held_out,
                damping=damping,
                offset=offset,
                max_relative_step=config.max_relative_step,
                **({} if config.finish_weight is None else {"pull": config.finish_weight}),
            )
            if path.steps and (found is None or path.better_than(found)):
                found = path
        if found is None:
            return None
        cheaper = found.held_out_loss < after
        if found.reached:
            return found if cheaper or not calibration.reached else None
        nearer = calibration.criterion is not None and found.criterion < calibration.criterion
        return found if cheaper and nearer and not calibration.reached else None

    def _bounded_step(
        self, context: ForgetContext, config: IAUConfig, directions: Directions, calibration: Calibration
    ) -> dict[str, Any]:
        """The calibrated step, no longer than allowed."""
        names = list(directions.forget_sum)
        step = directions.step(calibration.length, calibration.damping, calibration.finish_weight)
        allowed = config.max_relative_step * weights_norm(context.model, names)
        length = step_norm(step)
        if not math.isfinite(length):
            raise RequestError("The step is not finite: the curvature or a gradient is. Gather the memory anew.")
        if length > allowed * (1 + 1e-6):
            share = allowed / length
            step = {name: change * share for name, change in step.items()}
            calibration.length, calibration.finish_weight = (
                calibration.length * share,
                calibration.finish_weight * share,
            )
            calibration.reached = False
        return step


def _of_walk(calibration: Calibration, path: Walk) -> Calibration:
    """What is reported of a step that was walked."""
    return replace(
        calibration,
        damping=path.damping,
        source="walk",
        reached=path.reached,
        criterion=path.criterion,
        held_out_loss=path.held_out_loss,
        relative_step=path.relative_step,
        halvings=0,
        lengths=[],  # of one step, which was not taken: their spread is no uncertainty of the walk
        finish_curve=path.curve,
    )


def _summary(calibration: Calibration) -> dict[str, Any]:
    """The one step that a walk was taken instead of."""
    names = ("source", "length", "damping", "finish_weight", "reached", "criterion", "held_out_loss", "relative_step")
    return {name: getattr(calibration, name) for name in names}


def _start(runner: TrialRunner, advantage: float | None) -> Trial:
    """The trial of no step at all; with the draw's luck (see `TrialRunner.offset`) taken out where it is known."""
    start = runner.run(0.0, 1.0)
    if advantage is None:
        return start
    runner.offset = start.criterion - advantage
    runner.trials[-1] = replace(start, criterion=advantage)
    return runner.trials[-1]


def _for_prediction(rows: RowSource, held_out: RowSource) -> RowSource:
    """At most as many rows as the held-out sample, in batches of its size."""
    return rows.sample(max(len(held_out), ENOUGH_FORGET_ROWS), 0).resized(held_out.batch_size)


def _has_finish_sum(memory: GradientMemory) -> bool:
    """Whether Σ_D is there, exact or sampled with a standard error that is small beside it."""
    if memory.gradient_sum is None:
        return False
    norm = GradientSum(dict(memory.gradient_sum), memory.n_rows, memory.n_targets).norm()
    return memory.gradient_sum_error <= 0.5 * norm


def _finish_sum(context: ForgetContext, memory: GradientMemory) -> dict[str, Any] | None:
    """Σ_D for c, where it may be used."""
    if memory.gradient_sum is None or not _has_finish_sum(memory):
        return None
    tensors = {name: tensor.clone() for name, tensor in memory.gradient_sum.items()}
    total = GradientSum(tensors, memory.n_rows, memory.n_targets)
    add_weight_decay(context, total)
    return total.tensors


def _share_correct(context: ForgetContext, rows: RowSource) -> float:
    """Accuracy on `rows` at the present weights; 0 where the task has none."""
    accuracy = predict_rows(context.model, rows).accuracy
    return accuracy if math.isfinite(accuracy) else 0.0


def _whole_class(context: ForgetContext, memory: GradientMemory, retained: RowSource | None) -> int | None:
    """The class whose every remaining training row is in the request, if there is just one class in it.

    Known from the memory's counts of labels, or, where a data set has none, from a large sample of retained rows
    without a single row of that class.
    """
    if memory.label_counts and context.label_counts:
        if len(context.label_counts) != 1 or len(memory.label_counts) < 2:
            return None
        (label, count), *_ = context.label_counts.items()
        return int(label) if memory.label_counts.get(label) == count else None
    if retained is None or len(retained) < ENOUGH_FORGET_ROWS or len(context.forget) < 20:
        return None
    asked = predict_rows(context.model, context.forget.resized(context.prediction_batch_size)).label
    labels = set(asked[np.isfinite(asked)].tolist())
    if len(labels) != 1:
        return None
    left = predict_rows(context.model, retained).label
    return None if labels & set(left[np.isfinite(left)].tolist()) else int(labels.pop())


def _uncalibrated(context: ForgetContext, config: IAUConfig, directions: Directions) -> Calibration:
    """A short step, or the k, λ and c that were given."""
    damping = config.damping if config.damping is not None else config.damping_range[1]
    limit = _limit(context, directions, damping, min(0.02, config.max_relative_step))
    found = conservative_calibration(limit, damping)
    return replace(
        found,
        length=found.length if config.length is None else config.length,
        finish_weight=config.finish_weight or 0.0,
    )


def _limit(context: ForgetContext, directions: Directions, damping: float, relative_step: float) -> float:
    forget, _ = directions.at(damping)
    return relative_step * weights_norm(context.model, list(forget)) / max(step_norm(forget), 1e-300)


def _kronecker_share(memory: GradientMemory) -> float:
    assert memory.curvature is not None
    coverage = memory.curvature.coverage()
    return coverage.get("kronecker", 0) / max(sum(coverage.values()), 1)


def _to_remember(
    calibration: Calibration, config: IAUConfig, memory: GradientMemory, notes: dict[str, Any]
) -> dict[str, Any] | None:
    """What holds for other requests too: found freely, and on rows like any others."""
    free = config.length is None and config.damping is None and config.finish_weight is None
    usual = calibration.source == "proxies" or (
        calibration.source == "forget rows" and (notes.get("shift_test") or {}).get("passed", False)
    )
    if free and usual and calibration.reached:
        return {**calibration.to_dict(), "relative_path": memory.relative_path}
    return memory.calibration


def _remembered(config: IAUConfig, memory: GradientMemory) -> Calibration | None:
    """An earlier answer, while the weights are still near to where it was found."""
    known = memory.calibration
    if (
        known is None
        or config.recalibrate
        or any(value is not None for value in (config.length, config.damping, config.finish_weight))
    ):
        return None
    _check_remembered(known)
    low, high = config.damping_range
    if not low * 0.99 <= known.get("damping", low) <= high * 1.01:
        return None
    if config.calibrate_on not in ("auto", str(known.get("source", "")).replace(" ", "-")):
        return None
    if memory.relative_path - known.get("relative_path", 0.0) > _CALIBRATION_RANGE:
        return None
    fields = {name: known[name] for name in Calibration.__dataclass_fields__ if name in known}
    return Calibration(**{**fields, "source": "remembered"})


def _check_remembered(known: Mapping[str, Any]) -> None:
    """Raise `MemoryFileError` unless an earlier answer is one."""
    numbers: list[Any] = [known.get(name) for name in ("length", "damping", "finish_weight")]
    numbers += [known.get("relative_path", 0.0), *(known.get("lengths") or [])]
    plain = [value for value in numbers if type(value) in (int, float)]
    if len(plain) < len(numbers) or not all(math.isfinite(value) for value in plain):
        raise MemoryFileError(
            f"The memory's calibration is malformed ({dict(known)!r}): it is corrupt. Pass IAUConfig(recalibrate=True)."
        )


def _refuse_overlap(context: ForgetContext) -> None:
    """Held-out rows that are being forgotten, or were trained on, would set a false target."""
    assert context.held_out is not None
    probe = context.held_out.sample(512, context.seed)
    digests = {row_bytes(probe.dataset[i]) for i in range(len(probe))}
    shared, looked_at = len(digests & context.excluded), 1.0
    if not shared and context.train is not None:
        trained = context.train.sample(_OVERLAP_ROWS, context.seed)
        shared = sum(row_bytes(trained.dataset[i]) in digests for i in range(len(trained)))
        looked_at = len(trained) / max(len(context.train), 1)
    # Real data sets hold a few exact duplicates; an overlap of sets is another matter.
    if shared > max(2, 0.02 * len(probe) * looked_at):
        raise RequestError(
            f"{shared} of {len(probe)} held-out rows looked at are training rows: a model treats those as known, so "
            "calibrating on them would forget nothing. Pass held_out_dataset= with rows that were never trained on."
        )


__all__ = ["ENOUGH_FORGET_ROWS", "IAU", "IAUConfig"]
