"""`fine-tune`: train on, on the retained rows alone, and let the model forget by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.training_loop import TrainingLoopConfig, batches_of, descend, mean_loss, shuffled
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome


@dataclass(frozen=True)
class FineTuneConfig(TrainingLoopConfig):
    """Configuration of `fine-tune`; the defaults are those of SalUn's public code."""


@register_method
class FineTune:
    """θ ← θ − lr·∇L_r, for some epochs. Needs the retained rows."""

    name: ClassVar[str] = "fine-tune"
    config_class: ClassVar[type] = FineTuneConfig
    citation: ClassVar[str] = (
        "Warnecke, Pirch, Wressnegger, Rieck: Machine Unlearning of Features and Labels, 2021 (arXiv 2108.11577); "
        "Golatkar, Achille, Soatto: Eternal Sunshine of the Spotless Net, 2020 (arXiv 1911.04933)"
    )

    def check(self, context: ForgetContext, config: FineTuneConfig) -> None:
        context.check_retained(self.name)

    def run(self, context: ForgetContext, config: FineTuneConfig) -> MethodOutcome:
        with context.timer.phase("update"):
            retained = context.retained_rows(self.name)
            curve = descend(
                context,
                config,
                lambda epoch: shuffled(retained, config.batch_size, context.seed, epoch),
                lambda inputs: mean_loss(context, inputs),
                method=self.name,
                items_per_epoch=batches_of(retained, config.batch_size),
            )
        return MethodOutcome(diagnostics={"retained_rows": len(retained), "loss_by_epoch": curve})
