"""Unlearning methods, one file each, chosen by name."""

from hf_iau.methods import baselines
from hf_iau.methods.base import UnlearningMethod, available_methods, find_method, method_config, register_method
from hf_iau.methods.baselines import *  # noqa: F403
from hf_iau.methods.iau import IAU, IAUConfig
from hf_iau.methods.iau_paper import IAUPaper, IAUPaperConfig
from hf_iau.methods.iau_released import IAUReleased, IAUReleasedConfig

__all__ = [
    "IAU",
    "IAUConfig",
    "IAUPaper",
    "IAUPaperConfig",
    "IAUReleased",
    "IAUReleasedConfig",
    "UnlearningMethod",
    "available_methods",
    "find_method",
    "method_config",
    "register_method",
    *baselines.__all__,
]
