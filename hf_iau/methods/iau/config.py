"""What may be set of `iau`, and how many rows calibration needs to tell anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hf_iau.errors import ConfigError
from hf_iau.methods.context import ROWS_LOOKED_AT
from hf_iau.utils.config_checks import check_choice, check_number, is_finite

ENOUGH_FORGET_ROWS = 200
"""A forget set of this size sets its own target, if it passes the shift test: its AUC's standard error is 2 points."""
FEWEST_COMPARED_ROWS = 20
"""Fewer rows are not compared with others, for chance alone tells them apart; nor are many steps taken for them."""
FEWEST_HELD_OUT_ROWS = 100
"""For the error of an AUC against them to stay below 3 points."""


@dataclass(frozen=True)
class IAUConfig:
    """Configuration of `iau`. None means: calibrated.

    Parameters that control the step:
        scale, damping, retain_weight, retain_damping, max_relative_step.
    Parameters that control calibration:
        calibrate_on, damping_range, retain_weights, proxy_rows, held_out_rows, multi_step, recalibrate.
    Parameters that control the curvature:
        renew_curvature.

    Raises:
        ConfigError: a value is out of range.
    """

    scale: float | None = field(
        default=None, metadata={"help": "k, the scale of the step; 1 is the influence function's (Newton's)."}
    )
    damping: float | None = field(
        default=None, metadata={"help": "λ, relative to each layer's mean eigenvalue of the curvature."}
    )
    retain_weight: float | None = field(
        default=None,
        metadata={
            "help": "c, how much of the retain correction (the training's own unfinished step) to take along; 0: none."
        },
    )
    retain_damping: float = field(
        default=0.1,
        metadata={
            "help": "Least λ of the retain correction. In directions that C says are "
            "flat the retained rows' gradient sum is mostly noise of the sample, which a small λ would magnify."
        },
    )
    max_relative_step: float = field(
        default=0.5, metadata={"help": "Longest step allowed, relative to the norm of the weights."}
    )
    calibrate_on: str = field(
        default="auto",
        metadata={
            "help": "'proxies' (random training rows), 'forget-rows', or 'auto': the forget rows where there are at "
            "least 200 that look like any other training rows, else proxies."
        },
    )
    damping_range: Sequence[float] = field(
        default=(1e-3, 10.0), metadata={"help": "Smallest and largest λ that calibration may choose."}
    )
    retain_weights: Sequence[float] = field(default=(0.003, 0.01, 0.03), metadata={"help": "c to be tried beside 0."})
    proxy_rows: Sequence[int] = field(default=(512, 256), metadata={"help": "Size of each proxy draw."})
    held_out_rows: int = field(
        default=ROWS_LOOKED_AT,
        metadata={"help": f"Most held-out rows looked at in a trial, at least {FEWEST_HELD_OUT_ROWS}."},
    )
    multi_step: bool = field(
        default=True,
        metadata={
            "help": "Where one step does not arrive, or costs the held-out rows more than a tenth of their loss, and "
            "the request has at least 20 rows that look like any others, take many short steps instead; retained rows "
            "must be at hand."
        },
    )
    renew_curvature: float | None = field(
        default=0.25,
        metadata={
            "help": "Where the weights have moved farther than this share of their norm since the curvature was "
            "estimated, and retained rows are at hand, it is estimated anew first. None: never."
        },
    )
    recalibrate: bool = field(default=False, metadata={"help": "Calibrate anew though the memory knows the answer."})

    def __post_init__(self) -> None:
        for name in ("scale", "damping", "retain_weight", "renew_curvature"):  # None has a meaning of its own
            if getattr(self, name) is not None:
                check_number(self, name, at_least=0)
        check_number(self, "retain_damping", at_least=0)
        check_number(self, "max_relative_step", above=0, at_most=10)
        check_number(self, "held_out_rows", at_least=FEWEST_HELD_OUT_ROWS, whole=True)
        check_choice(self, "calibrate_on", ("auto", "proxies", "forget-rows"))
        if not _is_range(self.damping_range):
            raise ConfigError(
                f"IAUConfig(damping_range={self.damping_range}): give a smallest and a largest positive number."
            )
        if not all(is_finite(weight) and weight >= 0 for weight in self.retain_weights):
            raise ConfigError(f"IAUConfig(retain_weights={self.retain_weights}): give finite numbers >= 0, or none.")
        if not self.proxy_rows or any(rows < FEWEST_COMPARED_ROWS for rows in self.proxy_rows):
            raise ConfigError(
                f"IAUConfig(proxy_rows={self.proxy_rows}): give one or more sizes, each of at least "
                f"{FEWEST_COMPARED_ROWS} rows."
            )

    @property
    def is_given(self) -> bool:
        """Whether k and λ were both given, so that nothing is calibrated."""
        return self.scale is not None and self.damping is not None

    @property
    def is_free(self) -> bool:
        """Whether k, λ and c are all left to calibration."""
        return self.scale is None and self.damping is None and self.retain_weight is None


def _is_range(values: Sequence[float]) -> bool:
    return len(values) == 2 and all(map(is_finite, values)) and 0 < values[0] <= values[1]
