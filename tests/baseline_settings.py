"""Settings of every baseline for tests: quick, and strong enough to move a tiny model."""

from __future__ import annotations

from typing import Any

from tiny_models import build

from hf_iau.methods.baselines.bad_teacher import BadTeacherConfig
from hf_iau.methods.baselines.fine_tune import FineTuneConfig
from hf_iau.methods.baselines.fisher_forgetting import FisherForgettingConfig
from hf_iau.methods.baselines.gradient_ascent import GradientAscentConfig
from hf_iau.methods.baselines.influence_cg import InfluenceCGConfig
from hf_iau.methods.baselines.l1_sparse import L1SparseConfig
from hf_iau.methods.baselines.neggrad_plus import NegGradPlusConfig
from hf_iau.methods.baselines.npo import NPOConfig
from hf_iau.methods.baselines.random_labels import RandomLabelsConfig
from hf_iau.methods.baselines.retrain import RetrainConfig
from hf_iau.methods.baselines.salun import SalUnConfig
from hf_iau.methods.baselines.scrub import SCRUBConfig
from hf_iau.methods.baselines.ssd import SSDConfig
from hf_iau.methods.baselines.unrolling_sgd import UnrollingSGDConfig


def quick_settings(family: str) -> dict[str, Any]:
    """Baseline → its settings, for a model of this family."""
    return {
        "fine-tune": FineTuneConfig(epochs=1),
        "gradient-ascent": GradientAscentConfig(epochs=1),
        "neggrad-plus": NegGradPlusConfig(epochs=1),
        "npo": NPOConfig(epochs=1, lr=1e-3),
        "random-labels": RandomLabelsConfig(epochs=1),
        "salun": SalUnConfig(epochs=1),
        "scrub": SCRUBConfig(epochs=2, max_epochs=1),
        "ssd": SSDConfig(selection=1.1),
        "influence-cg": InfluenceCGConfig(iterations=2),
        "bad-teacher": BadTeacherConfig(epochs=3, retain_share=0.9),
        "l1-sparse": L1SparseConfig(epochs=1),
        "fisher-forgetting": FisherForgettingConfig(alpha=1e-5),
        "unrolling-sgd": UnrollingSGDConfig(model_init=lambda: build(family, seed=5)),
        "retrain": RetrainConfig(model_init=lambda: build(family, seed=5)),
    }
