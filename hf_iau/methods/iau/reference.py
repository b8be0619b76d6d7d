"""What k and λ rest on: the forget rows themselves, proxies, a class's share, or an earlier answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from hf_iau.data import RowPredictions
from hf_iau.errors import CalibrationError
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ROWS_LOOKED_AT, ForgetContext
from hf_iau.methods.iau.config import ENOUGH_FORGET_ROWS, FEWEST_COMPARED_ROWS, FEWEST_HELD_OUT_ROWS, IAUConfig
from hf_iau.methods.iau.label_support import LabelSupport
from hf_iau.methods.iau.remembered import remembered_calibration
from hf_iau.methods.iau.states import InitialState
from hf_iau.methods.iau.trial import auc_distance

# A random draw fails one of two tests at 1 % in 2 % of the cases; proxies then serve it as well.
_SIGNIFICANCE = 0.01


@dataclass(frozen=True)
class ShiftTest:
    """Outcome of comparing forget rows with other training rows, at the same weights.

    Attributes:
        loss_p: two-sample Kolmogorov-Smirnov test of the row losses.
        label_p: chi-squared test of the label counts; None where rows have no one class.
        passed: neither rejects at 1 %.
    """

    loss_p: float
    label_p: float | None
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def shift_test(forget: RowPredictions, others: RowPredictions) -> ShiftTest:
    """Compare the losses and labels of the forget rows with those of other training rows.

    Mislabelled rows, one person's rows or a whole class differ from a random draw; for those an AUC of one half against
    held-out rows is not what a retrained model shows, and proxies have to be used (statistics: SciPy).
    """
    loss_p = float(stats.ks_2samp(_finite(forget.loss), _finite(others.loss)).pvalue)
    label_p = None
    ours, theirs = _finite(forget.label), _finite(others.label)
    if ours.size and theirs.size:
        classes = np.unique(np.concatenate([ours, theirs]))
        if classes.size > 1:
            table = np.array([[np.sum(labels == c) for c in classes] for labels in (ours, theirs)])
            label_p = float(stats.chi2_contingency(table).pvalue)
    passed = loss_p >= _SIGNIFICANCE and (label_p is None or label_p >= _SIGNIFICANCE)
    return ShiftTest(loss_p, label_p, passed)


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


@dataclass
class CalibrationReference:
    """What calibration of a request rests on.

    Attributes:
        source: a `Calibration.source`.
        whole_class: the class whose every remaining training row is in the request, if it is one.
        advantage: AUC of the loss attack on a large sample of retained rows, minus one half: how much better the model
            does on rows that it was trained on. None where that was not measured, or does not count.
        shift: whether the forget rows are like any other training rows; None where they are too few, or there are too
            few others, to tell.
        support: which forget rows have a label that nothing else supports; None where they are like any others, or it
            could not be told.
        warnings: sentences for people.
    """

    source: str
    whole_class: int | None = None
    advantage: float | None = None
    shift: ShiftTest | None = None
    support: LabelSupport | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def has_unsupported(self) -> bool:
        """Whether there are rows whose label nothing else supports."""
        return self.support is not None and bool(self.support.unsupported.any())

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
            "label_support": None if self.support is None else self.support.to_dict(),
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
            f"Every row of class {label} is to be forgotten. One step cannot remove a class as retraining would: "
            "retrain if you can."
        )
        return CalibrationReference("class share", whole_class=label, warnings=[warning])
    reference = CalibrationReference("proxies")
    if initial.retained_rows is not None and len(initial.retained_rows) >= ENOUGH_FORGET_ROWS:
        reference.advantage = auc_distance(initial.retained, initial.held_out)
        if len(context.forget) >= FEWEST_COMPARED_ROWS:
            reference.shift = shift_test(initial.forget, initial.retained)
    if config.multi_step and config.is_free and (context.reason is not None or _is_unlike_others(reference)):
        reference.support = initial.label_support(context.reason)
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


def _is_unlike_others(reference: CalibrationReference) -> bool:
    return reference.shift is not None and not reference.shift.passed


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
    forget = initial.every_forget_row().label
    labels = set(forget[np.isfinite(forget)].tolist())
    if len(labels) != 1:
        return None
    retained = initial.retained.label
    return None if labels & set(retained[np.isfinite(retained)].tolist()) else int(labels.pop())


def check_calibratable(context: ForgetContext, config: IAUConfig, memory: GradientMemory) -> None:
    """Raise a clear error where calibration would have nothing to rest on, or a false target.

    Raises:
        CalibrationError: too few held-out rows; or a single forget row, and no other training rows.
        MemoryFileError: the memory's calibration is malformed.
    """
    if config.is_given or context.held_out is None:
        return
    if len(context.held_out) < FEWEST_HELD_OUT_ROWS:
        raise CalibrationError(
            f"held_out_dataset has {len(context.held_out)} rows, too few to calibrate with: give at least "
            f"{FEWEST_HELD_OUT_ROWS} rows that were never trained on ({ROWS_LOOKED_AT:,} are better), or set "
            "IAUConfig(scale=…, damping=…) yourself."
        )
    if (
        len(context.forget) < 2
        and context.train is None
        and context.retain is None
        and remembered_calibration(config, memory) is None
    ):
        raise CalibrationError(
            "A single forget row cannot set the target of calibration, and the trainer has no other training rows to "
            "try steps on: give it its train_dataset, pass retain_dataset=, or set IAUConfig(scale=…, damping=…)."
        )
