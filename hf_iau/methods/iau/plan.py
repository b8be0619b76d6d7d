"""k and λ on each basis that calibration may rest on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hf_iau.data import predict_rows
from hf_iau.data.rows import sample_positions
from hf_iau.errors import CalibrationError
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.gradients import objective_sum
from hf_iau.methods.iau.config import ENOUGH_FORGET_ROWS, FEWEST_HELD_OUT_ROWS, IAUConfig
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.iau.initial_state import InitialState
from hf_iau.methods.iau.reference import CalibrationReference
from hf_iau.methods.iau.remembered import remembered_calibration
from hf_iau.methods.iau.step_search import Calibration, calibrate, conservative_calibration, find_scale
from hf_iau.methods.iau.trial import Trial, TrialRunner, class_share_distance
from hf_iau.methods.step import step_norm, weights_norm

# Proxies are at most a tenth of the training rows: the step for more would be long, and no guide to a small request's.
_PROXY_SHARE = 10
# Held-out rows looked at in a trial, for each proxy: five times as many add a tenth to the error of an AUC.
_HELD_OUT_ROWS_A_PROXY = 5
_FEWEST_ROWS_A_CLASS = 10
_CLASS_TOLERANCE = 0.01
# ‖Δ‖/‖θ‖ of a step that nothing was calibrated for.
_SHORT_STEP = 0.02


def calibrate_on_request(
    context: ForgetContext,
    config: IAUConfig,
    memory: GradientMemory,
    directions: Directions,
    initial: InitialState,
    reference: CalibrationReference,
) -> Calibration:
    """k and λ by anything but proxies.

    Args:
        context: the request.
        config: what was asked for.
        memory: what was gathered.
        directions: of the forget rows.
        outset: the rows that are looked at.
        basis: what k and λ rest on.
    """
    if reference.source == "given":
        assert config.scale is not None and config.damping is not None
        return Calibration(config.scale, config.damping, config.retain_weight or 0.0, source="given")
    if reference.source == "uncalibrated":
        return _uncalibrated(context, config, directions)
    if reference.source == "class share":
        return _calibrate_on_class_share(context, config, directions, initial, reference)
    if reference.source == "remembered":  # of k and λ; whether they serve these rows is looked at all the same
        remembered = remembered_calibration(config, memory)
        assert remembered is not None
        return remembered
    runner = initial.trial_runner(directions, initial.forget_rows)
    start = runner.baseline_trial(initial.forget, initial.held_out, reference.advantage)
    return _search(runner, "forget rows", config, start)


def calibrate_on_proxies(
    context: ForgetContext,
    config: IAUConfig,
    memory: GradientMemory,
    initial: InitialState,
    reference: CalibrationReference,
) -> Calibration:
    """k and λ that make random training rows look held-out; the later draws find k alone, at the same λ.

    Raises:
        CalibrationError: no retained training rows are at hand.
    """
    calibration: Calibration | None = None
    assert initial.held_out_rows is not None
    most = max(1, (memory.n_rows - len(context.forget)) // _PROXY_SHARE)
    looked_at = max(_HELD_OUT_ROWS_A_PROXY * min(max(config.proxy_rows), most), FEWEST_HELD_OUT_ROWS)
    chosen = sample_positions(len(initial.held_out_rows), looked_at, context.seed)
    whole = len(chosen) == len(initial.held_out_rows)
    held_out = initial.held_out_rows if whole else initial.held_out_rows.select(chosen).keep_batches()
    for draw, size in enumerate(config.proxy_rows):
        share = min(size, most)
        proxies = context.retained_sample(share, context.seed + 1000 + draw, "proxy rows")
        if proxies is None or len(proxies) < 2:
            continue
        target = proxies.sample(max(len(held_out), ENOUGH_FORGET_ROWS), 0).resized(held_out.batch_size)
        directions = Directions.of(memory, objective_sum(context, proxies))
        runner = TrialRunner(context.model, directions, target, held_out, weights=context.weights)
        del directions
        start = runner.baseline_trial(
            predict_rows(context.model, target), initial.held_out.select(chosen), reference.advantage
        )
        if calibration is None:
            calibration = _search(runner, "proxies", config, start)
            del runner  # its directions are freed before the next draw's are made
            continue
        if config.scale is not None:
            break
        _, reached, scale = find_scale(
            runner,
            calibration.damping,
            calibration.retain_weight,
            start=start,
            tolerance=calibration.tolerance or 0.005,
            max_relative_step=config.max_relative_step,
            guess=calibration.scale,
            trials=3,
        )
        if reached:
            calibration.scales.append(scale)
            calibration.draws.append(len(proxies))
        calibration.curve += [t.to_dict() for t in runner.trials]
        del runner
    if calibration is None:
        raise CalibrationError(
            "There are no retained training rows to use as proxies. Give the trainer its train_dataset, or set "
            "IAUConfig(scale=…, damping=…)."
        )
    weights = np.asarray(calibration.draws, dtype=float)
    logs = np.log(np.maximum(calibration.scales, 1e-12))
    calibration.scale = float(np.exp(np.average(logs, weights=weights)))
    return calibration


def _calibrate_on_class_share(
    context: ForgetContext,
    config: IAUConfig,
    directions: Directions,
    initial: InitialState,
    reference: CalibrationReference,
) -> Calibration:
    """A whole class goes: its share on its own held-out rows falls to its rate on the others."""
    assert reference.whole_class is not None
    own = initial.held_out.label == reference.whole_class
    if min(int(own.sum()), int((~own).sum())) < _FEWEST_ROWS_A_CLASS:
        return _uncalibrated(context, config, directions)
    runner = initial.trial_runner(directions, None, criterion=class_share_distance(reference.whole_class), kept=~own)
    start = runner.baseline_trial(None, initial.held_out)
    return _search(runner, "class share", config, start, tolerance=_CLASS_TOLERANCE)


def _search(
    runner: TrialRunner, source: str, config: IAUConfig, start: Trial, tolerance: float | None = None
) -> Calibration:
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


def _uncalibrated(context: ForgetContext, config: IAUConfig, directions: Directions) -> Calibration:
    """A short step, or the k, λ and c that were given."""
    damping = config.damping if config.damping is not None else config.damping_range[1]
    forget = directions.at(damping)
    relative_step = min(_SHORT_STEP, config.max_relative_step)
    longest = relative_step * weights_norm(context.model, list(forget)) / max(step_norm(forget), 1e-300)
    found = conservative_calibration(longest, damping)
    return replace(
        found,
        scale=found.scale if config.scale is None else config.scale,
        retain_weight=config.retain_weight or 0.0,
    )
