"""What is saved beside a trainer's weights: the memory that belongs to them, and what the model card tells."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hf_iau.distributed import full_parameters
from hf_iau.errors import IAUError
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


def _memory_is_of_other_weights(folder: Path, model: nn.Module) -> bool:
    try:
        return bool(read_header(folder / MEMORY_HEADER)["model"]["weights"] != weights_fingerprint(model))
    except (IAUError, KeyError, TypeError):  # none, half of one, or one that cannot be read
        return True
