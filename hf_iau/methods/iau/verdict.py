"""When to say no: what a step's size and side effects say about whether to trust it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hf_iau.data import RowPredictions
from hf_iau.methods.iau.step_search import MAX_HELD_OUT_RISE, Calibration, standard_error_of_auc
from hf_iau.methods.iau.trial import auc_distance

OK, CHECK, RETRAIN = "ok", "check", "retrain"

# The thresholds are judgements and no bounds of a theory. Of each pair the first is a reason to check, the second to
# retrain.

LONG_STEP, TOO_LONG_STEP = 0.35, 0.6
"""‖Δ‖/‖θ‖. A step at right angles to the weights turns them by 19 and by 31 degrees: no longer small."""
DRIFT, TOO_MUCH_DRIFT = 0.10, MAX_HELD_OUT_RISE
"""Rise of the held-out loss, as a share of it; a retrained model's hardly rises. Beyond the second no search goes."""
LARGE_SHARE, TOO_LARGE_SHARE = 0.15, 0.40
"""Share of the training rows that are forgotten by now. The curvature was estimated with them: from two fifths on it is
nearly as much theirs as that of the rows that stay."""
SOME_LOST, TOO_MUCH_LOST = 0.05, 0.15
"""Accuracy lost on retained rows, of which a retrained model loses none: beyond chance for 2,000 rows; and a model that
is of no use."""
ACCURACY_GAP = 0.05
"""Accuracy on forget rows beside that on held-out rows, where a retrained model has none: beyond chance for some
hundred rows."""
AUC_AWAY, STANDARD_ERRORS = 0.05, 2.0
"""A loss attack's AUC that is farther than this from a retrained model's is of note, and no accident where it is
farther than twice what chance would make of it (95 % by a normal distribution)."""
LITTLE_CURVATURE = 0.5
"""Share of the parameters with more than a diagonal: below, most of the step knows of no other parameter."""
LARGE_SPREAD = 1.0
"""Largest over smallest k of the proxy draws, minus one: the draws agree on no more than the order of magnitude."""


@dataclass(frozen=True)
class LossAttack:
    """The loss attack on forget rows against held-out rows at the end of a request; the former are like any others.

    Attributes:
        auc: its AUC.
        expected: that of a retrained model: one half, but for the luck of the draw. What the forget rows' AUC exceeds
            that of a large sample of training rows by, before the request, is no matter of remembering.
        standard_error: of an AUC near one half, by chance, for so many rows.
    """

    auc: float
    expected: float
    standard_error: float

    @classmethod
    def of(cls, forget: RowPredictions, held_out: RowPredictions, luck: float) -> LossAttack | None:
        """From predictions at the end; None with fewer than 2 rows of a loss on a side.

        Args:
            forget: of the forget rows.
            held_out: of the held-out rows.
            luck: by how much the forget rows' AUC exceeded that of training rows before the request.
        """
        sizes = [int((rows.targets > 0).sum()) for rows in (forget, held_out)]
        if min(sizes) < 2:
            return None
        return cls(0.5 + auc_distance(forget, held_out), 0.5 + luck, standard_error_of_auc(*sizes))


@dataclass(frozen=True)
class Observations:
    """What was measured of a request, beside its calibration.

    Attributes:
        relative_step: ‖Δ‖ / ‖θ‖. The picture is first-order: it ends where steps are long.
        share_forgotten: of all training rows, by this and earlier requests.
        kronecker_share: share of the parameters whose curvature is more than a diagonal.
        whole_class: the class that was removed altogether, if any.
        retained_accuracy_lost: accuracy on a sample of retained rows, before minus after; None where it is not known.
            An overconfident model's held-out loss may fall while it forgets what it should keep.
        accuracy_gap: accuracy on the forget rows minus that on held-out rows, after the step, where the forget rows
            are like any others; a retrained model has about 0.
        attack: the loss attack on the same rows, after the step.
        recited: share of the rows whose label nothing else supports that are still predicted to be of it; a retrained
            model has about 0.
    """

    relative_step: float
    share_forgotten: float
    kronecker_share: float
    whole_class: int | None = None
    retained_accuracy_lost: float | None = None
    accuracy_gap: float | None = None
    attack: LossAttack | None = None
    recited: float | None = None


def assess(calibration: Calibration, observed: Observations) -> tuple[str, list[str]]:
    """ "ok", "check" or "retrain", and the reasons.

    Args:
        calibration: of what was taken, with the held-out loss before and with the step.
        observed: what was measured.
    """
    found = [reason for look in _LOOKS for reason in look(calibration, observed)]
    reasons_to_retrain = [reason for verdict, reason in found if verdict == RETRAIN]
    reasons_to_check = [reason for verdict, reason in found if verdict == CHECK]
    if reasons_to_retrain:
        return RETRAIN, reasons_to_retrain + reasons_to_check
    if reasons_to_check:
        return CHECK, reasons_to_check
    return OK, [f"short step, held-out loss kept, {_target_met(calibration)}"]


