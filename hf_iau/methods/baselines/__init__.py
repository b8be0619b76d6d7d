"""Methods of others, each faithful to its paper, behind the same call."""

from hf_iau.methods.baselines.bad_teacher import BadTeacher, BadTeacherConfig
from hf_iau.methods.baselines.fine_tune import FineTune, FineTuneConfig
from hf_iau.methods.baselines.fisher_forgetting import FisherForgetting, FisherForgettingConfig
from hf_iau.methods.baselines.gradient_ascent import GradientAscent, GradientAscentConfig
from hf_iau.methods.baselines.influence_cg import InfluenceCG, InfluenceCGConfig
from hf_iau.methods.baselines.l1_sparse import L1Sparse, L1SparseConfig
from hf_iau.methods.baselines.neggrad_plus import NegGradPlus, NegGradPlusConfig
from hf_iau.methods.baselines.npo import NPO, NPOConfig
from hf_iau.methods.baselines.random_labels import RandomLabels, RandomLabelsConfig
from hf_iau.methods.baselines.retrain import Retrain, RetrainConfig
from hf_iau.methods.baselines.salun import SalUn, SalUnConfig
from hf_iau.methods.baselines.scrub import SCRUB, SCRUBConfig
from hf_iau.methods.baselines.ssd import SSD, SSDConfig
from hf_iau.methods.baselines.unrolling_sgd import UnrollingSGD, UnrollingSGDConfig

__all__ = [
    "NPO",
    "SCRUB",
    "SSD",
    "BadTeacher",
    "BadTeacherConfig",
    "FineTune",
    "FineTuneConfig",
    "FisherForgetting",
    "FisherForgettingConfig",
    "GradientAscent",
    "GradientAscentConfig",
    "InfluenceCG",
    "InfluenceCGConfig",
    "L1Sparse",
    "L1SparseConfig",
    "NPOConfig",
    "NegGradPlus",
    "NegGradPlusConfig",
    "RandomLabels",
    "RandomLabelsConfig",
    "Retrain",
    "RetrainConfig",
    "SCRUBConfig",
    "SSDConfig",
    "SalUn",
    "SalUnConfig",
    "UnrollingSGD",
    "UnrollingSGDConfig",
]
