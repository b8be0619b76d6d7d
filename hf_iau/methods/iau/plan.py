"""k and λ by whatever calibration may rest on, before c and the request's own step are looked at."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hf_iau.data import RowSource, predict_rows
from hf_iau.data.digests import sample_positions
from hf_iau.errors import CalibrationError
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.gradients import objective_sum
from hf_iau.methods.iau.config import ENOUGH_FORGET_ROWS, FEWEST_HELD_OUT_ROWS, IAUConfig
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.iau.reference import choose_reference
from hf_iau.methods.iau.remembered import remembered_calibration
from hf_iau.methods.iau.states import InitialState
from hf_iau.methods.iau.step_search import (
    LEAST_TOLERANCE,
    TRIALS_AFTER_A_GUESS,
    Calibration,
    calibrate,
    conservative_calibration,
    find_scale,
)
from hf_iau.methods.iau.trial import Trial, TrialRunner, class_share_distance
from hf_iau.methods.step import step_norm, weights_norm

# Proxies are at most a tenth of the training rows: the step for more would be long, and no guide to a small request's.
_PROXY_SHARE = 10
# Held-out rows looked at in a trial, for each proxy: five times as many add a tenth to the error of an AUC.
_HELD_OUT_ROWS_A_PROXY = 5
# The first draw of proxies, and those after it: other rows than the retained ones that they are compared with.
_PROXY_SEED = 1000
# A share of fewer rows says little, and is no target.
_FEWEST_ROWS_A_CLASS = 10
# One of a hundred held-out rows, the fewest there may be.
_CLASS_TOLERANCE = 0.01
# ‖Δ‖/‖θ‖ of a step that nothing was calibrated for: far below what the verdict calls long.
_SHORT_STEP = 0.02


class CalibrationPlan:
    """What calibration of one request rests on, and the k and λ that follow from it.

    Args:
        context: the request.
        config: what was asked for.
        memory: what was gathered, with a curvature.
        initial: the rows that are looked at; made here if None.

    Attributes:
        reference: what k and λ rest on.
        found: k and λ, once they are found.
    """

    def __init__(
        self, context: ForgetContext, config: IAUConfig, memory: GradientMemory, initial: InitialState | None = None
    ) -> None:
        self.context, self.config, self.memory = context, config, memory
        self.initial = initial or InitialState(context, config.held_out_rows)
        self.reference = choose_reference(context, config, memory, self.initial)
        self.found: Calibration | None = None

    def calibrate_on_proxies(self) -> None:
        """Find k and λ, if they rest on proxies: best before the request's own gradient sum is made, so that one set of
        directions is held at a time.

        Raises:
            CalibrationError: no retained training rows are at hand.
        """
        if self.found is None and self.reference.source == "proxies":
            self.found = self._on_proxies()

    def calibrate(self, directions: Directions) -> Calibration:
        """k and λ by whatever they rest on, unless they are found already.

        Args:
            directions: of the forget rows.

        Raises:
            CalibrationError: they rest on proxies, and no retained training rows are at hand.
        """
        self.calibrate_on_proxies()
        self.found = self.found or self._on_request(directions)
        return self.found

    def anew(self) -> CalibrationPlan:
        """A plan that does not rest on an earlier answer."""
        return CalibrationPlan(self.context, replace(self.config, recalibrate=True), self.memory, self.initial)

    def _on_request(self, directions: Directions) -> Calibration:
        config, source = self.config, self.reference.source
        if source == "given":
            assert config.scale is not None and config.damping is not None
            return Calibration(config.scale, config.damping, config.retain_weight or 0.0, source="given")
        if source == "uncalibrated":
            return self._uncalibrated(directions)
        if source == "class share":
            return self._on_class_share(directions)
        if source == "remembered":  # of k and λ; whether they serve these rows is looked at all the same
            remembered = remembered_calibration(config, self.memory)
            assert remembered is not None
            return remembered
        runner = self.initial.trial_runner(directions, self.initial.forget_rows)
        start = runner.baseline_trial(self.initial.forget, self.initial.held_out, self.reference.advantage)
        return self._search(runner, "forget rows", start)

    def _on_proxies(self) -> Calibration:
        """k and λ that make random training rows look held-out; the later draws find k alone, at the same λ."""
        most = max(1, (self.memory.n_rows - len(self.context.forget)) // _PROXY_SHARE)
        positions = self._held_out_positions(most)
        held_out = self._held_out_rows(positions)
        calibration: Calibration | None = None
        for draw, size in enumerate(self.config.proxy_rows):
            if calibration is not None and self.config.scale is not None:
                break
            seed = self.context.seed + _PROXY_SEED + draw
            proxies = self.context.retained_sample(min(size, most), seed, "proxy rows")
            if proxies is None or len(proxies) < 2:
                continue
            runner, start = self._proxy_trials(proxies, held_out, positions)
            if calibration is None:
                calibration = self._search(runner, "proxies", start)
            else:
                self._add_draw(calibration, runner, start, len(proxies))
            del runner  # its directions are freed before the next draw's are made
        if calibration is None:
            raise CalibrationError(
                "There are no retained training rows to use as proxies. Give the trainer its train_dataset, or set "
                "IAUConfig(scale=…, damping=…)."
            )
        weights = np.asarray(calibration.draws, dtype=float)
        logs = np.log(np.maximum(calibration.scales, 1e-12))
        calibration.scale = float(np.exp(np.average(logs, weights=weights)))
        return calibration

    def _held_out_positions(self, most_proxies: int) -> np.ndarray:
        """Numbers of the held-out rows that proxies are compared with."""
        assert self.initial.held_out_rows is not None
        proxies = min(max(self.config.proxy_rows), most_proxies)
        size = max(_HELD_OUT_ROWS_A_PROXY * proxies, FEWEST_HELD_OUT_ROWS)
        return sample_positions(len(self.initial.held_out_rows), size, self.context.seed)

    def _held_out_rows(self, positions: np.ndarray) -> RowSource:
        rows = self.initial.held_out_rows
        assert rows is not None
        return rows if len(positions) == len(rows) else rows.select(positions).keep_batches()

    def _proxy_trials(
        self, proxies: RowSource, held_out: RowSource, positions: np.ndarray
    ) -> tuple[TrialRunner, Trial]:
        """What tries steps of one draw of proxies, and the trial of no step."""
        model = self.context.model
        target = proxies.sample(max(len(held_out), ENOUGH_FORGET_ROWS), 0).resized(held_out.batch_size)
        directions = Directions.of(self.memory, objective_sum(self.context, proxies))
        runner = TrialRunner(model, directions, target, held_out, weights=self.context.weights)
        before = predict_rows(model, target), self.initial.held_out.select(positions)
        return runner, runner.baseline_trial(*before, self.reference.advantage)

    def _add_draw(self, calibration: Calibration, runner: TrialRunner, start: Trial, rows: int) -> None:
        """k of another draw of so many rows, for its spread."""
        _, reached, scale = find_scale(
            runner,
            calibration.damping,
            calibration.retain_weight,
            start=start,
            tolerance=calibration.tolerance or LEAST_TOLERANCE,
            max_relative_step=self.config.max_relative_step,
            guess=calibration.scale,
            trials=TRIALS_AFTER_A_GUESS,
        )
        if reached:
            calibration.scales.append(scale)
            calibration.draws.append(rows)
        calibration.curve += [t.to_dict() for t in runner.trials]

    def _on_class_share(self, directions: Directions) -> Calibration:
        """A whole class goes: its share on its own held-out rows falls to its rate on the others."""
        label, held_out = self.reference.whole_class, self.initial.held_out
        assert label is not None
        own = held_out.label == label
        if min(int(own.sum()), int((~own).sum())) < _FEWEST_ROWS_A_CLASS:
            return self._uncalibrated(directions)
        runner = self.initial.trial_runner(directions, None, criterion=class_share_distance(label), kept=~own)
        start = runner.baseline_trial(None, held_out)
        return self._search(runner, "class share", start, tolerance=_CLASS_TOLERANCE)

    def _uncalibrated(self, directions: Directions) -> Calibration:
        """A short step, or the k, λ and c that were given."""
        config = self.config
        damping = config.damping if config.damping is not None else config.damping_range[1]
        forget = directions.at(damping)
        relative_step = min(_SHORT_STEP, config.max_relative_step)
        longest = relative_step * weights_norm(self.context.model, list(forget)) / max(step_norm(forget), 1e-300)
        short = conservative_calibration(longest, damping)
        return replace(
            short,
            scale=short.scale if config.scale is None else config.scale,
            retain_weight=config.retain_weight or 0.0,
        )

    def _search(self, runner: TrialRunner, source: str, start: Trial, tolerance: float | None = None) -> Calibration:
        config = self.config
        return calibrate(
            runner,
            source=source,
            damping=config.damping,
            damping_range=(config.damping_range[0], config.damping_range[1]),
            max_relative_step=config.max_relative_step,
            scale=config.scale,
            tolerance=tolerance,
            start=start,
        )
