"""Rows that were forgotten stay forgotten: through training, checkpoints, stale trainers, threads and Ctrl-C."""

from __future__ import annotations

import functools
import os
import signal
import threading
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
    IAUCallback,
    IAUConfig,
    RequestError,
    StorageError,
    UnlearningTrainer,
    audit,
)
from hf_iau.memory.fingerprints import weights_fingerprint
from hf_iau.methods.baselines.retrain import RetrainConfig
from hf_iau.methods.weights import WeightSnapshot

GIVEN = IAUConfig(scale=0.1, damping=1.0)
KEY = "the key of rows that do not come back"


@pytest.fixture(params=[True, False], ids=["with key", "without"])
def with_key(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param:
        monkeypatch.setenv("HF_IAU_KEY", KEY)
    return bool(request.param)


class Watched(UnlearningTrainer):
    """Notes the first feature of every row that is trained on."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen = self.__dict__.setdefault("seen", set())
        seen |= {round(float(x), 5) for x in inputs["features"][:, 0]}
        return super().training_step(model, inputs, *args, **kwargs)

    def trained_on(self) -> set[int]:
        return {i for i, row in enumerate(plain_rows(12)) if round(float(row["features"][0]), 5) in self.seen}


def rows() -> Any:
    return as_dataset(plain_rows(12))


def trained(folder: Path, **kwargs: Any) -> UnlearningTrainer:
    settings = {"num_train_epochs": 2, "max_steps": -1} | kwargs.pop("settings", {})
    trainer = make_trainer(
        folder,
        "plain",
        settings=settings,
        callbacks=[IAUCallback(WITH_CURVATURE)],
        trainer_class=Watched,
        **({"train_dataset": rows()} | kwargs),
    )
    if "model" not in kwargs:
        trainer.train()
    return trainer


def on_disk(folder: Path) -> torch.nn.Module:
    model = plain()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


# --- training on ------------------------------------------------------------------------------------------------------


def test_training_on_leaves_forgotten_rows_out(tmp_path: Path, with_key: bool) -> None:
    trainer = trained(tmp_path)
    trainer.unlearn(forget_indices=[2, 7], config=GIVEN)
    whole = trainer.train_dataset
    trainer.seen.clear()
    trainer.train()
    assert trainer.train_dataset is whole
    memory = trainer.memory
    assert memory is not None and memory.n_rows == 10 and memory.forgotten_rows == 2
    assert np.flatnonzero(memory.row_identity.forgotten).tolist() == [2, 7]
    assert trainer.trained_on() == set(range(12)) - {2, 7}
    with pytest.raises(AlreadyForgottenError):
        trainer.unlearn(forget_indices=[2, 3], config=GIVEN)
    assert trainer.unlearn(forget_indices=[3], config=GIVEN).memory.n_rows == 9  # numbers mean what they did


def test_training_on_in_another_process(tmp_path: Path, with_key: bool) -> None:
    trainer = trained(tmp_path)
    trainer.unlearn(forget_indices=[2, 7], config=GIVEN)
    trainer.save_model()
    again = trained(tmp_path, model=on_disk(tmp_path))
    if with_key:
        again.train()
        assert again.trained_on() == set(range(12)) - {2, 7}
        assert np.flatnonzero(again.memory.row_identity.forgotten).tolist() == [2, 7]
        return
    with pytest.raises(RequestError, match=r"2 of these 12 rows were forgotten.*does not know which"):
        again.train()
    assert_bits(again.model, state_of(on_disk(tmp_path)))


def test_a_checkpoint_from_before_is_refused(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
    trainer = trained(tmp_path, settings=saving)
    checkpoint = tmp_path / "checkpoint-3"
    assert checkpoint.is_dir()
    trainer.unlearn(forget_indices=[2, 7], config=GIVEN)
    before = state_of(trainer.model)
    for asked in (str(checkpoint), True):
        with pytest.raises(RequestError, match="written before 2 rows were forgotten"):
            trainer.train(resume_from_checkpoint=asked)
    assert_bits(trainer.model, before)
    trainer.save_model()
    # Another process, of another trainer.
    again = trained(tmp_path, model=on_disk(tmp_path), settings=saving)
    with pytest.raises(RequestError, match="written before 2 rows were forgotten"):
        again.train(resume_from_checkpoint=str(checkpoint))
    # One that was written afterwards serves.
    trainer.train()
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    trainer.train(resume_from_checkpoint=str(newest))


# --- stale trainers ---------------------------------------------------------------------------------------------------


def test_a_stale_trainer_does_not_save_over_a_served_request(tmp_path: Path, with_key: bool) -> None:
    trained(tmp_path).save_model()
    stale, other = (trained(tmp_path, model=on_disk(tmp_path)) for _ in range(2))
    other.unlearn(forget_indices=[2, 7], config=GIVEN)
    other.save_model()
    served = state_of(on_disk(tmp_path))
    with pytest.raises(StorageError, match="rows were forgotten there since this trainer was made"):
        stale.save_model()
    assert_bits(on_disk(tmp_path), served)
    stale.save_model(str(tmp_path / "elsewhere"))
    # A service catches up, and serves what comes next on top.
    DeletionService(stale, KEY).unlearn(forget_indices=[3, 4, 5], config=GIVEN)
    assert stale.memory.forgotten_rows == 5 if with_key else stale.memory.forgotten_rows >= 5
    with pytest.raises(StorageError):
        other.save_model()


def test_changes_on_top_of_stale_weights_are_refused_by_a_service(tmp_path: Path) -> None:
    trained(tmp_path).save_model()
    stale, other = (trained(tmp_path, model=on_disk(tmp_path)) for _ in range(2))
    assert stale.memory is not None  # is read now
    DeletionService(other, KEY).unlearn(forget_indices=[2, 7], config=GIVEN)
    stale.unlearn(forget_indices=[4], config=GIVEN)
    with pytest.raises(StorageError, match="its model was changed since as well"):
        DeletionService(stale, KEY).unlearn(forget_indices=[5], config=GIVEN)


def test_a_new_training_run_in_the_same_folder_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tmp_path)
    trainer.save_model()
    DeletionService(trainer, KEY).unlearn(forget_indices=[2, 7], config=GIVEN)
    fewer = rows().select(range(11))  # others than were gathered from: each is looked up by its content
    with pytest.raises(ConfigError, match="Knowing which rows were forgotten needs a key"):
        trained(tmp_path, train_dataset=fewer)
    monkeypatch.setenv("HF_IAU_KEY", KEY)
    again = trained(tmp_path, train_dataset=fewer)
    assert again.trained_on() == set(range(11)) - {2, 7}
    again.save_model()
    assert weights_fingerprint(on_disk(tmp_path)) == weights_fingerprint(again.model)


# --- threads and signals ----------------------------------------------------------------------------------------------


def test_two_threads_take_turns(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    results, errors = [], []

    def forget(numbers: list[int]) -> None:
        try:
            results.append(trainer.unlearn(forget_indices=numbers, config=GIVEN))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=forget, args=([number],)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and all(result.applied for result in results)
    assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == list(range(6))


@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_around_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    trainer = trained(tmp_path)
    trainer.save_model()
    service = DeletionService(trainer, KEY)
    before = state_of(trainer.model)
    write = service._storage.write

    def interrupted(*args: Any) -> Any:
        if when == "before":
            os.kill(os.getpid(), signal.SIGINT)
        entry = write(*args)
        if when == "after":
            os.kill(os.getpid(), signal.SIGINT)
        return entry

    monkeypatch.setattr(service, "_storage", type("Storage", (), {"write": staticmethod(interrupted)})())
    with pytest.raises(KeyboardInterrupt):
        service.unlearn(forget_indices=[2, 7], config=GIVEN)
    if when == "before":
        assert_bits(trainer.model, before)
    assert_bits(on_disk(tmp_path), state_of(trainer.model))
    trainer.memory.check_model(trainer.model)
    assert service.ledger.verify().count == (0 if when == "before" else 1)
    trainer.save_model()
    DeletionService(trainer, KEY).unlearn(forget_indices=[4], config=GIVEN)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("recorded", [True, False], ids=["service", "in memory"])
def test_a_second_ctrl_c_does_not_leave_half_of_the_old_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = trained(tmp_path)
    trainer.save_model()
    service = DeletionService(trainer, KEY)
    before, restore, calls = state_of(trainer.model), WeightSnapshot.restore, []

    def interrupted(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)

    def impatient(snapshot: WeightSnapshot) -> None:
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        restore(snapshot)

    monkeypatch.setattr(service, "_storage", type("Storage", (), {"write": staticmethod(interrupted)})())
    monkeypatch.setattr(WeightSnapshot, "restore", impatient)
    unlearn: Any = service.unlearn if recorded else functools.partial(trainer.unlearn, commit=interrupted)
    with pytest.raises(KeyboardInterrupt):
        unlearn(forget_indices=[2, 7], config=GIVEN)
    assert calls
    assert_bits(trainer.model, before)
    assert_bits(on_disk(tmp_path), before)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert service.ledger.verify().count == 0


# --- records ----------------------------------------------------------------------------------------------------------


def test_a_deleted_ledger_is_noticed_before_receipts_are_written_over(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.save_model()
    service = DeletionService(trainer, KEY)
    service.unlearn(forget_indices=[2], config=GIVEN)
    receipt = tmp_path / "_iau" / "receipts" / "00001.md"
    written = receipt.read_text()
    (tmp_path / "_iau" / "ledger.jsonl").unlink()
    with pytest.raises(StorageError, match=r"receipt of entry 1 .* has 0 entries"):
        DeletionService(trainer, KEY).unlearn(forget_indices=[3], config=GIVEN)
    assert receipt.read_text() == written


def test_a_request_without_rows_is_told_of_all_ways_to_name_them(tmp_path: Path) -> None:
    service = DeletionService(trained(tmp_path), KEY, id_column="user_id")
    for request in (service.unlearn, service.queue):
        with pytest.raises(RequestError, match=r"no rows: pass ids=, forget_indices= or forget_dataset="):
            request()


def test_rows_served_approximately_can_be_served_by_retraining(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.save_model()
    service = DeletionService(trainer, KEY)
    service.unlearn(forget_indices=[2, 7], config=GIVEN)
    anew = RetrainConfig(model_init=lambda: plain())
    output = service.unlearn(forget_indices=[2, 7], method="retrain", config=anew)
    assert output.applied and output.entry is not None and output.entry.number == 2
    assert output.entry.method == "retrain" and service.ledger.verify().count == 2
    # Once more it is answered.
    assert not service.unlearn(forget_indices=[2, 7], method="retrain", config=anew).applied
    with pytest.raises(AlreadyForgottenError):
        trainer.unlearn(forget_indices=[2], method="fine-tune")


def test_weights_that_are_not_what_the_ledger_says_are_told(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.save_model()
    old = (tmp_path / "model.safetensors").read_bytes()
    service = DeletionService(trainer, KEY)
    service.unlearn(forget_indices=[2, 7], config=GIVEN)
    assert service.ledger.verify().weights_match is True
    assert not [finding for finding in audit(tmp_path).findings if finding.kind == "weights"]
    (tmp_path / "model.safetensors").write_bytes(old)
    assert service.ledger.verify().weights_match is False
    (finding,) = [finding for finding in audit(tmp_path).findings if finding.kind == "weights"]
    assert "not those that the last request" in finding.why


def test_errors_and_logs_name_no_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    people = as_dataset([row | {"user": f"person-{i}@example.org"} for i, row in enumerate(plain_rows(12))])
    trainer = trained(tmp_path, train_dataset=people)
    trainer.save_model()
    service = DeletionService(trainer, KEY, id_column="user")
    service.unlearn(ids=["person-1@example.org"], request_id="ticket of Ms Example", config=GIVEN)
    with pytest.raises(RequestError, match="This request_id names a request of 1 rows") as first:
        service.unlearn(ids=["person-2@example.org"], request_id="ticket of Ms Example", config=GIVEN)
    with pytest.raises(RequestError, match=r"1 of 2 ids are in no training row, e.g. the one at position 1") as second:
        service.unlearn(ids=["person-3@example.org", "person-99@example.org"], config=GIVEN)
    with pytest.raises(RequestError, match="ids is a str: give a list of ids") as third:
        service.unlearn(ids="person-3@example.org", config=GIVEN)
    with pytest.raises(RequestError, match="something that is no id"):
        service.unlearn(ids=[["person-3@example.org"]], config=GIVEN)
    told = " ".join([*(str(error.value) for error in (first, second, third)), caplog.text])
    assert "example.org" not in told and "Example" not in told


@pytest.mark.parametrize("secret", ["a" * 32, "abc" * 20, "00000000000000000000000000000001"])
def test_keys_that_can_be_guessed_are_refused(tmp_path: Path, secret: str) -> None:
    with pytest.raises(ConfigError, match="different characters, so it can be guessed"):
        DeletionService(trained(tmp_path), secret)


def test_rows_that_were_retrained_away_stay_out_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(tmp_path)
    trainer.save_model()
    anew = RetrainConfig(model_init=lambda: plain())
    DeletionService(trainer, KEY).unlearn(forget_indices=[2, 7], method="retrain", config=anew)
    again = trained(tmp_path, model=on_disk(tmp_path))
    with pytest.raises(RequestError, match=r"The ledger in .* says that 2 rows were forgotten"):
        again.train()
    monkeypatch.setenv("HF_IAU_KEY", KEY)
    again.train()
    assert again.trained_on() == set(range(12)) - {2, 7}
    assert np.flatnonzero(again.memory.row_identity.forgotten).tolist() == [2, 7]
    other = trained(tmp_path / "other", model=plain())
    (tmp_path / "other" / "_iau").mkdir(parents=True)
    (tmp_path / "_iau" / "ledger.jsonl").rename(tmp_path / "other" / "_iau" / "ledger.jsonl")
    assert np.flatnonzero(other.gather(WITH_CURVATURE).row_identity.forgotten).tolist() == [2, 7]


def test_older_weights_are_not_saved_over_a_served_request(tmp_path: Path) -> None:
    trained(tmp_path).save_model()
    older = on_disk(tmp_path)
    trainer = trained(tmp_path, model=on_disk(tmp_path))
    DeletionService(trainer, KEY).unlearn(forget_indices=[2, 7], config=GIVEN)
    late = trained(tmp_path, model=older)  # made after the request, of a copy from before
    with pytest.raises(StorageError, match="weights from before a request that was served there"):
        late.save_model()


def test_without_a_key_a_second_time_is_told(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.unlearn(forget_indices=[2, 7], config=GIVEN)
    trainer.save_model()
    again = trained(tmp_path, model=on_disk(tmp_path))
    told = again.unlearn(forget_indices=[2, 7], config=GIVEN).report.warnings
    assert any("2 rows were forgotten before this trainer was made" in sentence for sentence in told)
