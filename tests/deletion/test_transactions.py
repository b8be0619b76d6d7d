"""What else can come between a request and the disk: errors, signals, a second request; and what a rerun does."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import stat
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from memorising_network import Classifier, Rows, Scene, draw, fit
from safetensors.torch import load_file
from tiny_models import as_dataset, build, plain_rows, rows_of
from torch import Tensor
from unlearning_trainers import WITH_CURVATURE, assert_bits, make_trainer, parameters_of, state_of

from benchmarks.interruptions import observed
from hf_iau import (
    AlreadyForgottenError,
    ConfigError,
    DeletionService,
    GatherConfig,
    GradientMemory,
    IAUConfig,
    Ledger,
    RequestError,
    StorageError,
    UnknownRowsError,
    UnlearningTrainer,
    gather,
)
from hf_iau.deletion import journal as journal_module
from hf_iau.deletion import service, storage
from hf_iau.memory.keys import Key
from hf_iau.methods.iau import run as calibration_run
from hf_iau.methods.iau.multi_step import MultiStep, MultiStepResult
from hf_iau.unlearn.transaction import WeightTransaction
from hf_iau.utils.atomic_files import file_digest

GIVEN = IAUConfig(scale=0.1, damping=1.0)
ROWS = list(range(1, 32, 2))


@pytest.fixture(autouse=True)
def _key(_no_key_of_the_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_IAU_KEY", "k0123456789" * 4)


@pytest.fixture
def trainer(tmp_path: Path) -> UnlearningTrainer:
    """A small trainer that has served one request already."""
    made = make_trainer(tmp_path, "plain", rows=plain_rows(60))
    made.gather(WITH_CURVATURE)
    made.save_model()
    serve(made, [0, 2, 4])
    return made


def serve(trainer: UnlearningTrainer, rows: Any = ROWS, **settings: Any) -> Any:
    return DeletionService(trainer).unlearn(forget_indices=rows, **({"config": GIVEN} | settings))


def on_disk(folder: Path) -> dict[str, str]:
    """Digest of every file but the lock."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock", "training_args.bin")
    }


# What a served request leaves


