"""Membership inference from per-row scores: can the forget rows be told apart from rows never trained on?

Every score is turned so that *higher means more member-like*. An area under the ROC curve (AUC) of 1 says that the
model still treats the forget rows like training rows; 0.5 says that nothing tells them apart from unseen rows, which
is what a model retrained without them gives when the forget rows are exchangeable with the unseen ones; *below* 0.5
says that they were over-forgotten, which is as visible as remembering (the Streisand effect). So the target is the
retrained model's own value, not the lowest one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import rankdata

from hf_iau.data.predictions import RowPredictions
from hf_iau.errors import ConfigError, NonFiniteGradientError, RequestError
from hf_iau.evaluation.intervals import (
    BOOTSTRAP_VALUES_AT_ONCE,
    LEVEL,
    MISSING,
    RESAMPLES,
    Interval,
    balanced_accuracy_interval,
    check_resamples,
    true_positive_rate_interval,
)
from hf_iau.evaluation.roc import area_under_curve, roc_curve
from hf_iau.utils.optional import require

AttackScore = Literal["loss", "confidence", "entropy", "modified_entropy", "correctness"]

ATTACK_SCORES: tuple[AttackScore, ...] = get_args(AttackScore)
"""Every score an attack can use."""

# The field of `RowPredictions` each score is read from, and the sign that makes higher more member-like.
_ORIENTATION: dict[str, tuple[str, float]] = {
    "loss": ("loss", -1.0),
    "confidence": ("confidence", 1.0),
    "entropy": ("entropy", -1.0),
    "modified_entropy": ("modified_entropy", -1.0),
    "correctness": ("correct", 1.0),
}

_MINIMUM_ROWS = 2


@dataclass(frozen=True)
class AttackResult:
    """What one score tells an attacker. NaN throughout when the task has no such score (confidence in regression).

    Attributes:
        auc: area under the ROC curve, 0 to 1; 0.5 is chance, 1 a member that is always recognised, below 0.5
            over-forgotten.
        balanced_accuracy: (true positive rate + true negative rate) / 2 at the best threshold, 0.5 to 1. The threshold
            is chosen on the same rows, so a few rows give more than 0.5 by chance alone.
        tpr_at_1_percent_fpr: the largest share of members recognised while at most 1 % of the non-members are taken
            for members, without interpolation; with fewer than 100 non-members that allows no false positive at all.
            Chance is 0.01.
        tpr_at_0_1_percent_fpr: the same at 0.1 % (fewer than 1,000 non-members allow no false positive).
        ci_low: lower end of the 95 % percentile bootstrap interval of `auc`, rows resampled on each side.
        ci_high: its upper end. The interval has no width where the two sides do not overlap at all. NaN without a
            bootstrap.
        n_members: member rows used.
        n_non_members: non-member rows used.
        dropped_members: member rows without a target, left out.
        dropped_non_members: non-member rows without a target, left out.
        balanced_accuracy_low: lower end of the 95 % interval of `balanced_accuracy`, see
            `hf_iau.evaluation.intervals.balanced_accuracy_interval`; 0.5 where the rows do not show more than chance.
        balanced_accuracy_high: its upper end.
        tpr_at_1_percent_fpr_low: lower end of the 95 % interval of `tpr_at_1_percent_fpr`, see
            `hf_iau.evaluation.intervals.true_positive_rate_interval`; conservative.
        tpr_at_1_percent_fpr_high: its upper end.
        tpr_at_0_1_percent_fpr_low: the same of `tpr_at_0_1_percent_fpr`.
        tpr_at_0_1_percent_fpr_high: its upper end.
    """

    auc: float
    balanced_accuracy: float
    tpr_at_1_percent_fpr: float
    tpr_at_0_1_percent_fpr: float
    ci_low: float
    ci_high: float
    n_members: int
    n_non_members: int
    dropped_members: int = 0
    dropped_non_members: int = 0
    balanced_accuracy_low: float = MISSING[0]
    balanced_accuracy_high: float = MISSING[1]
    tpr_at_1_percent_fpr_low: float = MISSING[0]
    tpr_at_1_percent_fpr_high: float = MISSING[1]
    tpr_at_0_1_percent_fpr_low: float = MISSING[0]
    tpr_at_0_1_percent_fpr_high: float = MISSING[1]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers."""
        return asdict(self)


