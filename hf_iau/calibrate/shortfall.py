"""How much better some rows are known than held-out rows of the same rank: what a walk is to make up for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_iau.objective import RowPredictions
from hf_iau.objective.targets import TaskKind

_SOFTNESS = 4.0  # τ


@dataclass(frozen=True)
class Shortfall:
    """How far some rows are from being known only as well as held-out rows are.

    Attributes:
        targets: `(rows,)` float64, the loss T that each row is to reach; NaN for rows without a target.
        scale: losses are divided by it before p = exp(−ℓ/scale); 1 but for regression.
        at_start: mean shortfall at the weights that the targets were made at.
    """

    targets: np.ndarray
    scale: float
    at_start: float

    @classmethod
    def of(cls, rows: RowPredictions, known: RowPredictions, held_out: RowPredictions) -> Shortfall:
        """Targets of `rows` by their rank among `known` training rows, all at the same weights."""
        loss, unseen = known.loss[known.targets > 0], held_out.loss[held_out.targets > 0]
        ordered = np.sort(loss)
        below = np.searchsorted(ordered, rows.loss, side="left") + np.searchsorted(ordered, rows.loss, side="right")
        rank = np.clip(below / (2.0 * len(ordered)), 0.5 / len(ordered), 1.0 - 0.5 / len(ordered))
        scale = max(float(unseen.mean()), 1e-12) if rows.kind is TaskKind.REGRESSION else 1.0
        # A row without a target has no loss, and none to reach.
        new = cls(np.where(rows.targets > 0, np.quantile(unseen, rank), np.nan), scale, 0.0)
        return cls(new.targets, scale, new.mean(rows.loss))

    def doubt(self, losses: np.ndarray) -> np.ndarray:
        """1 − p of each row, above 0."""
        return -np.expm1(-np.maximum(losses / self.scale, 1e-7))

    def known(self, losses: np.ndarray) -> np.ndarray:
        """q of each row, between 0 and 1."""
        return 1.0 / (1.0 + np.expm1(np.clip(losses / self.scale, 1e-7, 500.0)) ** (1.0 / _SOFTNESS))

    def each(self, losses: np.ndarray, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """s of each row, or of those at `positions`, whose losses are given; 0 where it has no target."""
        return np.nan_to_num(np.maximum(self.known(losses) - self.known(self.targets[positions]), 0.0))

    def weights(self, losses: np.ndarray, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """s/(1−p) of each row: what its plain gradient is multiplied by."""
        return np.nan_to_num(self.each(losses, positions) / self.doubt(losses))

    def mean(self, losses: np.ndarray) -> float:
        """The same between the two distributions: sorted against sorted, so that rows may change places."""
        counted = np.isfinite(losses)
        now, then = np.sort(self.known(losses[counted])), np.sort(self.known(self.targets[counted]))
        return float(np.maximum(now - then, 0.0).mean()) if len(now) else 0.0

    def remaining(self, losses: np.ndarray) -> float:
        """`mean` as a share of what it was at the start; 0 where there was nothing to do."""
        if not np.isfinite(losses[np.isfinite(self.targets)]).all():
            return float("inf")
        return self.mean(losses) / self.at_start if self.at_start > 0 else 0.0
