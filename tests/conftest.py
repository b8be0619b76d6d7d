"""Settings of all tests. This folder is importable, so `from tiny_models import …` works in every test file."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Before anything imports huggingface_hub: no test needs the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The files that take longest, the longest first: begun last, one of them would keep everybody waiting.
LONGEST = (
    "distributed/test_sharded.py",
    "invariant/test_invariance.py",
    "device/test_memory_on_a_device.py",
    "architectures/test_architectures.py",
    "memory/test_gradient_sums.py",
    "device/test_requests_on_a_device.py",
    "trainer/test_callback.py",
    "cli/test_commands.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of `LONGEST` first; the rest stays in its order."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Keep what the libraries made on import out of the garbage collections that a Trainer asks for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _loggers_left_alone() -> None:
    """Levels set by another test, or by a fixture that lives longer than one, do not silence what this one hears."""
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "hf_iau"]:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _torch_state_left_alone() -> Iterator[None]:
    """Seeds each test and puts torch's global settings back."""
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.use_deterministic_algorithms(deterministic)
