"""Every file that is read, damaged or forged in any way: a clear error or a sound object, and nothing else.

Nothing else means: no other kind of exception, no hang, no code of the file's own, no half-applied update.
"""

from __future__ import annotations

import ast
import copy
import json
import logging
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_memory_files import REFUSED, header_of, sign
from tiny_models import as_dataset, pad_right, plain, plain_rows
from transformers import TrainingArguments
from unlearning_trainers import assert_bits, state_of

import hf_iau
from hf_iau import GatherConfig, GradientMemory, IAUError, RequestError, UnlearningReport, UnlearningTrainer, gather
from hf_iau.deletion.artefacts import audit
from hf_iau.deletion.journal import Journal, JournalFile
from hf_iau.deletion.ledger import Ledger
from hf_iau.deletion.queue import RequestQueue
from hf_iau.errors import ConfigError, LedgerError, MemoryFileError, PublishError, StorageError
from hf_iau.memory.keys import Key, find_key
from hf_iau.methods import base
from hf_iau.methods.base import available_methods, method_config
from hf_iau.methods.iau.config import IAUConfig
from hf_iau.methods.iau.remembered import remembered_calibration
from hf_iau.report.card import UnlearningCard
from hf_iau.utils.atomic_files import file_digest

# More by e.g. FUZZ_EXAMPLES=3000; the slower tests, which serve requests, take a third.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "90"))
fuzz = settings(deadline=None, max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
slow_fuzz = settings(fuzz, max_examples=EXAMPLES // 3)

KEY = "fuzz0123456789" * 3
BIG = 10**400


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A memory with everything in it: gradient sum, curvature, row identity."""
    folder = tmp_path_factory.mktemp("memory")
    config = GatherConfig(gradient_sum="full", curvature="ekfac", progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_IAU_KEY", KEY)
        memory = gather(plain(), as_dataset(plain_rows(40)), data_collator=pad_right(), config=config)
    assert memory.row_identity is not None and memory.curvature is not None
    memory.calibration = {
        "scale": 0.5,
        "damping": 0.1,
        "retain_weight": 0.0,
        "source": "proxies",
        "lengths": [0.5, 0.4],
    }
    memory.save(folder)
    return folder


@pytest.fixture
def scratch(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, on which a test writes again and again."""
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# --- damage -----------------------------------------------------------------------------------------------------------

Damage = Callable[[bytes], bytes]


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """Cut, lengthen, flip, overwrite, repeat or move a part of a file; positions are shares of its length."""
    kind = draw(st.sampled_from(["cut", "append", "flip", "overwrite", "repeat", "remove", "swap"]))
    place, width = draw(st.floats(0, 1)), draw(st.integers(1, 64))
    filling, bit = draw(st.binary(min_size=1, max_size=32)), draw(st.integers(0, 7))

    def damage(content: bytes) -> bytes:
        at = min(int(place * len(content)), max(len(content) - 1, 0))
        part, rest = content[at : at + width], content[at + width :]
        if kind == "cut":
            return content[:at]
        if kind == "append":
            return content + filling
        if kind == "flip":
            changed = bytearray(content)
            changed[at] ^= 1 << bit
            return bytes(changed)
        if kind == "overwrite":
            return content[:at] + filling + content[at + len(filling) :]
        if kind == "repeat":
            return content[:at] + part * 3 + rest
        if kind == "remove":
            return content[:at] + rest
        return content[:at] + rest[:width] + part + rest[width:]

    return damage


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([BIG, -1, 0, 2**31, 2**63, "../../etc/passwd", "/etc/passwd", "\0", "nan", "9" * 5000, "\ud800"]),
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested lists and dictionaries."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def forged(draw: st.DataObject, original: Any) -> Any:
    """`original` with one to three places replaced, removed or added."""
    values = copy.deepcopy(original)
    for _ in range(draw.draw(st.integers(1, 3), label="changes")):
        spots = list(places(values))
        if not spots:
            break
        *path, last = draw.draw(st.sampled_from(spots), label="place")
        inside = values
        for key in path:
            inside = inside[key]
        change = draw.draw(st.sampled_from(["replace", "remove", "add"]), label="change")
        if change == "replace":
            inside[last] = draw.draw(anything, label="value")
        elif change == "remove":
            del inside[last]
        elif isinstance(inside, dict):
            inside[draw.draw(st.text(max_size=8), label="name")] = draw.draw(anything, label="value")
        else:
            inside.append(draw.draw(anything, label="value"))
    return values


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8", errors="surrogatepass")


# --- memory -----------------------------------------------------------------------------------------------------------


@fuzz
@given(damage=damages(), which=st.sampled_from(["header", "tensors"]))
def test_a_damaged_memory(scratch: Path, saved: Path, damage: Damage, which: str) -> None:
    name = "memory.json" if which == "header" else header_of(saved)["tensors"]["file"]
    content = (saved / name).read_bytes()
    damaged = damage(content)
    (scratch / name).write_bytes(damaged)
    try:
        GradientMemory.load(scratch)
    except REFUSED:
        pass
    else:  # spelled otherwise, but the same
        assert damaged == content or (which == "header" and json.loads(damaged) == json.loads(content))
    finally:
        (scratch / name).write_bytes(content)


def use(folder: Path) -> None:
    """Load a memory and ask for rows to be forgotten; the weights either stay, bit for bit, or all of it was done."""
    model, rows = plain(), as_dataset(plain_rows(40))
    before = state_of(model)
    try:
        memory = GradientMemory.load(folder)
        remembered_calibration(IAUConfig(), memory)
        trainer = UnlearningTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(folder / "out"),
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=rows,
            data_collator=pad_right(),
            memory=memory,
        )
        logging.getLogger("hf_iau").setLevel(logging.CRITICAL)
        result = trainer.unlearn(forget_indices=[1, 2, 3], config=IAUConfig(scale=0.1, damping=0.1))
    except IAUError:
        assert_bits(model, before)
        return
    assert result.applied and all(torch.isfinite(p).all() for p in model.parameters())
    result.revert()
    assert_bits(model, before)


@slow_fuzz
@given(data=st.data())
def test_a_forged_header_with_a_right_digest(scratch: Path, saved: Path, data: st.DataObject) -> None:
    header = forged(data, header_of(saved))
    try:
        sign(header)
    except (TypeError, AttributeError):
        pass
    write_json(scratch / "memory.json", header)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_IAU_KEY", KEY)
        use(scratch)


def with_tensor_file(scratch: Path, saved: Path, content: bytes) -> None:
    """Put a tensor file in place, with the digest that fits."""
    header = header_of(saved)
    path = scratch / header["tensors"]["file"]
    path.write_bytes(content)
    header["tensors"]["digest"] = file_digest(path)
    sign(header)
    write_json(scratch / "memory.json", header)


@fuzz
@given(damage=damages())
def test_damaged_tensors_with_a_right_digest(scratch: Path, saved: Path, damage: Damage) -> None:
    content = (saved / header_of(saved)["tensors"]["file"]).read_bytes()
    with_tensor_file(scratch, saved, damage(content))
    try:
        GradientMemory.load(scratch)
    except REFUSED:
        pass


@fuzz
@given(data=st.data())
def test_forged_tensor_headers(scratch: Path, saved: Path, data: st.DataObject) -> None:
    """Wrong dtype, shape, offsets, names: the header of the safetensors format, in front of the right bytes."""
    content = (saved / header_of(saved)["tensors"]["file"]).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = forged(data, json.loads(content[8 : 8 + length]))
    text = json.dumps(header).encode("utf-8", "replace")
    claimed = data.draw(st.sampled_from([len(text), len(text) + 1, 0, 2**40, 2**63, 2**64 - 1]), label="claimed length")
    with_tensor_file(scratch, saved, struct.pack("<Q", claimed) + text + content[8 + length :])
    try:
        GradientMemory.load(scratch)
    except REFUSED:
        pass


@slow_fuzz
@given(data=st.data())
def test_tensors_of_another_kind(scratch: Path, saved: Path, data: st.DataObject) -> None:
    """Well-formed files whose tensors have another dtype, shape or value; a memory that loads must be usable."""
    tensors = load_file(saved / header_of(saved)["tensors"]["file"])
    name = data.draw(st.sampled_from(sorted(tensors)), label="tensor")
    tensor = tensors[name]
    change = data.draw(
        st.sampled_from(["dtype", "shape", "nan", "negative", "huge", "zero", "drop", "rename"]), label="change"
    )
    if change == "dtype":
        kinds = [torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16]
        tensors[name] = tensor.to(data.draw(st.sampled_from(kinds), label="dtype"))
    elif change == "shape":
        shapes = [
            tensor.reshape(-1),
            tensor[..., None],
            tensor[:0],
            torch.zeros((), dtype=tensor.dtype),
            tensor[:-1],
            tensor[None],
        ]
        tensors[name] = data.draw(st.sampled_from(shapes), label="shape").contiguous()
    elif change == "drop":
        del tensors[name]
    elif change == "rename":
        tensors[f"../{name}"] = tensors.pop(name)
    elif tensor.dtype.is_floating_point:
        values = {"nan": float("nan"), "negative": -1.0, "huge": 1e30, "zero": 0.0}
        tensors[name] = torch.full_like(tensor, values[change])
    header = header_of(saved)
    path = scratch / header["tensors"]["file"]
    save_file(tensors, path)
    header["tensors"] |= {"digest": file_digest(path), "count": len(tensors)}
    sign(header)
    write_json(scratch / "memory.json", header)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_IAU_KEY", KEY)
        use(scratch)


# --- ledger, key, report, card, configurations ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ledger_text() -> str:
    """A ledger of three requests."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / "ledger.jsonl", Key.from_secret(KEY))
        for number in range(3):
            ledger.append(
                request=f"{number:032x}",
                training_run="",
                rows=2,
                row_ids=["0" * 32] * 2,
                method="iau",
                config={"scale": 0.5},
                calibration={"k": 0.5},
                weights_before="0" * 32,
                weights_after="1" * 32,
                outcome={"before": {"forget_loss": 0.25}},
                versions={"python": "3"},
                files={"model.safetensors": "0" * 32},
            )
        return ledger.path.read_text()


@fuzz
@given(damage=damages())
def test_a_damaged_ledger(ledger_text: str, tmp_path: Path, damage: Damage) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", Key.from_secret(KEY))
    damaged = damage(ledger_text.encode())
    ledger.path.write_bytes(damaged)
    head = json.loads(ledger_text.splitlines()[-1])["mac"]
    try:
        ledger.verify(head, 3)
    except LedgerError:
        return
    assert [json.loads(line) for line in damaged.splitlines()] == [
        json.loads(line) for line in ledger_text.splitlines()
    ]


@fuzz
@given(data=st.data())
def test_a_forged_ledger(ledger_text: str, tmp_path: Path, data: st.DataObject) -> None:
    """Without the key nothing that says something else verifies."""
    lines = [json.loads(line) for line in ledger_text.splitlines()]
    changed = forged(data, lines)
    ledger = Ledger(tmp_path / "ledger.jsonl", Key.from_secret(KEY))
    try:
        ledger.path.write_text("".join(json.dumps(line) + "\n" for line in changed))
    except ValueError:
        return
    try:
        ledger.verify(lines[-1]["mac"], 3)
    except LedgerError:
        return
    assert changed == lines


@fuzz
@given(data=st.data(), damage=damages(), forge=st.booleans(), which=st.sampled_from(["journal", "queue"]))
def test_a_damaged_or_forged_journal_or_queue(
    tmp_path: Path, data: st.DataObject, damage: Damage, forge: bool, which: str
) -> None:
    """Both move files or have rows forgotten, so both are sealed: what is not as it was written is refused."""
    (tmp_path / "_iau").mkdir(exist_ok=True)
    key = Key.from_secret(KEY)
    file: Any = JournalFile(tmp_path, key) if which == "journal" else RequestQueue(tmp_path, key)
    journal = Journal("0" * 32, "now", 3, "1" * 32, files=["model.safetensors"], removed=["a/b"])
    waiting = RequestQueue(tmp_path, key).asked(np.arange(48, dtype=np.uint8).reshape(3, 16), np.arange(3))
    file.seal(journal) if which == "journal" else file.write(waiting)
    text = file.path.read_text()
    try:
        file.path.write_bytes(json.dumps(forged(data, json.loads(text))).encode() if forge else damage(text.encode()))
    except ValueError:
        return
    try:
        found = file.read()
    except StorageError:
        return
    if which == "journal":
        assert found == journal
    else:
        assert np.array_equal(found.fingerprints, waiting.fingerprints) and found.named == waiting.named


@fuzz
@given(content=st.binary(max_size=6000))
def test_any_key_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_IAU_KEY", raising=False)
        patch.setenv("HF_IAU_KEY_FILE", str(path))
        try:
            key = find_key()
        except ConfigError:
            return
    assert key is not None and len(key.rows) == 32 and content.strip()


def report() -> UnlearningReport:
    figures = {
        "forget_accuracy": 0.5,
        "forget_loss": 1.0,
        "mia_auc": 0.6,
        "test_accuracy": 0.5,
        "per_row_suppressed": False,
        "attacks_against": None,
    }
    attack = {"auc": 0.5, "ci_low": 0.4, "ci_high": 0.6, "tpr_at_1_percent_fpr": 0.01}
    return UnlearningReport(
        method="iau",
        config={"scale": 1.0},
        seed=0,
        counts={"forget_rows": 30, "test_rows": 30},
        before=figures | {"attacks": {"loss": attack}},
        after=figures | {"attacks": {"loss": attack}, "mia_auc_test": 0.5},
        retrained=figures,
        gap={"mean_absolute": 1.0, "based_on": "accuracy", "compared": ["forget_accuracy"], "forget_accuracy": 1.0},
        gap_before={"mean_absolute": 1.0, "based_on": "accuracy", "compared": [], "forget_accuracy": 1.0},
        noise_floor={"figures": figures, "gap": {"mean_absolute": 0.5, "based_on": "accuracy"}},
        agreement={"forget": {"agreement": 0.5, "jensen_shannon": 0.1}},
        seconds={"step": 1.0},
        peak_memory_bytes={"step": 1000},
        diagnostics={"reasons": ["so"], "curve": [{"k": 1.0, "auc": 0.5}]},
        warnings=["careful"],
        versions={"python": "3"},
        verdict="ok",
        calibrated=True,
    )


@fuzz
@given(data=st.data(), damage=damages(), forge=st.booleans())
def test_a_damaged_or_forged_report(tmp_path: Path, data: st.DataObject, damage: Damage, forge: bool) -> None:
    path = tmp_path / "report.json"
    text = json.dumps(report().to_dict())
    try:
        path.write_bytes(json.dumps(forged(data, json.loads(text))).encode() if forge else damage(text.encode()))
    except ValueError:
        return
    try:
        loaded = UnlearningReport.load(path)
    except RequestError:
        return
    assert str(loaded) and loaded.to_markdown()
    loaded.save(tmp_path / "again")


def test_the_report_of_the_fuzz_test_is_whole(tmp_path: Path) -> None:
    report().save(tmp_path)
    assert UnlearningReport.load(tmp_path).to_dict() == report().to_dict()
    with open(tmp_path / "report.json", "r+b") as file:
        file.truncate(300 * 2**20)
    with pytest.raises(RequestError, match="too large"):
        UnlearningReport.load(tmp_path)


@fuzz
@given(data=st.data(), damage=damages(), forge=st.booleans())
def test_damaged_or_forged_card_data(tmp_path: Path, data: st.DataObject, damage: Damage, forge: bool) -> None:
    UnlearningCard().with_report(report(), "2026-01-31").with_report(report(), "2026-02-28").save(tmp_path, plain())
    path = tmp_path / "card.json"
    text = path.read_text()
    try:
        path.write_bytes(json.dumps(forged(data, json.loads(text))).encode() if forge else damage(text.encode()))
    except ValueError:
        return
    try:
        card, _ = UnlearningCard.load(tmp_path)
    except PublishError:
        return
    card.section()
    card.evaluation_results("text-classification")


@fuzz
@given(data=st.data())
def test_any_settings_of_a_method(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(available_methods()), label="method")
    known = [field.name for field in fields(base._METHODS[name].config_class)]
    values = data.draw(st.dictionaries(st.sampled_from([*known, "other"]), anything, max_size=3), label="settings")
    try:
        method_config(name, values)
    except IAUError:
        pass


@fuzz
@given(values=st.dictionaries(st.sampled_from(sorted(GatherConfig().to_dict())), anything, max_size=3))
def test_any_settings_of_gathering(values: dict[str, Any]) -> None:
    try:
        GatherConfig(**values)
    except ConfigError:
        pass


@slow_fuzz
@given(
    damage=damages(),
    name=st.sampled_from(["memory.json", "trainer_state.json", "README.md", "config.json", "card.json"]),
)
def test_audit_of_damaged_folders(saved: Path, tmp_path: Path, damage: Damage, name: str) -> None:
    """Reads headers, states and cards of anybody's folders, and takes whatever they hold."""
    (tmp_path / "_iau").mkdir(exist_ok=True)
    for path in saved.iterdir():
        (tmp_path / "_iau" / path.name).write_bytes(path.read_bytes())
    contents = {
        "memory.json": (saved / "memory.json").read_bytes(),
        "card.json": b'{"schema": 1}',
        "trainer_state.json": json.dumps({"best_model_checkpoint": str(tmp_path.parent), "x": [1, 2]}).encode(),
        "README.md": b"---\ndatasets:\n- org/rows\n---\n# A card\n",
        "config.json": b'{"model_type": "bert", "architectures": ["BertModel"]}',
    }
    target = tmp_path / "_iau" / name if name in ("memory.json", "card.json") else tmp_path / name
    target.write_bytes(damage(contents[name]))
    report = audit(tmp_path)
    assert str(report)
    outside = [f for f in report.findings if not f.path.resolve().is_relative_to(tmp_path.resolve())]
    assert not any(finding.removable for finding in outside)


# --- no pickle --------------------------------------------------------------------------------------------------------


def test_a_pickle_in_place_of_tensors_is_not_opened(saved: Path, scratch: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(scratch / "ran"), "w"))

    opened: list[Any] = []
    watching = True

    def hook(event: str, arguments: Any) -> None:
        if watching and event in ("pickle.find_class", "marshal.loads"):
            opened.append((event, arguments))

    torch.save(Evil(), scratch / "evil.pt")
    sys.addaudithook(hook)  # stays for good, so it is switched off below
    try:
        with_tensor_file(scratch, saved, (scratch / "evil.pt").read_bytes())
        with pytest.raises(MemoryFileError):
            GradientMemory.load(scratch)
        for name in ("report.json", "card.json"):
            (scratch / name).write_bytes((scratch / "evil.pt").read_bytes())
        with pytest.raises(RequestError):
            UnlearningReport.load(scratch)
        with pytest.raises(PublishError):
            UnlearningCard.load(scratch)
    finally:
        watching = False
    assert not opened and not (scratch / "ran").exists()


def test_the_package_reads_and_writes_no_pickle() -> None:
    """No module of the package uses pickle or evaluates text; `torch.load` only with `weights_only=True`."""
    calls = 0
    for path in sorted(Path(hf_iau.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                banned = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
                assert not banned & {name.split(".")[0] for name in names}, path
            if isinstance(node, ast.Call):
                calls += 1
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "torch.save"), f"{path}: {called}"
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("allow_pickle", "False") == "False", path
                if called == "torch.load":
                    assert keywords.get("weights_only") == "True", path
    assert calls > 1000
