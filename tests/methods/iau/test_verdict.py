"""When to trust a step, when to check it and when to retrain."""

from __future__ import annotations

import pytest

from hf_iau.methods.iau.step_search import Calibration
from hf_iau.methods.iau.verdict import CHECK, OK, RETRAIN, LossAttack, Observations, assess


def good(**changes):
    values = {"scale": 0.5, "damping": 0.1, "retain_weight": 0.0, "source": "proxies"}
    values |= {"held_out_loss_before": 1.0, "held_out_loss": 1.02, "scales": [0.5, 0.55]}
    return Calibration(**(values | changes))


@pytest.mark.parametrize(
    ("calibration", "other", "verdict", "word"),
    [
        (good(), {}, OK, "calibration"),
        (good(), {"relative_step": 0.4}, CHECK, "weights' norm"),
        (good(), {"relative_step": 0.7}, RETRAIN, "first-order"),
        (good(held_out_loss=1.2), {}, CHECK, "held-out loss rose"),
        (good(held_out_loss=1.5), {}, RETRAIN, "held-out loss rose"),
        (good(held_out_loss=float("nan")), {}, RETRAIN, "held-out loss rose"),
        (good(), {"share_forgotten": 0.2}, CHECK, "forgotten"),
        (good(), {"share_forgotten": 0.5}, RETRAIN, "forgotten"),
        (good(), {"whole_class": 3}, RETRAIN, "class 3"),
        (good(), {"kronecker_share": 0.2}, CHECK, "diagonal"),
        (good(reached=False), {}, CHECK, "target"),
        (good(scales=[0.2, 0.9]), {}, CHECK, "disagree"),
        (good(source="uncalibrated", held_out_loss=None, held_out_loss_before=None), {}, CHECK, "not calibrated"),
        (good(source="uncalibrated"), {"whole_class": 3}, RETRAIN, "for want of held-out rows of class 3"),
        (good(source="multi-step", reached=False, criterion=0.34), {}, CHECK, "34% of the way to their targets left"),
        (good(halvings=2), {}, CHECK, "halved 2"),
        (good(), {"retained_accuracy_lost": 0.07}, CHECK, "retained rows fell by 7.0"),
        (good(), {"retained_accuracy_lost": 0.2}, RETRAIN, "retained rows fell by 20.0"),
        (good(source="multi-step"), {}, OK, "known about as well as held-out rows"),
        (good(source="multi-step"), {"accuracy_gap": 0.12}, CHECK, "12.0 points better"),
        (good(), {"accuracy_gap": -0.08}, CHECK, "8.0 points worse"),
        (good(), {"accuracy_gap": 0.01}, OK, "calibration"),
        (
            good(),
            {"attack": LossAttack(0.96, 0.50, 0.02)},
            CHECK,
            "still tells the forget rows from held-out rows: AUC 0.96",
        ),
        (
            good(source="multi-step"),
            {"attack": LossAttack(0.58, 0.52, 0.02)},
            CHECK,
            "a retrained model would be at 0.52",
        ),
        (
            good(),
            {"attack": LossAttack(0.31, 0.50, 0.02)},
            CHECK,
            "whose losses rose too far, from held-out rows: AUC 0.31",
        ),
        (good(), {"attack": LossAttack(0.58, 0.55, 0.01)}, OK, "calibration"),  # an easy draw
        (good(), {"attack": LossAttack(0.549, 0.50, 0.01)}, OK, "calibration"),
        (good(), {"attack": LossAttack(0.62, 0.50, 0.07)}, OK, "calibration"),  # few rows
        (good(), {"attack": LossAttack(0.35, 0.50, 0.07)}, CHECK, "AUC 0.35"),
        (good(source="remembered", held_out_loss=1.5), {}, RETRAIN, "held-out loss rose"),
        (good(source="remembered", reached=False), {}, CHECK, "target"),
        (good(source="given", reached=False), {}, CHECK, "max_relative_step"),
    ],
)
def test_verdicts(calibration, other, verdict, word):
    figures = {"relative_step": 0.1, "share_forgotten": 0.05, "kronecker_share": 1.0, "whole_class": None} | other
    said, reasons = assess(calibration, Observations(**figures))
    assert said == verdict
    assert any(word in reason for reason in reasons)
