"""How much better some rows are known than held-out rows of the same rank: what a walk is to make up for.

Of token prediction every token has a target of its own. A row of text has tokens that are hard to guess (a name, a date) and
tokens that anyone knows; a mean loss over the row would be reached by making a few tokens impossible while the rest are still
recited. So a row's counterpart among the held-out rows is looked up by the mean loss, as for any row, and the row's
tokens get the losses of the counterpart's, the best known token that of the best known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hf_iau.data import RowPredictions
from hf_iau.data.targets import TaskKind
from hf_iau.evaluation.attacks import attack_auc
from hf_iau.methods.iau.step_search import standard_error_of_auc

_SOFTNESS = 4.0  # τ
# A language model that knows its texts by heart finds others far less likely than a classifier ever finds a class: where
# losses of 6 and 12 are all but the same, rows are left that anyone can tell from held-out ones.
_SOFTNESS_OF_TOKENS = 16.0
# A loss attack that is no better than chance so often is.
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class ForgetTargets:
    """How far some rows are from being known only as well as held-out rows are.

    Attributes:
        targets: float64, the loss T that each row is to reach, `(rows,)`, or each token, `(rows, most tokens of a row)`;
            NaN where there is none.
        scale: losses are divided by it before p = exp(−ℓ/scale); 1 but for regression.
        at_start: mean shortfall at the weights that the targets were made at.
        lead_at_start: where tokens have the targets, how much better than chance a loss attack on the rows was there: AUC
            above one half against rows with the mean losses that they are to reach.
        softness: τ in q = σ(φ/τ).
    """

    targets: np.ndarray
    scale: float
    at_start: float
    lead_at_start: float = 0.0
    softness: float = _SOFTNESS

    @classmethod
    def of(cls, rows: RowPredictions, known: RowPredictions, held_out: RowPredictions) -> ForgetTargets:
        """Targets of `rows` by their rank among `known` training rows, all at the same weights."""
        loss, unseen = known.loss[known.targets > 0], held_out.loss[np.isfinite(held_out.loss)]
        ordered = np.sort(loss)
        below = np.searchsorted(ordered, rows.loss, side="left") + np.searchsorted(ordered, rows.loss, side="right")
        rank = np.clip(below / (2.0 * len(ordered)), 0.5 / len(ordered), 1.0 - 0.5 / len(ordered))
        scale = max(float(unseen.mean()), 1e-12) if rows.kind is TaskKind.REGRESSION else 1.0
        # A row without a target has no loss, and none to reach.
        if rows.token_losses is None:
            targets = np.where(rows.targets > 0, np.quantile(unseen, rank), np.nan)
        else:
            assert held_out.token_losses is not None
            counterparts = np.flatnonzero(np.isfinite(held_out.loss))[np.argsort(unseen)]
            places = np.clip((rank * len(counterparts)).astype(int), 0, len(counterparts) - 1)
            targets = _by_place(rows.token_losses, held_out.token_losses[counterparts[places]])
        new = cls(targets, scale, 0.0, softness=_SOFTNESS if targets.ndim == 1 else _SOFTNESS_OF_TOKENS)
        losses = rows.target_losses
        lead, chance = new.lead_of_rows(losses), standard_error_of_auc(len(rows), len(rows))
        return replace(new, at_start=new.mean(losses), lead_at_start=lead if lead > _STANDARD_ERRORS * chance else 0.0)

    def doubt(self, losses: np.ndarray) -> np.ndarray:
        """1 − p of each, above 0."""
        return -np.expm1(-np.maximum(losses.astype(np.float64) / self.scale, 1e-7))

    def known(self, losses: np.ndarray) -> np.ndarray:
        """q of each, between 0 and 1."""
        odds = np.expm1(np.clip(losses.astype(np.float64) / self.scale, 1e-7, 500.0))
        return 1.0 / (1.0 + odds ** (1.0 / self.softness))

    def each(self, losses: np.ndarray, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """s of each row or token, or of the rows at `positions`, whose losses are given; 0 where there is no target."""
        targets = self.targets[positions]
        if losses.ndim == 2:  # the rows of a batch may all be shorter than others
            targets = targets[:, : losses.shape[1]]
        found = np.zeros(losses.shape)
        there = ~(np.isnan(losses) | np.isnan(targets))
        found[there] = np.maximum(self.known(losses[there]) - self.known(targets[there]), 0.0)
        return found

    def weights(self, losses: np.ndarray, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """s/(1−p) of each row or token: what its plain gradient is multiplied by."""
        found = self.each(losses, positions)
        there = found > 0.0
        found[there] /= self.doubt(losses[there])
        return found

    def mean(self, losses: np.ndarray) -> float:
        """The same between the two distributions: sorted against sorted, so that rows (or tokens) may change places."""
        counted = np.isfinite(losses) & np.isfinite(self.targets)
        now, then = np.sort(self.known(losses[counted])), np.sort(self.known(self.targets[counted]))
        return float(np.maximum(now - then, 0.0).mean()) if len(now) else 0.0

    def share_left(self, losses: np.ndarray) -> float:
        """`mean` as a share of what it was at the start; 0 where there was nothing to do."""
        return self.mean(losses) / self.at_start if self.at_start > 0 else 0.0

    def remaining(self, losses: np.ndarray) -> float:
        """What is left of the way, as a share; infinite where a loss is not finite.

        Of tokens the larger share of two: the tokens', and that of the attack on the rows. What is left of each token may be
        small, and add up over a row to what tells it from any other.
        """
        if not np.isfinite(losses[np.isfinite(self.targets)]).all():
            return float("inf")
        left = self.share_left(losses)
        return max(left, self.lead_of_rows(losses) / self.lead_at_start) if self.lead_at_start > 0 else left

    def lead_of_rows(self, losses: np.ndarray) -> float:
        """AUC of the loss attack on rows of tokens, against rows that are where they are to be, above one half; else 0."""
        if losses.ndim == 1:
            return 0.0
        now, then = (means[np.isfinite(means)] for means in (_row_means(losses), _row_means(self.targets)))
        if len(now) < 2:
            return 0.0
        return max(float(attack_auc(RowPredictions.from_losses(now), RowPredictions.from_losses(then))) - 0.5, 0.0)


def _by_place(losses: np.ndarray, counterparts: np.ndarray) -> np.ndarray:
    """For each row's tokens the losses of its counterpart's tokens at the same place in the order of losses.

    Where the rows differ in length, a token gets the mean over its part of the counterpart's sorted losses, so that the targets
    of a row have the counterpart's mean loss whatever its length: tokens' losses are so skewed that quantiles would not.

    Args:
        losses: `(rows, width)`, NaN beyond a row's end.
        counterparts: `(rows, another width)`, likewise, at least one loss a row.
    """
    targets = np.full(losses.shape, np.nan)
    for target, own, other in zip(targets, losses, counterparts, strict=True):
        here, sorted_ = np.flatnonzero(np.isfinite(own)), np.sort(other[np.isfinite(other)].astype(np.float64))
        if not len(here):
            continue
        sums = np.concatenate([[0.0], np.cumsum(sorted_)]) / len(sorted_)
        bounds = np.interp(np.linspace(0.0, 1.0, len(here) + 1), np.linspace(0.0, 1.0, len(sums)), sums)
        target[here[np.argsort(own[here], kind="stable")]] = len(here) * np.diff(bounds)
    return targets


def _row_means(losses: np.ndarray) -> np.ndarray:
    """`(rows,)`, NaN for a row without any."""
    there = np.isfinite(losses)
    sums: np.ndarray = np.where(there, losses, 0.0).sum(axis=1, dtype=np.float64)
    return np.where(there.any(axis=1), sums / np.maximum(there.sum(axis=1), 1), np.nan)
