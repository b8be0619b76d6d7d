"""`unrolling-sgd`: add back the forget rows' gradient at the weights that training started from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from hf_iau.errors import RequestError
from hf_iau.memory.gradient_sum import sum_row_gradients
from hf_iau.methods.base import register_method
from hf_iau.methods.baselines.initial_weights import (
    InitialWeightsConfig,
    check_initial_weights,
    check_same_architecture,
    initial_model,
)
from hf_iau.methods.baselines.training_loop import trained_parameters
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.methods.step import apply_step, step_norm
from hf_iau.utils.config_checks import check_number


@dataclass(frozen=True)
class UnrollingSGDConfig(InitialWeightsConfig):
    """Configuration of `unrolling-sgd`. None means: as in the trainer's arguments.

    Raises:
        ConfigError: a value is out of range.
    """

    lr: float | None = field(default=None, metadata={"help": "η, the learning rate of training."})
    epochs: float | None = field(default=None, metadata={"help": "m, the epochs of training."})
    batch_size: int | None = field(default=None, metadata={"help": "b, the rows that training took a step on."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "lr", above=0, optional=True)
        check_number(self, "epochs", above=0, optional=True)
        check_number(self, "batch_size", at_least=1, whole=True, optional=True)


@register_method
class UnrollingSGD:
    """θ ← θ + (η·m/b)·Σ_f ∇ℓ(θ₀): the first-order term of SGD unrolled from θ₀, the only one with the forget rows.

    Needs the weights that training started from, and SGD: it has no meaning for Adam.
    """

    name: ClassVar[str] = "unrolling-sgd"
    config_class: ClassVar[type] = UnrollingSGDConfig
    citation: ClassVar[str] = (
        "Thudi, Deza, Chandrasekaran, Papernot: Unrolling SGD: Understanding Factors Influencing Machine Unlearning, "
        "2021 (arXiv 2109.13398)"
    )

    def check(self, context: ForgetContext, config: UnrollingSGDConfig) -> None:
        if context.trainer is None:
            raise RequestError(f"method={self.name!r} works through trainer.unlearn() alone: it reads its arguments.")
        check_initial_weights(context, config, self.name)

    def run(self, context: ForgetContext, config: UnrollingSGDConfig) -> MethodOutcome:
        args = context.trainer.args
        batch_size = config.batch_size or args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        lr = args.learning_rate if config.lr is None else config.lr
        epochs = args.num_train_epochs if config.epochs is None else config.epochs
        if config.epochs is None and args.max_steps > 0:
            if context.train is None:
                raise RequestError("max_steps= and no train_dataset: pass UnrollingSGDConfig(epochs=…).")
            epochs = args.max_steps * batch_size / len(context.train)
        with context.timer.phase("gradient"):
            start = initial_model(context, config).to(context.forget.device)
            check_same_architecture(context.model, start)
            forget = sum_row_gradients(
                start,
                context.row_loss,
                context.forget,
                names=list(trained_parameters(context)),
                progress=context.progress,
            )
        scale = lr * epochs / batch_size
        with context.timer.phase("update"):
            step = {name: scale * gradient for name, gradient in forget.tensors.items()}
            apply_step(context.model, step)
        warnings = []
        if "sgd" not in str(args.optim) and config.lr is None:
            warnings.append(
                f"args.optim is {args.optim}: the formula is for SGD, and its learning rate means something else. Pass "
                "UnrollingSGDConfig(lr=…)."
            )
        return MethodOutcome(
            forget_targets=forget.n_targets,
            warnings=warnings,
            diagnostics={
                "step_norm": step_norm(step),
                "lr": lr,
                "epochs": epochs,
                "batch_size": batch_size,
                "initial_forget_gradient_norm": forget.norm(),
            },
        )
