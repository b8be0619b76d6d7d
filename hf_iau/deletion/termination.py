"""SIGTERM while a request runs: undone cleanly, or finished first, and then obeyed."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from hf_iau.errors import RequestError

logger = logging.getLogger(__name__)


class _Terminated(BaseException):
    """Raised by the handler; no `except Exception` on the way swallows it."""


class Termination:
    """A context in which SIGTERM raises, so that everything is put back, or waits while `deferred` is true.

    Afterwards the signal is sent again to whoever handled it before: a process without a handler ends by it. Outside
    the main thread Python allows no handlers, and the signal does what it always does.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._received = False
        self._earlier: Any = None
        self._installed = False

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._handle)
            self._installed = True
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        if not self.deferred:
            raise _Terminated

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._earlier if self._earlier is not None else signal.SIG_DFL)
        if not self._received:
            return
        undone = kind is not None
        logger.error(
            "SIGTERM while a request ran: %s",
            "nothing was changed; run the request again." if undone else "the request was finished first.",
        )
        os.kill(os.getpid(), signal.SIGTERM)
        if undone:  # a handler of the caller's let the process live
            raise RequestError("SIGTERM interrupted the request: nothing was changed; run it again.") from None
