"""Many unlearned models against many retrained ones: the strong tests, U-LiRA and KLoM.

Unlearning and retraining are both random. Of two *sets* of models, made with many seeds, one can ask for each row
whether its outputs are drawn from the same distribution; of two single models one can not. The sets are the caller's to
train. Both tests look at the margin of a row's label, which is nearly normal over seeds (Carlini et al. 2022).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from scipy.special import logsumexp, rel_entr
from scipy.stats import mannwhitneyu, norm
from scipy.stats import t as student

from hf_iau.errors import ConfigError, RequestError
from hf_iau.evaluation.intervals import LEVEL, RESAMPLES, Interval, ratio_interval

MINIMUM_MODELS = 4
"""Models a set without which neither test is made."""

MODELS_FOR_ROW_VARIANCE = 16
"""With fewer models to fit than this, U-LiRA's rows share one variance a set (as Carlini et al. 2022 do with few)."""

KLoMEstimator = Literal["histogram", "gaussian"]

_LARGEST_MARGIN = 100.0  # as in the published code: margins of saturated models are clipped
# As in the published code: retrained models have at least this share of each bin that unlearned ones are in.
_EMPTY_BIN = 1e-5


@dataclass(frozen=True)
class ULiRA:
    """How well the unlearned models can be told from retrained ones by their outputs on the forget rows.

    Attributes:
        accuracy: share of (model, row) pairs that the likelihood ratio attributes to the right set, averaged over the
            two sets, 0 to 1. 0.5: nothing tells unlearned from retrained; 1: always told apart.
        accuracy_low: lower end of its 95 % interval over models (Student's t), the rows taken as given.
        accuracy_high: upper end.
        auc: area under the ROC curve of the likelihood ratio, all rows together, 0 to 1; 0.5 is chance.
        auc_low: lower end of its interval.
        auc_high: upper end.
        unlearned_models: models of the first set.
        retrained_models: models of the second set.
        rows: forget rows.
        shared_variance: whether the rows of a set shared one variance.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    auc: float
    auc_low: float
    auc_high: float
    unlearned_models: int
    retrained_models: int
    rows: int
    shared_variance: bool

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers."""
        return asdict(self)


@dataclass(frozen=True)
class KLoM:
    """Divergence of the margins' distributions, row by row, in nats; 0 is equal, lower is closer.

    Attributes:
        mean: mean over the rows of KL(unlearned ‖ retrained).
        mean_low: lower end of its 95 % interval (bootstrap over rows).
        mean_high: upper end.
        median: median over the rows.
        percentile_95: value that 95 % of the rows are below: the rows forgotten worst.
        chance_mean: what `mean` is when whole models change sets at random: its value for a set of retrained models,
            which is above 0 because distributions are known from few models (for normal margins and 12, 50, 100 models
            a set: 4.9, 0.9, 0.35 nats by histogram, 0.2, 0.04, 0.02 by normal fits). Compare `mean` with this.
        chance_percentile_95: the same of `percentile_95`.
        p_value: share of those random exchanges with a mean at least as large: small says that the sets differ.
        rows: rows compared.
        unlearned_models: models of the first set.
        retrained_models: models of the second set.
        estimator: `"histogram"` or `"gaussian"`.
    """

    mean: float
    mean_low: float
    mean_high: float
    median: float
    percentile_95: float
    chance_mean: float
    chance_percentile_95: float
    p_value: float
    rows: int
    unlearned_models: int
    retrained_models: int
    estimator: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers."""
        return asdict(self)


def margins(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logit of the label less the log-sum-exp of the other logits, which is log(p/(1 − p)) of the label's probability.

    Args:
        logits: shape `(…, classes)`; logarithms of probabilities serve as well.
        labels: class numbers, shape `(…)`.

    Returns:
        float64, shape `(…)`. Computed from logits, because 1 − p of a float32 probability is 0 for a sure model.
    """
    logits = np.asarray(logits, dtype=np.float64)
    labels = np.asarray(labels)
    if logits.shape[:-1] != labels.shape:
        raise RequestError(f"logits of shape {logits.shape} and labels of shape {labels.shape}: give one label a row.")
    if labels.size and not (labels.min() >= 0 and labels.max() < logits.shape[-1]):
        raise RequestError(f"labels reach from {labels.min()} to {labels.max()}: give classes of the logits.")
    own = np.arange(logits.shape[-1]) == labels[..., None]
    others = logsumexp(np.where(own, -np.inf, logits), axis=-1)
    return np.asarray(np.where(own, logits, 0).sum(axis=-1) - others)


