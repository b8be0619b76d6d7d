"""Seconds and peak memory of each phase of a request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from hf_iau.errors import RequestError
from hf_iau.utils.devices import memory_counters, synchronise

_SAMPLING_SECONDS = 0.02


class PhaseTimer:
    """Collects wall seconds and peak memory by phase.

    Example:
        timer = PhaseTimer(model.device)
        with timer.phase("gradient"):
            ...
        timer.seconds["gradient"], timer.peak_memory_bytes["gradient"]

    Args:
        device: the device that does the work. On CUDA, and other accelerators whose allocator counts, the peak is
            `torch.cuda.max_memory_allocated` of that device during the phase: everything allocated, weights included;
            its peak counter is reset at the start of each phase. On any other device it is the *growth* of this
            process' resident memory above its size at the start of the phase, sampled every 20 ms by a background
            thread and at both ends; memory that the allocator kept from an earlier phase is not seen again, and a peak
            shorter than 20 ms can be missed.

    Attributes:
        seconds: wall seconds by phase, from a monotonic clock; the device is synchronised at both ends. Entering a
            phase again adds to it.
        peak_memory_bytes: peak memory by phase in bytes; of several entries the largest.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seconds: dict[str, float] = {}
        self.peak_memory_bytes: dict[str, int] = {}
        self._current: str | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as phase `name`; recorded even if the block raises.

        Raises:
            RequestError: inside another phase, whose figures would be counted twice.
        """
        if self._current is not None:
            raise RequestError(f"phase({name!r}) begins inside phase {self._current!r}: end that one first.")
        self._current = name
        memory = _ResidentMemory(self.device) if memory_counters(self.device) is None else _DeviceMemory(self.device)
        memory.start()
        started = time.perf_counter()
        try:
            yield
        finally:
            try:
                synchronise(self.device)
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
                self.peak_memory_bytes[name] = max(self.peak_memory_bytes.get(name, 0), memory.stop())
            finally:
                self._current = None


def peak_allocated_bytes(work: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes that PyTorch's allocator held at once while `work` ran.

    On accelerators everything that is allocated counts; elsewhere what is allocated beyond what there was before.
    """
    counters = memory_counters(device)
    if counters is not None:
        counters.reset_peak_memory_stats(device)
        work()
        return int(counters.max_memory_allocated(device))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del result
    return peak


class _DeviceMemory:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._counters: Any = memory_counters(device)

    def start(self) -> None:
        synchronise(self.device)
        self._counters.reset_peak_memory_stats(self.device)

    def stop(self) -> int:
        return int(self._counters.max_memory_allocated(self.device))


class _ResidentMemory:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process = psutil.Process()
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="hf-iau-memory", daemon=True)

    def start(self) -> None:
        synchronise(self.device)
        self._base = self._peak = self._process.memory_info().rss
        self._thread.start()

    def _sample(self) -> None:
        while not self._finished.wait(_SAMPLING_SECONDS):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def stop(self) -> int:
        self._finished.set()
        self._thread.join()
        return int(max(self._peak, self._process.memory_info().rss) - self._base)
