"""`retrain`: train anew without the forget rows. Every other method is measured against it."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from transformers import PrinterCallback, Trainer
from transformers.trainer_callback import DefaultFlowCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from hf_iau.data import RowSource
from hf_iau.errors import RequestError
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.initial_weights import (
    InitialWeightsConfig,
    check_initial_weights,
    check_same_architecture,
    copy_weights,
    initial_model,
)
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome

# What a Trainer subclass may override that changes how it trains, and that a plain Trainer would not repeat.
_NOT_REPEATED = ("create_optimizer", "create_scheduler", "get_train_dataloader", "_get_train_sampler")

_NEEDLESS_CALLBACKS = (DefaultFlowCallback, ProgressCallback, PrinterCallback)


@dataclass(frozen=True)
class RetrainConfig(InitialWeightsConfig):
    """Configuration of `retrain`: where training starts. Default: the trainer's own `model_init`."""


@register_method
class Retrain:
    """θ ← what a plain `transformers.Trainer` makes of the retained rows, with this trainer's arguments and seed.

    Needs the retained rows and the weights that training started from. The new weights are copied into the model in
    place; the memory of the old ones ends, and `trainer.gather()` makes a new one. Callbacks are not repeated.
    """

    name: ClassVar[str] = "retrain"
    makes_weights_anew: ClassVar[bool] = True
    config_class: ClassVar[type] = RetrainConfig
    citation: ClassVar[str] = (
        "exact unlearning; e.g. Cao, Yang: Towards Making Systems Forget with Machine Unlearning, 2015"
    )

    def check(self, context: ForgetContext, config: RetrainConfig) -> None:
        context.check_retained(self.name)
        trainer = context.trainer
        if trainer is None:
            raise RequestError(f"method={self.name!r} works through trainer.unlearn() alone: it repeats its settings.")
        check_initial_weights(context, config, self.name)
        if trainer.given_optimizer:
            raise RequestError(
                f"method={self.name!r} cannot repeat an optimizer object that was given as optimizers=: it holds the "
                "old parameters. Give optimizer_cls_and_kwargs= or args.optim instead."
            )
        overridden = [name for name in _NOT_REPEATED if getattr(type(trainer), name) is not getattr(Trainer, name)]
        if overridden or trainer.restriction_config is not None:
            what = ", ".join(overridden) or "restriction="
            raise RequestError(
                f"method={self.name!r} trains with a plain Trainer, which would not repeat this trainer's {what}. "
                "Train on the retained rows yourself."
            )

    def run(self, context: ForgetContext, config: RetrainConfig) -> MethodOutcome:
        warnings = []
        lost = [
            type(callback).__name__
            for callback in context.trainer.callback_handler.callbacks
            if not isinstance(callback, _NEEDLESS_CALLBACKS) and not getattr(callback, "only_watches", False)
        ]
        if lost:
            warnings.append(f"Retraining did not repeat the callbacks {', '.join(lost)}.")
        if context.memory is not None:
            warnings.append("The memory is of the weights before retraining: trainer.gather() makes a new one.")
        with context.timer.phase("update"), tempfile.TemporaryDirectory() as folder:
            retained = context.retained_rows(self.name)
            trainer = _plain_trainer(context, config, retained, folder)
            check_same_architecture(context.model, trainer.accelerator.unwrap_model(trainer.model))
            result = trainer.train()
            copy_weights(context.model, trainer.accelerator.unwrap_model(trainer.model))
        return MethodOutcome(
            keeps_memory=False,
            warnings=warnings,
            diagnostics={
                "retained_rows": len(retained),
                "steps": result.global_step,
                "training_loss": result.training_loss,
            },
        )


def _plain_trainer(context: ForgetContext, config: RetrainConfig, retained: RowSource, folder: str) -> Trainer:
    original = context.trainer
    args = copy.copy(original.args)
    args.output_dir, args.push_to_hub, args.report_to = folder, False, []
    if not args.load_best_model_at_end:
        args.save_strategy = SaveStrategy.NO

    class Retraining(Trainer):
        """A plain Trainer, with the original's own loss where it has one."""

        if type(original).compute_loss is not Trainer.compute_loss:

            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                return original.compute_loss(*args, **kwargs)

    start: dict[str, Any] = {"model_init": config.model_init or original.model_init}
    if config.initial_weights is not None:
        start = {"model": initial_model(context, config)}
    trainer = Retraining(
        **start,
        args=args,
        train_dataset=retained.dataset,
        eval_dataset=original.eval_dataset,
        data_collator=cast(Any, retained.collator),
        processing_class=original.processing_class,
        compute_loss_func=original.compute_loss_func,
        compute_metrics=original.compute_metrics,
        optimizer_cls_and_kwargs=original.optimizer_cls_and_kwargs,
        preprocess_logits_for_metrics=original.preprocess_logits_for_metrics,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
