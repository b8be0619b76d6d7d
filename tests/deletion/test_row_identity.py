"""Rows are recognised by keyed fingerprints, also in a fresh process, and copies are counted."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import as_dataset, plain, plain_rows
from unlearning_trainers import WITH_CURVATURE, assert_bits, make_trainer, state_of

from hf_iau import (
    AlreadyForgottenError,
    ConfigError,
    DeletionService,
    GradientMemory,
    IAUCallback,
    IAUConfig,
    MemoryFileError,
    MemoryMismatchError,
    RequestError,
    UnknownRowsError,
    UnlearningTrainer,
    UnlearnOutput,
)
from hf_iau.data.digests import row_bytes
from hf_iau.deletion.ids import rows_of_ids, rows_still_in
from hf_iau.memory.keys import Key, find_key
from hf_iau.memory.row_identity import RowIdentity, keyed_fingerprints

GIVEN = IAUConfig(scale=0.1, damping=1.0)
SECRET = "s0123456789" * 4
KEY = Key.from_secret(SECRET)


@pytest.fixture
def with_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_IAU_KEY", SECRET)


def rows_with_ids() -> list[dict[str, Any]]:
    """Twelve rows of six users; row 5 is a copy of row 3, of another user."""
    rows = plain_rows(12)
    rows[5] = dict(rows[3])
    return [row | {"user_id": f"u{i // 2}"} for i, row in enumerate(rows)]


def trained(folder: Path, **kwargs: Any) -> UnlearningTrainer:
    trainer = make_trainer(folder, "plain", rows=rows_with_ids(), callbacks=[IAUCallback(WITH_CURVATURE)], **kwargs)
    trainer.train()
    return trainer


def restarted(trainer: UnlearningTrainer, folder: Path, **kwargs: Any) -> UnlearningTrainer:
    """Weights and memory from disk alone, as in another process."""
    trainer.save_model()
    model = plain()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return make_trainer(folder, "plain", rows=rows_with_ids(), model=model, **kwargs)


def forget(trainer: UnlearningTrainer, rows: Any) -> Any:
    return trainer.unlearn(forget_indices=rows, config=GIVEN)


# Fingerprints


def test_fingerprints_are_hmac_of_the_rows_content(with_key: None) -> None:
    rows, model = plain_rows(3), plain()
    secret = hmac.new(SECRET.encode(), b"hf-iau 1 rows", hashlib.sha256).digest()
    expected = [hmac.new(secret, row_bytes(row), hashlib.sha256).digest()[:16] for row in as_dataset(rows)]
    found = keyed_fingerprints(KEY, model, as_dataset(rows))
    assert found.dtype == np.uint8 and found.shape == (3, 16)
    assert [row.tobytes() for row in found] == expected
    # Columns that the model does not take do not count, and neither does the key of another use.
    with_id = as_dataset([row | {"user_id": "u1"} for row in rows])
    assert np.array_equal(keyed_fingerprints(KEY, model, with_id), found)
    assert len({KEY.rows, KEY.ledger, KEY.requests}) == 3
    assert SECRET not in repr(KEY) and KEY.rows.hex() not in repr(KEY)


def test_counting_agrees_with_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 256, size=(40, 16), dtype=np.uint8)
    kinds[1, 4:] = 7  # shares its first bytes with another
    kinds[0, :4], kinds[0, 4:] = kinds[1, :4], 9
    trained = kinds[rng.integers(0, 30, size=200)]
    forgotten = rng.random(200) < 0.4
    identity = RowIdentity(trained, forgotten, KEY.check, "run")
    copies = identity.copies(kinds)
    for kind in kinds:
        same = [bool((row == kind).all()) for row in trained]
        gone = [a and bool(b) for a, b in zip(same, forgotten, strict=True)]
        assert copies[kind.tobytes()] == (sum(same), sum(gone))
    asked = trained[~forgotten][:20]
    positions = identity.positions(asked)
    assert len(set(positions.tolist())) == 20
    assert np.array_equal(trained[positions], asked) and not forgotten[positions].any()
    after = identity.without(asked)
    assert after.forgotten.sum() == forgotten.sum() + 20 and not (forgotten & ~after.forgotten).any()
    for kind in kinds:
        name = kind.tobytes()
        assert after.copies(kinds)[name][1] - copies[name][1] == sum(row.tobytes() == name for row in asked)


def test_copies_are_counted() -> None:
    a, b = np.zeros(16, np.uint8), np.ones(16, np.uint8)
    identity = RowIdentity(np.stack([a, b, a]), np.zeros(3, bool), KEY.check, "run")
    once = identity.without(np.stack([a]), np.array([2]))
    assert once.forgotten.tolist() == [False, False, True]
    once.check_request(np.stack([a, b]))  # another copy of `a` is still in
    assert once.still_in(np.stack([a, a, b])).tolist() == [True, False, True]
    twice = once.without(np.stack([a]))
    with pytest.raises(AlreadyForgottenError, match="1 of the 2"):
        twice.check_request(np.stack([a, b]))
    with pytest.raises(UnknownRowsError, match=r"1 of the 2 rows were never trained on .* at position 1\."):
        twice.check_request(np.stack([b, a + 5]))


# Keys


def test_keys_that_cannot_be_used_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_key(tmp_path) is None
    monkeypatch.setenv("HF_IAU_KEY", "short")
    with pytest.raises(ConfigError, match="HF_IAU_KEY is 5 bytes"):
        find_key(tmp_path)
    monkeypatch.setenv("HF_IAU_KEY_FILE", "somewhere")
    with pytest.raises(ConfigError, match="both set"):
        find_key(tmp_path)
    monkeypatch.delenv("HF_IAU_KEY")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_key(tmp_path)


def test_a_key_file_must_not_lie_beside_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, safe = tmp_path / "output", tmp_path / "keys"
    for folder in (output / "_iau", safe):
        folder.mkdir(parents=True)
        (folder / "key").write_text(f"{SECRET}\n")
        os.chmod(folder / "key", 0o600)
    monkeypatch.setenv("HF_IAU_KEY_FILE", str(safe / "key"))
    assert find_key(output) == KEY
    for inside in (output / "_iau" / "key", safe / ".." / "output" / "_iau" / "key"):
        monkeypatch.setenv("HF_IAU_KEY_FILE", str(inside))
        with pytest.raises(ConfigError, match="lies below output_dir"):
            find_key(output)
    (safe / "link").symlink_to(output / "_iau" / "key")
    monkeypatch.setenv("HF_IAU_KEY_FILE", str(safe / "link"))
    with pytest.raises(ConfigError, match="lies below output_dir"):
        make_trainer(output, "plain", callbacks=[IAUCallback(WITH_CURVATURE)]).train()


# In the trainer


def test_without_a_key_rows_are_known_in_this_process_alone(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    with pytest.raises(UnknownRowsError, match="2 of the 2 rows were never trained on"):
        trainer.unlearn(as_dataset(plain_rows(2, seed=9)), config=GIVEN)
    forget(trainer, [1])
    assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == [1]
    with pytest.raises(AlreadyForgottenError):
        forget(trainer, [1])
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert trainer.memory.row_identity.fingerprints[0].tobytes() not in written
    assert restarted(trainer, tmp_path).memory.row_identity is None


def test_a_fresh_process_knows_what_was_forgotten(with_key: None, tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    unknown = as_dataset(plain_rows(2, seed=9))
    for process in ("same", "fresh"):
        if process == "same":
            forget(trainer, [1, 3, 7])
        else:
            trainer = restarted(trainer, tmp_path)
        assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == [1, 3, 7]
        with pytest.raises(AlreadyForgottenError, match="1 of the 2 rows"):
            forget(trainer, [7, 8])
        with pytest.raises(AlreadyForgottenError, match="2 of the 3 rows"):
            trainer.unlearn(trainer.train_dataset.select([1, 2, 7]), config=GIVEN)
        with pytest.raises(UnknownRowsError, match="2 of the 2 rows were never trained on"):
            trainer.unlearn(unknown, config=GIVEN)
    # Row 5 is a copy of row 3, and still in.
    forget(trainer, [5])
    with pytest.raises(AlreadyForgottenError):
        forget(trainer, [3])


def test_a_refused_request_and_a_reverted_one_change_nothing(with_key: None, tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    result = forget(trainer, [1])
    result.revert()
    assert not trainer.memory.row_identity.forgotten.any()
    forget(trainer, [1])


def test_gathering_anew_leaves_out_what_was_forgotten_in_another_process(with_key: None, tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    forget(trainer, [1, 3])
    trainer = restarted(trainer, tmp_path)
    run = trainer.memory.row_identity.training_run
    memory = trainer.gather(WITH_CURVATURE)
    assert (memory.n_rows, memory.forgotten_rows) == (10, 2)
    assert np.flatnonzero(memory.row_identity.forgotten).tolist() == [1, 3]
    assert memory.row_identity.training_run == run
    alone = make_trainer(
        tmp_path / "other",
        "plain",
        model=trainer.model,
        rows=[row for i, row in enumerate(rows_with_ids()) if i not in (1, 3)],
    ).gather(WITH_CURVATURE)
    for name, tensor in alone.gradient_sum.items():
        assert torch.allclose(memory.gradient_sum[name], tensor, rtol=1e-6, atol=1e-9)
    with pytest.raises(AlreadyForgottenError):
        forget(trainer, [1])


def test_a_second_training_run_leaves_forgotten_rows_out(with_key: None, tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    run = trainer.memory.row_identity.training_run
    forget(trainer, [1])
    trainer.train()
    assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == [1]
    assert trainer.memory.row_identity.training_run != run
    with pytest.raises(AlreadyForgottenError):
        forget(trainer, [1])


def test_the_wrong_key_and_a_missing_one_are_told(with_key: None, tmp_path: Path, monkeypatch: Any) -> None:
    trainer = trained(tmp_path)
    monkeypatch.setenv("HF_IAU_KEY", "t0123456789" * 4)
    with pytest.raises(MemoryMismatchError, match="no row would be recognised"):
        forget(trainer, [1])
    monkeypatch.delenv("HF_IAU_KEY")
    with pytest.raises(ConfigError, match="set the key"):
        forget(trainer, [1])


# Ids


def unlearn_ids(trainer: UnlearningTrainer, ids: list[str]) -> UnlearnOutput:
    """In memory alone, what is still in of the rows of `ids`."""
    still, notes = rows_still_in(trainer.view, rows_of_ids(trainer.train_dataset, "user_id", ids), find_key())
    output = forget(trainer, still)
    output.report.warnings += notes
    return output


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_rows_are_found_by_id(kind: str, with_key: None, tmp_path: Path) -> None:
    rows: Any = rows_with_ids()
    if kind == "torch":
        rows = [row | {"user_id": i // 2} for i, row in enumerate(rows)]
    trainer = make_trainer(tmp_path, "plain", rows=rows, kind=kind, callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    service = DeletionService(trainer, id_column="user_id")
    first, other = (["u0", "u3"], ["u3", "u5"]) if kind == "datasets" else ([0, 3], [3, 5])
    service.unlearn(ids=first, config=GIVEN)
    assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == [0, 1, 6, 7]
    result = service.unlearn(ids=other, config=GIVEN)  # what is left of them
    assert result.report.warnings[-1].startswith("2 of the 4 rows of these ids were forgotten by an earlier request")
    assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == [0, 1, 6, 7, 10, 11]
    with pytest.raises(AlreadyForgottenError, match="All 2 rows"):
        service.unlearn(ids=first[:1], config=GIVEN)


def test_rows_of_ids_are_followed_without_a_key_as_far_as_the_trainer_knows(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    assert not any("ids" in note for note in unlearn_ids(trainer, ["u0"]).report.warnings)
    forget(trainer, [7])
    result = unlearn_ids(trainer, ["u0", "u3", "u5"])
    assert result.report.counts["forget_rows"] == 3
    left_out = "3 of the 6 rows of these ids were forgotten by an earlier request: this one is of the other 3."
    assert result.report.warnings[-1] == left_out
    moved = state_of(trainer.model)
    result.revert()
    forget(trainer, [6, 10, 11])
    assert_bits(trainer.model, moved)
    assert len(rows_still_in(trainer.view, rows_of_ids(trainer.train_dataset, "user_id", ["u3"]), None)[0]) == 0
    # Of the equal rows 3 and 5, row 3 is out, and that of the other user is not.
    forget(trainer, [3])
    assert unlearn_ids(trainer, ["u2"]).report.counts["forget_rows"] == 2
    # Another process cannot know which rows they were, and says so.
    fresh = restarted(trainer, tmp_path)
    (note,) = [note for note in unlearn_ids(fresh, ["u4"]).report.warnings if "ids" in note]
    assert note.startswith("9 rows were forgotten before this trainer was made") and "HF_IAU_KEY" in note


def test_unknown_ids_are_refused(with_key: None, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", rows=rows_with_ids())
    trainer.gather(WITH_CURVATURE)
    service = DeletionService(trainer, id_column="user_id")
    with pytest.raises(RequestError, match=r"1 of 2 ids are in no training row, e\.g\. the one at position 1"):
        service.unlearn(ids=["u1", "u99"])
    with pytest.raises(RequestError, match="is a str"):
        service.unlearn(ids="u1")
    with pytest.raises(RequestError, match="ids= and other rows"):
        service.unlearn(ids=["u1"], forget_indices=[1])
    with pytest.raises(RequestError, match="no column of train_dataset"):
        DeletionService(trainer, id_column="nobody").unlearn(ids=["u1"])
    with pytest.raises(RequestError, match="id_column="):
        DeletionService(trainer).unlearn(ids=["u1"])


# Files


def test_damaged_identities_are_refused(with_key: None, tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    identity = trainer.memory.row_identity
    tensors, metadata = identity.tensors(), identity.metadata()
    again = RowIdentity.from_tensors(tensors, metadata)
    assert np.array_equal(again.fingerprints, identity.fingerprints) and len(again) == 12
    for name, tensor in {
        "row_identity.fingerprints": torch.zeros(12, 15, dtype=torch.uint8),
        "row_identity.forgotten": torch.full((12,), 2, dtype=torch.uint8),
    }.items():
        with pytest.raises(MemoryFileError):
            RowIdentity.from_tensors(tensors | {name: tensor}, metadata)
        with pytest.raises(MemoryFileError):
            RowIdentity.from_tensors(tensors | {name: tensors[name].to(torch.int64)}, metadata)
        with pytest.raises(MemoryFileError):
            RowIdentity.from_tensors({key: value for key, value in tensors.items() if key != name}, metadata)
    for wrong in (None, [], {"key_check": 3, "training_run": "x"}):
        with pytest.raises(MemoryFileError):
            RowIdentity.from_tensors(tensors, wrong)


def test_no_key_and_no_id_is_written(with_key: None, tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    DeletionService(trainer, id_column="user_id").unlearn(ids=["u2"], config=GIVEN)
    trainer.save_model()
    for path in (path for path in (tmp_path / "_iau").rglob("*") if path.is_file()):
        content = path.read_bytes()
        for secret in (SECRET.encode(), KEY.rows, KEY.rows.hex().encode(), b"u2", b"user_id"):
            assert secret not in content
    assert json.loads((tmp_path / "_iau" / "memory.json").read_text())["row_identity"]["key_check"] == KEY.check
    assert GradientMemory.load(tmp_path).row_identity.forgotten.sum() == 2
