"""The calibrated method: a curvature-aware step whose size nobody has to choose."""

from hf_iau.methods.iau.config import IAUConfig
from hf_iau.methods.iau.method import IAU

__all__ = ["IAU", "IAUConfig"]
