"""A request as the methods see it, and what they answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from hf_iau.errors import MissingMemoryError
from hf_iau.objective import RowLoss, RowSource
from hf_iau.objective.rows import row_bytes
from hf_iau.phases import PhaseTimer
from hf_iau.remember import GradientMemory


@dataclass
class ForgetContext:
    """All that a method may use to serve one request.

    Attributes:
        model: the bare model; a method changes it in place, inside a transaction.
        row_loss: ℓ.
        forget: the rows to forget.
        memory: what was gathered, checked against the model; None where there is none.
        train: all training rows (forget rows among them), where the trainer has them.
        forget_positions: the forget rows' numbers in `train`, where the request named them so.
        retain: all retained rows, only where the caller gave `retain_dataset`.
        held_out: rows that were never trained on, for calibration.
        excluded: digests of rows that are out: forgotten now or earlier.
        digests: digests of the forget rows, with how often each occurs.
        fingerprints: keyed fingerprints of the forget rows in their order, uint8 `(m, 16)`; None without a key.
        seed, progress, timer: as their names say.
    """

    model: nn.Module
    row_loss: RowLoss
    forget: RowSource
    memory: GradientMemory | None = None
    train: RowSource | None = None
    forget_positions: np.ndarray | None = None
    retain: RowSource | None = None
    held_out: RowSource | None = None
    excluded: set[bytes] = field(default_factory=set)
    digests: Counter[bytes] = field(default_factory=Counter)
    fingerprints: np.ndarray | None = None
    label_counts: Mapping[str, int] | None = None
    seed: int = 0
    progress: bool = False
    timer: PhaseTimer = field(default_factory=PhaseTimer)

    @property
    def prediction_batch_size(self) -> int:
        """Rows a batch where no gradients are taken."""
        return self.held_out.batch_size if self.held_out is not None else self.forget.batch_size

    def require_memory(self, method: str) -> GradientMemory:
        """The memory, or an error that says how to get one."""
        if self.memory is None:
            raise MissingMemoryError(
                f"method={method!r} needs a gradient memory and there is none. Train with callbacks=[IAUCallback()], "
                "give memory=hf_iau.gather(model, train_dataset), or load one with GradientMemory.load(dir)."
            )
        return self.memory

    def retained_sample(self, size: int, seed: int, name: str = "retained rows") -> RowSource | None:
        """Up to `size` retained rows: drawn from `retain` where given, else training rows that are not excluded."""
        if self.retain is not None:
            return self.retain.sample(size, seed, name)
        if self.train is None:
            return None
        out = set(self.forget_positions.tolist()) if self.forget_positions is not None else set()
        order = np.random.default_rng(seed).permutation(len(self.train))
        chosen: list[int] = []
        for position in order.tolist():
            if len(chosen) == size:
                break
            if position in out or (self.excluded and row_bytes(self.train.dataset[position]) in self.excluded):
                continue
            chosen.append(position)
        return self.train.select(np.sort(np.asarray(chosen, dtype=np.int64)), name) if chosen else None


@dataclass
class MethodOutcome:
    """What a method tells about its work, beside the changed weights.

    Attributes:
        forget_sum: Σ_f at the old weights, float64, where the method computed it.
        forget_targets: targets of the forget rows.
        diagnostics: JSON for the report.
        calibrated: whether the step was calibrated; None for methods that do not calibrate.
        verdict: "safe", "check" or "retrain", where the method judges.
        warnings: sentences for people.
        calibration: what to remember for later requests.
    """

    forget_sum: dict[str, Tensor] | None = None
    forget_targets: int | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    calibrated: bool | None = None
    verdict: str | None = None
    warnings: list[str] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