def test_weights_memory_ledger_and_receipt_belong_together(trainer: UnlearningTrainer, tmp_path: Path) -> None:
    before = trainer.memory.model["weights"]
    result = serve(trainer)
    saved = load_file(tmp_path / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(saved[name], parameter)
    memory = GradientMemory.load(tmp_path)
    memory.check_model(trainer.model)
    head = Ledger.of(tmp_path).verify()
    entry = Ledger.of(tmp_path).entries()[-1]
    assert entry == result.entry and (head.count, head.head) == (2, entry.mac)
    assert (entry.weights_before, entry.weights_after) == (before, memory.model["weights"])
    assert entry.rows == 16 and len(set(entry.row_ids)) == 16
    assert entry.calibration == {"scale": 0.1, "damping": 1.0, "retain_weight": 0.0}
    assert entry.config["scale"] == 0.1 and entry.versions["torch"] == version("torch")
    assert entry.outcome["after"]["forget_loss"] == result.report.after["forget_loss"]
    assert len(list((tmp_path / "_iau").glob("memory-*"))) == 1  # of the older memory no copy is left
    for path in (tmp_path / "_iau").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    text = (tmp_path / "_iau" / "receipts" / "00002.md").read_text()
    assert entry.mac in text and "16 training rows were removed" in text
    assert not any(row in text for row in entry.row_ids) and entry.request not in text
    assert "forget rows" not in text  # too few for figures of their own
    with pytest.raises(RequestError, match="was saved, which is final"):
        result.revert()


def test_a_saved_request_keeps_no_copy_of_frozen_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an adapter's model, that would be all of the base model."""
    trainer = make_trainer(tmp_path, "lora", rows=rows_of("lora", 24))
    trainer.gather(WITH_CURVATURE)
    kept: list[set[str]] = []

    def watched(*args: Any, **settings: Any) -> WeightTransaction:
        made = WeightTransaction(*args, **settings)
        kept.append(set(made.copies))
        return made

    monkeypatch.setattr("hf_iau.unlearn.run.WeightTransaction", watched)
    assert serve(trainer, [0, 1]).applied
    frozen = {name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    assert len(kept) == 1 and frozen and not kept[0] & frozen and kept[0] >= set(trainer.memory.parameters)


@pytest.mark.parametrize("family", ["lora", "resnet"])
def test_other_kinds_of_models(family: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, family, rows=rows_of(family, 24))
    trainer.gather(WITH_CURVATURE)
    trainer.save_model()
    (tmp_path / "README.md").write_text("mine")
    old = state_of(trainer.model)
    with pytest.raises(Stopped), stopped_at("journal ready"):
        serve(trainer, [1, 2])
    assert_bits(trainer.model, old)
    result = serve(trainer, [1, 2])  # finishes what was committed, and takes the weights from disk
    assert not result.applied
    trainer.memory.check_model(trainer.model)
    assert Ledger.of(tmp_path).verify().count == 1
    assert (tmp_path / "README.md").read_text() == "mine"


def test_only_what_lies_below_iau_is_closed_to_others(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "served", "lora", rows=rows_of("lora", 24))
    trainer.model.add_adapter("second", trainer.model.peft_config["default"])  # saved in a folder of its own
    trainer.gather(WITH_CURVATURE)
    staged: dict[Path, int] = {}

    def modes(folder: Path) -> dict[Path, int]:
        return {path.relative_to(folder): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}

    mask = os.umask(0o022)
    try:
        with observed(lambda name: staged.update(modes(tmp_path / "served" / "_iau"))):
            serve(trainer, [1, 2])
        super(UnlearningTrainer, trainer).save_model(str(tmp_path / "plain"))
    finally:
        os.umask(mask)
    assert staged[Path("staged")] == staged[Path("staged/_iau")] == staged[Path("staged/_iau/receipts")] == 0o700
    served, plain = modes(tmp_path / "served"), modes(tmp_path / "plain")
    private = {path for path in served if path.parts[0] == "_iau"}
    assert all(served[path] == (0o700 if (tmp_path / "served" / path).is_dir() else 0o600) for path in private)
    assert plain[Path("second")] == 0o755
    assert {path: mode for path, mode in served.items() if path not in private} == plain


def test_sharded_weights_change_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path, "bert", rows=rows_of("bert", 24))
    trainer.gather(WITH_CURVATURE)
    whole = trainer.model.save_pretrained
    monkeypatch.setattr(trainer.model, "save_pretrained", lambda *a, **k: whole(*a, **k, max_shard_size="8KB"))
    trainer.save_model()
    model_class = type(build("bert"))

    def weights() -> dict[str, Tensor]:
        return parameters_of(model_class.from_pretrained(tmp_path))

    old = weights()
    seen = []
    moved = os.replace

    def replace(source: Any, target: Any) -> None:
        moved(source, target)
        if "staged" in str(source):
            seen.append(weights())

    monkeypatch.setattr(journal_module.os, "replace", replace)
    serve(trainer, [1, 2])
    new = parameters_of(trainer.model)
    same = [[all(torch.equal(found[n], state[n]) for n in state) for state in (old, new)] for found in seen]
    assert [True, False] in same and [False, True] in same and [False, False] not in same
    assert len(list(tmp_path.glob("model*.safetensors"))) == len(
        set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    )
    serve(trainer, [3, 4])
    assert all(torch.equal(value, parameters_of(trainer.model)[name]) for name, value in weights().items())


# What goes wrong


class Stopped(Exception):
    pass


def stopped_at(point: str) -> contextlib.AbstractContextManager[None]:
    """Inside, a request is interrupted by `Stopped` where `point` is passed."""

    def stop(passed: str) -> None:
        if passed == point:
            raise Stopped

    return observed(stop)


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk(place: str) -> Callable[[pytest.MonkeyPatch], None]:
    def weights(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    places: dict[str, tuple[Any, str, Any]] = {
        "journal": (journal_module, "write_text_atomically", no_space),
        "weights": (storage.Trainer, "save_model", no_space),
        "weights, by torch": (storage.Trainer, "save_model", weights),
        "memory": (GradientMemory, "save", no_space),
        "ledger": (storage, "write_text_atomically", no_space),
        "flush": (storage, "_flush", no_space),
    }
    return lambda patch: patch.setattr(*places[place])


@pytest.mark.parametrize("place", ["journal", "weights", "weights, by torch", "memory", "ledger", "flush"])
def test_a_full_disk_leaves_everything_as_it_was(place: str, trainer: UnlearningTrainer, tmp_path: Path) -> None:
    bits, files, memory = state_of(trainer.model), on_disk(tmp_path), trainer.memory
    with pytest.MonkeyPatch.context() as patch:
        full_disk(place)(patch)
        with pytest.raises(StorageError, match=r"are as they were before; mend the cause and run the request again"):
            serve(trainer)
    assert_bits(trainer.model, bits)
    assert on_disk(tmp_path) == files and trainer.memory is memory
    assert serve(trainer).applied and Ledger.of(tmp_path).verify().count == 2


def test_a_failure_after_the_commit_is_finished_by_the_next_run(
    trainer: UnlearningTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(journal_module.os, "replace", no_space_when_moved(os.replace))
        with pytest.raises(StorageError, match="committed, but could not be moved into place"):
            serve(trainer)
    result = serve(trainer)
    assert not result.applied and Ledger.of(tmp_path).verify().count == 2
    trainer.memory.check_model(trainer.model)
    assert serve(trainer, [40, 41]).applied


@pytest.mark.parametrize("point", ["journal ready", "journal removed"])
def test_a_model_from_before_the_last_request_catches_up(
    point: str, trainer: UnlearningTrainer, tmp_path: Path
) -> None:
    """Else the next request would be served on the old weights, and writing it would undo the last one."""
    bits = state_of(trainer.model)
    with pytest.raises(Stopped), stopped_at(point):
        serve(trainer)
    assert_bits(trainer.model, bits)
    assert serve(trainer, [40, 41]).applied
    entries = Ledger.of(tmp_path).entries()
    assert [entry.rows for entry in entries] == [3, 16, 2] and entries[2].weights_before == entries[1].weights_after
    assert not serve(trainer).applied
    trainer.memory.check_model(trainer.model)


def test_an_older_model_is_refused_where_the_newer_weights_are_gone(trainer: UnlearningTrainer, tmp_path: Path) -> None:
    older = state_of(trainer.model)
    serve(trainer)
    (tmp_path / "model.safetensors").unlink()
    trainer.model.load_state_dict(older)
    with pytest.raises(StorageError, match="would bring the forgotten rows back"):
        serve(trainer, [40, 41])
    assert_bits(trainer.model, older)


def no_space_when_moved(move: Any) -> Any:
    def replace(source: Any, target: Any) -> None:
        if "staged" in str(source) and "staged" not in str(target):
            no_space()
        move(source, target)

    return replace


def test_a_directory_that_cannot_be_written_is_refused_before_any_compute(
    trainer: UnlearningTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_iau.trainer.unlearning_trainer.run_request", lambda *a, **k: pytest.fail("it computed"))
    with monkeypatch.context() as patch:
        patch.setattr(service.os, "access", lambda *a: False)
        with pytest.raises(StorageError, match=r"cannot be written to \(no permission to write\): nothing was changed"):
            serve(trainer)
    with monkeypatch.context() as patch:
        patch.setattr(service.shutil, "disk_usage", lambda path: os.statvfs_result and _Usage())
        with pytest.raises(StorageError, match="has 0 MiB free, and the request needs"):
            serve(trainer)
    monkeypatch.setattr(trainer.args, "output_dir", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written to"):
        serve(trainer)


class _Usage:
    free = 1000


def test_two_requests_at_once_are_refused(trainer: UnlearningTrainer, tmp_path: Path) -> None:
    with FileLock(tmp_path / "_iau" / "lock"), pytest.raises(RequestError, match="Another request is running"):
        serve(trainer)
    assert serve(trainer).applied


@pytest.mark.parametrize("point", ["step computed", "memory staged", "journal ready", "files moved"])
def test_sigterm_undoes_or_finishes_and_is_then_obeyed(point: str, trainer: UnlearningTrainer, tmp_path: Path) -> None:
    bits, files, received = state_of(trainer.model), on_disk(tmp_path), []
    handler = signal.signal(signal.SIGTERM, lambda *args: received.append(Ledger.of(tmp_path).verify().count))
    terminated = observed(lambda name: os.kill(os.getpid(), signal.SIGTERM) if name == point else None)
    try:
        if point in ("step computed", "memory staged"):
            with pytest.raises(RequestError, match="SIGTERM interrupted the request: nothing was changed"), terminated:
                serve(trainer)
            assert_bits(trainer.model, bits)
            assert on_disk(tmp_path) == files and received == [1]
        else:
            with terminated:
                assert serve(trainer).applied and received == [2]
            trainer.memory.check_model(trainer.model)
    finally:
        assert signal.signal(signal.SIGTERM, handler) is not signal.SIG_DFL


def test_a_damaged_journal_is_no_command(trainer: UnlearningTrainer, tmp_path: Path) -> None:
    with pytest.raises(Stopped), stopped_at("journal ready"):
        serve(trainer)
    path = tmp_path / "_iau" / "journal.json"
    content = path.read_text()
    values = json.loads(content)
    for text in (
        content[:-9],
        "[" * 100_000,
        "[]",
        json.dumps(values | {"removed": ["../elsewhere"]}),
        json.dumps({key: value for key, value in values.items() if key != "seal"}),
    ):
        path.write_text(text)
        with pytest.raises(StorageError, match="not readable"):
            serve(trainer)
    path.write_text(content)
    assert not serve(trainer).applied


# Once, and only once


def test_the_same_rows_in_any_order_are_the_same_request(trainer: UnlearningTrainer, tmp_path: Path) -> None:
    assert serve(trainer).applied
    bits = state_of(trainer.model)
    for again in (
        serve(trainer),
        serve(trainer, ROWS[::-1]),
        DeletionService(trainer).unlearn(trainer.train_dataset.select(ROWS), config=GIVEN),
    ):
        assert not again.applied and again.entry.number == 2
        assert "carried out at" in again.report.warnings[0] and again.report.after["held_out_loss"] is not None
    assert_bits(trainer.model, bits)
    assert Ledger.of(tmp_path).verify().count == 2
    with pytest.raises(AlreadyForgottenError):
        serve(trainer, ROWS[:-1])
    with pytest.raises(UnknownRowsError):
        DeletionService(trainer).unlearn(as_dataset(plain_rows(2, seed=8)), config=GIVEN)


def test_named_requests(trainer: UnlearningTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serve(trainer, [7, 8], request_id="ticket 12").applied
    assert not serve(trainer, [8, 7], request_id="ticket 12").applied
    bits, files = state_of(trainer.model), on_disk(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("hf_iau.trainer.unlearning_trainer.run_request", lambda *a, **k: pytest.fail("it computed"))
        for others in ([9], [7], [7, 8, 9]):
            with pytest.raises(RequestError, match=r"This request_id names a request of 2 rows .* of their own"):
                serve(trainer, others, request_id="ticket 12")
    assert_bits(trainer.model, bits)
    assert on_disk(tmp_path) == files
    assert serve(trainer, [9], request_id="ticket 13").applied
    assert "ticket" not in (tmp_path / "_iau" / "ledger.jsonl").read_text()
    with pytest.raises(RequestError, match="save= is no setting"):
        serve(trainer, [10], save=False)
    with pytest.raises(RequestError, match="dry_run=True contradicts it"):
        serve(trainer, [10], dry_run=True)


def test_a_request_of_ids_is_answered_when_it_is_run_again(tmp_path: Path) -> None:
    rows = [row | {"user_id": f"u{i // 10}"} for i, row in enumerate(plain_rows(60))]
    trainer = make_trainer(tmp_path, "plain", rows=rows)
    trainer.gather(WITH_CURVATURE)
    trainer.save_model()
    service = DeletionService(trainer, id_column="user_id")

    def by_id(*ids: str, **settings: Any) -> Any:
        return service.unlearn(ids=ids, config=GIVEN, **settings)

    assert by_id("u0", "u1").applied
    assert by_id("u1", "u2", request_id="ticket").entry.rows == 10  # those of u1 were out already
    bits, files = state_of(trainer.model), on_disk(tmp_path)
    for again, number in ((by_id("u1", "u0"), 1), (by_id("u1", "u2", request_id="ticket"), 2)):
        assert not again.applied and again.entry.number == number and "carried out at" in again.report.warnings[0]
    for settings in ({}, {"request_id": "unheard of"}):
        with pytest.raises(AlreadyForgottenError, match="All 10 rows of these ids"):
            by_id("u1", **settings)
    with pytest.raises(AlreadyForgottenError):
        by_id("u0", request_id="ticket")  # a request of that name, but of rows of u2
    assert_bits(trainer.model, bits)
    assert on_disk(tmp_path) == files


def test_a_later_training_run_has_requests_of_its_own(trainer: UnlearningTrainer) -> None:
    assert serve(trainer).applied
    trainer.train()  # without the rows that are out
    trainer.gather(WITH_CURVATURE)
    with pytest.raises(AlreadyForgottenError):
        serve(trainer)
    reached = [number for number, visits in enumerate(trainer.memory.visits) if visits]
    assert serve(trainer, reached[:2]).applied


def test_saving_needs_a_key(trainer: UnlearningTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_IAU_KEY")
    with pytest.raises(ConfigError, match="DeletionService needs a key: set HF_IAU_KEY"):
        serve(trainer)


def test_a_memory_from_before_the_key_learns_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_IAU_KEY")
    trainer = make_trainer(tmp_path, "plain", rows=plain_rows(60))
    trainer.gather(WITH_CURVATURE)
    monkeypatch.setenv("HF_IAU_KEY", "k0123456789" * 4)
    serve(trainer)
    assert GradientMemory.load(tmp_path).row_identity.forgotten.sum() == 16


# What is run again after an interruption


def scene_trainer(folder: Path, scene: Scene) -> UnlearningTrainer:
    trainer = scene.trainer(folder)
    trainer.memory.check_model(trainer.model)
    return trainer


@pytest.fixture(scope="module")
def scene() -> Scene:
    torch.manual_seed(0)
    train, held_out = draw(400, 1), draw(300, 2)
    model = fit(Classifier(), train, epochs=20, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_IAU_KEY", "k0123456789" * 4)
        memory = gather(model, train, config=GatherConfig(gradient_sum="full", batch_size=128, progress=False))
    return Scene(model, train, held_out, Rows(*train[:0].values()), memory, parameters_of(model))


def test_an_interrupted_request_is_run_again_from_the_start_and_comes_to_the_same(scene: Scene, tmp_path: Path) -> None:
    trainer = scene_trainer(tmp_path / "whole", scene)
    whole = serve(trainer, config=None)
    expected, memory = state_of(trainer.model), trainer.memory
    trainer = scene_trainer(tmp_path / "interrupted", scene)
    for point in ("step computed", "weights staged", "staged files flushed"):
        with pytest.raises(Stopped), stopped_at(point):
            serve(trainer, config=None)
        assert_bits(trainer.model, scene.state)
        assert not (tmp_path / "interrupted" / "_iau" / "journal.json").exists()
    result = serve(trainer, config=None)
    assert result.applied and result.entry.calibration == whole.entry.calibration
    assert result.entry.config == whole.entry.config and result.report.verdict == whole.report.verdict
    assert_bits(trainer.model, expected)
    assert trainer.memory.calibration == memory.calibration


def test_many_steps_are_not_recorded_as_one_step(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """k and c of the one step that was not taken would say nothing of it."""

    def run(steps: MultiStep) -> MultiStepResult:
        step = {name: torch.full_like(value, 1e-4, dtype=torch.float64) for name, value in steps.start.copies.items()}
        return MultiStepResult(step, steps.settings.damping, 7, True, 0.0, 0.0, 0.0)

    monkeypatch.setattr(MultiStep, "run", run)
    monkeypatch.setattr(calibration_run, "MOST_REMAINING", -1.0)  # no single step is good enough
    entry = serve(scene_trainer(tmp_path, scene), range(40), config=None).entry
    assert entry.outcome["multi_step"] and entry.calibration is None
    text = (tmp_path / "_iau" / "receipts" / "00001.md").read_text()
    assert "| method | `iau`, in many short steps |" in text and "retain weight" not in text


def test_another_request_in_between_loses_nothing(scene: Scene, tmp_path: Path) -> None:
    trainer = scene_trainer(tmp_path, scene)
    with pytest.raises(Stopped), stopped_at("weights staged"):
        serve(trainer)
    assert serve(trainer, [100, 101]).applied and serve(trainer).applied
    assert [entry.rows for entry in Ledger.of(tmp_path).entries()] == [2, 16]


def test_what_a_killed_process_had_staged_is_told_and_removed(
    trainer: UnlearningTrainer, tmp_path: Path, caplog: Any
) -> None:
    staged = tmp_path / "_iau" / "staged"
    staged.mkdir()
    (staged / "model.safetensors").write_text("half of it")
    assert serve(trainer).applied and not staged.exists()
    assert "was interrupted before it was committed" in caplog.text and "run it again" in caplog.text


# A committed request that is not finished


def test_an_unfinished_request_is_finished_by_a_service_and_by_nothing_else(
    trainer: UnlearningTrainer, tmp_path: Path
) -> None:
    with pytest.raises(Stopped), stopped_at("journal ready"):
        serve(trainer)
    files = on_disk(tmp_path)
    for attempt in (
        lambda: trainer.memory,
        trainer.save_model,
        lambda: trainer.unlearn(forget_indices=[50], config=GIVEN),
    ):
        with pytest.raises(StorageError, match=r"make a DeletionService\(trainer\), which finishes it"):
            attempt()
    assert on_disk(tmp_path) == files
    service = DeletionService(trainer)
    trainer.memory.check_model(trainer.model)
    assert [entry.rows for entry in service.ledger.entries()] == [3, 16]
    trainer.save_model()
    assert not service.unlearn(forget_indices=ROWS, config=GIVEN).applied


def test_a_key_that_is_given_needs_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_IAU_KEY")
    rows = [row | {"user_id": f"u{i // 10}"} for i, row in enumerate(plain_rows(60))]
    trainer = make_trainer(tmp_path, "plain", rows=rows)
    trainer.gather(WITH_CURVATURE)
    with pytest.raises(ConfigError, match="DeletionService needs a key"):
        DeletionService(trainer)
    with pytest.raises(ConfigError, match=r"key is 5 bytes long: give 32"):
        DeletionService(trainer, "short")
    with pytest.raises(ConfigError, match=r"key is a int"):
        DeletionService(trainer, 7)
    key = Key.from_secret("s0123456789" * 4)
    assert DeletionService(trainer, key, id_column="user_id").unlearn(ids=["u1"], config=GIVEN).applied
    service = DeletionService(trainer, b"s0123456789" * 4, id_column="user_id")
    assert service.unlearn(ids=["u1", "u2"], config=GIVEN).entry.rows == 10
    assert service.queue(forget_indices=[50], config=GIVEN) is None
    assert service.serve_queue(config=GIVEN).entry.number == 3 and service.ledger.verify().count == 3
    with pytest.raises(ConfigError, match="The memory holds row fingerprints made with key"):
        trainer.unlearn(forget_indices=[51], config=GIVEN)


# The queue


def test_small_requests_wait_for_company(trainer: UnlearningTrainer, tmp_path: Path) -> None:
    assert DeletionService(trainer).queue(forget_indices=[10, 11, 12], config=GIVEN) is None
    assert DeletionService(trainer).queue(forget_indices=[12, 13], config=GIVEN) is None  # row 12 waits already
    path = tmp_path / "_iau" / "queue.json"
    assert len(json.loads(path.read_text())["rows"]) == 4
    with pytest.raises(AlreadyForgottenError):
        DeletionService(trainer).queue(forget_indices=[2])
    fresh = make_trainer(tmp_path, "plain", rows=plain_rows(60), model=trainer.model)
    result = DeletionService(fresh).queue(forget_indices=list(range(20, 32)), config=GIVEN)
    assert result is not None and result.applied and result.entry.rows == 16
    forgotten = fresh.memory.row_identity.forgotten
    assert forgotten.nonzero()[0].tolist() == [0, 2, 4, 10, 11, 12, 13, *range(20, 32)]
    assert json.loads(path.read_text())["rows"] == []
    assert DeletionService(fresh).serve_queue() is None
    assert not any("fewer than 16" in sentence for sentence in result.report.warnings)


def test_copies_of_a_row_are_queued_and_served_as_often_as_they_are_asked_for(tmp_path: Path, caplog: Any) -> None:
    rows = plain_rows(60)
    rows[5] = rows[9] = dict(rows[3])  # three copies
    trainer = make_trainer(tmp_path, "plain", rows=rows)
    trainer.gather(WITH_CURVATURE)
    trainer.save_model()

    def waiting() -> int:
        return len(json.loads((tmp_path / "_iau" / "queue.json").read_text())["rows"])

    def content(*positions: int) -> Any:
        return trainer.train_dataset.select(positions)

    DeletionService(trainer).queue(forget_indices=[7])
    for again in (content(7), content(7, 7)):  # there is one such row
        DeletionService(trainer).queue(again)
        assert waiting() == 1
    assert "1 of the 1 rows wait in the queue already" in caplog.text
    for numbers, expected in (([3], 2), ([3], 2), ([3, 5], 3), ([5, 3], 3)):
        DeletionService(trainer).queue(forget_indices=numbers)
        assert waiting() == expected, numbers
    result = DeletionService(trainer).serve_queue(config=GIVEN)
    assert result is not None and result.entry.rows == 3
    assert waiting() == 0 and DeletionService(trainer).serve_queue() is None  # the third copy was not asked for
    assert trainer.memory.row_identity.forgotten.nonzero()[0].tolist() == [3, 5, 7]
    DeletionService(trainer).queue(content(9))
    DeletionService(trainer).queue(content(9))
    assert waiting() == 1
    serve(trainer, [9])
    assert waiting() == 0
    with pytest.raises(AlreadyForgottenError):
        DeletionService(trainer).queue(content(9))


def test_the_queue_is_served_once_and_cannot_be_forged(trainer: UnlearningTrainer, tmp_path: Path) -> None:
    DeletionService(trainer).queue(forget_indices=[10, 11])
    path = tmp_path / "_iau" / "queue.json"
    content = path.read_text()
    for text in (content[:-4], "[]", content.replace('"rows": ["', '"rows": ["00'), "[" * 100_000):
        path.write_text(text)
        with pytest.raises(StorageError, match="not readable"):
            DeletionService(trainer).serve_queue(config=GIVEN)
    path.write_text(content)
    serve(trainer, [11])  # asked for directly meanwhile
    result = DeletionService(trainer).serve_queue(config=GIVEN)
    assert result is not None and result.entry.rows == 1
    assert any("fewer than 16" in sentence for sentence in result.report.warnings)
