"""The Trainer that can forget, the callback that remembers, and gradient restriction in training."""

from hf_iau.trainer.callback import IAUCallback
from hf_iau.trainer.restriction import GradientRestriction, RestrictionConfig
from hf_iau.trainer.unlearning_trainer import UnlearningTrainer
from hf_iau.unlearn.output import UnlearnOutput

__all__ = ["GradientRestriction", "IAUCallback", "RestrictionConfig", "UnlearnOutput", "UnlearningTrainer"]
