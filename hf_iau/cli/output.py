"""What a command prints, and the code that it ends with."""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import typer
from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from hf_iau.errors import (
    AlreadyForgottenError,
    IAUError,
    LedgerError,
    MemoryFileError,
    MemoryMismatchError,
    MissingMemoryError,
    PublishError,
    StorageError,
)
from hf_iau.utils.jsonable import json_text


class ExitCode(IntEnum):
    """What scripts can rely on; documented in docs/how_to/command_line.md."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    REFUSED = 3
    RETRAIN = 4
    MEMORY = 5
    FOUND = 6
    PUBLISH = 7
    LEDGER = 8
    ALREADY_FORGOTTEN = 9
    STORAGE = 10


# The first that fits is taken.
_CODES: tuple[tuple[type[IAUError], ExitCode], ...] = (
    (MemoryMismatchError, ExitCode.MEMORY),
    (MemoryFileError, ExitCode.MEMORY),
    (MissingMemoryError, ExitCode.MEMORY),
    (PublishError, ExitCode.PUBLISH),
    (LedgerError, ExitCode.LEDGER),
    (AlreadyForgottenError, ExitCode.ALREADY_FORGOTTEN),
    (StorageError, ExitCode.STORAGE),
    (IAUError, ExitCode.REFUSED),
)


class Output:
    """Where a command's results go: text or a table for people, or one JSON object on standard output.

    Under `accelerate launch` only the first process prints.

    Args:
        as_json: print JSON, and nothing else, on standard output.
        debug: show the traceback of an unexpected error.
    """

    def __init__(self, as_json: bool = False, debug: bool = False) -> None:
        self.as_json = as_json
        self.debug = debug

    def result(self, values: dict[str, Any], text: str | Table) -> None:
        """Print a command's result, as `values` or as `text`."""
        if not PartialState().is_main_process:
            return
        if self.as_json:
            sys.stdout.write(json_text(values))
        elif isinstance(text, Table):
            Console().print(text)
        else:
            sys.stdout.write(text.rstrip("\n") + "\n")

    def note(self, text: str) -> None:
        """Tell people something on standard error."""
        if PartialState().is_main_process:
            Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)

    def failure(self, error: BaseException, message: str, code: ExitCode) -> None:
        """Tell of an error, on standard error and, with `as_json`, on standard output as well."""
        if not PartialState().is_main_process:
            return
        Console(stderr=True, soft_wrap=True).print(f"Error: {message}", style="red", markup=False, highlight=False)
        if self.as_json:
            values = {"error": type(error).__name__, "message": message, "exit_code": int(code)}
            sys.stdout.write(json_text(values))


@contextlib.contextmanager
def reported(output: Output) -> Iterator[None]:
    """Turn the package's errors into a message and an exit code; anything else ends with `ExitCode.UNEXPECTED`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            yield
        except (typer.Exit, typer.Abort, KeyboardInterrupt):
            raise
        except IAUError as error:
            code = next(code for kind, code in _CODES if isinstance(error, kind))
            output.failure(error, str(error), code)
            raise typer.Exit(code) from error
        except Exception as error:
            if output.debug:
                traceback.print_exc()
            message = f"{type(error).__name__}: {error}" + ("" if output.debug else " (--debug shows where)")
            output.failure(error, message, ExitCode.UNEXPECTED)
            raise typer.Exit(ExitCode.UNEXPECTED) from error
