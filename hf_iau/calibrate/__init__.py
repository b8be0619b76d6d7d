"""Calibration: how long the step is, without a retrained model and without knobs."""

from hf_iau.calibrate.calibration import Calibration, calibrate, conservative_calibration, finish
from hf_iau.calibrate.exchangeability import ShiftTest, shift_test
from hf_iau.calibrate.trial import Directions, Trial, TrialRunner

__all__ = [
    "Calibration",
    "Directions",
    "ShiftTest",
    "Trial",
    "TrialRunner",
    "calibrate",
    "conservative_calibration",
    "finish",
    "shift_test",
]
