"""One model measured once on forget, retained, held-out and test rows, by forward passes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import nn

from hf_iau.data.predictions import RowPredictions, predict_rows
from hf_iau.data.rows import RowSource
from hf_iau.errors import IAUError, NonFiniteGradientError, RequestError
from hf_iau.evaluation.attacks import AttackResult, all_attacks, attack_auc
from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES, Figures
from hf_iau.evaluation.intervals import (
    MISSING,
    RESAMPLES,
    Interval,
    check_resamples,
    proportion_interval,
    ratio_interval,
)


@dataclass(frozen=True)
class Measurement:
    """What a model makes of each set of rows; None for a set that was not given.

    Attributes:
        forget: the forget rows.
        retain: the retained rows, or the caller's sample of them.
        held_out: rows never trained on, which calibration may look at.
        test: rows never trained on, which nothing but the measurement looks at.
    """

    forget: RowPredictions
    retain: RowPredictions | None = None
    held_out: RowPredictions | None = None
    test: RowPredictions | None = None

    @property
    def unseen_split(self) -> Literal["test", "held_out"] | None:
        """The set that the forget rows are compared with: the test rows, else the held-out rows, else None."""
        if self.test is not None:
            return "test"
        return "held_out" if self.held_out is not None else None

    @property
    def unseen(self) -> RowPredictions | None:
        """The rows of `unseen_split`."""
        return self.test if self.test is not None else self.held_out

    @property
    def per_row_suppressed(self) -> bool:
        """Whether too few forget rows have a target for anything but means over them."""
        return rows_with_targets(self.forget) < MINIMUM_ROWS_FOR_PER_ROW_FIGURES

    def figures(self, *, attacks: bool = True, bootstrap: int = RESAMPLES, seed: int = 0) -> Figures:
        """The figures of the four sets.

        Args:
            attacks: also run every attack; the loss attack's AUC is always there.
            bootstrap: resamples of each interval that is bootstrapped; 0 for no intervals at all.
            seed: of the resampling.

        An attack that cannot be made (fewer than 2 rows on a side) gives None; one on a model whose loss is NaN gives
        NaN. With fewer than `MINIMUM_ROWS_FOR_PER_ROW_FIGURES` forget rows the attacks' operating points are withheld.

        Raises:
            ConfigError: for a negative `bootstrap`.
        """
        check_resamples(bootstrap)
        values: dict[str, float | None] = {}
        intervals: dict[str, Interval] = {}
        suppressed = self.per_row_suppressed
        for split in ("forget", "retain", "held_out", "test"):
            predictions = getattr(self, split)
            values[f"{split}_accuracy"] = _accuracy(predictions)
            values[f"{split}_loss"] = _mean_loss(predictions)
            if bootstrap and predictions is not None and values[f"{split}_accuracy"] is not None:
                if split == "forget" and suppressed and not is_proportion(predictions):
                    continue  # a bootstrap of a few rows gives single rows away
                intervals[f"{split}_accuracy"] = accuracy_interval(predictions, bootstrap, seed)
        held_out, test = self._auc_against(self.held_out), self._auc_against(self.test)
        results: dict[str, AttackResult] | None = None
        if attacks and not suppressed and self.unseen is not None:
            try:
                results = all_attacks(self.forget, self.unseen, bootstrap, seed)
            except (RequestError, NonFiniteGradientError):
                results = None
        if bootstrap and results is not None:
            intervals["mia_auc"] = (results["loss"].ci_low, results["loss"].ci_high)
        return Figures(
            **values,
            mia_auc=test if self.test is not None else held_out,
            mia_auc_held_out=held_out,
            mia_auc_test=test,
            attacks=results,
            attacks_against=None if results is None else self.unseen_split,
            per_row_suppressed=suppressed,
            intervals=intervals or None,
        )

    def _auc_against(self, unseen: RowPredictions | None) -> float | None:
        if unseen is None:
            return None
        try:
            return attack_auc(self.forget, unseen, "loss")
        except NonFiniteGradientError:
            return float("nan")
        except IAUError:
            return None


def measure_model(
    model: nn.Module,
    forget: RowSource,
    retain: RowSource | None = None,
    held_out: RowSource | None = None,
    test: RowSource | None = None,
    *,
    keep_probabilities: bool = False,
) -> Measurement:
    """Run `model` once over each set of rows that is given, in evaluation mode and without gradients.

    Args:
        model: the bare model.
        forget: the forget rows.
        retain: retained rows; sample them first (`RowSource.sample`) when they are many.
        held_out: rows never trained on, those that calibration uses.
        test: rows never trained on and not used for calibration.
        keep_probabilities: keep each single-label row's predicted distribution, shape `(rows, classes)`, for
            `hf_iau.evaluation.agreement`.

    Returns:
        Predictions of each set in the order of its rows; None for a set that was not given.
    """

    def predictions(source: RowSource | None) -> RowPredictions | None:
        return None if source is None else predict_rows(model, source, keep_probabilities=keep_probabilities)

    return Measurement(
        forget=predict_rows(model, forget, keep_probabilities=keep_probabilities),
        retain=predictions(retain),
        held_out=predictions(held_out),
        test=predictions(test),
    )


def rows_with_targets(predictions: RowPredictions | None) -> int:
    """Number of rows that have at least one target."""
    return 0 if predictions is None else int((predictions.targets > 0).sum())


def accuracy_interval(predictions: RowPredictions, bootstrap: int = RESAMPLES, seed: int = 0) -> Interval:
    """95 % interval of `predictions.accuracy`: Wilson's where every row is right or wrong, else bootstrapped over rows.

    Args:
        predictions: of rows with a target.
        bootstrap: resamples; 0 for no interval.
        seed: of the resampling.

    Returns:
        Its ends as fractions of 1; NaN without one.
    """
    if not bootstrap:
        return MISSING
    if is_proportion(predictions):
        correct = predictions.correct[predictions.targets > 0]
        return proportion_interval(float(correct.sum()), len(correct))
    return ratio_interval(predictions.correct, predictions.targets, bootstrap, seed)


def is_proportion(predictions: RowPredictions) -> bool:
    """Whether the accuracy is a plain share of rows: each row has at most one target, right or wrong."""
    counted = predictions.targets > 0
    return bool((predictions.targets[counted] == 1).all() and np.isin(predictions.correct[counted], (0, 1)).all())


def _mean_loss(predictions: RowPredictions | None) -> float | None:
    if predictions is None or not rows_with_targets(predictions):
        return None
    if np.isnan(predictions.loss[predictions.targets > 0]).any():
        return float("nan")
    return predictions.mean_loss


def _accuracy(predictions: RowPredictions | None) -> float | None:
    if predictions is None or not rows_with_targets(predictions):
        return None
    accuracy = predictions.accuracy
    return None if np.isnan(accuracy) else accuracy
