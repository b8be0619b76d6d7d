"""The weights that training started from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import set_seed

from hf_iau.errors import ConfigError, RequestError
from hf_iau.methods.context import ForgetContext


@dataclass(frozen=True)
class InitialWeightsConfig:
    """Where training started. Default: the trainer's own `model_init`.

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
        owner = type(self).__name__
        if self.model_init is not None and self.initial_weights is not None:
            raise ConfigError(f"{owner} was given both model_init and initial_weights: give one.")
        if self.model_init is not None and not callable(self.model_init):
            raise ConfigError(f"{owner}(model_init={self.model_init!r}): give a function that makes a model.")
        if self.initial_weights is not None:
            weight_files(self.initial_weights)


def check_initial_weights(context: ForgetContext, config: InitialWeightsConfig, method: str) -> None:
    """Raise `RequestError` where nothing says how training started."""
    own = getattr(context.trainer, "model_init", None)
    if config.model_init is None and config.initial_weights is None and own is None:
        name = type(config).__name__
        raise RequestError(
            f"method={method!r} needs the model that training started from: make the trainer with model_init=, or pass "
            f"config={name}(model_init=…) or {name}(initial_weights='file.safetensors')."
        )


def initial_model(context: ForgetContext, config: InitialWeightsConfig) -> nn.Module:
    """The model that training started from; `model_init` is called with the seed of the training arguments."""
    if config.initial_weights is not None:
        model = copy.deepcopy(context.model)
        load_weights(model, config.initial_weights)
        return model
    set_seed(context.seed)
    return config.model_init() if config.model_init is not None else context.trainer.call_model_init()


def check_same_architecture(model: nn.Module, fresh: nn.Module) -> None:
    """Raise `RequestError` unless both have the same parameters in the same shapes."""
    shapes, others = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (model, fresh))
    if shapes != others:
        name = next(name for name in {**shapes, **others} if shapes.get(name) != others.get(name))
        raise RequestError(
            f"The initial model has {name!r} of shape {others.get(name)}, the trainer's {shapes.get(name)}: model_init "
            "must make the same architecture."
        )


def weight_files(path: str) -> list[Path]:
    """The safetensors files at `path`, a file or a folder.

    Raises:
        ConfigError: there are none.
    """
    place = Path(path)
    try:
        files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    except OSError:  # a name that is too long
        files = []
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise ConfigError(
            f"initial_weights={path!r}: give a safetensors file, or a folder with some, as save_pretrained() writes "
            "them."
        )
    return files


def load_weights(model: nn.Module, path: str) -> None:
    """Copy the weights at `path` into `model`.

    Raises:
        ConfigError: a trainable parameter is missing, or a tensor has another shape.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
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
