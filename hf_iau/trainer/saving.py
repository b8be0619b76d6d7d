"""What is saved beside a trainer's weights: the memory that belongs to them, and what the model card tells."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hf_iau.distributed import full_parameters
from hf_iau.errors import IAUError, RequestError, StorageError
from hf_iau.memory.fingerprints import weights_fingerprint
from hf_iau.memory.keys import Key
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.memory_files import MEMORY_HEADER, read_header, remove_memory
from hf_iau.memory.row_identity import keyed_fingerprints
from hf_iau.unlearn.state import UnlearningState


def save_private_files(
    model: nn.Module, memory: GradientMemory | None, state: UnlearningState, folder: Path, write: bool
) -> None:
    """Save memory and card into `folder`; remove a memory of other weights that lies there where a request ended it.

    Args:
        model: the bare model, of whose weights they are.
        memory: the one in force, as far as it was read; None where there is none.
        state: of the trainer.
        folder: below which they go.
        write: whether this process writes; all have to call.
    """
    memory = None if memory is None else memory.on_main_process()
    with full_parameters(model):
        if not write:
            return
        if memory is not None:
            memory.save(folder)
        elif state.ended and _memory_is_of_other_weights(folder, model):
            remove_memory(folder)
        if state.card is not None:
            state.card.save(folder, model)


def weights_on_disk(folder: Path) -> str | None:
    """Fingerprint of the weights that requests, or training, left in the model's folder above `folder`.

    As the memory there says, or, where a request ended that, the last line of the ledger; None where neither is there.
    """
    with contextlib.suppress(IAUError, KeyError, TypeError):
        return str(read_header(folder / MEMORY_HEADER)["model"]["weights"])
    lines = _ledger_lines(folder)
    return str(lines[-1].get("weights_after")) if lines else None


def rows_forgotten_on_disk(folder: Path) -> int:
    """How many rows requests took out of the model in the folder above `folder`, as far as its records tell."""
    rows = 0
    with contextlib.suppress(IAUError, KeyError, TypeError, ValueError):
        rows = int(read_header(folder / MEMORY_HEADER)["forgotten_rows"])
    return max(rows, len({row for line in _ledger_lines(folder) for row in line.get("row_ids", ())}))


def forgotten_by_ledger(folder: Path, key: Key | None, model: nn.Module, dataset: Any) -> np.ndarray | None:
    """Which rows of `dataset` the ledger in `folder` says are out: bool, `(rows,)`; None where it has no entry.

    Raises:
        RequestError: there is no key to recognise them by.
    """
    names = Counter(str(row) for line in _ledger_lines(folder) for row in line.get("row_ids", ()))
    if not names:
        return None
    if key is None:
        raise RequestError(
            f"The ledger in {folder} says that {len(names)} rows were forgotten, and without its key nobody can tell "
            "which: set HF_IAU_KEY, or give another output_dir."
        )
    out = np.zeros(len(dataset), dtype=bool)
    for i, row in enumerate(keyed_fingerprints(key, model, dataset)):
        name = row.tobytes().hex()
        out[i] = names[name] > 0
        names[name] -= 1
    return out


def refuse_stale(folder: Path, model: nn.Module, known: set[str], memory: GradientMemory | None, argument: str) -> None:
    """Raise `StorageError` where saving would put older weights over a model that requests have changed since.

    Args:
        folder: the `_iau/` that is to be written.
        model: the bare model.
        known: weights that this trainer has found there, or left there itself.
        memory: that is to be saved.
        argument: where the folder is named, for the error.
    """
    lines = _ledger_lines(folder)
    before, after = ({str(line.get(name)) for line in lines} for name in ("weights_before", "weights_after"))
    if lines and weights_fingerprint(model) in before - after:
        raise StorageError(
            f"{argument}={folder.parent}: the model has weights from before a request that was served there, so saving "
            "would bring forgotten rows back. Load the model that lies there, or save elsewhere."
        )
    there = weights_on_disk(folder)
    if there is None or there in known or not rows_forgotten_on_disk(folder):
        return
    if memory is not None and memory.model["weights"] == there:
        return
    raise StorageError(
        f"{argument}={folder.parent}: rows were forgotten there since this trainer was made, or the model there is "
        f"another one (weights {there[:8]}), so saving would bring them back. Load the model that lies there and give "
        "it to a new trainer, or save elsewhere; DeletionService(trainer) catches up by itself."
    )


def _ledger_lines(folder: Path) -> list[dict[str, Any]]:
    """The ledger's lines as they are, not verified; none where there is no ledger, or it cannot be read."""
    try:
        lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
        return lines if all(isinstance(line, dict) for line in lines) else []
    except (OSError, ValueError, RecursionError):
        return []


def _memory_is_of_other_weights(folder: Path, model: nn.Module) -> bool:
    try:
        return bool(read_header(folder / MEMORY_HEADER)["model"]["weights"] != weights_fingerprint(model))
    except (IAUError, KeyError, TypeError):  # none, half of one, or one that cannot be read
        return True
