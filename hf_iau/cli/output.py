"""What a command prints, and the code that it ends with."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from hf_iau.cli.options import DebugOption, JsonOption
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


# As the launchers name a process' number: torchrun and Accelerate, then MPI's.
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Output:
    """What is printed.

    Text or a table for people, or one JSON object on standard output. Under `accelerate launch` only the first process
    prints.

    Attributes:
        as_json: print JSON, and nothing else, on standard output.
        debug: show the traceback of an unexpected error.
    """

    as_json: JsonOption = False
    debug: DebugOption = False

    def result(self, values: dict[str, Any], text: str | Table) -> None:
        """Print a command's result, as `values` or as `text`."""
        if not _is_first_process():
            return
        if self.as_json:
            from hf_iau.utils.jsonable import jsonable  # knows tensors, so it imports PyTorch

            _print_json(jsonable(values))
        elif isinstance(text, Table):
            Console().print(text)
        else:
            sys.stdout.write(text.rstrip("\n") + "\n")

    def note(self, text: str) -> None:
        """Tell people something on standard error."""
        if _is_first_process():
            Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)

    def failure(self, error: BaseException, message: str, code: ExitCode) -> None:
        """Tell of an error, on standard error and, with `as_json`, on standard output as well."""
        if not _is_first_process():
            return
        Console(stderr=True, soft_wrap=True).print(f"Error: {message}", style="red", markup=False, highlight=False)
        if self.as_json:
            _print_json({"error": type(error).__name__, "message": message, "exit_code": int(code)})


def _is_first_process() -> bool:
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


def _print_json(values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the package's errors as a message and an exit code; others end with `ExitCode.UNEXPECTED`.

    Its arguments `as_json` and `debug`, as far as it has them, say how errors are told.
    """

    @functools.wraps(command)
    def run(**given: Any) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        output = Output(given.get("as_json", False), given.get("debug", False))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            try:
                command(**given)
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

    return run
