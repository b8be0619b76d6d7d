"""What is saved beside a trainer's weights: the memory that belongs to them, and what the model card tells."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from torch import nn

from hf_iau.distributed import full_parameters
from hf_iau.errors import IAUError, StorageError
from hf_iau.memory.fingerprints import weights_fingerprint
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.memory_files import MEMORY_HEADER, read_header, remove_memory
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
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        return str(json.loads(_ledger(folder).read_text(encoding="utf-8").splitlines()[-1])["weights_after"])
    return None


def rows_forgotten_on_disk(folder: Path) -> int:
    """How many rows requests took out of the model in the folder above `folder`, as far as its records tell."""
    rows = 0
    with contextlib.suppress(IAUError, KeyError, TypeError, ValueError):
        rows = int(read_header(folder / MEMORY_HEADER)["forgotten_rows"])
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        lines = _ledger(folder).read_text(encoding="utf-8").splitlines()
        rows = max(rows, sum(int(json.loads(line)["rows"]) for line in lines))
    return rows


def refuse_stale(folder: Path, known: set[str], memory: GradientMemory | None, argument: str) -> None:
    """Raise `StorageError` where saving would put older weights over a model that requests have changed since.

    Args:
        folder: the `_iau/` that is to be written.
        known: weights that this trainer has found there, or left there itself.
        memory: that is to be saved.
        argument: where the folder is named, for the error.
    """
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


def _ledger(folder: Path) -> Path:
    return folder / "ledger.jsonl"


def _memory_is_of_other_weights(folder: Path, model: nn.Module) -> bool:
    try:
        return bool(read_header(folder / MEMORY_HEADER)["model"]["weights"] != weights_fingerprint(model))
    except (IAUError, KeyError, TypeError):  # none, half of one, or one that cannot be read
        return True
