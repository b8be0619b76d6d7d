"""What still remembers the rows: found where it lies, told from the live model, and removed only when asked."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import as_dataset, bert, gpt2, language_rows, pad_right, text_rows
from unlearning_trainers import EXACT, FORGET, make_trainer

from hf_iau import (
    AuditReport,
    GatherConfig,
    GradientMemory,
    IAUCallback,
    IAUPaperConfig,
    PublishError,
    RequestError,
    audit,
    gather,
)


def found(report: AuditReport) -> dict[str, tuple[str, bool]]:
    """Path below the folder → kind and whether it is removable."""
    return {
        os.path.relpath(finding.path, report.directory): (finding.kind, finding.removable)
        for finding in report.findings
    }


def bytes_below(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `output_dir` after training with checkpoints, a request, and saving."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trainer = make_trainer(folder, settings=settings, callbacks=[IAUCallback(EXACT)])
    trainer.train()
    trainer.unlearn(forget_indices=FORGET, method="iau-paper", config=IAUPaperConfig(eta=1e-3))
    trainer.save_model()
    trainer.save_state()
    return folder


@pytest.fixture
def model_folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "model"))


def test_what_training_leaves(model_folder: Path) -> None:
    report = audit(model_folder)
    assert report.has_model
    assert found(report) == {
        "_iau/memory.json": ("memory", False),
        "checkpoint-2": ("checkpoint", True),
        "checkpoint-4": ("checkpoint", True),
        "trainer_state.json": ("log", True),
    }
    sizes = {finding.path.name: finding.bytes for finding in report.findings}
    assert sizes["checkpoint-2"] == bytes_below(model_folder / "checkpoint-2") > 0
    assert "before 3 rows were forgotten" in str(report) and "optimizer" in str(report)
    json.dumps(report.to_dict())


def test_purge_keeps_the_live_model_and_its_memory(model_folder: Path) -> None:
    kept = {
        path: path.read_bytes()
        for path in model_folder.rglob("*")
        if path.is_file() and "checkpoint" not in str(path) and path.name != "trainer_state.json"
    }
    before = bytes_below(model_folder)
    report = audit(model_folder)
    freed = report.purge()
    assert freed == before - bytes_below(model_folder) > 0
    assert {path: path.read_bytes() for path in model_folder.rglob("*") if path.is_file()} == kept
    assert found(audit(model_folder)) == found(report) == {"_iau/memory.json": ("memory", False)}
    model = type(bert()).from_pretrained(model_folder)
    GradientMemory.load(model_folder).check_model(model)


def test_the_only_copy_of_a_model_is_never_removable(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    report = audit(model_folder)
    assert not report.has_model
    assert found(report)["checkpoint-4"] == ("checkpoint", False)
    report.purge()
    assert (model_folder / "checkpoint-4" / "model.safetensors").is_file()


PLANTED = {
    "optimizer.pt": ("training state", True),
    "optimizer.bin": ("training state", True),
    "scheduler.pt": ("training state", True),
    "scaler.pt": ("training state", True),
    "rng_state.pth": ("training state", True),
    "rng_state_3.pth": ("training state", True),
    "deep/er/optimizer.pt": ("training state", True),
    "runs/Nov24_host/events.out.tfevents.1.host.2.0": ("log", True),
    "wandb/run-1/run.wandb": ("log", False),
    "global_step12/zero.pt": ("checkpoint", True),
    "pytorch_model_fsdp_0/a.distcp": ("checkpoint", True),
    "sub/checkpoint-7/model.safetensors": ("checkpoint", True),
    "last-checkpoint/model.safetensors": ("checkpoint", True),
    "best/model.safetensors": ("weights", False),
    "model_backup.pt": ("weights", False),
    "model.safetensors.bak": ("weights", False),
    "pytorch_model.bin": ("weights", False),
    "cache-0123456789abcdef.arrow": ("rows", True),
    "rows/data-00000-of-00001.arrow": ("rows", False),
    "train.parquet": ("rows", False),
    "_iau/memory-" + "a" * 32 + ".safetensors": ("memory", True),
    "_iau/.memory-staged.safetensors": ("memory", True),
    "_iau/.memory.json.tmp12": ("memory", True),
    "old/memory-" + "b" * 32 + ".safetensors": ("memory", True),
    "old/_iau/memory.json": ("memory", True),
    "_iau/ledger.jsonl": ("ledger", False),
}
WHOLE = {"global_step12", "pytorch_model_fsdp_0", "sub/checkpoint-7", "last-checkpoint", "wandb", "old/_iau"}


def test_planted_artefacts(model_folder: Path) -> None:
    base = found(audit(model_folder))
    for name in PLANTED:
        path = model_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"influence")
    for innocent in ("config.json", "tokenizer.json", "README.md", "report.json", "sub/notes.txt", "training_args.bin"):
        if not (model_folder / innocent).exists():
            (model_folder / innocent).write_text("{}")
    expected = {next((w for w in WHOLE if name.startswith(w)), name): kind for name, kind in PLANTED.items()}
    report = audit(model_folder)
    assert found(report) == base | expected
    report.purge()
    left = {name: kind for name, kind in (base | expected).items() if not kind[1]}
    assert found(audit(model_folder)) == left


def test_an_identical_copy_is_no_finding(model_folder: Path) -> None:
    (model_folder / "copy").mkdir()
    shutil.copy(model_folder / "model.safetensors", model_folder / "copy")
    assert "copy/model.safetensors" not in found(audit(model_folder))


def test_a_nested_model_keeps_its_memory(model_folder: Path) -> None:
    shutil.copytree(model_folder, model_folder / "other", ignore=shutil.ignore_patterns("checkpoint-*", "other"))
    report = audit(model_folder)
    assert found(report)["other/_iau"] == ("memory", False)


def test_a_memory_of_other_weights(model_folder: Path) -> None:
    bert(seed=5).save_pretrained(model_folder)
    report = audit(model_folder)
    memory = [path for path in found(report) if path.startswith("_iau/")]
    assert len(memory) == 2 and all(found(report)[path] == ("memory", True) for path in memory)
    assert "of other weights" in str(report)
    report.purge()
    assert not list((model_folder / "_iau").glob("memory*"))


def test_a_memory_of_a_model_with_tied_weights(tmp_path: Path) -> None:
    """The saved file has fewer tensors than the model has names; still its memory is its own."""
    model = gpt2()
    config = GatherConfig(curvature="none", gradient_sum="full", progress=False)
    memory = gather(model, as_dataset(language_rows()), data_collator=pad_right(), config=config)
    model.save_pretrained(tmp_path)
    memory.save(tmp_path / "_iau")
    assert found(audit(tmp_path)) == {}
    gpt2(seed=1).save_pretrained(tmp_path)
    assert set(found(audit(tmp_path)).values()) == {("memory", True)}


def test_a_model_that_cannot_be_built_accuses_no_memory(model_folder: Path) -> None:
    save_file({"weight": torch.zeros(2)}, model_folder / "model.safetensors")
    (model_folder / "config.json").write_text('{"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}}')
    (model_folder / "evil.py").write_text(f"open({str(model_folder / 'ran')!r}, 'w')")
    assert found(audit(model_folder))["_iau/memory.json"] == ("memory", False)
    assert not (model_folder / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"schema_version": 9}', b"[" * 100_000])
def test_a_damaged_memory_is_listed(model_folder: Path, content: bytes) -> None:
    (model_folder / "_iau" / "memory.json").write_bytes(content)
    report = audit(model_folder)
    assert found(report)["_iau/memory.json"] == ("memory", True) and "cannot be read" in str(report)


def test_git_history_is_named_without_its_token(model_folder: Path) -> None:
    (model_folder / ".git").mkdir()
    (model_folder / ".git" / "config").write_text(
        '[remote "origin"]\n\turl = https://me:hf_SECRET@huggingface.co/me/m\n'
    )
    (model_folder / ".git" / "lfs").write_bytes(b"x" * 100)
    report = audit(model_folder)
    assert found(report)[".git"] == ("history", False)
    text = str(report)
    assert "https://huggingface.co/me/m" in text and "super_squash_history" in text and "SECRET" not in text


def test_the_best_checkpoint_wherever_it_is(model_folder: Path, tmp_path: Path) -> None:
    state = json.loads((model_folder / "trainer_state.json").read_text())
    for place, removable in ((tmp_path / "elsewhere", False), (model_folder / "the-best", True)):
        place.mkdir()
        (place / "model.safetensors").write_bytes(b"weights")
        (model_folder / "trainer_state.json").write_text(json.dumps(state | {"best_model_checkpoint": str(place)}))
        relative = os.path.relpath(place, model_folder)
        assert found(audit(model_folder))[relative] == ("checkpoint", removable)
    for strange in (None, 3, "", "\0", str(model_folder), [1]):
        (model_folder / "trainer_state.json").write_text(json.dumps(state | {"best_model_checkpoint": strange}))
        assert "checkpoint-2" in found(audit(model_folder))


def test_caches_of_rows(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "cache" / "org___rows").mkdir(parents=True)
    (tmp_path / "cache" / "org___rows" / "rows.arrow").write_bytes(b"rows")
    (model_folder / "README.md").write_text("---\ndatasets:\n- org/rows\n- ../..\n- org/absent\n- 3\n---\n")
    rows: Any = as_dataset(text_rows()).map(lambda row: row, cache_file_name=str(tmp_path / "mapped.arrow"))
    report = audit(model_folder, train_dataset=rows)
    caches = {finding.path: (finding.kind, finding.removable) for finding in report.findings if finding.kind == "rows"}
    assert caches == {tmp_path / "cache" / "org___rows": ("rows", False), tmp_path / "mapped.arrow": ("rows", False)}
    report.purge()
    assert (tmp_path / "mapped.arrow").is_file()


def test_links_are_not_followed(model_folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside" / "checkpoint-1"
    outside.mkdir(parents=True)
    (outside / "optimizer.pt").write_bytes(b"state")
    (model_folder / "link").symlink_to(outside.parent)
    (model_folder / "checkpoint-9").symlink_to(outside)
    (model_folder / "checkpoint-2" / "link").symlink_to(outside)
    report = audit(model_folder)
    assert found(report)["checkpoint-9"] == ("weights", False) and not any("link/" in path for path in found(report))
    report.purge()
    assert not (model_folder / "checkpoint-2").exists() and (outside / "optimizer.pt").is_file()


def test_what_purge_refuses(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = audit(model_folder)
    memory = next(finding for finding in report.findings if finding.kind == "memory")
    with pytest.raises(PublishError, match="not a removable finding"):
        report.purge([memory])
    with pytest.raises(PublishError, match="not a removable finding"):
        audit(model_folder / "checkpoint-2").purge(report.removable)
    chosen = [finding for finding in report.removable if finding.path.name == "checkpoint-2"]

    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", fail)
        with pytest.raises(PublishError, match=r"checkpoint-2 \(Permission denied\)"):
            report.purge(chosen)
    assert report.purge(chosen) > 0
    assert (model_folder / "checkpoint-4").is_dir() and not (model_folder / "checkpoint-2").exists()


@pytest.mark.parametrize("place", ["absent", "model/config.json"])
def test_no_folder(model_folder: Path, place: str) -> None:
    with pytest.raises(RequestError, match="is no folder"):
        audit(model_folder.parent / place)


def test_an_empty_folder(tmp_path: Path) -> None:
    report = audit(tmp_path)
    assert report.findings == [] and "Nothing found" in str(report) and report.purge() == 0
