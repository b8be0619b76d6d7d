"""What k and λ rest on: the forget rows themselves, proxies, a class's share, or an earlier answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.iau.config import ENOUGH_FORGET_ROWS, FEWEST_COMPARED_ROWS, IAUConfig
from hf_iau.methods.iau.exchangeability import ShiftTest, shift_test
from hf_iau.methods.iau.initial_state import InitialState
from hf_iau.methods.iau.remembered import remembered_calibration
from hf_iau.methods.iau.trial import auc_distance


@dataclass
class CalibrationReference:
    """What calibration of a request rests on.

    Attributes:
        source: a `Calibration.source`.
        whole_class: the class whose every remaining training row is in the request, if it is one.
        advantage: AUC of the loss attack on a large sample of retained rows, minus one half: how much better a known
            row is treated. None where that was not looked at, or is not to be reckoned with.
        shift: whether the forget rows are like any other training rows; None where they are too few, or there are too
            few others, to tell.
        warnings: sentences for people.
    """

    source: str
    whole_class: int | None = None
    advantage: float | None = None
    shift: ShiftTest | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def like_any_others(self) -> bool:
        """Whether the forget rows are known to be like any other training rows."""
        return self.shift is not None and self.shift.passed

    def to_dict(self) -> dict[str, Any]:
        """What the report tells of it, plain JSON."""
        if self.source in ("given", "uncalibrated"):
            return {}
        if self.whole_class is not None:
            return {"whole_class": self.whole_class}
        return {
            "advantage_of_training_rows": self.advantage,
            "shift_test": None if self.shift is None else self.shift.to_dict(),
        }


def choose_reference(
    context: ForgetContext, config: IAUConfig, memory: GradientMemory, initial: InitialState
) -> CalibrationReference:
    """What k and λ of this request are to rest on."""
    if config.is_given:
        return CalibrationReference("given")
    if initial.held_out_rows is None:
        warning = (
            "There are no held-out rows, so the step was not calibrated: a short, norm-bounded one was taken. Pass "
            "held_out_dataset= (or eval_dataset=) to calibrate."
        )
        return CalibrationReference("uncalibrated", warnings=[warning])
    label = find_whole_class(context, memory, initial)
    if label is not None:
        warning = (
            f"Every row of class {label} is to be forgotten. One step cannot remove a class as retraining would: retrain "
            "if you can."
        )
        return CalibrationReference("class share", whole_class=label, warnings=[warning])
    reference = CalibrationReference("proxies")
    if initial.retained_rows is not None and len(initial.retained_rows) >= ENOUGH_FORGET_ROWS:
        reference.advantage = auc_distance(initial.retained, initial.held_out)
        if len(context.forget) >= FEWEST_COMPARED_ROWS:
            reference.shift = shift_test(initial.forget, initial.retained)
    if remembered_calibration(config, memory) is not None:
        reference.source = "remembered"
        return reference
    own = len(context.forget) >= ENOUGH_FORGET_ROWS and reference.like_any_others
    no_proxies = context.train is None and context.retain is None
    if config.calibrate_on == "forget-rows" or (config.calibrate_on == "auto" and own) or no_proxies:
        reference.source = "forget rows"
        if no_proxies and config.calibrate_on != "forget-rows" and not own:
            reference.advantage = None
            reference.warnings.append(
                "The trainer has no train_dataset to draw proxy rows from, so the forget rows themselves set the "
                "target; that is unreliable for few or unusual rows."
            )
    return reference


def find_whole_class(context: ForgetContext, memory: GradientMemory, initial: InitialState) -> int | None:
    """The class whose every remaining training row is in the request, if there is just one class in it.

    Known from the memory's counts of labels, or, where a data set has none, from a large sample of retained rows
    without a single row of that class.
    """
    if memory.label_counts and context.label_counts:
        if len(context.label_counts) != 1 or len(memory.label_counts) < 2:
            return None
        (label, count), *_ = context.label_counts.items()
        return int(label) if memory.label_counts.get(label) == count else None
    if (
        initial.retained_rows is None
        or len(initial.retained_rows) < ENOUGH_FORGET_ROWS
        or len(context.forget) < FEWEST_COMPARED_ROWS
    ):
        return None
    asked = initial.every_forget_row().label
    labels = set(asked[np.isfinite(asked)].tolist())
    if len(labels) != 1:
        return None
    left = initial.retained.label
    return None if labels & set(left[np.isfinite(left)].tolist()) else int(labels.pop())
