"""The shadow-model attack: an attacker learns on models of its own what a member looks like.

Shokri et al. (2017, arXiv 1610.05820) train the attacker on shadow models, whose members are known; the unlearning
paper of Liu et al. (2025, arXiv 2507.23257) measures with it. What the attacker sees of a row is [softmax − one-hot,
one-hot]: how far the prediction is from the label, and the label. The attack means something only if the shadow models
are made as the victim was (same architecture, same training) from rows that the victim has *not* seen: `shadow_rows`
deals them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hf_iau.data.predictions import RowPredictions
from hf_iau.errors import RequestError
from hf_iau.evaluation.attacks import AttackResult, score_attack
from hf_iau.evaluation.intervals import RESAMPLES, check_resamples, proportion_interval
from hf_iau.utils.optional import require

MINIMUM_SHADOW_ROWS = 20
"""Rows of each kind, over all shadow models, without which an attacker is not trained."""


@dataclass(frozen=True)
class ShadowRows:
    """The rows of one shadow model, as positions in the data set, ascending.

    Attributes:
        members: rows to train the shadow model on.
        non_members: rows to keep from it, of the same number.
    """

    members: np.ndarray
    non_members: np.ndarray


@dataclass(frozen=True)
class ShadowPredictions:
    """What one trained shadow model makes of its rows, with probabilities kept.

    Attributes:
        members: its predictions for the rows it was trained on.
        non_members: its predictions for the others.
    """

    members: RowPredictions
    non_members: RowPredictions


@dataclass(frozen=True)
class ShadowAttack:
    """What an attacker with shadow models tells of the forget rows. Shares are 0 to 1.

    Attributes:
        member_share: share of the forget rows that the attacker calls members (its probability is at least one half).
            This is the "attack accuracy" of the IAU paper's tables. Its value for a retrained model is not 0 but about
            `unseen_member_share`.
        member_share_low: lower end of its 95 % interval (Wilson's); that of the attacker's own training is not in it.
        member_share_high: upper end.
        unseen_member_share: the same share of the rows that were never trained on: the attacker's false alarms.
        unseen_member_share_low: lower end of its interval.
        unseen_member_share_high: upper end.
        balanced_accuracy: (member_share + 1 − unseen_member_share) / 2 at the attacker's own threshold, which no row
            judged here has seen: 0.5 is chance, and without the flattery of a threshold chosen afterwards.
        ranking: the attack with the attacker's probability as score: AUC and operating points.
        shadow_models: shadow models that the attacker learned from.
        shadow_rows: their rows that it learned from, half of them members.
    """

    member_share: float
    member_share_low: float
    member_share_high: float
    unseen_member_share: float
    unseen_member_share_low: float
    unseen_member_share_high: float
    balanced_accuracy: float
    ranking: AttackResult
    shadow_models: int
    shadow_rows: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers, `ranking` as a dictionary."""
        return asdict(self)


def shadow_rows(
    total: int, victim_rows: Sequence[int] | np.ndarray, models: int = 3, seed: int = 0
) -> list[ShadowRows]:
    """Deal the rows that the victim has nothing to do with to shadow models.

    Args:
        total: rows in the data set.
        victim_rows: positions of every row that the victim was trained on, and of the rows never trained on that it
            will be judged with. No shadow model gets any of them.
        models: shadow models.
        seed: of the draws.

    Returns:
        For each model another random halving of the remaining rows. A shadow model should be trained on about as many
        rows as the victim; with fewer it overfits more, and the attacker expects too much.

    Raises:
        RequestError: for positions outside the data set, no model, or fewer than 4 rows left.
    """
    victim = np.unique(np.asarray(victim_rows, dtype=np.int64))
    if len(victim) and not (victim[0] >= 0 and victim[-1] < total):
        raise RequestError(f"victim_rows reaches from {victim[0]} to {victim[-1]}: give positions in 0 … {total - 1}.")
    if models < 1:
        raise RequestError(f"models={models}: give at least 1 shadow model.")
    left = np.setdiff1d(np.arange(total), victim)
    if len(left) < 4:
        raise RequestError(
            f"victim_rows leaves {len(left)} of {total} rows: shadow models need rows of their own, at least 4. Train "
            "the victim on fewer rows."
        )
    random = np.random.default_rng(seed)
    half = len(left) // 2
    dealt = []
    for _ in range(models):
        order = random.permutation(left)
        dealt.append(ShadowRows(np.sort(order[:half]), np.sort(order[half : 2 * half])))
    return dealt


def attack_features(predictions: RowPredictions) -> np.ndarray:
    """[softmax − one-hot, one-hot] of each row that has a label: float64, shape `(rows, 2 · classes)`.

    Raises:
        RequestError: for predictions without probabilities or labels.
    """
    p = predictions.probabilities
    if p is None:
        raise RequestError(
            "The predictions hold no probabilities: call predict_rows(..., keep_probabilities=True). They exist for "
            "single-label rows only."
        )
    labelled = ~np.isnan(predictions.label)
    one_hot = np.eye(p.shape[1])[predictions.label[labelled].astype(np.int64)]
    return np.concatenate([p[labelled].astype(np.float64) - one_hot, one_hot], axis=1)


def shadow_model_attack(
    forget: RowPredictions,
    unseen: RowPredictions,
    shadows: Sequence[ShadowPredictions],
    bootstrap: int = RESAMPLES,
    seed: int = 0,
) -> ShadowAttack:
    """Train an attacker on the shadow models' rows and let it judge the victim's.

    Args:
        forget: the victim's (the unlearned model's) predictions for the forget rows, with probabilities kept.
        unseen: its predictions for rows that neither it nor a shadow model was trained on.
        shadows: the shadow models' predictions, made with `keep_probabilities=True`; see `shadow_rows`.
        bootstrap: resamples for the AUC's interval; 0 for none.
        seed: of the attacker's training and of the resampling.

    The attacker is scikit-learn's `MLPClassifier` with one hidden layer of 64 units, stopped early on a tenth of its
    rows. Members and non-members of each shadow model are used in equal numbers (the larger side is subsampled), so
    that its threshold of one half is that of an even chance.

    Raises:
        RequestError: without shadow models, with fewer than 20 of their rows of a kind, fewer than 2 forget or unseen
            rows, different numbers of classes, or predictions without probabilities.
        MissingPackageError: without scikit-learn.
    """
    require("sklearn", "The shadow-model attack")
    from sklearn.neural_network import MLPClassifier

    check_resamples(bootstrap)
    if not shadows:
        raise RequestError("shadows is empty: give the predictions of at least one shadow model (see `shadow_rows`).")
    random = np.random.default_rng(seed)
    inputs, labels = [], []
    for shadow in shadows:
        sides = [attack_features(shadow.members), attack_features(shadow.non_members)]
        size = min(len(side) for side in sides)
        for side, member in zip(sides, (1, 0), strict=True):
            chosen = side if len(side) == size else side[random.choice(len(side), size, replace=False)]
            inputs.append(chosen)
            labels.append(np.full(size, member))
    judged = [attack_features(forget), attack_features(unseen)]
    widths = {features.shape[1] // 2 for features in (*inputs, *judged)}
    if len(widths) > 1:
        raise RequestError(f"The predictions have {sorted(widths)} classes: give models of the same classes.")
    if sum(len(side) for side in inputs) < 2 * MINIMUM_SHADOW_ROWS:
        raise RequestError(
            f"shadows holds {sum(len(side) for side in inputs) // 2} rows of a kind: the attacker needs at least "
            f"{MINIMUM_SHADOW_ROWS} members and as many non-members."
        )
    if min(len(side) for side in judged) < 2:
        raise RequestError(
            f"forget has {len(judged[0])} and unseen {len(judged[1])} rows with a label: give at least 2 of each."
        )
    attacker = MLPClassifier(hidden_layer_sizes=(64,), early_stopping=True, random_state=seed)
    attacker.fit(np.concatenate(inputs), np.concatenate(labels))
    inside, outside = (attacker.predict_proba(side)[:, 1] for side in judged)
    called = [int((side >= 0.5).sum()) for side in (inside, outside)]
    of_forget, of_unseen = (proportion_interval(k, len(side)) for k, side in zip(called, judged, strict=True))
    member_share, unseen_member_share = called[0] / len(inside), called[1] / len(outside)
    return ShadowAttack(
        member_share=member_share,
        member_share_low=of_forget[0],
        member_share_high=of_forget[1],
        unseen_member_share=unseen_member_share,
        unseen_member_share_low=of_unseen[0],
        unseen_member_share_high=of_unseen[1],
        balanced_accuracy=(member_share + 1 - unseen_member_share) / 2,
        ranking=score_attack(inside, outside, bootstrap, seed),
        shadow_models=len(shadows),
        shadow_rows=sum(len(side) for side in inputs),
    )