def u_lira(unlearned: np.ndarray, retrained: np.ndarray, folds: int = 5, seed: int = 0) -> ULiRA:
    """The likelihood-ratio attack on unlearning (U-LiRA).

    Kurmanji et al. (2023, arXiv 2302.09880) and Hayes et al. (2024, arXiv 2403.01218) adapt LiRA (Carlini et al. 2022,
    arXiv 2112.03570): for each row a normal distribution is fitted to its margins under models that learned and then
    unlearned it, another one to those under models that never saw it, and a model is judged by the ratio of the two
    likelihoods of its own margin. Each model is judged by fits that it had no part in.

    Args:
        unlearned: margins (see `margins`) of the forget rows under unlearned models, shape `(rows, models)`. Each model
            learned all of these rows and unlearned them.
        retrained: margins of the same rows under models trained without them, shape `(rows, models)`.
        folds: parts that the models are dealt into; each part is judged by fits to the others.
        seed: of the dealing.

    Raises:
        RequestError: for other shapes, fewer than 4 models a set, or margins that are not finite.
        ConfigError: for fewer than 2 folds.
    """
    unlearned, retrained = _checked(unlearned, retrained)
    if folds < 2:
        raise ConfigError(f"folds={folds}: give at least 2, so that no model is judged by a fit to itself.")
    (rows, n), m = unlearned.shape, retrained.shape[1]
    folds = min(folds, n, m)
    random = np.random.default_rng(seed)
    fold_of_u, fold_of_r = random.permutation(np.arange(n) % folds), random.permutation(np.arange(m) % folds)
    fitted = min(n - np.bincount(fold_of_u).max(), m - np.bincount(fold_of_r).max())
    shared = bool(fitted < MODELS_FOR_ROW_VARIANCE)
    spread = max(float(np.ptp(np.concatenate([unlearned, retrained], axis=1))), 1e-12)

    right_u, right_r = np.empty(n), np.empty(m)  # per model, over rows
    auc_u, auc_r = np.empty(n), np.empty(m)  # mean AUC of a model against those of the other set in its fold
    for fold in range(folds):
        u, r = np.flatnonzero(fold_of_u == fold), np.flatnonzero(fold_of_r == fold)
        fit_u = _fit(unlearned[:, fold_of_u != fold], shared, spread)
        fit_r = _fit(retrained[:, fold_of_r != fold], shared, spread)
        ratio_u, ratio_r = (norm.logpdf(x, *fit_u) - norm.logpdf(x, *fit_r) for x in (unlearned[:, u], retrained[:, r]))
        right_u[u] = ((ratio_u > 0) + 0.5 * (ratio_u == 0)).mean(axis=0)
        right_r[r] = ((ratio_r < 0) + 0.5 * (ratio_r == 0)).mean(axis=0)
        # The Mann-Whitney statistic of each pair of models, over rows², is their AUC.
        counted = mannwhitneyu(ratio_u.T[:, None], ratio_r.T[None], axis=-1, method="asymptotic").statistic
        pairs = counted / rows**2
        auc_u[u], auc_r[r] = pairs.mean(axis=1), pairs.mean(axis=0)
    accuracy = (right_u.mean() + right_r.mean()) / 2
    auc = auc_u.mean()
    around = _over_models(accuracy, right_u / 2, right_r / 2)
    around_auc = _over_models(auc, auc_u, auc_r)
    return ULiRA(
        accuracy=float(accuracy),
        accuracy_low=around[0],
        accuracy_high=around[1],
        auc=float(auc),
        auc_low=around_auc[0],
        auc_high=around_auc[1],
        unlearned_models=n,
        retrained_models=m,
        rows=rows,
        shared_variance=shared,
    )


def klom(
    unlearned: np.ndarray,
    retrained: np.ndarray,
    estimator: KLoMEstimator = "histogram",
    permutations: int = 200,
    bootstrap: int = RESAMPLES,
    seed: int = 0,
) -> KLoM:
    """KL divergence of margins (Georgiev et al. 2024, arXiv 2410.23232, appendix E.1).

    The direction is that of the authors' code: what unlearned models do often, retrained ones must do as well.

    Args:
        unlearned: margins (see `margins`) under unlearned models, shape `(rows, models)`. The paper looks at forget,
            retained and test rows in turn.
        retrained: margins of the same rows under models trained without the forget rows, shape `(rows, models)`.
        estimator: `"histogram"`, the authors': 20 bins over the two sets' common range, at most about 11 nats (the
            largest margin, which falls out of their last bin, is counted here); or
            `"gaussian"`: closed form of two fitted normal distributions, better with few models and unbounded.
        permutations: random exchanges of models for the values at chance; 0 for none (they are then NaN).
        bootstrap: resamples, of rows, for the mean's interval; 0 for none.
        seed: of both.

    Raises:
        RequestError: for other shapes, fewer than 4 models a set, or margins that are not finite.
        ConfigError: for an unknown estimator or a negative number of permutations or resamples.
    """
    if estimator not in get_args(KLoMEstimator):
        raise ConfigError(f"estimator={estimator!r} is not known: choose one of {', '.join(get_args(KLoMEstimator))}.")
    if permutations < 0:
        raise ConfigError(f"permutations={permutations}: give their number, or 0 for none.")
    unlearned, retrained = _checked(unlearned, retrained)
    n = unlearned.shape[1]
    divergence = row_divergences(unlearned, retrained, estimator)
    everything = np.concatenate([unlearned, retrained], axis=1)
    random = np.random.default_rng(seed)
    by_chance = []
    for _ in range(permutations):
        order = random.permutation(everything.shape[1])
        by_chance.append(row_divergences(everything[:, order[:n]], everything[:, order[n:]], estimator))
    means = np.array([values.mean() for values in by_chance])
    low, high = ratio_interval(divergence, np.ones(len(divergence)), bootstrap, seed)
    return KLoM(
        mean=float(divergence.mean()),
        mean_low=low,
        mean_high=high,
        median=float(np.median(divergence)),
        percentile_95=float(np.percentile(divergence, 95)),
        chance_mean=float(means.mean()) if permutations else float("nan"),
        chance_percentile_95=(
            float(np.mean([np.percentile(values, 95) for values in by_chance])) if permutations else float("nan")
        ),
        p_value=(1 + int((means >= divergence.mean()).sum())) / (1 + permutations) if permutations else float("nan"),
        rows=len(divergence),
        unlearned_models=n,
        retrained_models=retrained.shape[1],
        estimator=estimator,
    )


