"""Measuring a model: figures of each set of rows, membership attacks, distance from retraining."""

from hf_iau.measure.agreement import Agreement, ParameterDistance, agreement, parameter_distance
from hf_iau.measure.attacks import (
    ATTACK_SCORES,
    AttackResult,
    AttackScore,
    all_attacks,
    attack,
    attack_auc,
    attack_scores,
    svc_confidence_attack,
)
from hf_iau.measure.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES, Figures
from hf_iau.measure.gap import Gap, gap
from hf_iau.measure.intervals import Interval, difference_interval, proportion_interval, ratio_interval
from hf_iau.measure.measurement import Measurement, measure_model, rows_with_targets
from hf_iau.measure.model_sets import KLoM, ULiRA, klom, margins, u_lira
from hf_iau.measure.question_answers import ForgetQuality, ModelUtility, forget_quality, model_utility, truth_ratio
from hf_iau.measure.relearning import RelearnTime, first_reached, relearn_time
from hf_iau.measure.shadow_models import (
    ShadowAttack,
    ShadowPredictions,
    ShadowRows,
    shadow_model_attack,
    shadow_rows,
)

__all__ = [
    "ATTACK_SCORES",
    "MINIMUM_ROWS_FOR_PER_ROW_FIGURES",
    "Agreement",
    "AttackResult",
    "AttackScore",
    "Figures",
    "ForgetQuality",
    "Gap",
    "Interval",
    "KLoM",
    "Measurement",
    "ModelUtility",
    "ParameterDistance",
    "RelearnTime",
    "ShadowAttack",
    "ShadowPredictions",
    "ShadowRows",
    "ULiRA",
    "agreement",
    "all_attacks",
    "attack",
    "attack_auc",
    "attack_scores",
    "difference_interval",
    "first_reached",
    "forget_quality",
    "gap",
    "klom",
    "margins",
    "measure_model",
    "model_utility",
    "parameter_distance",
    "proportion_interval",
    "ratio_interval",
    "relearn_time",
    "rows_with_targets",
    "shadow_model_attack",
    "shadow_rows",
    "svc_confidence_attack",
    "truth_ratio",
    "u_lira",
]
