"""Saving and loading: bit for bit, private, safe against crashes, and never fooled by a damaged file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import random
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import as_dataset, bert, language_rows, llama, pad_right, plain, plain_rows, text_rows
from torch import Tensor, nn

from hf_iau import GatherConfig, GradientMemory, MemoryFileError, MemoryMismatchError, gather
from hf_iau.memory import SCHEMA_VERSION
from hf_iau.memory import memory as memory_module
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.step import moved_gradient_sum
from hf_iau.utils.atomic_files import file_digest, write_atomically, write_public_atomically

REFUSED = (MemoryFileError, MemoryMismatchError)


def make_memory(model: nn.Module, rows: Any, **config: Any) -> GradientMemory:
    settings = {"gradient_sum": "full", "curvature": "none", "batch_size": 4, "progress": False}
    return gather(model, as_dataset(rows), data_collator=pad_right(), config=GatherConfig(**(settings | config)))


@pytest.fixture(scope="module")
def memory() -> GradientMemory:
    return make_memory(plain(), plain_rows(), curvature="ekfac")


@pytest.fixture
def saved(memory: GradientMemory, tmp_path: Path) -> Path:
    memory.save(tmp_path)
    return tmp_path


def header_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "memory.json").read_text())


def sign(header: dict[str, Any]) -> None:
    """Give a header the digest of its content, as somebody who forges one would."""
    content = {key: value for key, value in header.items() if key != "digest"}
    header["digest"] = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header and sign it again."""
    header = header_of(folder)
    change(header)
    sign(header)
    (folder / "memory.json").write_text(json.dumps(header))


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors, with a digest that fits."""
    entry = header_of(folder)["tensors"]
    path = folder / entry["file"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    rewrite(folder, lambda header: header["tensors"].update(digest=file_digest(path), count=len(tensors)))


def assert_same(one: GradientMemory, other: GradientMemory) -> None:
    for field in dataclasses.fields(GradientMemory):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "gradient_sum":
            assert (a is None) == (b is None)
            for name in a or {}:
                assert a[name].dtype == b[name].dtype and a[name].equal(b[name]), name
        elif field.name == "curvature":
            assert (a is None) == (b is None)
            if a is not None:
                left, right = a.tensors(), b.tensors()
                assert left.keys() == right.keys()
                assert bool(left) == (a.kind != "identity")
                assert all(left[k].dtype == right[k].dtype and left[k].cpu().equal(right[k]) for k in left)
                assert json.dumps(a.metadata(), sort_keys=True) == json.dumps(b.metadata(), sort_keys=True)
        elif field.name == "row_identity":
            # Fingerprints by this process's own key are not written.
            assert all(identity is None or identity.of_process for identity in (a, b))
        else:
            assert a == b or (a != a and b != b), field.name
    assert list(one.parameters) == list(other.parameters)


# --- round trip -------------------------------------------------------------------------------------------------------


def test_a_file_with_sums_in_float64_still_serves(memory: GradientMemory, saved: Path) -> None:
    """Sums were kept in float64 whatever the weights' type."""

    def widen(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: t.double() for name, t in tensors.items() if name.startswith("gradient_sum.")})

    rewrite_tensors(saved, widen)
    loaded = GradientMemory.load(saved)
    assert memory.gradient_sum is not None and loaded.gradient_sum is not None and loaded.curvature is not None
    for name, tensor in loaded.gradient_sum.items():
        assert tensor.dtype == torch.float64 and tensor.equal(memory.gradient_sum[name].double())
    forget = {name: torch.ones_like(tensor) for name, tensor in memory.gradient_sum.items()}
    newer, older = (Directions(loaded.curvature, forget, m.gradient_sum, 9) for m in (memory, loaded))
    for name, change in newer.step(0.5, 0.1, 0.3).items():
        torch.testing.assert_close(older.step(0.5, 0.1, 0.3)[name].to(change), change)
    moved = [moved_gradient_sum(m.gradient_sum, forget, loaded.curvature, forget, 9) for m in (memory, loaded)]  # type: ignore[arg-type]
    for name, tensor in moved[0].items():
        torch.testing.assert_close(moved[1][name].to(tensor), tensor)


