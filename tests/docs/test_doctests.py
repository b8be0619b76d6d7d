"""The examples in the docstrings of the entry points run, and print what they say."""

from __future__ import annotations

import doctest
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from hf_iau import DeletionService, GradientMemory, IAUCallback, UnlearningTrainer, gather

SETTING = UnlearningTrainer
OTHERS = [UnlearningTrainer.unlearn, IAUCallback, gather, GradientMemory, DeletionService]


def example_of(thing: Any, names: dict[str, Any]) -> doctest.DocTest:
    """The example in the docstring of `thing`, to be run with `names`."""
    name = f"{thing.__module__}.{thing.__qualname__}"
    example = doctest.DocTestParser().get_doctest(thing.__doc__, names, name, None, None)
    assert example.examples, f"{name} has no example"
    return example


def run(example: doctest.DocTest) -> dict[str, Any]:
    """The names that are defined after the example."""
    runner = doctest.DebugRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(example, clear_globs=False)
    return example.globs


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    monkeypatch.delenv("HF_IAU_KEY", raising=False)
    monkeypatch.delenv("HF_IAU_KEY_FILE", raising=False)
    names = run(example_of(SETTING, {}))
    yield names
    shutil.rmtree(names["folder"])


@pytest.mark.parametrize("thing", OTHERS, ids=lambda thing: thing.__qualname__)
def test_example_runs(thing: Any, setting: dict[str, Any]) -> None:
    run(example_of(thing, setting))
