"""float32 that is float32, on GPUs too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Inside the context, float32 matrices and images are multiplied and convolved in float32.

    A GPU rounds them to TF32 first (10 bits of mantissa instead of 23): in convolutions unless it is told not to, in
    matrix products where that was switched on (`tf32=True` of `TrainingArguments`, torch.compile through it). Sums of
    gradients are then good to about 1e-3, and a rounded eigenbasis lets large eigenvalues leak into directions that are
    divided by small ones. The settings are the process's, so the backward pass's own threads see them; afterwards,
    also after an exception, they are what they were.
    """
    backends: Any = torch.backends
    owners = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
    )
    before = {
        owner: owner.fp32_precision for owner in owners if hasattr(backends, "fp32_precision")
    }  # from PyTorch 2.9
    with contextlib.ExitStack() as undo:
        undo.callback(_put_back, before)
        # Of PyTorch's two interfaces to these settings the older one raises where the newer one disagrees with it. So the
        # older is set where it can be read, and the newer where that was not enough.
        _switch_off(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", undo)
        _switch_off(lambda: backends.cudnn.allow_tf32, _allow_tf32_in_cudnn, False, undo)
        for owner in before:
            if owner.fp32_precision not in ("none", "ieee"):
                owner.fp32_precision = "ieee"
        yield


def _switch_off(read: Callable[[], Any], write: Callable[[Any], None], off: Any, undo: contextlib.ExitStack) -> None:
    try:
        before = read()
    except RuntimeError:
        return
    if before != off:
        write(off)
        undo.callback(write, before)


def _allow_tf32_in_cudnn(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed


def _put_back(before: dict[Any, str]) -> None:
    for owner, value in before.items():
        owner.fp32_precision = "none"  # then it is what `torch.backends.fp32_precision` says
        if owner.fp32_precision != value:
            owner.fp32_precision = value
