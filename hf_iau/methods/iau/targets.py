"""How much better some rows are known than held-out rows of the same rank: what a multi-step update is to make up for.

Of token prediction every token has a target of its own. A row of text has tokens that are hard to guess (a name, a
date) and tokens that anyone knows; a mean loss over the row would be reached by making a few tokens impossible while
the rest are still recited. So a row's counterpart among the held-out rows is looked up by the mean loss, as for any
row, and the row's tokens get the losses of the counterpart's, the best known token that of the best known.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hf_iau.data import RowPredictions
from hf_iau.data.targets import TaskKind
from hf_iau.evaluation.attacks import attack_auc
from hf_iau.methods.iau.label_support import LabelSupport
from hf_iau.methods.iau.step_search import standard_error_of_auc

# τ: between probabilities (1), which hardly see rows that are known for sure, and log-odds, which see nothing else.
_SOFTNESS = 4.0
# A language model that knows its texts by heart finds others far less likely than a classifier ever finds a class:
# where losses of 6 and 12 are all but the same, rows are left that anyone can tell from held-out ones.
_SOFTNESS_OF_TOKENS = 16.0
# An attack within so many standard errors of one half may be chance (5 % by a normal distribution).
_STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class ForgetTargets:
    """How far some rows are from being known only as well as held-out rows are.

    Attributes:
        targets: float64, the loss T that each row is to reach, `(rows,)`, or each token, `(rows, most tokens of a
            row)`; NaN where there is none.
        loss_scale: losses are divided by it before p = exp(−ℓ/loss_scale); 1 but for regression.
        deficit_at_start: mean deficit at the weights that the targets were made at.
        advantage_at_start: where tokens have the targets, `attack_advantage` there; 0 where that may be chance.
        softness: τ in q = σ(φ/τ).
    """

    targets: np.ndarray
    loss_scale: float
    deficit_at_start: float
    advantage_at_start: float = 0.0
    softness: float = _SOFTNESS

    @classmethod
    def of(
        cls,
        rows: RowPredictions,
        retained: RowPredictions,
        held_out: RowPredictions,
        support: LabelSupport | None = None,
        positions: np.ndarray | None = None,
    ) -> ForgetTargets:
        """Targets of `rows` by their rank among `retained` training rows, all at the same weights.

        Args:
            rows, retained, held_out: what the model makes of the rows.
            support: which forget rows have a label that nothing else supports; those get targets of their own.
            positions: of `rows` among the forget rows, `(rows,)`; default: they are all of these.
        """
        loss, unseen = retained.loss[retained.targets > 0], held_out.loss[np.isfinite(held_out.loss)]
        ordered = np.sort(loss)
        below = np.searchsorted(ordered, rows.loss, side="left") + np.searchsorted(ordered, rows.loss, side="right")
        rank = np.clip(below / (2.0 * len(ordered)), 0.5 / len(ordered), 1.0 - 0.5 / len(ordered))
        loss_scale = max(float(unseen.mean()), 1e-12) if rows.kind is TaskKind.REGRESSION else 1.0
        # A row without a target has no loss, and none to reach.
        if rows.token_losses is None:
            targets = np.where(rows.targets > 0, np.quantile(unseen, rank), np.nan)
            if support is not None:
                targets = support.targets(targets, np.arange(len(rows)) if positions is None else positions)
        else:
            assert held_out.token_losses is not None
            counterparts = np.flatnonzero(np.isfinite(held_out.loss))[np.argsort(unseen)]
            places = np.clip((rank * len(counterparts)).astype(int), 0, len(counterparts) - 1)
            targets = _by_place(rows.token_losses, held_out.token_losses[counterparts[places]])
        new = cls(targets, loss_scale, 0.0, softness=_SOFTNESS if targets.ndim == 1 else _SOFTNESS_OF_TOKENS)
        losses = rows.target_losses
        advantage, chance = new.attack_advantage(losses), _STANDARD_ERRORS * standard_error_of_auc(len(rows), len(rows))
        return replace(
            new,
            deficit_at_start=new.mean_deficit(losses),
            advantage_at_start=advantage if advantage > chance else 0.0,
        )

    def error_probability(self, losses: np.ndarray) -> np.ndarray:
        """1 − p of each row or token, above 0."""
        return -np.expm1(-np.maximum(losses.astype(np.float64) / self.loss_scale, 1e-7))

    def soft_confidence(self, losses: np.ndarray) -> np.ndarray:
        """q of each row or token, between 0 and 1."""
        odds = np.expm1(np.clip(losses.astype(np.float64) / self.loss_scale, 1e-7, 500.0))
        return 1.0 / (1.0 + odds ** (1.0 / self.softness))

    def deficit(self, losses: np.ndarray, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """s of each row or token, or of the rows at `positions`, whose losses are given; 0 where there is no target."""
        targets = self.targets[positions]
        if losses.ndim == 2:  # the rows of a batch may all be shorter than others
            targets = targets[:, : losses.shape[1]]
        deficit = np.zeros(losses.shape)
        there = ~(np.isnan(losses) | np.isnan(targets))
        deficit[there] = np.maximum(self.soft_confidence(losses[there]) - self.soft_confidence(targets[there]), 0.0)
        return deficit

    def weights(self, losses: np.ndarray, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """s/(1−p) of each row or token: what its plain gradient is multiplied by."""
        weights = self.deficit(losses, positions)
        there = weights > 0.0
        weights[there] /= self.error_probability(losses[there])
        return weights

    def mean_deficit(self, losses: np.ndarray) -> float:
        """Mean deficit of the distribution: sorted against sorted, so that rows (or tokens) may change places."""
        counted = np.isfinite(losses) & np.isfinite(self.targets)
        now, then = np.sort(self.soft_confidence(losses[counted])), np.sort(self.soft_confidence(self.targets[counted]))
        return float(np.maximum(now - then, 0.0).mean()) if len(now) else 0.0

    def deficit_share(self, losses: np.ndarray) -> float:
        """`mean_deficit` as a share of what it was at the start; 0 where there was nothing to do."""
        return self.mean_deficit(losses) / self.deficit_at_start if self.deficit_at_start > 0 else 0.0

    def share_remaining(self, losses: np.ndarray) -> float:
        """What remains of the way, as a share; infinite where a loss is not finite.

        Of tokens the larger share of two: the tokens', and that of the attack on the rows. What remains of each token
        may be small, and add up over a row to what tells it from any other.
        """
        if not np.isfinite(losses[np.isfinite(self.targets)]).all():
            return float("inf")
        share = self.deficit_share(losses)
        if self.advantage_at_start <= 0:
            return share
        return max(share, self.attack_advantage(losses) / self.advantage_at_start)

    def attack_advantage(self, losses: np.ndarray) -> float:
        """AUC above one half of the loss attack on rows of tokens against rows with their targets' losses; else 0."""
        if losses.ndim == 1:
            return 0.0
        now, then = (means[np.isfinite(means)] for means in (_row_means(losses), _row_means(self.targets)))
        if len(now) < 2:
            return 0.0
        return max(float(attack_auc(RowPredictions.from_losses(now), RowPredictions.from_losses(then))) - 0.5, 0.0)


def _by_place(losses: np.ndarray, counterparts: np.ndarray) -> np.ndarray:
    """For each row's tokens the losses of its counterpart's tokens at the same place in the order of losses.

    Where the rows differ in length, a token gets the mean over its part of the counterpart's sorted losses, so that the
    targets of a row have the counterpart's mean loss whatever its length: tokens' losses are so skewed that quantiles
    would not.

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
