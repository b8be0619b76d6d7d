"""The ledger: what was forgotten when, in lines that cannot be changed, dropped or reordered unnoticed."""

from __future__ import annotations

import hmac
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_iau.deletion.saved_weights import weights_are
from hf_iau.errors import LedgerError
from hf_iau.memory.keys import Key, require_key
from hf_iau.memory.memory_files import MEMORY_FOLDER
from hf_iau.utils.atomic_files import PRIVATE_FOLDER, write_text_atomically

logger = logging.getLogger(__name__)

LEDGER_NAME = "ledger.jsonl"
SCHEMA = 3
BEGINNING = "0" * 64
_MAX_LEDGER_BYTES = 2**30
_MAC = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class LedgerEntry:
    """One request that was carried out.

    Attributes:
        number: 1 for the first entry.
        time: when, UTC, ISO 8601.
        request: keyed name of the request, 32 hexadecimal digits.
        training_run: keyed name of the training run that the rows were part of; "" where it is not known.
        rows: how many rows were forgotten.
        row_ids: their keyed fingerprints, 32 hexadecimal digits each; pseudonymous personal data.
        method: name of the method.
        config: its settings, as the caller gave them.
        calibration: scale k, damping λ and weight c of the retain correction, where the method has them; None where
            many steps were taken, which they do not describe.
        weights_before, weights_after: fingerprints of the weights.
        outcome: measured figures before and after, verdict, and size of the step.
        versions: of Python and of the packages that did it.
        files: the weights' files, each with the digest of its content.
        previous: `mac` of the entry before, 64 zeros for the first.
        mac: HMAC-SHA256 of all of the above.
    """

    number: int
    time: str
    request: str
    training_run: str
    rows: int
    row_ids: list[str]
    method: str
    config: dict[str, Any]
    calibration: dict[str, Any] | None
    weights_before: str
    weights_after: str
    outcome: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]
    previous: str
    mac: str = ""
    schema: int = SCHEMA

    def to_line(self) -> str:
        """The entry as its line of the ledger, without the line's end."""
        return _canonical(asdict(self))

    def sealed(self, key: Key) -> LedgerEntry:
        """The same entry with its `mac`."""
        values = asdict(self)
        content = _canonical({name: value for name, value in values.items() if name != "mac"})
        return LedgerEntry(**{**values, "mac": _mac(content, key)})


@dataclass(frozen=True)
class LedgerHead:
    """How many entries a ledger has, and the `mac` of the last one: what a receipt carries.

    Attributes:
        count, head: these two.
        weights_match: whether the weights in the folder are those that the last entry left; None where that cannot be
            known (no entry, no weights there, or weights whose model cannot be built).
    """

    count: int
    head: str
    weights_match: bool | None = None


