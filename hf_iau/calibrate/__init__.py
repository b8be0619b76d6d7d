"""Calibration: how long the step is, without a retrained model and without knobs."""

from hf_iau.calibrate.calibration import Calibration, calibrate, conservative_calibration, finish
from hf_iau.calibrate.duplicates import DuplicateSearch, find_near_duplicates
from hf_iau.calibrate.exchangeability import ShiftTest, shift_test
from hf_iau.calibrate.trial import Directions, Trial, TrialRunner
from hf_iau.calibrate.walk import Shortfall, Walk, walk

__all__ = [
    "Calibration",
    "Directions",
    "DuplicateSearch",
    "ShiftTest",
    "Shortfall",
    "Trial",
    "TrialRunner",
    "Walk",
    "calibrate",
    "conservative_calibration",
    "find_near_duplicates",
    "finish",
    "shift_test",
    "walk",
]
