"""The command line `hf-iau`: thin functions over the package's public ones."""

from __future__ import annotations

import sys

from hf_iau.errors import MissingPackageError
from hf_iau.utils.optional import require


def main() -> None:
    """Run the command line."""
    try:
        for package in ("typer", "rich"):
            require(package, "The command line")
    except MissingPackageError as error:
        sys.exit(f"Error: {error}")
    from hf_iau.cli.commands import app

    app()


__all__ = ["main"]