@dataclass(frozen=True)
class Ledger:
    """The ledger of one output directory, `_iau/ledger.jsonl`: one JSON object a line, each chained to the one before.

    Each line carries the HMAC-SHA256 of its content and of the line before, made with a key that is not stored here.
    So nobody without the key can edit, insert, drop or reorder lines unnoticed. Cutting lines off the end shows only
    against a head that was kept elsewhere, such as the one on a receipt.

    Args:
        path: the file; it need not exist.
        key: the key of the environment (`Ledger.of` finds it).
    """

    path: Path
    key: Key = field(repr=False)

    @classmethod
    def of(cls, output_dir: str | Path) -> Ledger:
        """The ledger below `output_dir`, with the key of the environment.

        Raises:
            ConfigError: there is no key, or it cannot be used.
        """
        return cls(
            Path(output_dir) / MEMORY_FOLDER / LEDGER_NAME, require_key("Reading or writing the ledger", output_dir)
        )

    def verify(self, head: str | None = None, count: int | None = None) -> LedgerHead:
        """Check every entry and the chain between them.

        Args:
            head: `mac` of an entry that must still be there, as a receipt gives it.
            count: number of that entry.

        Returns:
            The number of entries, the present head, and whether the weights beside it are those of the last entry.

        Raises:
            LedgerError: an entry was edited, dropped, added or moved; or the entry of `head` is gone.
        """
        entries = self.entries()
        if head is not None:
            if not _MAC.fullmatch(head):
                raise LedgerError(f"head={head!r} is no head of a ledger: give the 64 hexadecimal digits.")
            found = next((entry for entry in entries if hmac.compare_digest(entry.mac, head)), None)
            if found is None:
                raise LedgerError(
                    f"The ledger {self.path} has {len(entries)} entries and none of them is head {head[:16]}…: it was "
                    "cut off or written anew since that head was given out."
                )
            if count is not None and found.number != count:
                raise LedgerError(f"Head {head[:16]}… is entry {found.number} of {self.path}, not entry {count}.")
        elif count is not None and len(entries) < count:
            raise LedgerError(f"The ledger {self.path} has {len(entries)} entries, fewer than {count}: it was cut off.")
        if not entries:
            return LedgerHead(0, BEGINNING)
        match = weights_are(self.path.parent.parent, entries[-1].weights_after, entries[-1].files)
        if match is False:
            logger.warning(
                "The weights in %s are not those that entry %d of the ledger left: the model was trained on since, or "
                "older weights were put back, which still know the forgotten rows.",
                self.path.parent.parent,
                entries[-1].number,
            )
        return LedgerHead(len(entries), entries[-1].mac, match)

    def entries(self) -> list[LedgerEntry]:
        """All entries, in order, after checking each; none where there is no ledger yet.

        Raises:
            LedgerError: as `verify`.
        """
        entries: list[LedgerEntry] = []
        previous = BEGINNING
        for number, line in enumerate(self._lines(), start=1):
            entry = _read(line, number, self.path)
            # Over the line as it stands, so that no other way to write the same content passes.
            content = line.replace(f'"mac":"{entry.mac}",', "", 1)
            if not hmac.compare_digest(entry.mac, _mac(content, self.key)):
                raise LedgerError(
                    f"Line {number} of {self.path} was edited, or the ledger was made with another key than HF_IAU_KEY "
                    f"is (key {self.key.check})."
                )
            if entry.number != number or entry.previous != previous:
                raise LedgerError(
                    f"Line {number} of {self.path} is entry {entry.number} and does not follow the line before: "
                    "entries were dropped, added or moved."
                )
            previous = entry.mac
            entries.append(entry)
        return entries

    def extended(self, **values: Any) -> tuple[LedgerEntry, str]:
        """The sealed entry that would follow, and the whole ledger's text with it as the last line.

        Args:
            **values: the attributes of `LedgerEntry` that do not follow from the chain.
        """
        entries = self.entries()
        values.setdefault("time", datetime.now(UTC).isoformat(timespec="seconds"))
        try:
            values = json.loads(_canonical(values))  # as a reader will see it
        except (TypeError, ValueError) as error:
            raise LedgerError(f"The entry is no plain JSON ({error}).") from error
        previous = entries[-1].mac if entries else BEGINNING
        entry = LedgerEntry(**{**values, "number": len(entries) + 1, "previous": previous}).sealed(self.key)
        return entry, "".join(f"{line}\n" for line in [*self._lines(), entry.to_line()])

    def append(self, **values: Any) -> LedgerEntry:
        """Add an entry and flush it to disk; a crash leaves the ledger with it or without it, never with half of it."""
        entry, text = self.extended(**values)
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        write_text_atomically(self.path, text)
        return entry

    def _lines(self) -> list[str]:
        try:
            size = self.path.stat().st_size
            if size > _MAX_LEDGER_BYTES:
                raise LedgerError(f"{self.path} is {size} bytes, too large for a ledger.")
            text = self.path.read_bytes().decode("utf-8")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise LedgerError(f"{self.path} is not readable as a ledger ({error}).") from error
        if text and not text.endswith("\n"):
            raise LedgerError(f"The last line of {self.path} is incomplete: it was cut off.")
        return text.split("\n")[:-1]


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _mac(content: str, key: Key) -> str:
    return hmac.digest(key.ledger, content.encode(), "sha256").hex()


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _read(line: str, number: int, path: Path) -> LedgerEntry:
    """An entry of a line, each value checked for its type."""
    try:
        values = json.loads(line, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise LedgerError(f"Line {number} of {path} is no JSON ({error}): it was edited or cut off.") from error
    names = {f.name for f in fields(LedgerEntry)}
    if not isinstance(values, dict) or values.keys() != names:
        raise LedgerError(f"Line {number} of {path} is no entry of a ledger: it needs {', '.join(sorted(names))}.")
    if type(values["schema"]) is not int or values["schema"] != SCHEMA:
        raise LedgerError(
            f"Line {number} of {path} has schema {values['schema']!r}; this hf-iau reads {SCHEMA}. Read it with the "
            "version that wrote it, or check whether it was edited."
        )
    texts = ("time", "request", "training_run", "method", "weights_before", "weights_after", "previous", "mac")
    right = (
        all(isinstance(values[name], str) for name in texts)
        and all(type(values[name]) is int and values[name] >= 0 for name in ("number", "rows"))
        and all(isinstance(values[name], dict) for name in ("config", "outcome", "versions", "files"))
        and (values["calibration"] is None or isinstance(values["calibration"], dict))
        and isinstance(values["row_ids"], list)
        and all(type(row) is str and len(row) == 32 for row in values["row_ids"])
        and bool(_MAC.fullmatch(values["mac"]))
        and bool(_MAC.fullmatch(values["previous"]))
    )
    if not right:
        raise LedgerError(f"Line {number} of {path} has values of a wrong type: it was edited.")
    return LedgerEntry(**values)
