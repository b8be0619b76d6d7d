"""Measuring a model: figures of each set of rows, membership attacks, distance from retraining."""

from hf_iau.evaluation.attacks import (
    ATTACK_SCORES,
    AttackResult,
    AttackScore,
    all_attacks,
    attack,
    attack_auc,
    attack_scores,
    svc_confidence_attack,
)
from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES, Figures
from hf_iau.evaluation.intervals import Interval, difference_interval, proportion_interval, ratio_interval
from hf_iau.evaluation.measurement import Measurement, measure_model, rows_with_targets
from hf_iau.evaluation.model_agreement import Agreement, ParameterDistance, agreement, parameter_distance
from hf_iau.evaluation.retraining_gap import Gap, gap

__all__ = [
    "ATTACK_SCORES",
    "MINIMUM_ROWS_FOR_PER_ROW_FIGURES",
    "Agreement",
    "AttackResult",
    "AttackScore",
    "Figures",
    "Gap",
    "Interval",
    "Measurement",
    "ParameterDistance",
    "agreement",
    "all_attacks",
    "attack",
    "attack_auc",
    "attack_scores",
    "difference_interval",
    "gap",
    "measure_model",
    "parameter_distance",
    "proportion_interval",
    "ratio_interval",
    "rows_with_targets",
    "svc_confidence_attack",
]
