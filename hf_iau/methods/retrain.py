"""`retrain`: train anew without the forget rows. The yardstick of every other method, and the dearest."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer
from transformers.trainer_callback import DefaultFlowCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from hf_iau.errors import ConfigError, RequestError
from hf_iau.forget import ForgetContext, MethodOutcome
from hf_iau.gather import IAUCallback
from hf_iau.methods.base import register_method
from hf_iau.objective import RowSource

# What a Trainer subclass may override that changes how it trains, and that a plain Trainer would not repeat.
_NOT_REPEATED = ("create_optimizer", "create_scheduler", "get_train_dataloader", "_get_train_sampler")

_NEEDLESS_CALLBACKS = (DefaultFlowCallback, ProgressCallback, PrinterCallback, IAUCallback)


@dataclass(frozen=True)
class RetrainConfig:
    """Configuration of `retrain`: where training starts. Default: the trainer's own `model_init`.

    Raises:
        ConfigError: both were given, or the file is missing.
    """

    model_init: Callable[[], nn.Module] | None = field(
        default=None, metadata={"help": "Makes the model that training starts from, as in `Trainer(model_init=…)`."}
    )
    initial_weights: str | None = field(
        default=None,
        metadata={"help": "Instead: a safetensors file, or a folder of them, with the weights before training."},
    )

    def __post_init__(self) -> None:
        if self.model_init is not None and self.initial_weights is not None:
            raise ConfigError("RetrainConfig was given both model_init and initial_weights: give one.")
        if self.model_init is not None and not callable(self.model_init):
            raise ConfigError(f"RetrainConfig(model_init={self.model_init!r}): give a function that makes a model.")
        if self.initial_weights is not None:
            weight_files(self.initial_weights, "RetrainConfig")


@register_method
class Retrain:
    """θ ← what a plain `transformers.Trainer` makes of the retained rows, with this trainer's arguments and seed.

    Needs the retained rows and the weights that training started from. The new weights are copied into the model in
    place; the memory of the old ones ends, and `trainer.gather()` makes a new one. Callbacks are not repeated.
    """

    name: ClassVar[str] = "retrain"
    config_class: ClassVar[type] = RetrainConfig
    citation: ClassVar[str] = (
        "exact unlearning; e.g. Cao, Yang: Towards Making Systems Forget with Machine Unlearning, 2015"
    )

    def check(self, context: ForgetContext, config: RetrainConfig) -> None:
        context.check_retained(self.name)
        trainer = context.trainer
        if trainer is None:
            raise RequestError(f"method={self.name!r} works through trainer.unlearn() alone: it repeats its settings.")
        if config.model_init is None and config.initial_weights is None and trainer.model_init is None:
            raise RequestError(
                f"method={self.name!r} needs the model that training started from: make the trainer with model_init=, "
                "or pass config=RetrainConfig(model_init=…) or RetrainConfig(initial_weights='file.safetensors')."
            )
        if trainer.given_optimizer:
            raise RequestError(
                f"method={self.name!r} cannot repeat an optimizer object that was given as optimizers=: it holds the "
                "old parameters. Give optimizer_cls_and_kwargs= or args.optim instead."
            )
        overridden = [name for name in _NOT_REPEATED if getattr(type(trainer), name) is not getattr(Trainer, name)]
        if overridden or trainer.restriction_config is not None:
            what = ", ".join(overridden) or "restriction="
            raise RequestError(
                f"method={self.name!r} trains with a plain Trainer, which would not repeat this trainer's {what}. Train "
                "on the retained rows yourself."
            )

    def run(self, context: ForgetContext, config: RetrainConfig) -> MethodOutcome:
        warnings = []
        lost = [
            type(callback).__name__
            for callback in context.trainer.callback_handler.callbacks
            if not isinstance(callback, _NEEDLESS_CALLBACKS)
        ]
        if lost:
            warnings.append(f"Retraining did not repeat the callbacks {', '.join(lost)}.")
        if context.memory is not None:
            warnings.append("The memory is of the weights before retraining: trainer.gather() makes a new one.")
        with context.timer.phase("update"), tempfile.TemporaryDirectory() as folder:
            retained = context.retained_rows(self.name)
            trainer = _plain_trainer(context, config, retained, folder)
            _check_alike(context.model, trainer.accelerator.unwrap_model(trainer.model))
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


def initial_model(context: ForgetContext, model_init: Callable[[], nn.Module] | None, weights: str | None) -> nn.Module:
    """The model that training started from, on the CPU or wherever it is made.

    Args:
        context: of the request.
        model_init: makes it; default: the trainer's own, unless `weights` are given.
        weights: safetensors file or folder to be loaded into a copy of the model.
    """
    if weights is None:
        return model_init() if model_init is not None else context.trainer.call_model_init()
    model = copy.deepcopy(context.model)
    load_weights(model, weights)
    return model


def weight_files(path: str, owner: str) -> list[Path]:
    """The safetensors files at `path`, a file or a folder.

    Raises:
        ConfigError: there are none.
    """
    place = Path(path)
    found = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    if not found or any(file.suffix != ".safetensors" for file in found):
        raise ConfigError(
            f"{owner}(initial_weights={path!r}): give a safetensors file, or a folder with some, as save_pretrained() "
            "writes them."
        )
    return found


def load_weights(model: nn.Module, path: str) -> None:
    """Copy the weights at `path` into `model`.

    Raises:
        ConfigError: a trainable parameter is missing, or a tensor has another shape.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path, "config"):
        tensors |= load_file(file)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and name not in tensors]
    if missing:
        raise ConfigError(
            f"initial_weights={path!r} lacks {len(missing)} trainable parameters, e.g. {missing[0]!r}: save the whole "
            "model before training, or give model_init."
        )
    _copy(model, tensors)


def copy_weights(model: nn.Module, other: nn.Module) -> None:
    """Copy every parameter and buffer of `other` into `model`, in place."""
    _copy(model, {**dict(other.named_parameters()), **dict(other.named_buffers())})


def _copy(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, own in [*model.named_parameters(), *model.named_buffers()]:
            if name not in tensors:
                continue
            if tensors[name].shape != own.shape:
                raise ConfigError(
                    f"{name!r} has shape {tuple(tensors[name].shape)} in the initial weights and {tuple(own.shape)} in "
                    "the model: give those of the same architecture."
                )
            if not torch.equal(own, tensors[name].to(own)):  # constants that nothing can write to are equal
                own.copy_(tensors[name])


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
        start = {"model": initial_model(context, None, config.initial_weights)}
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


def _check_alike(model: nn.Module, fresh: nn.Module) -> None:
    shapes, others = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (model, fresh))
    if shapes != others:
        name = next(name for name in {**shapes, **others} if shapes.get(name) != others.get(name))
        raise RequestError(
            f"The model to be retrained has {name!r} of shape {others.get(name)}, the trainer's {shapes.get(name)}: "
            "model_init must make the same architecture."
        )