def attack_scores(predictions: RowPredictions, score: AttackScore = "loss") -> np.ndarray:
    """Each row's score, float64, shape `(rows,)`, higher = more member-like; NaN for rows without a target.

    Raises:
        ConfigError: for an unknown score.
        NonFiniteGradientError: when the model's loss is NaN on rows that do have a target.
    """
    if score not in _ORIENTATION:
        raise ConfigError(f"score={score!r} is not known: choose one of {', '.join(ATTACK_SCORES)}.")
    broken = np.isnan(predictions.loss) & (predictions.targets > 0)
    if broken.any():
        raise NonFiniteGradientError(
            f"The model's loss is NaN on {int(broken.sum())} of {len(predictions)} rows, so no attack can rank them: "
            "the model has diverged. Take a shorter step or restore the weights."
        )
    field, sign = _ORIENTATION[score]
    return sign * np.asarray(getattr(predictions, field), dtype=np.float64)


def attack_auc(members: RowPredictions, non_members: RowPredictions, score: AttackScore = "loss") -> float:
    """AUC of the threshold attack on one score.

    The loss attack is that of Yeom et al. (2018, arXiv 1709.01604), the others are of Song and Mittal (2021, arXiv
    2003.10595).

    Args:
        members: the forget rows.
        non_members: rows the model has never seen (held-out or test rows).
        score: `"loss"`, `"confidence"` (probability of the true label), `"entropy"` (of the predicted distribution),
            `"modified_entropy"` (label-aware) or `"correctness"` (the gap attack). Only their order matters, so
            `"loss"` and `"confidence"` agree for single-label rows.

    Returns:
        The probability that a random member scores higher than a random non-member (ties count half), 0 to 1. Before
        unlearning it is above 0.5; a retrained model has about 0.5 on exchangeable rows; below 0.5 is over-forgetting.
        Its standard error is about 0.29/√(forget rows) when the non-members are many.

    Raises:
        ConfigError: for an unknown score.
        RequestError: with fewer than 2 usable rows on a side, or a score the task does not have.
        NonFiniteGradientError: when the model's loss is NaN.
    """
    inside, outside, _, _ = _both_sides(members, non_members, score)
    return area_under_curve(inside, outside)


def attack(
    members: RowPredictions,
    non_members: RowPredictions,
    score: AttackScore = "loss",
    bootstrap: int = RESAMPLES,
    seed: int = 0,
) -> AttackResult:
    """The threshold attack on one score, with its operating points and a bootstrap interval.

    Args:
        members: the forget rows.
        non_members: rows the model has never seen.
        score: see `attack_auc`.
        bootstrap: resamples for the AUC's interval; 0 for no intervals at all.
        seed: of the resampling.

    Raises:
        ConfigError, RequestError, NonFiniteGradientError: as `attack_auc`; ConfigError for a negative `bootstrap`.
    """
    check_resamples(bootstrap)
    inside, outside, dropped_inside, dropped_outside = _both_sides(members, non_members, score)
    return score_attack(inside, outside, bootstrap, seed, (dropped_inside, dropped_outside))


