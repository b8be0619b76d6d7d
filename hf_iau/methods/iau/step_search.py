"""The search for k, λ and c by what held-out rows look like, with forward passes only.

A retrained model treats forgotten rows like rows it never saw. So k is the scale at which the loss attack cannot tell
forgotten from held-out rows (AUC one half), and λ and c are those with the lowest held-out loss. The rows on which this
is tried must be exchangeable with the held-out ones: random training rows as proxies, or the forget rows themselves
where they are many and pass a shift test. The step is additive in rows, so its scale carries over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hf_iau.methods.iau.trial import Trial, TrialRunner

# Trials of one search for k: a guess from the first-order response, then interpolation.
_TRIALS_PER_SCALE = 5
TRIALS_AFTER_A_GUESS = 3
MOST_HALVINGS = 4
"""To a sixteenth: a step that is still too long then was not made for this model."""
# A k that was too small is raised at least so much, or the search would creep; and no more, for the power is a guess.
_LEAST_FACTOR, _LARGEST_FACTOR = 1.05, 4.0
# The criterion need not come nearer to 0 than a quarter of its standard error, nor than half a point of AUC.
_SHARE_OF_ERROR, LEAST_TOLERANCE = 0.25, 0.005
MAX_HELD_OUT_RISE = 0.3
"""A step that raises the held-out loss by more than this share is too long, whatever it forgets; the verdict on one
would be "retrain"."""


@dataclass
class Calibration:
    """The values found, and what they rest on.

    Attributes:
        scale, damping, retain_weight: k, λ (relative) and c.
        source: "forget rows", "proxies", "class share", "remembered", "given", "uncalibrated" or "multi-step" (many
            short steps were taken instead of one; `scale` and `retain_weight` are those of the one step not taken).
        reached: whether the criterion was brought within its tolerance.
        criterion: its value at the trial next to the k chosen; `tolerance` and `standard_error` beside it.
        held_out_loss_before, held_out_loss: mean loss of the held-out rows without and with the step.
        scales: k of every draw (their spread is the uncertainty of `scale`).
        curve: every trial that looked for k and λ, for the report.
        draws: rows of each proxy draw.
        relative_step: ‖Δ‖/‖θ‖ of the request's step.
        halvings: how often that step was halved for the sake of the held-out or the retained rows.
        step_curve: every trial of the request's own step, in which c was chosen; or every step of many.
    """

    scale: float
    damping: float
    retain_weight: float
    source: str
    reached: bool = True
    criterion: float | None = None
    tolerance: float | None = None
    standard_error: float | None = None
    held_out_loss_before: float | None = None
    held_out_loss: float | None = None
    scales: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    draws: list[int] = field(default_factory=list)
    relative_step: float | None = None
    halvings: int = 0
    step_curve: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return dict(self.__dict__)

    @property
    def relative_spread(self) -> float:
        """Largest over smallest k of the draws, minus one; 0 for a single draw."""
        return max(self.scales) / min(self.scales) - 1.0 if len(self.scales) > 1 and min(self.scales) > 0 else 0.0


def standard_error_of_auc(n_forget: int, n_held_out: int) -> float:
    """Standard error of an AUC near one half: √((m+n+1)/(12mn)) (Mann-Whitney)."""
    return math.sqrt((n_forget + n_held_out + 1) / (12.0 * n_forget * n_held_out))


def find_scale(
    runner: TrialRunner,
    damping: float,
    retain_weight: float,
    *,
    start: Trial,
    tolerance: float,
    max_relative_step: float,
    guess: float | None = None,
    trials: int = _TRIALS_PER_SCALE,
) -> tuple[Trial, bool, float]:
    """The k at which the criterion vanishes, by bracketing and interpolation.

    Trials end where the criterion is within the tolerance. They come from below, so the k returned is where it vanishes
    by one more interpolation, which is not tried. Where the held-out loss rises by more than `MAX_HELD_OUT_RISE` before
    that, the longest step tried that stays within that budget is taken.

    Args:
        runner: tries steps.
        damping, retain_weight: λ and c.
        start: the trial of k = 0.
        tolerance: how near to 0 the criterion must come.
        max_relative_step: longest ‖Δ‖/‖θ‖ allowed.
        guess: first k; default: from the first-order response of the target rows' loss.
        trials: how many steps may be tried.

    Returns:
        The best trial, whether it is within the tolerance, and k: near that trial's, or else the trial's own.
    """
    limit = runner.longest(damping, max_relative_step)
    most = (1.0 + MAX_HELD_OUT_RISE) * start.held_out_loss
    bracket = _Bracket(low_value=start.criterion)
    tried: list[Trial] = []
    scale = min(guess if guess is not None else first_guess(runner, damping, start), limit)
    for _ in range(trials):
        trial = runner.run(scale, damping, retain_weight)
        tried.append(trial)
        within_budget = trial.held_out_loss <= most
        if within_budget and abs(trial.criterion) <= tolerance:
            return trial, True, min(_root(start.criterion, tried), limit)
        if within_budget and trial.criterion > 0:
            if scale >= limit:
                break
            bracket.low, bracket.low_value = scale, trial.criterion
        else:
            bracket.high = scale
            bracket.high_value = min(trial.criterion, -start.criterion if not within_budget else 0.0)
        if bracket.high is None:
            factor = min(max(power_factor(start.criterion, tried), _LEAST_FACTOR), _LARGEST_FACTOR)
            scale = min(scale * factor, limit)
        else:
            scale = bracket.between()
    affordable = [trial for trial in tried if trial.held_out_loss <= most]
    best = min(affordable, key=lambda trial: abs(trial.criterion)) if affordable else min(tried, key=lambda t: t.scale)
    return best, False, best.scale


@dataclass
class _Bracket:
    """A k that is too small and, once there is one, a k that is too large, with the criterion there."""

    low_value: float
    low: float = 0.0
    high: float | None = None
    high_value: float = 0.0

    def between(self) -> float:
        """Where the criterion vanishes along a line; over log k, where both are above 0."""
        assert self.high is not None
        gap = self.low_value - self.high_value  # not positive where the rows look like held-out ones at k = 0
        share = min(max(self.low_value / gap, 0.1), 0.9) if gap > 0 else 0.1
        if self.low > 0.0:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return share * self.high


def power_factor(distance: float, tried: list[Trial]) -> float:
    """The factor that takes the last k to where the criterion vanishes, were what a step brings a power of k.

    The exponent is 1 by one step alone, else that of the last two.

    Args:
        distance: the criterion of no step.
        tried: steps; the last two are looked at.
    """
    brought = [distance - trial.criterion for trial in tried[-2:]]
    if not brought[-1] > 0.0 or not distance > 0.0:
        return math.inf if distance > 0.0 else 0.0  # nothing was brought; or there is nothing to be brought
    exponent = 1.0
    if len(brought) == 2 and brought[0] > 0.0:
        first, last = sorted(zip((trial.scale for trial in tried[-2:]), brought, strict=True))
        if first[0] < last[0] and first[1] < last[1]:
            exponent = math.log(last[1] / first[1]) / math.log(last[0] / first[0])
    return (distance / brought[-1]) ** (1.0 / max(exponent, 0.25))


def _root(distance: float, tried: list[Trial]) -> float:
    """Where the criterion vanishes, next to the last trial, which nearly does that.

    Between that trial and the nearest one on the other side, or by `power_factor`; at most a quarter away from the
    trial.
    """
    last = tried[-1]
    others = [t for t in tried[:-1] if t.criterion * last.criterion < 0.0 and math.isfinite(t.held_out_loss)]
    if others and last.scale > 0.0:
        other = min(others, key=lambda trial: abs(trial.criterion))
        share = last.criterion / (last.criterion - other.criterion)
        factor = (other.scale / last.scale) ** share if other.scale > 0.0 else 1.0
    else:
        factor = power_factor(distance, tried)
        factor = factor if 0.0 < factor < math.inf else 1.0
    return last.scale * min(max(factor, 0.8), 1.25)


def first_guess(runner: TrialRunner, damping: float, start: Trial) -> float:
    """The k at which the loss of a target would reach the held-out loss if it rose along the tangent, halved.

    Loss rises faster than its tangent, so half of it is nearer; at most the k of an influence function's 1.
    """
    missing = start.held_out_loss - start.target_loss
    slope = runner.directions.slope(damping) / max(runner.directions.targets or runner.n_target, 1)
    if not math.isfinite(missing) or missing <= 0 or slope <= 0:
        return 0.25
    return min(0.5 * missing / slope, 1.0)


def calibrate(
    runner: TrialRunner,
    *,
    source: str,
    damping: float | None,
    damping_range: tuple[float, float],
    max_relative_step: float,
    scale: float | None = None,
    tolerance: float | None = None,
    start: Trial,
) -> Calibration:
    """Find k for every λ tried, and keep the λ with the lowest held-out loss.

    λ is searched by factors of ten from the middle of its range, downhill in the held-out loss. The first k at a new λ
    is the one with the same first-order effect as the k found before, so it is nearly right at once.

    Args:
        runner: tries steps that forget the calibration rows.
        source: what those rows are, for the report.
        damping: keep λ at this value.
        damping_range: smallest and largest λ to be tried, relative to each layer's mean eigenvalue.
        max_relative_step: longest ‖Δ‖/‖θ‖ allowed.
        scale: keep k at this value and choose λ only.
        tolerance: of the criterion; default: a quarter of its standard error, at least 0.005.
        start: the trial of no step at all.
    """
    error = standard_error_of_auc(runner.n_target, len(runner.held_out))
    tolerance = tolerance if tolerance is not None else max(LEAST_TOLERANCE, _SHARE_OF_ERROR * error)

    def at(value: float, neighbour: _Candidate | None) -> _Candidate:
        if scale is not None:
            return _Candidate(runner.run(scale, value), True, scale)
        guess = None
        if neighbour is not None and neighbour.trial.scale > 0 and neighbour.slope > 0:
            slope = runner.directions.slope(value)
            guess = neighbour.scale * neighbour.slope / slope if slope > 0 else None
        found = find_scale(
            runner,
            value,
            0.0,
            start=start,
            tolerance=tolerance,
            max_relative_step=max_relative_step,
            guess=guess,
            trials=_TRIALS_PER_SCALE if guess is None else TRIALS_AFTER_A_GUESS,
        )
        return _Candidate(*found, slope=runner.directions.slope(value))

    best = at(damping, None) if damping is not None else _downhill(at, damping_range)
    trial, reached = best.trial, best.reached
    return Calibration(
        scale=best.scale,
        damping=trial.damping,
        retain_weight=0.0,
        source=source,
        reached=reached,
        criterion=trial.criterion,
        tolerance=tolerance,
        standard_error=error,
        scales=[best.scale],
        curve=[t.to_dict() for t in runner.trials],
        draws=[runner.n_target],
    )


def add_retain_correction(
    runner: TrialRunner,
    calibration: Calibration,
    *,
    before: Trial,
    retain_weights: tuple[float, ...],
    max_relative_step: float,
    retain_weight: float | None = None,
    keep_scale: bool = False,
) -> Calibration:
    """Choose c for the request's own step, and halve it (up to four times) while it ruins the held-out rows.

    The retain correction repairs what forgetting costs the held-out rows. It is raised only while that helps, and
    not further than to the held-out loss of before (by interpolation): a retrained model is not better trained than
    the original.

    Args:
        runner: tries the *request's* steps; its criterion is not looked at.
        calibration: k and λ.
        before: the trial of no step at all.
        retain_weights: c to be tried beside 0, ascending; empty without a gradient sum.
        max_relative_step: longest ‖Δ‖/‖θ‖ allowed.
        retain_weight: keep c at this value.
        keep_scale: keep k as well; else it grows by c, so that the correction is of the retained rows alone.

    Returns:
        The calibration with c, the held-out losses and `halvings` filled in.
    """
    first = len(runner.trials)
    scale = min(calibration.scale, runner.longest(calibration.damping, max_relative_step))
    given = retain_weight or 0.0

    def run(scale: float, weight: float) -> Trial:
        # Σ_D is of the forget rows too, and c·Σ_D would learn them again: (k + c)·Σ_f − c·Σ_D corrects with the others
        # alone.
        return runner.run(scale if keep_scale else scale + weight, calibration.damping, weight)

    best = run(scale, given)
    halvings = 0
    while not best.held_out_loss <= (1.0 + MAX_HELD_OUT_RISE) * before.held_out_loss and halvings < MOST_HALVINGS:
        halvings += 1
        best = run(scale * 0.5**halvings, given)
    if retain_weight is None:
        best = _raise_retain_weight(
            lambda weight: run(scale * 0.5**halvings, weight), best, before, retain_weights, max_relative_step
        )
    return replace(
        calibration,
        scale=best.scale,
        retain_weight=best.retain_weight,
        held_out_loss_before=before.held_out_loss,
        held_out_loss=best.held_out_loss,
        relative_step=best.relative_step,
        halvings=halvings,
        reached=calibration.reached and scale >= calibration.scale * (1 - 1e-6) and halvings == 0,
        step_curve=[t.to_dict() for t in (before, *runner.trials[first:])],
    )


def _raise_retain_weight(
    run: Callable[[float], Trial],
    best: Trial,
    before: Trial,
    retain_weights: tuple[float, ...],
    max_relative_step: float,
) -> Trial:
    """The trial with the c that lowers the held-out loss most, but not below that of `before`.

    Args:
        run: tries a c.
        best: the trial without one.
        before: that of no step.
        retain_weights: c to be tried, ascending.
        max_relative_step: longest ‖Δ‖/‖θ‖ allowed.
    """
    for weight in retain_weights:
        if best.held_out_loss <= before.held_out_loss:
            break
        tried = run(weight)
        if not tried.held_out_loss < best.held_out_loss or tried.relative_step > max_relative_step:
            break
        if tried.held_out_loss < before.held_out_loss:
            share = (best.held_out_loss - before.held_out_loss) / (best.held_out_loss - tried.held_out_loss)
            return run(best.retain_weight + share * (weight - best.retain_weight))
        best = tried
    return best


@dataclass(frozen=True)
class _Candidate:
    """A λ with the k found for it."""

    trial: Trial
    reached: bool
    scale: float
    slope: float = 0.0

    def better_than(self, other: _Candidate) -> bool:
        if self.reached != other.reached:
            return self.reached
        if self.reached:
            return self.trial.held_out_loss < other.trial.held_out_loss
        return abs(self.trial.criterion) < abs(other.trial.criterion)


def _downhill(at: Callable[[float, _Candidate | None], _Candidate], damping_range: tuple[float, float]) -> _Candidate:
    """The best λ by factors of ten: from the middle of the range towards smaller ones, else towards larger ones."""
    low, high = damping_range
    best = at(min(max(10.0 ** round(math.log10(low * high) / 2.0), low), high), None)
    for factor in (0.1, 10.0):
        moved = False
        while low * 0.99 <= best.trial.damping * factor <= high * 1.01:
            candidate = at(best.trial.damping * factor, best)
            if not candidate.better_than(best):
                break
            best, moved = candidate, True
        if moved:
            break
    return best


def conservative_calibration(runner_limit: float, damping: float) -> Calibration:
    """Without held-out rows: the influence function's k = 1, or less where the step would be long; uncalibrated."""
    return Calibration(min(1.0, runner_limit), damping, 0.0, source="uncalibrated", reached=False)
