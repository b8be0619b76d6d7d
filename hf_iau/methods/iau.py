"""`iau`, the default: one curvature-aware step whose length is calibrated."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from hf_iau.calibrate import (
    Calibration,
    Directions,
    Shortfall,
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
from hf_iau.calibrate.walk import ARRIVED, DAMPING, DEAR
from hf_iau.errors import CalibrationError, ConfigError, MemoryFileError, MissingMemoryError, RequestError
from hf_iau.forget import ForgetContext, MethodOutcome, apply_step, step_norm, weights_norm
from hf_iau.gather.gradient_sum import GradientSum, sum_row_gradients
from hf_iau.gather.renewal import renew_curvature, renewal_settings
from hf_iau.methods.base import add_weight_decay, register_method
from hf_iau.methods.settings import is_finite
from hf_iau.methods.verdict import judge
from hf_iau.objective import RowPredictions, RowSource, predict_rows
from hf_iau.objective.rows import row_bytes
from hf_iau.parallel import of_main_process
from hf_iau.remember import GradientMemory

# A forget set of this size sets its own target, if it passes the shift test: the standard error of its AUC is 2 points.
ENOUGH_FORGET_ROWS = 200
_FEWEST_HELD_OUT_ROWS = 100
_REFERENCE_ROWS = 2000
_OVERLAP_ROWS = 2000
# Proxies are at most a tenth of the training rows: the step for more would be long, and no guide to a small request's.
_PROXY_SHARE = 10
FEWEST_WALKED_ROWS = 20
"""A request of fewer rows is never walked."""
# A step after which more of the way to the held-out rows is left than this is followed by a look at a walk.
_LEFT = 0.15
# So is one that costs retained rows this much accuracy.
_SPARED = 0.03
_CLASS_TOLERANCE = 0.01
# Memories may be moved this far, relative to the weights, before an earlier calibration is not trusted any more.
_CALIBRATION_RANGE = 0.05
# An earlier calibration whose step raises the held-out loss by more than this share is not trusted either.
_REMEMBERED_COST = 0.02


@dataclass(frozen=True)
class IAUConfig:
    """Configuration of `iau`. None means: calibrated.

    Parameters that control the step:
        length, damping, finish_weight, max_relative_step.
    Parameters that control calibration:
        calibrate_on, damping_range, finish_weights, proxy_rows, held_out_rows, walk, renew_curvature, recalibrate.

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
            "the request has at least 20 rows that look like any others, take many short steps instead; retained rows "
            "must be at hand."
        },
    )
    renew_curvature: float | None = field(
        default=0.25,
        metadata={
            "help": "Where the weights have moved farther than this share of their norm since the curvature was "
            "estimated, and retained rows are at hand, it is estimated anew first. None: never."
        },
    )
    recalibrate: bool = field(default=False, metadata={"help": "Calibrate anew though the memory knows the answer."})

    def __post_init__(self) -> None:
        for name, least in {"length": 0.0, "damping": 0.0, "finish_weight": 0.0}.items():
            value = getattr(self, name)
            if value is not None and (not is_finite(value) or value < least):
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
        if self.renew_curvature is not None and not (is_finite(self.renew_curvature) and self.renew_curvature >= 0):
            raise ConfigError(
                f"IAUConfig(renew_curvature={self.renew_curvature}): give a share of the weights' norm, e.g. 0.25, or None."
            )
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
    and calibration 5 to 14 evaluations of a few thousand rows.
    """

    name: ClassVar[str] = "iau"
    moves_only_trained: ClassVar[bool] = True
    config_class: ClassVar[type] = IAUConfig
    works_on_shards: ClassVar[bool] = True
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
        if (
            len(context.forget) < 2
            and context.train is None
            and context.retain is None
            and _remembered(config, memory) is None
        ):
            raise CalibrationError(
                "A single forget row cannot set the target of calibration, and the trainer has no other training rows to "
                "try steps on: give it its train_dataset, pass retain_dataset=, or set IAUConfig(length=…, damping=…)."
            )
        _refuse_overlap(context)

    def run(self, context: ForgetContext, config: IAUConfig) -> MethodOutcome:
        memory = self._with_near_curvature(context, config, context.require_memory(self.name))
        curvature = memory.require_curvature(self.name)
        names = list(memory.parameters)
        with context.timer.phase("calibration"):
            known = context.retained_sample(_REFERENCE_ROWS, context.seed + 7)
            held_out = context.held_out_sample(config.held_out_rows)
            outset = _Outset(context, held_out, known)
            duplicates = self._near_duplicates(context, outset.known_rows)
            basis, notes = self._basis(context, config, memory, outset)
            on_proxies = None
            if basis == "proxies":  # before the request's own sum is made: one set of directions is held at a time
                on_proxies = self._calibrate_on_proxies(context, config, memory, outset, notes)
        with context.timer.phase("gradient"):
            forget = sum_row_gradients(
                context.model, context.row_loss, context.forget, names=names, progress=context.progress
            )
            add_weight_decay(context, forget)
            finish = _finish_sum(context, memory)
        remaining = max(memory.n_targets - forget.n_targets, 1)  # of tokens, n_targets is an estimate
        directions = Directions(curvature, forget.tensors, finish, remaining, forget.n_targets)
        with context.timer.phase("calibration"):
            calibration = on_proxies or self._calibrate(context, config, memory, directions, outset, basis, notes)
            found = calibration
            path: Walk | None = None
            after = _After()
            if held_out is not None and not config.is_given:
                calibration = self._finish(context, config, directions, calibration, outset, notes)
                if calibration.source == "remembered" and _is_dear(calibration):
                    anew = replace(config, recalibrate=True)
                    basis, notes = self._basis(context, anew, memory, outset)
                    found = (
                        self._calibrate_on_proxies(context, anew, memory, outset, notes)
                        if basis == "proxies"
                        else self._calibrate(context, anew, memory, directions, outset, basis, notes)
                    )
                    calibration = self._finish(context, anew, directions, found, outset, notes)
                path, after = self._walk(context, config, directions, calibration, outset, notes)
            found_by_main = of_main_process(
                [calibration.length, calibration.damping, calibration.finish_weight], "k, λ and c"
            )
            calibration.length, calibration.damping, calibration.finish_weight = found_by_main
        notes |= duplicates | {"warnings": [*notes["warnings"], *duplicates.get("warnings", [])]}
        with context.timer.phase("update"):
            if path is not None:
                notes["walk"] = {"steps": path.steps, "one_step": _summary(calibration)}
                calibration = _of_walk(calibration, path)
                apply_step(context.model, path.step)
                length = step_norm(path.step)
            else:
                wanted = calibration.length
                self._bound(context, config, directions, calibration)
                after = after if calibration.length == wanted else _After()
                length = directions.apply(
                    context.model, calibration.length, calibration.damping, calibration.finish_weight
                )
            del directions
        lost, lead = self._look_back(context, outset, after, notes)
        notes["retained_accuracy_lost"] = lost
        notes["accuracy_lead_of_forget_rows"] = lead
        relative = length / max(weights_norm(context.model, names), 1e-300)
        verdict, reasons = judge(
            calibration=calibration,
            relative_step=relative,
            share_forgotten=(memory.forgotten_rows + len(context.forget)) / (memory.forgotten_rows + memory.n_rows),
            kronecker_share=_kronecker_share(memory),
            whole_class=notes.get("whole_class"),
            halvings=calibration.halvings,
            retained_accuracy_lost=lost or 0.0,
            accuracy_lead=lead,
        )
        warnings = notes.pop("warnings")
        return MethodOutcome(
            forget_sum=forget.tensors,
            forget_targets=forget.n_targets,
            diagnostics={
                "forget_gradient_norm": forget.norm(),
                "calibration": calibration.to_dict(),
                "curvature": {
                    "kind": curvature.kind,
                    "rows": curvature.n_rows,
                    "parameters": curvature.coverage(),
                    "renewed": memory is not context.memory,
                },
                "reasons": reasons,
                **notes,
            },
            calibrated=calibration.source not in ("uncalibrated",),
            verdict=verdict,
            warnings=warnings,
            # A request that had to be walked says nothing about one step for the next.
            calibration=memory.calibration if path is not None else _to_remember(found, config, memory, notes),
            memory=memory,
        )

    def _with_near_curvature(self, context: ForgetContext, config: IAUConfig, memory: GradientMemory) -> GradientMemory:
        """The memory; with its curvature estimated anew where that was estimated too far away."""
        if config.is_given or config.renew_curvature is None or memory.path_since_curvature <= config.renew_curvature:
            return memory
        settings = renewal_settings(memory, progress=context.progress)
        with context.timer.phase("curvature"):
            seed = context.seed + 11
            rows = (
                None if settings is None else context.retained_sample(settings.curvature_rows, seed, "curvature rows")
            )
            if settings is None or rows is None:
                return memory
            rows = rows.resized(context.forget.batch_size)
            return renew_curvature(memory, context.model, context.row_loss, rows, settings)

    # --- calibration ----------------------------------------------------------------------------------------------

    def _basis(
        self, context: ForgetContext, config: IAUConfig, memory: GradientMemory, outset: _Outset
    ) -> tuple[str, dict[str, Any]]:
        """What k and λ are to rest on (a `Calibration.source`), and notes about it."""
        notes: dict[str, Any] = {"warnings": []}
        if config.is_given:
            return "given", notes
        if outset.held_out_rows is None:
            notes["warnings"].append(
                "There are no held-out rows, so the step was not calibrated: a short, norm-bounded one was taken. Pass "
                "held_out_dataset= (or eval_dataset=) to calibrate."
            )
            return "uncalibrated", notes
        label = _whole_class(context, memory, outset)
        if label is not None:
            notes["whole_class"] = label
            return "class share", notes
        # A large sample of retained rows, before the step: how much better a known row is treated.
        known = outset.known if outset.known_rows is not None else None
        if known is not None and len(known) < ENOUGH_FORGET_ROWS:
            known = None
        advantage = None if known is None else auc_distance(known, outset.held_out)
        notes["advantage_of_training_rows"] = advantage
        shift = shift_test(outset.forget, known) if known is not None and len(context.forget) >= 20 else None
        notes["shift_test"] = None if shift is None else shift.to_dict()
        if _remembered(config, memory) is not None:
            return "remembered", notes
        own = len(context.forget) >= ENOUGH_FORGET_ROWS and shift is not None and shift.passed
        no_proxies = context.train is None and context.retain is None
        if config.calibrate_on == "forget-rows" or (config.calibrate_on == "auto" and own) or no_proxies:
            if no_proxies and config.calibrate_on != "forget-rows" and not own:
                notes["advantage_of_training_rows"] = None
                notes["warnings"].append(
                    "The trainer has no train_dataset to draw proxy rows from, so the forget rows themselves set the "
                    "target; that is unreliable for few or unusual rows."
                )
            return "forget rows", notes
        return "proxies", notes

    def _calibrate(
        self,
        context: ForgetContext,
        config: IAUConfig,
        memory: GradientMemory,
        directions: Directions,
        outset: _Outset,
        basis: str,
        notes: dict[str, Any],
    ) -> Calibration:
        """k and λ by anything but proxies."""
        if basis == "given":
            assert config.length is not None and config.damping is not None
            return Calibration(config.length, config.damping, config.finish_weight or 0.0, source="given")
        if basis == "uncalibrated":
            return _uncalibrated(context, config, directions)
        if basis == "class share":
            return self._calibrate_class(context, config, directions, outset, notes)
        if basis == "remembered":  # of k and λ; whether they serve these rows is looked at all the same
            remembered = _remembered(config, memory)
            assert remembered is not None
            return remembered
        assert outset.held_out_rows is not None
        runner = TrialRunner(
            context.model,
            directions,
            outset.forget_rows,
            outset.held_out_rows,
            held_out_at=outset.held_out_at,
            weights=context.weights,
        )
        start = runner.outset(outset.forget, outset.held_out, notes["advantage_of_training_rows"])
        return self._search(runner, "forget rows", config, start)

    def _search(self, runner: TrialRunner, source: str, config: IAUConfig, start: Trial) -> Calibration:
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
        outset: _Outset,
        notes: dict[str, Any],
    ) -> Calibration:
        """k and λ that make random training rows look held-out; the later draws find k alone, at the same λ."""
        calibration: Calibration | None = None
        curvature = memory.require_curvature(self.name)
        held_out = outset.held_out_rows
        assert held_out is not None
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
            remaining = max(memory.n_targets - total.n_targets, 1)
            runner = TrialRunner(
                context.model,
                Directions(curvature, total.tensors, None, remaining, total.n_targets),
                _for_prediction(proxies, held_out),
                held_out,
                weights=context.weights,
            )
            del total
            assert runner.target is not None
            advantage = notes["advantage_of_training_rows"]
            start = runner.outset(predict_rows(context.model, runner.target), outset.held_out, advantage)
            if calibration is None:
                calibration = self._search(runner, "proxies", config, start)
                del runner  # its directions are freed before the next draw's are made
                continue
            if config.length is not None:
                break
            _, reached, length = find_length(
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
                calibration.lengths.append(length)
                calibration.draws.append(len(proxies))
            calibration.curve += [t.to_dict() for t in runner.trials]
            del runner
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
        outset: _Outset,
        notes: dict[str, Any],
    ) -> Calibration:
        """A whole class goes: its share on its own held-out rows falls to its rate on the others."""
        held_out = outset.held_out_rows
        assert held_out is not None
        label = notes["whole_class"]
        own = outset.held_out.label == label
        notes["warnings"].append(
            f"Every row of class {label} is to be forgotten. One step cannot remove a class as retraining would: retrain "
            "if you can."
        )
        if int(own.sum()) < 10 or int((~own).sum()) < 10:
            return _uncalibrated(context, config, directions)
        runner = TrialRunner(
            context.model,
            directions,
            None,
            held_out,
            criterion=class_share_distance(label),
            kept=~own,
            held_out_at=outset.held_out_at,
            weights=context.weights,
        )
        return calibrate(
            runner,
            source="class share",
            damping=config.damping,
            damping_range=(config.damping_range[0], config.damping_range[1]),
            max_relative_step=config.max_relative_step,
            length=config.length,
            tolerance=_CLASS_TOLERANCE,
            start=runner.outset(None, outset.held_out),
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

    # --- the step -------------------------------------------------------------------------------------------------

    def _finish(
        self,
        context: ForgetContext,
        config: IAUConfig,
        directions: Directions,
        calibration: Calibration,
        outset: _Outset,
        notes: dict[str, Any],
    ) -> Calibration:
        """c for the request's own step, and a look at what it does to the held-out rows."""
        kept = outset.held_out.label != notes["whole_class"] if "whole_class" in notes else None
        held_out = outset.held_out_rows
        assert held_out is not None
        runner = TrialRunner(
            context.model,
            directions,
            None,
            held_out,
            criterion=lambda *_: 0.0,
            kept=kept,
            held_out_at=outset.held_out_at,
            weights=context.weights,
        )
        return finish(
            runner,
            calibration,
            before=runner.outset(None, outset.held_out),
            finish_weights=tuple(sorted(w for w in config.finish_weights if w > 0)) if directions.finish_sum else (),
            max_relative_step=config.max_relative_step,
            finish_weight=config.finish_weight,
            keep_length=config.length is not None,
        )

    def _look_back(
        self, context: ForgetContext, outset: _Outset, after: _After, notes: dict[str, Any]
    ) -> tuple[float | None, float | None]:
        """At the moved weights: accuracy lost on retained rows, and how much better the forget rows are still predicted
        than held-out rows, where they are like any others; None where that is not known, or the task has no accuracy."""
        lost, lead = None, None
        with context.timer.phase("calibration"):
            if outset.known_rows is not None:
                known = after.known or predict_rows(context.model, outset.known_rows)
                lost = _accuracy_lost(outset.known, known)
            if self._like_any_others(context, notes) and outset.held_out_rows is not None:
                forget = after.forget or predict_rows(context.model, outset.forget_rows)
                held_out = after.held_out or predict_rows(context.model, outset.held_out_rows)
                lead = _accuracy_lost(forget, held_out)
        return lost, lead

    @staticmethod
    def _like_any_others(context: ForgetContext, notes: dict[str, Any]) -> bool:
        """Whether the forget rows passed the shift test and are not too few to tell."""
        shift = notes.get("shift_test")
        return shift is not None and shift["passed"] and len(context.forget) >= FEWEST_WALKED_ROWS

    def _walk(
        self,
        context: ForgetContext,
        config: IAUConfig,
        directions: Directions,
        calibration: Calibration,
        outset: _Outset,
        notes: dict[str, Any],
    ) -> tuple[Walk | None, _After]:
        """Many short steps in place of one that does not arrive, or that costs the held-out rows too much.

        Returns:
            The path, if it is to be taken; and what was seen of the rows at the end of it or, else, of the one step.
        """
        before, after = calibration.held_out_loss_before, calibration.held_out_loss
        place = (calibration.length, calibration.damping, calibration.finish_weight)
        seen = _After(held_out=outset.held_out_at.get(place))
        if (
            not config.walk
            or config.length is not None
            or config.finish_weight is not None
            or not self._like_any_others(context, notes)
            or before is None
            or after is None
        ):
            return None, seen
        assert outset.known_rows is not None and outset.held_out_rows is not None
        shortfall = Shortfall.of(outset.forget, outset.known, outset.held_out)
        runner = TrialRunner(
            context.model, directions, outset.forget_rows, outset.held_out_rows, weights=context.weights
        )
        forget, known = runner.look((outset.forget_rows, outset.known_rows), *place)
        del runner
        seen = replace(seen, forget=forget, known=known)
        left = shortfall.remaining(forget.loss)
        spared = (_accuracy_lost(outset.known, known) or 0.0) < _SPARED and after <= (1.0 + DEAR) * before
        notes["left_after_one_step"] = left
        if calibration.reached and spared and left <= _LEFT:
            return None, seen
        everything = outset.every_forget_row()
        directions.clear()
        path = walk(
            context.model,
            directions.curvature,
            context.forget,
            outset.known_rows.resized(context.forget.batch_size),
            outset.held_out_rows,
            Shortfall.of(everything, outset.known, outset.held_out),
            names=list(directions.forget_sum),
            looked_at=context.forget_to_predict,
            before=(everything, outset.held_out),
            damping=DAMPING if config.damping is None else config.damping,
            max_relative_step=config.max_relative_step,
            progress=context.progress,
            weights=context.weights,
        )
        # Arrived or nearer to the target, and no dearer than one step or than what may be paid.
        nearer = path.reached or path.remaining < left
        better = nearer and path.held_out_loss <= max(after, (1.0 + DEAR) * before)
        if not path.steps or not better:
            return None, seen
        whole = outset.forget_rows is context.forget_to_predict
        return path, _After(forget=path.forget if whole else None, held_out=path.held_out)

    def _bound(
        self, context: ForgetContext, config: IAUConfig, directions: Directions, calibration: Calibration
    ) -> None:
        """Shorten the calibrated step to what is allowed."""
        allowed = config.max_relative_step * weights_norm(context.model, list(directions.forget_sum))
        length = directions.norm(calibration.length, calibration.damping, calibration.finish_weight)
        if not math.isfinite(length):
            raise RequestError("The step is not finite: the curvature or a gradient is. Gather the memory anew.")
        if length > allowed * (1 + 1e-6):
            share = allowed / length
            calibration.length *= share
            calibration.finish_weight *= share
            calibration.reached = False