Reasons = Iterator[tuple[str, str]]
"""Verdicts ("check" or "retrain"), each with its reason in words."""


def _of_class(calibration: Calibration, observed: Observations) -> Reasons:
    if observed.whole_class is not None:
        yield (
            RETRAIN,
            f"all rows of class {observed.whole_class} were removed, which one step cannot do as retraining would",
        )


def _of_step(calibration: Calibration, observed: Observations) -> Reasons:
    sentence = f"the step is {observed.relative_step:.0%} of the weights' norm"
    if observed.relative_step >= TOO_LONG_STEP:
        yield RETRAIN, f"{sentence}, beyond a first-order picture"
    elif observed.relative_step >= LONG_STEP:
        yield CHECK, sentence


def _of_held_out_loss(calibration: Calibration, observed: Observations) -> Reasons:
    before, after = calibration.held_out_loss_before, calibration.held_out_loss
    if before is None or after is None:
        return
    rise = (after - before) / max(abs(before), 1e-12)
    if not rise < DRIFT:  # a loss that is not a number has risen
        yield CHECK if rise < TOO_MUCH_DRIFT else RETRAIN, f"the held-out loss rose by {rise:.0%}"


def _of_retained_rows(calibration: Calibration, observed: Observations) -> Reasons:
    lost = observed.retained_accuracy_lost or 0.0
    if lost >= SOME_LOST:
        verdict = RETRAIN if lost >= TOO_MUCH_LOST else CHECK
        yield verdict, f"accuracy on retained rows fell by {100 * lost:.1f} points"


def _of_accuracy_gap(calibration: Calibration, observed: Observations) -> Reasons:
    gap = observed.accuracy_gap
    if gap is not None and abs(gap) >= ACCURACY_GAP:
        yield (
            CHECK,
            f"the forget rows are predicted {100 * abs(gap):.1f} points {'better' if gap > 0 else 'worse'} than "
            "held-out rows, which a retrained model would not do",
        )


def _of_attack(calibration: Calibration, observed: Observations) -> Reasons:
    attack = observed.attack
    if attack is None:
        return
    away = attack.auc - attack.expected
    if abs(away) > max(AUC_AWAY, STANDARD_ERRORS * attack.standard_error):
        tells = "still tells the forget rows" if away > 0 else "tells the forget rows, whose losses rose too far,"
        yield (
            CHECK,
            f"a loss attack {tells} from held-out rows: AUC {attack.auc:.2f}; a retrained model would be at "
            f"{attack.expected:.2f}",
        )


def _of_recited(calibration: Calibration, observed: Observations) -> Reasons:
    if observed.recited is not None and observed.recited >= ACCURACY_GAP:
        yield CHECK, f"{observed.recited:.0%} of the labels that nothing else supports are still predicted"


def _of_share(calibration: Calibration, observed: Observations) -> Reasons:
    if observed.share_forgotten >= LARGE_SHARE:
        verdict = RETRAIN if observed.share_forgotten >= TOO_LARGE_SHARE else CHECK
        yield verdict, f"{observed.share_forgotten:.0%} of the training rows are forgotten by now"


def _of_target(calibration: Calibration, observed: Observations) -> Reasons:
    if calibration.source == "uncalibrated":
        of_class = "" if observed.whole_class is None else f" of class {observed.whole_class}"
        yield CHECK, f"the step was not calibrated, for want of held-out rows{of_class}"
    elif not calibration.reached:
        reasons = {
            "given": "the step given was longer than max_relative_step allows and was shortened",
            "multi-step": f"the steps ended with {calibration.criterion or 0.0:.0%} of the way to their targets left",
        }
        usual = "calibration did not reach its target within the longest step allowed"
        yield CHECK, reasons.get(calibration.source, usual)


def _of_draws(calibration: Calibration, observed: Observations) -> Reasons:
    if calibration.relative_spread >= LARGE_SPREAD:
        yield CHECK, f"the proxy draws disagree on the scale (by a factor of {1 + calibration.relative_spread:.1f})"


def _of_curvature(calibration: Calibration, observed: Observations) -> Reasons:
    if observed.kronecker_share < LITTLE_CURVATURE:
        yield CHECK, f"only {observed.kronecker_share:.0%} of the parameters have curvature beyond a diagonal"


def _of_halvings(calibration: Calibration, observed: Observations) -> Reasons:
    if calibration.halvings:
        yield CHECK, f"the step was halved {calibration.halvings} times to spare other rows"


_LOOKS: tuple[Callable[[Calibration, Observations], Reasons], ...] = (
    _of_class,
    _of_step,
    _of_held_out_loss,
    _of_retained_rows,
    _of_accuracy_gap,
    _of_attack,
    _of_recited,
    _of_share,
    _of_target,
    _of_draws,
    _of_curvature,
    _of_halvings,
)


def _target_met(calibration: Calibration) -> str:
    met = {
        "multi-step": "the forget rows are known about as well as held-out rows are",
        "given": "values taken as given",
    }
    return met.get(calibration.source, "calibration on target")