def row_divergences(unlearned: np.ndarray, retrained: np.ndarray, estimator: KLoMEstimator) -> np.ndarray:
    """KL(unlearned ‖ retrained) of each row's margins in nats, shape `(rows,)`; the arguments are those of `klom`."""
    unlearned, retrained = (np.clip(x, -_LARGEST_MARGIN, _LARGEST_MARGIN) for x in (unlearned, retrained))
    if estimator == "gaussian":
        spread = max(float(np.ptp(np.concatenate([unlearned, retrained], axis=1))), 1e-12)
        (mean_u, deviation_u), (mean_r, deviation_r) = (_fit(x, False, spread) for x in (unlearned, retrained))
        squares = (deviation_u**2 + (mean_u - mean_r) ** 2) / (2 * deviation_r**2)
        return np.asarray((np.log(deviation_r / deviation_u) + squares - 0.5)[:, 0])
    bins, rows = 20, len(unlearned)
    both = np.concatenate([unlearned, retrained], axis=1)
    low, width = both.min(axis=1, keepdims=True), np.maximum(np.ptp(both, axis=1, keepdims=True), 1e-12)

    def shares(x: np.ndarray) -> np.ndarray:
        numbers = np.minimum((bins * (x - low) / width).astype(np.int64), bins - 1) + bins * np.arange(rows)[:, None]
        return np.bincount(numbers.ravel(), minlength=bins * rows).reshape(rows, bins) / x.shape[1]

    p, q = shares(unlearned), shares(retrained)
    q = np.where(p > 0, np.maximum(q, _EMPTY_BIN), q)
    return np.asarray(rel_entr(p, q / q.sum(axis=1, keepdims=True)).sum(axis=1))


def _checked(unlearned: np.ndarray, retrained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for name, values in (("unlearned", unlearned), ("retrained", retrained)):
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 2 or not len(array) or array.shape[1] < MINIMUM_MODELS:
            raise RequestError(
                f"{name} has shape {array.shape}: give margins of shape (rows, models), of at least {MINIMUM_MODELS} "
                "models."
            )
        if not np.isfinite(array).all():
            raise RequestError(
                f"{name} holds {int((~np.isfinite(array)).sum())} margins that are not finite: compute them from "
                "logits (`hf_iau.metrics.model_sets.margins`) and leave out models that have diverged."
            )
        arrays.append(array)
    if len(arrays[0]) != len(arrays[1]):
        raise RequestError(
            f"unlearned has {len(arrays[0])} and retrained {len(arrays[1])} rows: give the same rows of both sets."
        )
    return arrays[0], arrays[1]


def _fit(values: np.ndarray, shared: bool, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each row, shape `(rows, 1)`; the latter is kept above rounding."""
    variance = values.var(axis=1, ddof=1, keepdims=True)
    if shared:
        variance = np.full_like(variance, variance.mean())
    return values.mean(axis=1, keepdims=True), np.maximum(np.sqrt(variance), 1e-6 * spread)


def _over_models(value: float, *parts: np.ndarray) -> Interval:
    """Student's interval of a cross-fitted sum of means over independent sets of models, within 0 and 1.

    Every fold is judged by fits to the others, so each pair of folds counts twice with the same luck: where the sets
    agree, the variance is twice that of independent models. It is doubled throughout, which is rather too much where
    they differ.

    Args:
        value: the sum.
        parts: for each set, what each model contributes to its mean.
    """
    error = np.sqrt(2 * sum(part.var(ddof=1) / len(part) for part in parts))
    half = float(student.ppf((1 + LEVEL) / 2, min(len(part) for part in parts) - 1) * error)
    return max(0.0, float(value) - half), min(1.0, float(value) + half)
