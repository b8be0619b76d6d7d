"""Fingerprints: which model, which rows and which loss a memory was made of."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_iau.data.adapters import active_adapters
from hf_iau.data.digests import digests_and_columns
from hf_iau.data.targets import base_model, input_columns
from hf_iau.distributed import class_name, full_tensor, reshard

_VERSIONED = ("hf-iau", "torch", "transformers", "datasets", "accelerate", "peft")


def model_fingerprint(model: nn.Module) -> dict[str, str]:
    """Name, architecture and weights of a model.

    Returns:
        `class`; `architecture`, a digest of every parameter's name and shape; `weights`, a digest of the values of all
        parameters and persistent buffers, in the order of their names; `adapters`, the active PEFT adapters, if any.
    """
    reshard(model)
    shapes = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        shapes.update(f"{name}{tuple(parameter.shape)}".encode())
    fingerprint = {
        "class": class_name(base_model(model)),
        "architecture": shapes.hexdigest(),
        "weights": weights_fingerprint(model),
    }
    adapters = active_adapters(model)
    return fingerprint | {"adapters": ", ".join(adapters)} if adapters else fingerprint


def weights_fingerprint(model: nn.Module) -> str:
    """Digest of every parameter and persistent buffer of a model, bit for bit; one is gathered at a time."""
    reshard(model)
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True).keys()
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in persistent})
    return tensors_fingerprint((name, full_tensor(tensors[name].detach())) for name in sorted(tensors))


def tensors_fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Digest of named tensors, given in the order of their names."""
    values = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        values.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        if tensor.numel():
            values.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return values.hexdigest()


def data_fingerprint(model: nn.Module, dataset: Any) -> dict[str, Any]:
    """Row count and a digest of every row of `dataset` and of their order, as far as the model sees them.

    Columns that the model's forward does not take are left out, so that the fingerprint is the same before and after
    the Trainer removes them. `columns` names those that are left.
    """
    digests, columns = digests_and_columns(dataset, input_columns(model))
    content = hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest()
    return {"rows": len(dataset), "columns": columns, "content": content}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages whose behaviour the numbers depend on."""
    return {"python": platform.python_version()} | {
        name: installed_version(name) or "not installed" for name in _VERSIONED
    }


@functools.cache
def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
