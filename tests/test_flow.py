"""Imports flow one way: no room of the package reaches for one that comes after it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_iau

PACKAGE = Path(hf_iau.__file__).parent
ROOMS = (
    *(
        "errors",
        "devices",
        "vectors",
        "settings",
        "phases",
        "parallel",
        "objective",
        "curvature",
        "remember",
        "gather",
        "forget",
    ),
    *("measure", "calibrate", "methods", "report", "requests", "publish", "train", "tasks", "forecast", "metrics"),
    *("accelerate_configs", "demo", "cli"),
)
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


def imports(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Modules of the package that a file imports when it is run, with the names taken from each."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_iau.") and id(node) not in for_types:
            yield str(node.module), [alias.name for alias in node.names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_imports_from_a_later_room_or_takes_private_names(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module, names in imports(path):
        other = module.split(".")[1]
        assert ROOMS.index(other) <= ROOMS.index(room), f"{room} imports from {other}, which comes after it"
        assert not any(name.startswith("_") for name in names), f"{names} of {module} are private to it"


def test_every_room_has_its_place() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(ROOMS) and len(ROOMS) == len(set(ROOMS))
