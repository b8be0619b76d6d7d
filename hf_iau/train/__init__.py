"""Training: a Trainer that can forget, and the gradient restriction that makes forgetting easier later."""

from hf_iau.train.restriction import GradientRestriction, RestrictionConfig
from hf_iau.train.trainer import UnlearningTrainer, UnlearnOutput

__all__ = ["GradientRestriction", "RestrictionConfig", "UnlearnOutput", "UnlearningTrainer"]
