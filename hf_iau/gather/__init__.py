"""Gathering: one look at the training rows when training ends, and what is kept of it."""

from hf_iau.gather.callback import IAUCallback
from hf_iau.gather.config import GatherConfig
from hf_iau.gather.gather import gather
from hf_iau.gather.gradient_sum import GradientSum, sum_row_gradients

__all__ = ["GatherConfig", "GradientSum", "IAUCallback", "gather", "sum_row_gradients"]
