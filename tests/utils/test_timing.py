"""Seconds and peak memory by phase."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from hf_iau.errors import RequestError
from hf_iau.utils.timing import PhaseTimer


def test_seconds_add_up_by_phase():
    timer = PhaseTimer()
    for _ in range(2):
        with timer.phase("gradient"):
            time.sleep(0.05)
    with timer.phase("step"):
        pass
    assert list(timer.seconds) == list(timer.peak_memory_bytes) == ["gradient", "step"]
    assert 0.1 <= timer.seconds["gradient"] < 2
    assert timer.seconds["step"] < timer.seconds["gradient"]


def test_memory_that_is_freed_within_the_phase_is_seen():
    timer = PhaseTimer()
    size = 256 << 20
    with timer.phase("large"):
        block = np.ones(size, dtype=np.uint8)
        time.sleep(0.3)  # several samples, on a busy machine as well
        del block
    assert timer.peak_memory_bytes["large"] > 0.8 * size


def test_phases_do_not_nest():
    timer = PhaseTimer()
    with timer.phase("outer"), pytest.raises(RequestError, match=r"'inner'.*inside phase 'outer'"):
        timer.phase("inner").__enter__()
    with timer.phase("next"):
        pass
    assert list(timer.seconds) == ["outer", "next"]


def test_an_error_inside_is_recorded_and_raised():
    timer = PhaseTimer()
    before = threading.active_count()
    with pytest.raises(KeyError), timer.phase("broken"):
        raise KeyError("x")
    assert "broken" in timer.seconds
    assert threading.active_count() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_peak_is_of_the_phase():
    timer = PhaseTimer("cuda")
    with timer.phase("large"):
        block = torch.ones(64 << 20, dtype=torch.uint8, device="cuda")
        del block
    with timer.phase("small"):
        pass
    assert timer.peak_memory_bytes["large"] >= 64 << 20
    assert timer.peak_memory_bytes["small"] < timer.peak_memory_bytes["large"]
