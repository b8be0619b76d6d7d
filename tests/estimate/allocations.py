"""Bytes that PyTorch's CPU allocator holds, followed event by event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_allocated(work: Callable[[], Any]) -> int:
    """The most bytes that `work` held at once beyond what was held when it began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    assert profiler.profiler is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held, peak = 0, 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak
