"""Unlearning methods, one file each, chosen by name."""

from hf_iau.methods.base import UnlearningMethod, available_methods, find_method, register_method
from hf_iau.methods.fine_tune import FineTune, FineTuneConfig
from hf_iau.methods.gradient_ascent import GradientAscent, GradientAscentConfig
from hf_iau.methods.iau import IAU, IAUConfig
from hf_iau.methods.iau_paper import IAUPaper, IAUPaperConfig
from hf_iau.methods.iau_released import IAUReleased, IAUReleasedConfig
from hf_iau.methods.neggrad_plus import NegGradPlus, NegGradPlusConfig
from hf_iau.methods.retrain import Retrain, RetrainConfig

__all__ = [
    "IAU",
    "FineTune",
    "FineTuneConfig",
    "GradientAscent",
    "GradientAscentConfig",
    "IAUConfig",
    "IAUPaper",
    "IAUPaperConfig",
    "IAUReleased",
    "IAUReleasedConfig",
    "NegGradPlus",
    "NegGradPlusConfig",
    "Retrain",
    "RetrainConfig",
    "UnlearningMethod",
    "available_methods",
    "find_method",
    "register_method",
]
