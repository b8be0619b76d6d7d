"""Calibration: how long the step is, without a retrained model and without knobs."""

from hf_iau.calibrate.basis import Basis, choose_basis
from hf_iau.calibrate.calibration import Calibration, calibrate, conservative_calibration, finish
from hf_iau.calibrate.config import IAUConfig
from hf_iau.calibrate.decision import Decision, decide
from hf_iau.calibrate.directions import Directions
from hf_iau.calibrate.duplicates import DuplicateSearch, find_near_duplicates
from hf_iau.calibrate.exchangeability import ShiftTest, shift_test
from hf_iau.calibrate.outset import Outset
from hf_iau.calibrate.requirements import check_calibratable
from hf_iau.calibrate.search import calibrate_on_proxies, calibrate_on_request
from hf_iau.calibrate.shortfall import Shortfall
from hf_iau.calibrate.trial import Trial, TrialRunner
from hf_iau.calibrate.verdict import judge
from hf_iau.calibrate.walk import Walk, walk

__all__ = [
    "Basis",
    "Calibration",
    "Decision",
    "Directions",
    "DuplicateSearch",
    "IAUConfig",
    "Outset",
    "ShiftTest",
    "Shortfall",
    "Trial",
    "TrialRunner",
    "Walk",
    "calibrate",
    "calibrate_on_proxies",
    "calibrate_on_request",
    "check_calibratable",
    "choose_basis",
    "conservative_calibration",
    "decide",
    "find_near_duplicates",
    "finish",
    "judge",
    "shift_test",
    "walk",
]
