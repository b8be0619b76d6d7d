"""Unlearning methods, one file each, chosen by name."""

from hf_iau.methods.base import UnlearningMethod, available_methods, find_method, register_method
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
    "register_method",
]
