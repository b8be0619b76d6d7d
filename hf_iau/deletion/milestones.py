"""The steps of writing a request to disk, by name, so that tests can interrupt each of them."""

from __future__ import annotations

from collections.abc import Callable

# In their order. A request is committed with "journal ready" and not before.
MILESTONES = (
    "locked",
    "step computed",
    "journal written",
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

observer: Callable[[str], None] | None = None


def passed(milestone: str) -> None:
    """Tell the observer, if there is one, that `milestone` was passed."""
    if observer is not None:
        observer(milestone)
