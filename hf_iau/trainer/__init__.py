"""The Trainer that can forget, the callback that remembers, and gradient restriction in training."""

from hf_iau.trainer.callback import IAUCallback
from hf_iau.trainer.output import UnlearnOutput
from hf_iau.trainer.restriction import GradientRestriction, RestrictionConfig
from hf_iau.trainer.unlearning_trainer import UnlearningTrainer

__all__ = ["GradientRestriction", "IAUCallback", "RestrictionConfig", "UnlearnOutput", "UnlearningTrainer"]