def test_round_trip_is_bit_exact(memory: GradientMemory, saved: Path) -> None:
    assert_same(GradientMemory.load(saved), memory)
    assert_same(GradientMemory.load(str(saved)), memory)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_sum": "none"},
        {"gradient_sum": "none", "curvature": "identity"},
        {"gradient_sum": "sampled", "sample_rows": 6},
        {"gradient_sum": "sampled", "sample_rows": 4},  # one batch: its standard error is unknown, infinite
        {"curvature": "diagonal", "curvature_rows": 5},
    ],
)
def test_round_trip_of_other_contents(settings: dict[str, Any], tmp_path: Path) -> None:
    made = make_memory(bert(), text_rows(), **settings)
    made.save(tmp_path)
    assert_same(GradientMemory.load(tmp_path), made)
    if settings.get("sample_rows") == 4:
        assert made.gradient_sum_error == math.inf


def test_round_trip_of_a_language_model_and_calibration(tmp_path: Path) -> None:
    made = make_memory(llama(), language_rows())
    made.calibration = {"scale": 0.1, "by_size": {9: [1e-300, float("nan")], 10: None}, "name": "Σ"}
    made.save(tmp_path)
    loaded = GradientMemory.load(tmp_path)
    assert loaded.calibration is not None
    assert loaded.calibration["scale"] == 0.1 and loaded.calibration["name"] == "Σ"
    assert loaded.calibration["by_size"]["9"][0] == 1e-300 and math.isnan(loaded.calibration["by_size"]["9"][1])
    assert loaded.calibration["by_size"]["10"] is None
    made.calibration = loaded.calibration
    assert_same(loaded, made)


def test_load_finds_the_memory_below_an_output_directory(memory: GradientMemory, tmp_path: Path) -> None:
    memory.save(tmp_path / "_iau")
    assert_same(GradientMemory.load(tmp_path), memory)


def test_files_and_folder_are_private(memory: GradientMemory, tmp_path: Path) -> None:
    header = memory.save(tmp_path / "_iau")
    assert header == tmp_path / "_iau" / "memory.json"
    files = sorted((tmp_path / "_iau").iterdir())
    assert len(files) == 3 and files[0].read_text().endswith("\n*\n")  # git is told to leave them alone
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
    assert stat.S_IMODE((tmp_path / "_iau").stat().st_mode) == 0o700


def test_a_newer_memory_replaces_the_older_one(memory: GradientMemory, saved: Path) -> None:
    newer = make_memory(plain(seed=1), plain_rows())
    bystander = saved / "memory-mine.safetensors"
    bystander.write_bytes(b"not ours")
    newer.save(saved)
    assert_same(GradientMemory.load(saved), newer)
    assert len(list(saved.glob("memory-*.safetensors"))) == 2 and bystander.read_bytes() == b"not ours"
    newer.save(saved)
    assert_same(GradientMemory.load(saved), newer)


# --- crashes ----------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The process dies: nothing catches this."""


