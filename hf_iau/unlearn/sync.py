"""Several processes run one request: the same one, from the same weights, to the same weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from torch import nn

from hf_iau.distributed import (
    SAME_START,
    all_gather_arrays,
    assert_same_on_ranks,
    broadcast_,
    get_world_size,
    is_distributed,
    is_sharded,
    to_local,
)
from hf_iau.errors import ParallelError
from hf_iau.memory.fingerprints import weights_fingerprint
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.weights import model_state
from hf_iau.unlearn.transaction import WeightTransaction

# Rounding on different devices is far below this share of the update; anything above is another update.
_ROUNDING = 1e-3


def agree_on_request(context: ForgetContext, method: str, config: dict[str, Any]) -> None:
    """Make sure that every process was given the same request and starts from the same weights and memory.

    Raises:
        ParallelError: in every process, if not.
    """
    if not is_distributed():
        return
    others = (context.train, context.retain, context.held_out)
    request = {
        "method": method,
        "config": config,
        "forget": sorted((digest.hex(), count) for digest, count in context.digests.items()),
        "rows": [None if rows is None else len(rows) for rows in others],
        "excluded": len(context.excluded),
        "reason": context.reason,
        "seed": context.seed,
    }
    digest = hashlib.blake2b(json.dumps(request, default=str, sort_keys=True).encode()).hexdigest()
    assert_same_on_ranks(
        digest, "the request", "Pass all forget rows, and the same arguments, to unlearn() in every process."
    )
    memory = context.memory
    about_memory = (
        None if memory is None else (memory.n_rows, memory.n_targets, memory.gradient_sum_kind, memory.calibration)
    )
    assert_same_on_ranks(
        weights_fingerprint(context.model) + json.dumps(about_memory), "their weights or memory", SAME_START
    )


def settle_weights(model: nn.Module, transaction: WeightTransaction) -> None:
    """Make the updated weights the same, bit for bit, in every process.

    Where they differ by rounding (kernels that add up in changing order), all take those of process 0.

    Args:
        model: the bare model, updated.
        transaction: that which knows the weights before the update; it is to roll back if this raises.

    Raises:
        ParallelError: in every process, if the updates of two processes are not the same update.
    """
    if not is_distributed():
        return
    prints = [
        about["print"] for _, about in all_gather_arrays({}, {"print": weights_fingerprint(model)}, "updated weights")
    ]
    if len(set(prints)) > 1:
        if is_sharded(model):  # all have gathered the same shards: replicas of them must differ
            raise ParallelError(
                "Replicas of the same shard were updated differently, so the update was not applied. Start all "
                "processes again."
            )
        away, moved = 0.0, 0.0
        with torch.no_grad():
            for name, tensor in model_state(model).items():
                main = tensor.detach().clone()
                broadcast_(main, 0, f"the updated {name}")
                away += float((tensor.double() - main.double()).square().sum())
                moved += float((main.double() - transaction.before(name).to(main.device).double()).square().sum())
                tensor.copy_(main)
        own = {"distance": np.asarray([away / moved if moved > 0 else away], dtype=np.float64)}
        distances = [
            float(arrays["distance"][0]) ** 0.5 for arrays, _ in all_gather_arrays(own, {}, "updates' distances")
        ]
        if not max(distances) <= _ROUNDING:
            number = int(np.argmax(distances))
            raise ParallelError(
                f"Process {number} of {get_world_size()} computed an update that is {distances[number]:.2g} of its "
                "length away from that of process 0, so it was not applied. Give every process the same weights, "
                "rows and seeds; a method that draws at random must seed itself with args.seed."
            )
    assert_same_on_ranks(
        weights_fingerprint(model), "the updated weights", "The update was not applied; start all processes again."
    )


def non_finite_parameter(model: nn.Module) -> str | None:
    """The first parameter with a NaN or infinite value, of shards in any process; None where there is none."""
    names = (name for name, p in model.named_parameters() if not bool(torch.isfinite(to_local(p)).all()))
    bad = next(names, None)
    if is_sharded(model):
        found = all_gather_arrays({}, {"bad": bad}, "the check for values that are not finite")
        bad = next((about["bad"] for _, about in found if about["bad"]), None)
    return bad
