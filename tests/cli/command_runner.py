"""Commands run in this process, as a script would run them."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from hf_iau.cli.commands import app

ROWS, HELD_OUT = 60, 40


def run(*arguments: object, code: int = 0, stdin: str | None = None) -> Any:
    """Run a command in this process and check how it ends."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, f"{result.exit_code}: {result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


def run_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The same with `--json`: standard output must be one JSON object and nothing else."""
    values = json.loads(run(*arguments, "--json", code=code).stdout)
    assert isinstance(values, dict)
    return values
