"""The ledger shows every edit, gap, reordering and cut."""

from __future__ import annotations

import hashlib
import hmac
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from hf_iau import LedgerError
from hf_iau.deletion.ledger import Ledger
from hf_iau.errors import ConfigError
from hf_iau.memory.keys import Key

KEY = Key.from_secret("k0123456789" * 4)


def values(number: int) -> dict[str, Any]:
    return {
        "request": f"{number:032x}",
        "training_run": "ab" * 16,
        "rows": 2,
        "row_ids": [f"{2 * number:032x}", f"{2 * number + 1:032x}"],
        "method": "iau",
        "config": {"length": None, "retain_weights": (0.003, 0.01)},
        "calibration": {"scale": 0.5, "damping": 0.1, "retain_weight": 0.0},
        "weights_before": "before",
        "weights_after": "after",
        "outcome": {"before": {"forget_loss": 0.25}, "after": {"forget_loss": None}},
        "versions": {"torch": "2"},
        "files": {},
    }


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(tmp_path / "_iau" / "ledger.jsonl", KEY)
    for number in range(1, 6):
        made.append(**values(number))
    return made


def test_entries_come_back_and_are_chained(ledger: Ledger) -> None:
    entries = ledger.entries()
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5]
    assert entries[0].previous == "0" * 64
    assert [e.previous for e in entries[1:]] == [e.mac for e in entries[:-1]]
    assert entries[2].config == {"length": None, "retain_weights": [0.003, 0.01]}
    head = ledger.verify()
    assert (head.count, head.head) == (5, entries[-1].mac)
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_the_mac_is_plain_hmac_over_the_line_without_it(ledger: Ledger) -> None:
    secret = hmac.new(b"k0123456789" * 4, b"hf-iau 1 ledger", hashlib.sha256).digest()
    for line in ledger.path.read_text().splitlines():
        entry = json.loads(line)
        mac = entry.pop("mac")
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert hmac.new(secret, text.encode(), hashlib.sha256).hexdigest() == mac


def _edit(lines: list[str]) -> list[str]:
    return [*lines[:2], lines[2].replace('"rows":2', '"rows":1'), *lines[3:]]


def _renumber(lines: list[str]) -> list[str]:
    return [*lines[:2], *(line.replace(f'"number":{n}', f'"number":{n - 1}') for n, line in enumerate(lines[3:], 4))]


TAMPERED = {
    "edited": _edit,
    "gap": lambda lines: lines[:2] + lines[3:],
    "first entry gone": lambda lines: lines[1:],
    "gap, numbers mended": _renumber,
    "reordered": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "repeated": lambda lines: lines[:3] + lines[2:],
    "empty line": lambda lines: [*lines[:2], "", *lines[2:]],
    "not JSON": lambda lines: [*lines[:2], lines[2][:-5], *lines[3:]],
    "NaN": lambda lines: [*lines[:2], lines[2].replace("0.25", "NaN"), *lines[3:]],
    "too large a number": lambda lines: [*lines[:2], lines[2].replace("0.25", "1e999"), *lines[3:]],
    "nested too deep": lambda lines: [*lines[:2], "[" * 100_000, *lines[3:]],
    "list": lambda lines: [*lines[:2], "[]", *lines[3:]],
    "another type": lambda lines: [*lines[:2], lines[2].replace('"rows":2', '"rows":true'), *lines[3:]],
}


@pytest.mark.parametrize("change", TAMPERED)
def test_tampering_is_detected(change: str, ledger: Ledger) -> None:
    lines = ledger.path.read_text().splitlines()
    ledger.path.write_text("".join(f"{line}\n" for line in TAMPERED[change](lines)))
    with pytest.raises(LedgerError):
        ledger.verify()
    with pytest.raises(LedgerError):
        ledger.append(**values(9))


def test_every_changed_byte_is_detected(ledger: Ledger) -> None:
    content = ledger.path.read_bytes()
    for position in range(0, len(content), 23):
        ledger.path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(LedgerError):
            ledger.verify()


def test_a_cut_shows_against_a_head_given_out_earlier(ledger: Ledger) -> None:
    kept = ledger.verify()
    third = ledger.entries()[2]
    ledger.append(**values(6))
    assert ledger.verify(kept.head, kept.count).count == 6
    assert ledger.verify(third.mac).count == 6
    lines = ledger.path.read_text().splitlines()
    ledger.path.write_text("".join(f"{line}\n" for line in lines[:4]))
    assert ledger.verify().count == 4  # a cut alone cannot be seen
    with pytest.raises(LedgerError, match="cut off"):
        ledger.verify(kept.head)
    with pytest.raises(LedgerError, match="cut off"):
        ledger.verify(count=5)
    with pytest.raises(LedgerError, match="not entry 4"):
        ledger.verify(third.mac, count=4)
    ledger.path.write_text("\n".join(lines)[:-3])
    with pytest.raises(LedgerError, match="incomplete"):
        ledger.verify()


def test_a_rewritten_ledger_lacks_the_old_head(ledger: Ledger) -> None:
    head = ledger.verify().head
    ledger.path.unlink()
    with pytest.raises(LedgerError, match="cut off or written anew"):
        ledger.verify(head)
    for number in range(1, 7):
        ledger.append(**values(number + 10))
    with pytest.raises(LedgerError, match="cut off or written anew"):
        ledger.verify(head)


def test_another_key_is_told(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="another key"):
        Ledger(ledger.path, Key.from_secret("x0123456789" * 4)).verify()


def test_the_ledger_of_a_folder_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="HF_IAU_KEY"):
        Ledger.of(tmp_path)
    monkeypatch.setenv("HF_IAU_KEY", "k0123456789" * 4)
    assert Ledger.of(tmp_path).verify().count == 0


def test_what_is_no_json_is_not_written(ledger: Ledger) -> None:
    content = ledger.path.read_bytes()
    for wrong in (float("nan"), {1, 2}):
        with pytest.raises(LedgerError, match="plain JSON"):
            ledger.append(**(values(8) | {"outcome": {"loss": wrong}}))
    assert ledger.path.read_bytes() == content
