"""Imports flow one way: rooms in order, no circle between modules, and no core room that needs an edge."""

from __future__ import annotations

import ast
import graphlib
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_iau

PACKAGE = Path(hf_iau.__file__).parent
CORE = (
    "errors",
    "utils",
    "distributed",
    "data",
    "curvature",
    "memory",
    "evaluation",
    "methods",
    "report",
    "unlearn",
    "cost_estimate",
    "trainer",
)
EDGES = ("deletion", "metrics", "accelerate_configs", "cli", "trl")
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Modules of the package that a file imports, for types only or not, each with one name taken from it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_iau":
            for alias in node.names:
                yield str(node.module), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("hf_iau."):
                    yield alias.name, ""


def origin(module: str, name: str) -> str:
    """The module that a name comes from, where a package only passes it on."""
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    if MODULES[module].name == "__init__.py":
        for source, passed_on in imports(MODULES[module]):
            if passed_on == name:
                return origin(source, name)
    return module


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_imports_from_a_later_room_or_takes_private_names(path: Path) -> None:
    rooms = CORE + EDGES
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module, name in imports(path):
        if module == "hf_iau":
            assert room in EDGES, f"{path}: the inside does not import from the outside of the package"
            continue
        other = module.split(".")[1]
        assert rooms.index(other) <= rooms.index(room), f"{room} imports from {other}, which comes after it"
        assert room in EDGES or other not in EDGES, f"{room} imports from the edge {other}"
        assert not name.startswith("_"), f"{name} of {module} is private to it"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {
        module: {origin(*found) for found in imports(path)} - {module}
        for module, path in MODULES.items()
        if path.name != "__init__.py"
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_room_has_its_place() -> None:
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(CORE + EDGES) and len(CORE + EDGES) == len(rooms)


@pytest.mark.parametrize("path", [p for p in MODULES.values() if p.name == "__init__.py"], ids=module_of)
def test_no_package_exports_a_name_that_is_also_its_module(path: Path) -> None:
    package = module_of(path)
    below = {module.rsplit(".", 1)[1] for module in MODULES if module.rpartition(".")[0] == package}
    both = below & set(getattr(importlib.import_module(package), "__all__", ()))
    assert not both, f"{package} exports {sorted(both)}, which are modules of it"