@pytest.mark.parametrize("at", ["tensors", "header", "digest"])
def test_a_crash_while_saving_leaves_the_older_memory(
    at: str, memory: GradientMemory, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = make_memory(plain(seed=1), plain_rows())

    def crash(*args: Any, **kwargs: Any) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        places: dict[str, tuple[Any, str]] = {
            "tensors": (memory_module, "save_file"),
            "header": (Path, "write_text"),
            "digest": (memory_module, "header_digest"),
        }
        patched.setattr(*places[at], crash)
        with pytest.raises(Crash):
            newer.save(saved)
    assert_same(GradientMemory.load(saved), memory)
    # What the crash left behind is in nobody's way, and is cleared by the next save.
    newer.save(saved)
    assert_same(GradientMemory.load(saved), newer)
    assert sorted(path.name for path in saved.glob("memory*")) == sorted(
        ["memory.json", header_of(saved)["tensors"]["file"]]
    )


def test_a_crash_in_a_first_save_leaves_no_memory(
    memory: GradientMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, text: str, **_: Any) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        memory.save(tmp_path)
    with pytest.raises(MemoryFileError, match="No gradient memory"):
        GradientMemory.load(tmp_path)


def test_write_atomically(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, lambda target: target.write_text("old"))

    def fail(target: Path) -> None:
        target.write_text("new")
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_write_public_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_public_atomically(path, b"old")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_public_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_public_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    (saved / header_of(saved)["tensors"]["file"]).unlink()
    with pytest.raises(MemoryFileError, match="missing"):
        GradientMemory.load(saved)
    (saved / "memory.json").unlink()
    with pytest.raises(MemoryFileError, match="No gradient memory"):
        GradientMemory.load(saved)
    with pytest.raises(MemoryFileError, match="No gradient memory"):
        GradientMemory.load(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["header", "tensors"])
def test_folders_in_place_of_files(file: str, saved: Path) -> None:
    path = saved / ("memory.json" if file == "header" else header_of(saved)["tensors"]["file"])
    path.unlink()
    path.mkdir()
    with pytest.raises(MemoryFileError):
        GradientMemory.load(saved)


def _lengths(size: int) -> Iterator[int]:
    yield from (0, 1, 7, 8, 9, size // 3, size // 2, size - 2, size - 1)


@pytest.mark.parametrize("file", ["header", "tensors"])
def test_truncation_anywhere(file: str, saved: Path) -> None:
    path = saved / ("memory.json" if file == "header" else header_of(saved)["tensors"]["file"])
    content = path.read_bytes()
    for length in _lengths(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(MemoryFileError):
            GradientMemory.load(saved)
    path.write_bytes(content + b"\0")
    with pytest.raises(MemoryFileError):
        GradientMemory.load(saved)


@pytest.mark.parametrize("file", ["header", "tensors"])
def test_a_flipped_bit_anywhere(file: str, saved: Path) -> None:
    path = saved / ("memory.json" if file == "header" else header_of(saved)["tensors"]["file"])
    content = path.read_bytes()
    draw = random.Random(0)
    for position in draw.sample(range(len(content)), min(300, len(content))):
        damaged = bytearray(content)
        damaged[position] ^= 1 << draw.randrange(8)
        if file == "header" and spells_the_same(damaged, content):
            continue
        path.write_bytes(bytes(damaged))
        with pytest.raises(REFUSED):
            GradientMemory.load(saved)
    path.write_bytes(content)
    GradientMemory.load(saved)


def spells_the_same(one: bytes | bytearray, other: bytes) -> bool:
    """Whether two texts are the same JSON: 1e-5 and 1E-5 differ in a bit."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


def test_every_changed_count_is_noticed(saved: Path) -> None:
    """A digit is a small change that is still JSON."""
    header = header_of(saved)
    header["n_rows"] += 1
    (saved / "memory.json").write_text(json.dumps(header))
    with pytest.raises(MemoryFileError, match="digest"):
        GradientMemory.load(saved)


@pytest.mark.parametrize(
    "content",
    [b"", b"null", b"[]", b"3", b'"memory"', b"{}", b"not json", b"\xff\xfe\x00", b"\x93NUMPY", b"[" * 200_000]
    + [b'{"schema_version": 5}', b'{"schema_version": 5, "a": ' + b"[" * 900 + b"]" * 900 + b"}"],
    ids=lambda content: repr(content[:20]),
)
def test_headers_that_are_none(content: bytes, saved: Path) -> None:
    (saved / "memory.json").write_bytes(content)
    with pytest.raises(MemoryFileError):
        GradientMemory.load(saved)


def test_an_oversized_header_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(saved / "memory.json", "r+b") as file:
        file.truncate(65 * 2**20)
    monkeypatch.setattr(json, "loads", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(MemoryFileError, match="too large"):
        GradientMemory.load(saved)


@pytest.mark.parametrize("version", [0, 1, 4, 6, "5", 1.5, None, [5]])
def test_another_schema_version_names_both(version: Any, saved: Path) -> None:
    rewrite(saved, lambda header: header.update(schema_version=version))
    with pytest.raises(MemoryMismatchError) as caught:
        GradientMemory.load(saved)
    assert repr(version) in str(caught.value) and f"reads version {SCHEMA_VERSION}" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "memory-/../../x.safetensors", "..", "", "memory.json", 3, None]
    + ["memory-" + "0" * 32 + ".safetensors\n", "memory-" + "0" * 31 + "/.safetensors"],
)
def test_tensor_files_outside_the_folder_are_not_opened(name: Any, memory: GradientMemory, tmp_path: Path) -> None:
    folder = tmp_path / "_iau"
    memory.save(folder)
    entry = header_of(folder)["tensors"]
    (tmp_path / "outside.safetensors").write_bytes((folder / entry["file"]).read_bytes())
    rewrite(folder, lambda header: header["tensors"].update(file=name))
    with pytest.raises(MemoryFileError):
        GradientMemory.load(folder)


FIRST = "gradient_sum.hidden.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.update({FIRST: tensors[FIRST].half()}),
        lambda tensors: tensors.update({FIRST: tensors[FIRST].long()}),
        lambda tensors: tensors.update({FIRST: tensors[FIRST].T.contiguous()}),
        lambda tensors: tensors.update({FIRST: tensors[FIRST][:-1].contiguous()}),
        lambda tensors: tensors.update({FIRST: tensors[FIRST] * float("nan")}),
        lambda tensors: tensors.update({FIRST: tensors[FIRST] + float("inf")}),
        lambda tensors: tensors.pop(FIRST),
        lambda tensors: tensors.update({"gradient_sum.other": tensors[FIRST].clone()}),
        lambda tensors: tensors.clear(),
        lambda tensors: [tensors.pop(name) for name in list(tensors) if not name.startswith("gradient_sum.")],
        lambda tensors: tensors.update(
            {name: t.half() for name, t in tensors.items() if not name.startswith("gradient_sum.")}
        ),
        lambda tensors: tensors.update(
            {name: t[..., :-1].contiguous() for name, t in tensors.items() if not name.startswith("gradient_sum.")}
        ),
    ],
    ids=["float16", "int64", "transposed", "shorter", "nan", "inf", "absent", "unknown", "no tensors"]
    + ["no curvature", "half curvature", "shorter curvature"],
)
def test_tensors_of_the_wrong_kind(change: Callable[[dict[str, Tensor]], Any], saved: Path) -> None:
    rewrite_tensors(saved, change)
    with pytest.raises(REFUSED):
        GradientMemory.load(saved)


def test_no_safetensors(saved: Path) -> None:
    entry = header_of(saved)["tensors"]
    for content in (b"", b"\x00" * 64, b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}", b"PK\x03\x04 a pickle"):
        (saved / entry["file"]).write_bytes(content)
        rewrite(saved, lambda header: header["tensors"].update(digest=file_digest(saved / entry["file"])))
        with pytest.raises(MemoryFileError):
            GradientMemory.load(saved)


STRANGE = [None, True, -1, 1.5, 10**400, math.nan, "text", "", [], [[]], {}, {"a": {"b": []}}]


def _places(header: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a header."""
    items = header.items() if isinstance(header, dict) else enumerate(header) if isinstance(header, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


def test_strange_values_anywhere_give_no_other_exception(saved: Path) -> None:
    """Forged with a right digest: refused, or taken as a memory whose checks still work; never another exception."""
    original = header_of(saved)
    model = plain()
    text = json.dumps(original)
    refused = 0
    for place in _places(original):
        for number, value in enumerate([*STRANGE, "remove"]):
            if len(place) > 1 and number % 3 != len(place) % 3:
                continue  # a third of them, deep inside
            header = json.loads(text)
            inside = header
            for key in place[:-1]:
                inside = inside[key]
            if value == "remove":
                del inside[place[-1]]
            else:
                inside[place[-1]] = value
            sign(header)
            (saved / "memory.json").write_text(json.dumps(header))
            try:
                loaded = GradientMemory.load(saved)
                loaded.check_model(model)
                loaded.check_data(model, as_dataset(plain_rows()))
            except REFUSED:
                refused += 1
    assert refused > 200


@pytest.mark.parametrize("name", ["n_rows", "n_targets", "gradient_sum_rows", "forgotten_rows", "forgotten_targets"])
@pytest.mark.parametrize("value", [-1, 1.5, True, None, "3"])
def test_counts_are_counts(name: str, value: Any, saved: Path) -> None:
    rewrite(saved, lambda header: header.update({name: value}))
    with pytest.raises(MemoryFileError, match=name):
        GradientMemory.load(saved)


def test_the_kind_of_sum_must_fit_its_tensors(saved: Path, tmp_path: Path) -> None:
    rewrite(saved, lambda header: header.update(gradient_sum_kind="none"))
    with pytest.raises(MemoryFileError, match="gradient sum"):
        GradientMemory.load(saved)
    folder = tmp_path / "without"
    make_memory(plain(), plain_rows(), gradient_sum="none").save(folder)
    rewrite(folder, lambda header: header.update(gradient_sum_kind="full"))
    with pytest.raises(MemoryFileError, match="gradient sum"):
        GradientMemory.load(folder)
