"""When to say no: what a step's size and side effects say about whether to trust it."""

from __future__ import annotations

from hf_iau.methods.iau.final_state import LossAttack
from hf_iau.methods.iau.step_search import Calibration

OK, CHECK, RETRAIN = "ok", "check", "retrain"

LONG_STEP, TOO_LONG_STEP = 0.35, 0.6
DRIFT, TOO_MUCH_DRIFT = 0.10, 0.30
LARGE_SHARE, TOO_LARGE_SHARE = 0.15, 0.40
_LOST, TOO_MUCH_LOST = 0.05, 0.15
_LEAD = 0.05
# An AUC that is farther than this from a retrained model's, and than twice what chance would make of it, is no accident.
_AUC_AWAY, _STANDARD_ERRORS = 0.05, 2.0
_LITTLE_CURVATURE = 0.5
_SPREAD = 1.0


def assess(
    *,
    calibration: Calibration,
    relative_step: float,
    share_forgotten: float,
    kronecker_share: float,
    whole_class: int | None,
    retained_accuracy_lost: float = 0.0,
    accuracy_lead: float | None = None,
    attack: LossAttack | None = None,
) -> tuple[str, list[str]]:
    """ "ok", "check" or "retrain", and the reasons.

    Args:
        calibration: of what was taken, with the held-out loss before and with the step.
        relative_step: ‖Δ‖ / ‖θ‖. The picture is first-order: it ends where steps are long.
        share_forgotten: of all training rows, by this and earlier requests.
        kronecker_share: share of the parameters whose curvature is more than a diagonal.
        whole_class: the class that was removed altogether, if any.
        retained_accuracy_lost: accuracy on a sample of retained rows, before minus after. An overconfident model's
            held-out loss may fall while it forgets what it should keep.
        accuracy_lead: accuracy on the forget rows minus that on held-out rows, after the step, where the forget rows
            are like any others; a retrained model has about 0.
        attack: the loss attack on the same rows, after the step.
    """
    grave: list[str] = []
    mild: list[str] = []
    if whole_class is not None:
        grave.append(f"all rows of class {whole_class} were removed, which one step cannot do as retraining would")
    if relative_step >= TOO_LONG_STEP:
        grave.append(f"the step is {relative_step:.0%} of the weights' norm, beyond a first-order picture")
    elif relative_step >= LONG_STEP:
        mild.append(f"the step is {relative_step:.0%} of the weights' norm")
    before, after = calibration.held_out_loss_before, calibration.held_out_loss
    if before is not None and after is not None:
        drift = (after - before) / max(abs(before), 1e-12)
        if not drift < TOO_MUCH_DRIFT:
            grave.append(f"the held-out loss rose by {drift:.0%}")
        elif drift >= DRIFT:
            mild.append(f"the held-out loss rose by {drift:.0%}")
    if retained_accuracy_lost >= TOO_MUCH_LOST:
        grave.append(f"accuracy on retained rows fell by {100 * retained_accuracy_lost:.1f} points")
    elif retained_accuracy_lost >= _LOST:
        mild.append(f"accuracy on retained rows fell by {100 * retained_accuracy_lost:.1f} points")
    if accuracy_lead is not None and abs(accuracy_lead) >= _LEAD:
        better = "better" if accuracy_lead > 0 else "worse"
        mild.append(
            f"the forget rows are predicted {100 * abs(accuracy_lead):.1f} points {better} than held-out rows, which a "
            "retrained model would not do"
        )
    if attack is not None and abs(away := attack.auc - attack.expected) > max(
        _AUC_AWAY, _STANDARD_ERRORS * attack.standard_error
    ):
        tells = "still tells the forget rows" if away > 0 else "tells the forget rows, whose losses rose too far,"
        mild.append(
            f"a loss attack {tells} from held-out rows: AUC {attack.auc:.2f}; a retrained model would be at "
            f"{attack.expected:.2f}"
        )
    if share_forgotten >= TOO_LARGE_SHARE:
        grave.append(f"{share_forgotten:.0%} of the training rows are forgotten by now")
    elif share_forgotten >= LARGE_SHARE:
        mild.append(f"{share_forgotten:.0%} of the training rows are forgotten by now")
    if calibration.source == "uncalibrated":
        of_class = "" if whole_class is None else f" of class {whole_class}"
        mild.append(f"the step was not calibrated, for want of held-out rows{of_class}")
    elif calibration.source == "given" and not calibration.reached:
        mild.append("the step given was longer than max_relative_step allows and was shortened")
    elif calibration.source == "multi-step" and not calibration.reached:
        mild.append(f"the walk stopped with {calibration.criterion:.0%} of its way left")
    elif not calibration.reached:
        mild.append("calibration did not reach its target within the longest step allowed")
    if calibration.relative_spread >= _SPREAD:
        mild.append(f"the proxy draws disagree on the length (by a factor of {1 + calibration.relative_spread:.1f})")
    if kronecker_share < _LITTLE_CURVATURE:
        mild.append(f"only {kronecker_share:.0%} of the parameters have curvature beyond a diagonal")
    if calibration.halvings:
        mild.append(f"the step was halved {calibration.halvings} times to spare other rows")
    if grave:
        return RETRAIN, grave + mild
    if mild:
        return CHECK, mild
    target = (
        "the forget rows are known about as well as held-out rows are"
        if calibration.source == "multi-step"
        else "values taken as given"
        if calibration.source == "given"
        else "calibration on target"
    )
    return OK, [f"short step, held-out loss kept, {target}"]
