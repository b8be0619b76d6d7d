"""Fixtures of the tests of requests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_key_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_IAU_KEY", raising=False)
    monkeypatch.delenv("HF_IAU_KEY_FILE", raising=False)
