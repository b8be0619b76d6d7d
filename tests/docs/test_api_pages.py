"""Every public name has a place on an API page, and every name on an API page exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import hf_iau
from hf_iau import methods, metrics

PAGES = Path(__file__).parents[2] / "docs" / "api"
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md")))
NAMES = re.findall(r"^::: ([\w.]+)$", TEXT, re.MULTILINE)


def test_every_public_name_is_documented() -> None:
    listed = set(NAMES)
    assert {f"hf_iau.{name}" for name in hf_iau.__all__} <= listed
    assert {f"hf_iau.metrics.{name}" for name in metrics.__all__} <= listed


def test_the_configuration_of_every_method_is_documented() -> None:
    configurations = {
        methods.find_method(name, None)[0].config_class for name in hf_iau.available_methods() if name != "iau-paper"
    }
    documented = {name.rsplit(".", 1)[1] for name in NAMES}
    assert {config.__name__ for config in configurations} <= documented


@pytest.mark.parametrize("name", NAMES)
def test_a_name_on_an_api_page_can_be_imported_and_has_a_docstring(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    assert (found.__doc__ or "").strip()


def test_no_name_is_documented_twice() -> None:
    assert len(NAMES) == len(set(NAMES))
