"""The command line `hf-iau`: thin functions over the package's public ones."""

from hf_iau.cli.commands import app


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["app", "main"]
