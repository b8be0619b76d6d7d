"""`python -m benchmarks.ledger_cost --out DIR`: what row identity, ledger and transaction add to a request.

A million training rows as synthetic fingerprints, a ledger that is a year old, and a model so small that computing,
writing weights and hashing rows cost next to nothing beside the rest. What is timed is what a request pays for being
recorded: to look its rows up, to mark them, to verify and extend the ledger, to write the receipt and the journal, and
to make the whole a transaction. Medians over several requests of both wall and CPU seconds; on a shared machine the
first include waiting for others.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.hardware import hardware
from hf_iau import Ledger
from hf_iau.deletion.journal import Journal, JournalFile
from hf_iau.deletion.ledger import LedgerEntry
from hf_iau.deletion.receipt import render_receipt
from hf_iau.memory.fingerprints import package_versions
from hf_iau.memory.keys import find_key
from hf_iau.memory.row_identity import RowIdentity
from hf_iau.utils.atomic_files import write_text_atomically

GOAL_MILLISECONDS = 100.0


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for ledger_cost.json.")] = None,
    rows: Annotated[int, typer.Option(help="Training rows.")] = 1_000_000,
    request_rows: Annotated[int, typer.Option(help="Rows of a request.")] = 100,
    entries: Annotated[int, typer.Option(help="Entries that the ledger has already.")] = 365,
    repeats: Annotated[int, typer.Option(help="Requests timed.")] = 7,
) -> None:
    """Time what is beside compute, weights and hashing; exit code 1 if it is over 100 ms of CPU time."""
    torch.set_num_threads(1)
    os.environ["HF_IAU_KEY"] = secrets.token_hex(32)
    with tempfile.TemporaryDirectory() as scratch:
        parts = measure(Path(scratch), rows, request_rows, entries, repeats)
    cpu = sum(part["cpu_milliseconds"] for part in parts.values())
    wall = sum(part["wall_milliseconds"] for part in parts.values())
    document = {
        "command": shlex.join(["python", "-m", "benchmarks.ledger_cost", *sys.argv[1:]]),
        "hardware": hardware(),
        "rows": rows,
        "request_rows": request_rows,
        "entries": entries,
        "parts": parts,
        "cpu_milliseconds": cpu,
        "wall_milliseconds": wall,
        "met": cpu < GOAL_MILLISECONDS,
    }
    for name, part in parts.items():
        print(f"{part['cpu_milliseconds']:8.1f} ms CPU {part['wall_milliseconds']:8.1f} ms wall  {name}")
    print(
        f"{cpu:8.1f} ms CPU {wall:8.1f} ms wall  in all ({rows:,} rows, requests of {request_rows}, {entries} entries)"
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "ledger_cost.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(0 if document["met"] else 1)


def measure(folder: Path, rows: int, request_rows: int, entries: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each part, CPU and wall."""
    key = find_key()
    assert key is not None
    random = np.random.default_rng(0)
    fingerprints = random.integers(0, 256, size=(rows, 16), dtype=np.uint8)
    identity = RowIdentity(fingerprints, np.zeros(rows, dtype=bool), key.check, "r" * 32)
    ledger = Ledger.of(folder)
    ledger.path.parent.mkdir(parents=True)
    _fill(ledger, entries, request_rows, random)
    journal = JournalFile(folder, key)
    times: dict[str, list[tuple[float, float]]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        times.setdefault(name, []).append((time.process_time() - cpu, time.perf_counter() - wall))
        return result

    for number in range(repeats):
        positions = random.choice(np.flatnonzero(~identity.forgotten), size=request_rows, replace=False)
        asked = fingerprints[positions]
        name = secrets.token_hex(16)
        note = Journal(name, "now", request_rows, "before", "after")
        timed("is it known, and still in?", partial(identity.check_request, asked))
        timed("ledger read and verified", ledger.entries)
        identity = timed("mark its rows", partial(identity.without, asked, positions))
        tensors = timed("rows for the memory's file", identity.tensors)
        assert int(tensors["row_identity.forgotten"].sum()) == (number + 1) * request_rows
        private = journal.staged / "_iau"
        private.mkdir(parents=True)

        def stage(private: Path = private, name: str = name, asked: np.ndarray = asked) -> LedgerEntry:
            entry, text = ledger.extended(**_values(name, asked))
            write_text_atomically(private / "ledger.jsonl", text)
            write_text_atomically(private / f"{entry.number:05d}.md", render_receipt(entry))
            return entry

        entry = timed("ledger and receipt", stage)
        names = ["_iau/ledger.jsonl", f"_iau/{entry.number:05d}.md"]

        def commit(note: Journal = note, names: list[str] = names) -> None:
            sealed = Journal(**{**vars(note), "files": names})
            journal.seal(sealed)
            journal.finish(sealed)

        timed("commit", commit)
    assert ledger.verify().count == entries + repeats
    return {
        name: {
            "cpu_milliseconds": 1000 * statistics.median(cpu for cpu, _ in found),
            "wall_milliseconds": 1000 * statistics.median(wall for _, wall in found),
        }
        for name, found in times.items()
    }


def _values(name: str, asked: np.ndarray) -> dict[str, Any]:
    figures = {f"{split}_{kind}": 0.5 for split in ("forget", "retain", "held_out") for kind in ("accuracy", "loss")}
    return {
        "request": name,
        "training_run": "r" * 32,
        "rows": len(asked),
        "row_ids": [row.tobytes().hex() for row in asked],
        "method": "iau",
        "config": {"scale": None, "damping": None, "retain_weights": [0.003, 0.01, 0.03], "multi_step": True},
        "calibration": {"scale": 0.1, "damping": 0.1, "retain_weight": 0.0},
        "weights_before": "b" * 32,
        "weights_after": "a" * 32,
        "outcome": {"before": figures, "after": figures, "verdict": "ok", "calibrated": True},
        "versions": package_versions(),
    }


def _fill(ledger: Ledger, entries: int, request_rows: int, random: np.random.Generator) -> None:
    """A ledger of so many entries, sealed one after the other and written at once."""
    previous, lines = "0" * 64, []
    for number in range(1, entries + 1):
        asked = random.integers(0, 256, size=(request_rows, 16), dtype=np.uint8)
        values = _values(secrets.token_hex(16), asked) | {"time": "2026-01-01T00:00:00+00:00"}
        entry = LedgerEntry(number=number, previous=previous, **values).sealed(ledger.key)
        previous = entry.mac
        lines.append(entry.to_line())
    ledger.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
