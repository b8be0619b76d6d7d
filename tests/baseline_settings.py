"""Settings of every baseline for tests: quick, and strong enough to move a tiny model."""

from __future__ import annotations

from typing import Any

from tiny_models import build

from hf_iau.methods import (
    BadTeacherConfig,
    FineTuneConfig,
    FisherForgettingConfig,
    GradientAscentConfig,
    InfluenceCGConfig,
    L1SparseConfig,
    NegGradPlusConfig,
    NPOConfig,
    RandomLabelsConfig,
    RetrainConfig,
    SalUnConfig,
    SCRUBConfig,
    SSDConfig,
    UnrollingSGDConfig,
)


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