def _of_walk(calibration: Calibration, path: Walk) -> Calibration:
    """What is reported of a step that was walked."""
    return replace(
        calibration,
        damping=path.damping,
        source="walk",
        reached=path.reached,
        criterion=path.remaining,
        tolerance=ARRIVED,
        standard_error=None,
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


@dataclass(frozen=True)
class _After:
    """What was made of calibration's rows at the weights that the request ends with, where that was looked at."""

    forget: RowPredictions | None = None
    known: RowPredictions | None = None
    held_out: RowPredictions | None = None


class _Outset:
    """The rows that calibration looks at, and what the model makes of them at the old weights; each looked at once.

    Args:
        context: the request.
        held_out: a sample of the held-out rows, or None.
        known: a sample of the retained rows, or None.
    """

    def __init__(self, context: ForgetContext, held_out: RowSource | None, known: RowSource | None) -> None:
        self._model = context.model
        self._predicted = context.predicted
        self._every_row = context.forget_to_predict
        self.held_out_rows = None if held_out is None else held_out.keep_batches()
        self.held_out_at: dict[tuple[float, float, float], RowPredictions] = {}
        self.known_rows = None if known is None else known.resized(context.prediction_batch_size).keep_batches()
        size = max(len(held_out) if held_out is not None else 0, ENOUGH_FORGET_ROWS)
        self.forget_rows = self._every_row if size >= len(self._every_row) else self._every_row.sample(size, 0)
        self.forget_rows.keep_batches()

    def _look(self, rows: RowSource) -> RowPredictions:
        if rows not in self._predicted:
            self._predicted[rows] = predict_rows(self._model, rows)
        return self._predicted[rows]

    @functools.cached_property
    def forget(self) -> RowPredictions:
        """Of at most as many forget rows as there are held-out rows in the sample."""
        return self._look(self.forget_rows)

    def every_forget_row(self) -> RowPredictions:
        """Of all forget rows, at the old weights."""
        return self._look(self._every_row)

    @functools.cached_property
    def known(self) -> RowPredictions:
        """Of the retained rows."""
        assert self.known_rows is not None
        return self._look(self.known_rows)

    @functools.cached_property
    def held_out(self) -> RowPredictions:
        """Of the held-out rows."""
        assert self.held_out_rows is not None
        return self._look(self.held_out_rows)


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
    changed = memory.weight_decay.keys()
    tensors = {name: tensor.clone() if name in changed else tensor for name, tensor in memory.gradient_sum.items()}
    total = GradientSum(tensors, memory.n_rows, memory.n_targets)
    add_weight_decay(context, total)
    return total.tensors


def _accuracy_lost(first: RowPredictions, second: RowPredictions) -> float | None:
    """Accuracy of the first minus that of the second; None where the task has none."""
    lost = first.accuracy - second.accuracy
    return lost if math.isfinite(lost) else None


def _whole_class(context: ForgetContext, memory: GradientMemory, outset: _Outset) -> int | None:
    """The class whose every remaining training row is in the request, if there is just one class in it.

    Known from the memory's counts of labels, or, where a data set has none, from a large sample of retained rows
    without a single row of that class.
    """
    if memory.label_counts and context.label_counts:
        if len(context.label_counts) != 1 or len(memory.label_counts) < 2:
            return None
        (label, count), *_ = context.label_counts.items()
        return int(label) if memory.label_counts.get(label) == count else None
    if outset.known_rows is None or len(outset.known_rows) < ENOUGH_FORGET_ROWS or len(context.forget) < 20:
        return None
    asked = outset.every_forget_row().label
    labels = set(asked[np.isfinite(asked)].tolist())
    if len(labels) != 1:
        return None
    left = outset.known.label
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
    forget = directions.at(damping)
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


def _is_dear(calibration: Calibration) -> bool:
    """Whether the step costs the held-out rows more than an earlier calibration may; so does a step that was halved."""
    before, after = calibration.held_out_loss_before, calibration.held_out_loss
    if before is None or after is None:
        return False
    return calibration.halvings > 0 or not after <= before + _REMEMBERED_COST * abs(before)


def _check_remembered(known: Mapping[str, Any]) -> None:
    """Raise `MemoryFileError` unless an earlier answer is one."""
    numbers: list[Any] = [known.get(name) for name in ("length", "damping", "finish_weight")]
    lengths = known.get("lengths", [])
    numbers += [known.get("relative_path", 0.0), *(lengths if isinstance(lengths, list) else [None])]
    if not all(type(value) in (int, float) and abs(value) < 1e300 for value in numbers):
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
        # The order in which retained rows are drawn: most of these are hashed for other reasons too.
        looked_for = np.random.default_rng(context.seed).permutation(len(context.train))[:_OVERLAP_ROWS]
        shared = sum(context.train.digest(int(i)) in digests for i in looked_for)
        looked_at = len(looked_for) / max(len(context.train), 1)
    # Real data sets hold a few exact duplicates; an overlap of sets is another matter.
    if shared > max(2, 0.02 * len(probe) * looked_at):
        raise RequestError(
            f"{shared} of {len(probe)} held-out rows looked at are training rows: a model treats those as known, so "
            "calibrating on them would forget nothing. Pass held_out_dataset= with rows that were never trained on."
        )


__all__ = ["ENOUGH_FORGET_ROWS", "IAU", "IAUConfig"]
