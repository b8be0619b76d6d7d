"""Every measure as an `evaluate` metric: importable from here, and each folder loadable with `evaluate.load`."""

from hf_iau.utils.optional import require

require("evaluate", "Metrics")

from hf_iau.metrics.klom.klom import KLoM
from hf_iau.metrics.membership_inference.membership_inference import MembershipInference
from hf_iau.metrics.parameter_distance.parameter_distance import ParameterDistance
from hf_iau.metrics.prediction_agreement.prediction_agreement import PredictionAgreement
from hf_iau.metrics.relearn_time.relearn_time import RelearnTime
from hf_iau.metrics.shadow_model_attack.shadow_model_attack import ShadowModelAttack
from hf_iau.metrics.tofu.tofu import TOFU
from hf_iau.metrics.u_lira.u_lira import ULiRA
from hf_iau.metrics.unlearning_gap.unlearning_gap import UnlearningGap

__all__ = [
    "TOFU",
    "KLoM",
    "MembershipInference",
    "ParameterDistance",
    "PredictionAgreement",
    "RelearnTime",
    "ShadowModelAttack",
    "ULiRA",
    "UnlearningGap",
]
