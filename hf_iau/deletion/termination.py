"""SIGTERM and Ctrl-C while a request runs: undone cleanly, or finished first, and then obeyed."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from hf_iau.errors import RequestError

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Terminated(BaseException):
    """Raised by the handler; no `except Exception` on the way swallows it."""


class Termination:
    """A context in which SIGTERM and SIGINT raise, so that everything is put back, or wait while `deferred` is true.

    Only the first raises; those that follow wait until everything is put back. Afterwards the last is sent again to
    whoever handled it before: a process without a handler ends by SIGTERM, and Ctrl-C raises `KeyboardInterrupt`.
    Outside the main thread Python allows no handlers, and the signals do what they always do.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._received: int | None = None
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._earlier[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first, self._received = self._received is None, number
        if first and not self.deferred:  # a second one would come in between what is being put back
            raise _Terminated

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier if earlier is not None else signal.SIG_DFL)
        if self._received is None:
            return
        undone, name = kind is not None, signal.Signals(self._received).name
        logger.error(
            "%s while a request ran: %s",
            name,
            "nothing was changed; run the request again." if undone else "the request was finished first.",
        )
        os.kill(os.getpid(), self._received)
        if undone:  # a handler of the caller's let the process live
            raise RequestError(f"{name} interrupted the request: nothing was changed; run it again.") from None
