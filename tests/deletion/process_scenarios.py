"""What several processes do with a request that is saved. Each function is run in all of them."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import plain_rows
from unlearning_trainers import WITH_CURVATURE, make_trainer, state_of

from hf_iau import DeletionService, IAUConfig, Ledger, StorageError, UnlearningTrainer
from hf_iau.deletion import storage
from hf_iau.distributed import is_main_process
from hf_iau.memory.fingerprints import weights_fingerprint

ROWS = list(range(1, 36, 2))
GIVEN = IAUConfig(scale=0.1, damping=1.0)


def trainer_of(folder: Path) -> UnlearningTrainer:
    trainer = make_trainer(folder, "plain", rows=plain_rows(60))
    trainer.gather(WITH_CURVATURE)
    return trainer


def saved(folder: Path) -> dict[str, Any]:
    """A request, the same one again, a full disk, and a few rows that wait."""
    trainer = trainer_of(folder)
    service = DeletionService(trainer)
    first = service.unlearn(forget_indices=ROWS, config=GIVEN)
    again = service.unlearn(forget_indices=ROWS, config=GIVEN)
    before = state_of(trainer.model)
    memory = trainer.memory

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    original = storage.write_text_atomically
    if is_main_process():
        storage.write_text_atomically = no_space
    message = ""
    try:
        service.unlearn(forget_indices=[40, 41], config=GIVEN)
    except StorageError as error:
        message = str(error)
    storage.write_text_atomically = original
    unmoved = all(bool((value == before[name]).all()) for name, value in state_of(trainer.model).items())
    waiting = service.queue(forget_indices=[40, 41])
    served = service.serve_queue(config=GIVEN)
    assert served is not None and served.entry is not None and trainer.memory is not None
    return {
        "applied": [first.applied, again.applied, waiting is None, served.applied],
        "entries": [output.entry.number for output in (first, again, served) if output.entry is not None],
        "told": "are as they were before" in message,
        "unmoved": unmoved and memory is not None,
        "weights": weights_fingerprint(trainer.model),
        "forgotten": np.flatnonzero(trainer.memory.row_identity.forgotten).tolist(),  # type: ignore[union-attr]
        "ledger": Ledger.of(folder).verify().count,
    }
