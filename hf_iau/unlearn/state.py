"""What a trainer knows of the requests that its model has been through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.memory_files import MEMORY_HEADER
from hf_iau.methods.context import ForgetContext
from hf_iau.report.card import UnlearningCard


@dataclass
class UnlearningState:
    """The memory in force, the rows that are out, and what the model card tells.

    Attributes:
        given: the memory that was given, or lay below `output_dir`.
        latest: the memory after the last request, or gathered since.
        ended: whether a request made the weights anew, so that every memory there was is of other weights.
        forgotten: digests of the rows that are out, with how often each occurs.
        forgotten_positions: numbers by which they were named, where they were.
        card: None where it was not read yet.
        on_disk: fingerprints of the weights that this trainer has found in its `output_dir`, or left there itself.
    """

    given: GradientMemory | None = None
    latest: GradientMemory | None = None
    ended: bool = False
    forgotten: Counter[bytes] = field(default_factory=Counter)
    forgotten_positions: tuple[int, ...] = ()
    card: UnlearningCard | None = None
    on_disk: set[str] = field(default_factory=set)

    def adopt(self, folder: Path) -> None:
        """Take what lies in `folder` for the memory of the present weights, whatever was in force before."""
        self.given = GradientMemory.load(folder) if (folder / MEMORY_HEADER).is_file() else None
        self.latest, self.ended = None, self.given is None
        self.forgotten, self.forgotten_positions, self.card = Counter(), (), None

    def finished(
        self, context: ForgetContext, memory: GradientMemory | None, card: UnlearningCard
    ) -> Callable[[], None]:
        """Note a request that was run. Returns the function that takes the note back.

        Args:
            context: the request.
            memory: of the weights after it; None where there is none, so that whatever was in force before is not any
                more.
            card: with this request.
        """
        earlier = replace(self)
        self.latest, self.ended = memory, self.ended or memory is None
        self.forgotten = self.forgotten + context.digests
        if context.forget_positions is not None:
            self.forgotten_positions += tuple(context.forget_positions.tolist())
        self.card = card

        def undo() -> None:
            self.latest, self.ended, self.card = earlier.latest, earlier.ended, earlier.card
            self.forgotten, self.forgotten_positions = earlier.forgotten, earlier.forgotten_positions

        return undo
