"""The points at which writing a deletion request can be interrupted, hooked in from outside."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from hf_iau.deletion import journal
from hf_iau.deletion.journal import JournalFile
from hf_iau.deletion.storage import RequestStorage

# In their order. A request is committed with "journal ready" and not before.
POINTS = (
    "locked",
    "step computed",
    "weights staged",
    "memory staged",
    "ledger staged",
    "staged files flushed",
    "journal ready",
    "first file moved",
    "files moved",
    "old files removed",
    "journal removed",
)
COMMITTED = POINTS[POINTS.index("journal ready") :]


@contextlib.contextmanager
def observed(observer: Callable[[str], None]) -> Iterator[None]:
    """Inside, `observer` is told each point of `POINTS` that is passed."""
    with contextlib.ExitStack() as stack:

        def hook(owner: Any, name: str, before: str | None = None, after: str | None = None) -> None:
            stack.enter_context(_hooked(owner, name, observer, before, after))

        hook(FileLock, "acquire", after="locked")
        hook(RequestStorage, "write", before="step computed")
        hook(RequestStorage, "_stage_weights", after="weights staged")
        hook(RequestStorage, "_stage_entry", before="memory staged", after="ledger staged")
        hook(journal, "write_text_atomically", before="staged files flushed", after="journal ready")
        hook(JournalFile, "discard", before="old files removed", after="journal removed")
        stack.enter_context(_moves_observed(observer))
        yield


@contextlib.contextmanager
def _hooked(
    owner: Any, name: str, observer: Callable[[str], None], before: str | None, after: str | None
) -> Iterator[None]:
    original = getattr(owner, name)
    own = name in vars(owner)

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            observer(before)
        result = original(*args, **kwargs)
        if after is not None:
            observer(after)
        return result

    setattr(owner, name, hooked)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def _moves_observed(observer: Callable[[str], None]) -> Iterator[None]:
    """Inside, the first move out of the staged files is told, and what comes right before old files are removed."""
    finish, replace, unlink = JournalFile.finish, os.replace, Path.unlink

    def finishing(self: JournalFile, *args: Any) -> None:
        told = set()

        def once(point: str) -> None:
            if point not in told:
                told.add(point)
                observer(point)

        def replacing(source: Any, target: Any, **kwargs: Any) -> None:
            replace(source, target, **kwargs)
            if self.staged in Path(source).parents:
                once("first file moved")

        def unlinking(path: Path, missing_ok: bool = False) -> None:
            once("files moved")
            unlink(path, missing_ok=missing_ok)

        os.replace, Path.unlink = replacing, unlinking  # type: ignore[assignment, method-assign]
        try:
            finish(self, *args)
        finally:
            os.replace, Path.unlink = replace, unlink  # type: ignore[method-assign]

    JournalFile.finish = finishing  # type: ignore[method-assign]
    try:
        yield
    finally:
        JournalFile.finish = finish  # type: ignore[method-assign]
