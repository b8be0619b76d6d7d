"""Packages that not everybody needs, and the extra that brings each."""

from __future__ import annotations

from importlib.util import find_spec

from hf_iau.errors import MissingPackageError

# Module → name on the package index, and the extra of pyproject.toml.
_PACKAGES = {
    "evaluate": ("evaluate", "metrics"),
    "matplotlib": ("matplotlib", "plots"),
    "rich": ("rich", "cli"),
    "sklearn": ("scikit-learn", "metrics"),
    "trl": ("trl", "trl"),
    "typer": ("typer", "cli"),
}


def is_installed(module: str) -> bool:
    """Whether a module of that name can be imported, without importing it."""
    return find_spec(module) is not None


def require(module: str, what: str) -> None:
    """Raise unless an optional package is installed; the import follows where it is needed.

    Args:
        module: its name in `import`.
        what: what needs it, as the beginning of a sentence.

    Raises:
        MissingPackageError: it is not installed; the message names the extra that brings it.
    """
    if not is_installed(module):
        package, extra = _PACKAGES[module]
        raise MissingPackageError(
            f'{what} needs {package}, which is not installed: pip install "hf-iau[{extra}]".', name=module
        )