def score_attack(
    inside: np.ndarray,
    outside: np.ndarray,
    bootstrap: int = RESAMPLES,
    seed: int = 0,
    dropped: tuple[int, int] = (0, 0),
) -> AttackResult:
    """The threshold attack on any scores, e.g. a trained attacker's.

    Args:
        inside: the forget rows' scores, higher = more member-like, shape `(m,)`, at least one and none NaN.
        outside: scores of rows never trained on, shape `(n,)`, the same.
        bootstrap: resamples for the AUC's interval; 0 for no intervals at all.
        seed: of the resampling.
        dropped: rows left out before, on either side.
    """
    # Every corner of the curve is kept: a dropped collinear one could be the best point below a false positive rate.
    fpr, tpr, thresholds = roc_curve(inside, outside)
    low, high = _bootstrap_interval(inside, outside, bootstrap, seed)
    best, one, tenth = (MISSING,) * 3
    if bootstrap:
        best = balanced_accuracy_interval(inside, outside, thresholds[np.argmax(tpr - fpr)])
        one, tenth = (true_positive_rate_interval(inside, outside, level) for level in (0.01, 0.001))
    return AttackResult(
        auc=area_under_curve(inside, outside),
        balanced_accuracy=float(np.max(tpr + 1 - fpr) / 2),
        tpr_at_1_percent_fpr=float(tpr[fpr <= 0.01].max()),
        tpr_at_0_1_percent_fpr=float(tpr[fpr <= 0.001].max()),
        ci_low=low,
        ci_high=high,
        n_members=len(inside),
        n_non_members=len(outside),
        dropped_members=dropped[0],
        dropped_non_members=dropped[1],
        balanced_accuracy_low=best[0],
        balanced_accuracy_high=best[1],
        tpr_at_1_percent_fpr_low=one[0],
        tpr_at_1_percent_fpr_high=one[1],
        tpr_at_0_1_percent_fpr_low=tenth[0],
        tpr_at_0_1_percent_fpr_high=tenth[1],
    )


def all_attacks(
    members: RowPredictions, non_members: RowPredictions, bootstrap: int = RESAMPLES, seed: int = 0
) -> dict[str, AttackResult]:
    """`attack` with every score, by the score's name; a score that the task does not have is NaN throughout.

    Args:
        members: the forget rows.
        non_members: rows the model has never seen.
        bootstrap: resamples for each AUC's interval; 0 for no intervals at all.
        seed: of the resampling.

    Raises:
        ConfigError, RequestError, NonFiniteGradientError: as `attack`, of the `"loss"` score.
    """
    results: dict[str, AttackResult] = {}
    for score in ATTACK_SCORES:
        if score != "loss" and (_is_undefined(members, score) or _is_undefined(non_members, score)):
            reference = results["loss"]
            missing = float("nan")
            results[score] = AttackResult(
                *(missing,) * 6,
                n_members=reference.n_members,
                n_non_members=reference.n_non_members,
                dropped_members=reference.dropped_members,
                dropped_non_members=reference.dropped_non_members,
            )
        else:
            results[score] = attack(members, non_members, score, bootstrap, seed)
    return results


def svc_confidence_attack(
    retain_train_conf: np.ndarray, held_out_conf: np.ndarray, forget_conf: np.ndarray, seed: int = 0
) -> float:
    """The "MIA" column of SalUn's and ℓ1-sparse's tables: share of forget rows that a trained attacker calls unseen.

    An `SVC(C=3, gamma="auto", kernel="rbf")` learns the probability of the true label of retained (member) and unseen
    (non-member) rows of the *same* model and then classifies the forget rows. This is the confidence attack of
    `evaluation/SVC_MIA.py` in github.com/OPTML-Group/Unlearn-Sparse (Jia et al. 2023, arXiv 2304.04934) and
    github.com/OPTML-Group/Unlearn-Saliency (Fan et al. 2024, arXiv 2310.12508): retained rows as shadow members, test
    rows as shadow non-members, forget rows as targets. As there, both shadow sides have the same number of rows: the
    larger one is subsampled.

    Args:
        retain_train_conf: probability of the true label on retained rows, shape `(rows,)`, 0 to 1; NaN for rows without
            one (`RowPredictions.confidence`).
        held_out_conf: the same on held-out or test rows.
        forget_conf: the same on the forget rows.
        seed: of the subsampling.

    Returns:
        Share of forget rows called non-members, 0 to 1 (the tables show it × 100). Higher = more forgotten, but the
        target is the retrained model's own value (0.129 for ResNet-18 on CIFAR-10 in SalUn's table), not 1. Training
        the SVC takes time quadratic in the shadow rows: give at most some 10,000.

    Raises:
        RequestError: with fewer than 2 rows with a target on a shadow side, or no such forget row.
        MissingPackageError: without scikit-learn, which the extra `metrics` brings.
    """
    require("sklearn", "The SVC attack")
    from sklearn.svm import SVC

    members, non_members, forget = (
        _finite_column(values) for values in (retain_train_conf, held_out_conf, forget_conf)
    )
    size = min(len(members), len(non_members))
    if size < _MINIMUM_ROWS or not len(forget):
        raise RequestError(
            f"The SVC attack got retain_train_conf with {len(members)}, held_out_conf with {len(non_members)} and "
            f"forget_conf with {len(forget)} usable rows: it needs at least 2, 2 and 1."
        )
    random = np.random.default_rng(seed)
    members, non_members = (
        side if len(side) == size else side[random.choice(len(side), size, replace=False)]
        for side in (members, non_members)
    )
    classifier = SVC(C=3, gamma="auto", kernel="rbf")
    classifier.fit(np.concatenate([members, non_members]), np.repeat([1, 0], size))
    return float(1 - classifier.predict(forget).mean())


