"""What a request needs to be calibrated, checked before any compute is spent."""

from __future__ import annotations

import numpy as np

from hf_iau.data.rows import row_bytes
from hf_iau.errors import CalibrationError, RequestError
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.iau.config import FEWEST_HELD_OUT_ROWS, IAUConfig
from hf_iau.methods.iau.remembered import remembered_calibration

_OVERLAP_ROWS, _OVERLAP_HELD_OUT_ROWS = 2000, 512


def check_calibratable(context: ForgetContext, config: IAUConfig, memory: GradientMemory) -> None:
    """Raise a clear error where calibration would have nothing to rest on, or a false target.

    Raises:
        CalibrationError: too few held-out rows; or a single forget row, and no other training rows.
        RequestError: the held-out rows were trained on.
        MemoryFileError: the memory's calibration is malformed.
    """
    if config.is_given or context.held_out is None:
        return
    if len(context.held_out) < FEWEST_HELD_OUT_ROWS:
        raise CalibrationError(
            f"held_out_dataset has {len(context.held_out)} rows, too few to calibrate with: give at least "
            f"{FEWEST_HELD_OUT_ROWS} rows that were never trained on (2,000 are better), or set IAUConfig(scale=…, "
            "damping=…) yourself."
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
    _refuse_overlap(context)


def _refuse_overlap(context: ForgetContext) -> None:
    """Held-out rows that are being forgotten, or were trained on, would set a false target."""
    assert context.held_out is not None
    probe = context.held_out.sample(_OVERLAP_HELD_OUT_ROWS, context.seed)
    digests = {row_bytes(probe.dataset[i]) for i in range(len(probe))}
    shared, looked_at = len(digests & context.excluded), 1.0
    if not shared and context.train is not None:
        # The order in which retained rows are drawn: most of these are hashed for other reasons too.
        looked_for = np.random.default_rng(context.seed).permutation(len(context.train))[:_OVERLAP_ROWS]
        shared = sum(context.train.digest(int(i)) in digests for i in looked_for)
        looked_at = len(looked_for) / max(len(context.train), 1)
    # Real data sets hold a few exact duplicates; an overlap of sets is another matter.
    if shared > max(2, 0.02 * len(probe) * looked_at):
        raise RequestError(
            f"{shared} of {len(probe)} held-out rows looked at are training rows: a model treats those as known, so "
            "calibrating on them would forget nothing. Pass held_out_dataset= with rows that were never trained on."
        )
