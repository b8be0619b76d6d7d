"""What a request returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hf_iau.errors import RequestError
from hf_iau.memory.memory import GradientMemory
from hf_iau.report.report import UnlearningReport


@dataclass
class UnlearnOutput:
    """What `unlearn()` returns.

    Attributes:
        report: before, after and how; see `UnlearningReport`.
        applied: whether the weights were changed (False for an empty request, a dry run, and a request that the ledger
            has already).
        memory: the memory of the changed model, or None where there was none.
        undo: what `revert()` calls, once; None where there is nothing to undo.
    """

    report: UnlearningReport
    applied: bool
    memory: GradientMemory | None
    undo: Callable[[], None] | None = None

    def revert(self) -> None:
        """Put the weights (bit for bit) and the memory back to what they were before the request.

        Raises:
            RequestError: nothing was applied, it was reverted already, or the weights have moved since.
        """
        if self.undo is None:
            raise RequestError("revert(): this request changed nothing, or was reverted already.")
        self.undo()
        self.undo, self.applied = None, False