def _both_sides(
    members: RowPredictions, non_members: RowPredictions, score: AttackScore
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """The two sides' scores as ranks of all rows together, and the rows dropped on each."""
    sides = []
    for name, predictions in (("members", members), ("non_members", non_members)):
        scores = attack_scores(predictions, score)
        if _is_undefined(predictions, score):
            raise RequestError(
                f"score={score!r} is not defined for {predictions.kind.value} rows ({name}): use score='loss'."
            )
        usable = scores[~np.isnan(scores)]
        if len(usable) < _MINIMUM_ROWS:
            raise RequestError(
                f"The attack got {len(usable)} usable of {len(predictions)} {name} (rows without a target do not "
                f"count): give at least {_MINIMUM_ROWS} on each side."
            )
        sides.append(usable)
    # Ranks keep the order and the ties, and make infinite scores (a loss that overflowed) harmless.
    ranks = rankdata(np.concatenate(sides), method="dense").astype(np.float64)
    inside, outside = ranks[: len(sides[0])], ranks[len(sides[0]) :]
    return inside, outside, len(members) - len(inside), len(non_members) - len(outside)


def _is_undefined(predictions: RowPredictions, score: AttackScore) -> bool:
    values = getattr(predictions, _ORIENTATION[score][0])
    with_target = predictions.targets > 0
    return bool(with_target.any() and np.isnan(values[with_target]).all())


def _bootstrap_interval(inside: np.ndarray, outside: np.ndarray, resamples: int, seed: int) -> Interval:
    if not resamples:
        return MISSING
    m, n = len(inside), len(outside)
    if inside.min() > outside.max() or inside.max() < outside.min() or np.ptp(np.concatenate([inside, outside])) == 0:
        auc = area_under_curve(inside, outside)  # every resample has the same value
        return auc, auc

    # Scores become their place among all distinct scores, so that a resample is two rows of counts, without sorting.
    distinct, places = np.unique(np.concatenate([inside, outside]), return_inverse=True)
    width = len(distinct)

    def auc_of(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        # The Mann-Whitney statistic over m·n equals the AUC: non-members below each member, ties counting half.
        x, y = np.atleast_2d(x), np.atleast_2d(y)
        offsets = width * np.arange(len(x))[:, None]
        of_x, of_y = (
            np.bincount((side + offsets).ravel(), minlength=width * len(x)).reshape(len(x), width) for side in (x, y)
        )
        return np.asarray((of_x * (of_y.cumsum(axis=-1) - of_y / 2)).sum(axis=-1) / (m * n))

    result = scipy_bootstrap(
        (places[:m], places[m:]),
        auc_of,
        n_resamples=resamples,
        batch=max(1, BOOTSTRAP_VALUES_AT_ONCE // (m + n)),
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _finite_column(values: np.ndarray) -> np.ndarray:
    column = np.asarray(values, dtype=np.float64).reshape(-1, 1)
    return column[~np.isnan(column[:, 0])]
