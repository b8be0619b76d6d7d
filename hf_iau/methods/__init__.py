"""Unlearning methods, one file each, chosen by name."""

from hf_iau.calibrate import IAUConfig
from hf_iau.methods.bad_teacher import BadTeacher, BadTeacherConfig
from hf_iau.methods.base import UnlearningMethod, available_methods, find_method, method_config, register_method
from hf_iau.methods.fine_tune import FineTune, FineTuneConfig
from hf_iau.methods.fisher_forgetting import FisherForgetting, FisherForgettingConfig
from hf_iau.methods.gradient_ascent import GradientAscent, GradientAscentConfig
from hf_iau.methods.iau import IAU
from hf_iau.methods.iau_paper import IAUPaper, IAUPaperConfig
from hf_iau.methods.iau_released import IAUReleased, IAUReleasedConfig
from hf_iau.methods.influence_cg import InfluenceCG, InfluenceCGConfig
from hf_iau.methods.l1_sparse import L1Sparse, L1SparseConfig
from hf_iau.methods.neggrad_plus import NegGradPlus, NegGradPlusConfig
from hf_iau.methods.npo import NPO, NPOConfig
from hf_iau.methods.random_labels import RandomLabels, RandomLabelsConfig
from hf_iau.methods.retrain import Retrain, RetrainConfig
from hf_iau.methods.salun import SalUn, SalUnConfig
from hf_iau.methods.scrub import SCRUB, SCRUBConfig
from hf_iau.methods.ssd import SSD, SSDConfig
from hf_iau.methods.unrolling_sgd import UnrollingSGD, UnrollingSGDConfig

__all__ = [
    "IAU",
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
    "IAUConfig",
    "IAUPaper",
    "IAUPaperConfig",
    "IAUReleased",
    "IAUReleasedConfig",
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
    "UnlearningMethod",
    "UnrollingSGD",
    "UnrollingSGDConfig",
    "available_methods",
    "find_method",
    "method_config",
    "register_method",
]
