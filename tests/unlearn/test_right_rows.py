"""Row numbers name the rows that the user gave; rows that were never trained on are told, refused or left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import RowList, as_dataset, language_rows, plain, plain_rows
from transformers import Trainer
from unlearning_trainers import WITH_CURVATURE, assert_bits, make_trainer, parameters_of, state_of

from hf_iau import (
    AlreadyForgottenError,
    DeletionService,
    IAUCallback,
    IAUConfig,
    MemoryMismatchError,
    RequestError,
    UnknownRowsError,
    UnlearningTrainer,
    gather,
)

GIVEN = IAUConfig(scale=0.1, damping=1.0)
KEY = "a key that is 32 characters long"


class PreparingTrainer(Trainer):
    """Doubles its features, drops some rows and turns the others round, as trainers that prepare their rows do."""

    drops = (3, 4, 9)
    keeps_columns = True

    def __init__(self, *args: Any, train_dataset: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, train_dataset=self.prepared(train_dataset), **kwargs)

    @classmethod
    def prepared(cls, rows: datasets.Dataset) -> datasets.Dataset:
        kept = rows.select([i for i in reversed(range(len(rows))) if i not in cls.drops])
        gone = [] if cls.keeps_columns else [name for name in kept.column_names if name not in ("features", "labels")]
        return kept.map(lambda row: {"features": [2 * x for x in row["features"]]}).remove_columns(gone)


class UnlearningPreparingTrainer(UnlearningTrainer, PreparingTrainer):
    pass


class Forgetful(PreparingTrainer):
    keeps_columns = False


class UnlearningForgetfulTrainer(UnlearningTrainer, Forgetful):
    pass


def preparing(folder: Path, trainer_class: Any = UnlearningPreparingTrainer, **kwargs: Any) -> UnlearningTrainer:
    folder.mkdir(exist_ok=True)
    settings = {"num_train_epochs": 1, "max_steps": -1}
    trainer = make_trainer(
        folder,
        "plain",
        trainer_class=trainer_class,
        settings=settings,
        callbacks=[IAUCallback(WITH_CURVATURE)],
        **kwargs,
    )
    trainer.train()
    return trainer


def by_hand(folder: Path, positions: list[int]) -> dict[str, torch.Tensor]:
    """The weights after the same request, of the prepared rows by their own numbers."""
    rows = PreparingTrainer.prepared(as_dataset(plain_rows(12)))
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(
        folder,
        "plain",
        train_dataset=rows,
        settings={"num_train_epochs": 1, "max_steps": -1},
        callbacks=[IAUCallback(WITH_CURVATURE)],
    )
    trainer.train()
    trainer.unlearn(forget_indices=positions, config=GIVEN)
    return parameters_of(trainer.model)


# --- what a subclass makes of its rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["numbers", "rows", "mask"])
def test_numbers_mean_the_users_rows(tmp_path: Path, named: str) -> None:
    given = as_dataset(plain_rows(12))
    trainer = preparing(tmp_path / "a", train_dataset=given)
    assert len(trainer.train_dataset) == 9 and trainer.train_dataset.column_names == given.column_names
    if named == "numbers":
        result = trainer.unlearn(forget_indices=[11, 5], config=GIVEN)
    elif named == "rows":
        result = trainer.unlearn(given.select([11, 5]), config=GIVEN)
    else:
        result = trainer.unlearn(forget_indices=np.isin(np.arange(12), [5, 11]), config=GIVEN)
    assert result.report.counts["forget_rows"] == 2 and "left_out_rows" not in result.report.counts
    # Turned round, with 9 gone: row 11 is the first, row 5 the sixth.
    expected = by_hand(tmp_path / "b", [0, 5])
    for name, value in parameters_of(trainer.model).items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-8), name


def test_dropped_rows_are_told_and_left_out(tmp_path: Path) -> None:
    trainer = preparing(tmp_path)
    before = state_of(trainer.model)
    with pytest.warns(UserWarning, match="3 of the 3 requested rows were dropped by PreparingTrainer"):
        result = trainer.unlearn(forget_indices=[3, 4, 9], config=GIVEN)
    assert not result.applied and result.report.counts["left_out_rows"] == 3
    assert_bits(trainer.model, before)
    result = trainer.unlearn(forget_indices=[3, 5], config=GIVEN)
    assert result.applied and result.report.counts["forget_rows"] == 1 and result.report.counts["left_out_rows"] == 1
    assert any("1 of the 2 requested rows were dropped" in sentence for sentence in result.report.warnings)


def test_rows_that_were_never_given_are_refused(tmp_path: Path) -> None:
    trainer = preparing(tmp_path)
    mixed = datasets.concatenate_datasets([as_dataset(plain_rows(12)).select([1]), as_dataset(plain_rows(2, seed=9))])
    with pytest.raises(UnknownRowsError, match="2 of the 3 rows of forget_dataset are not among the rows"):
        trainer.unlearn(mixed, config=GIVEN)


def test_numbers_that_cannot_be_carried_are_refused(tmp_path: Path) -> None:
    trainer = preparing(tmp_path, UnlearningForgetfulTrainer)
    with pytest.raises(RequestError, match=r"Forgetful made other rows .*pass rows of trainer.train_dataset"):
        trainer.unlearn(forget_indices=[1], config=GIVEN)
    assert trainer.unlearn(trainer.train_dataset.select([1]), config=GIVEN).report.counts["forget_rows"] == 1


def test_a_trainer_that_leaves_its_rows_alone_has_the_same_object(tmp_path: Path) -> None:
    given = as_dataset(plain_rows(12))

    class Other(Trainer):
        pass

    class UnlearningOther(UnlearningTrainer, Other):
        pass

    for trainer_class in (UnlearningTrainer, UnlearningOther):
        assert make_trainer(tmp_path, "plain", trainer_class=trainer_class, train_dataset=given).train_dataset is given


def test_ids_name_rows_of_what_was_given(tmp_path: Path) -> None:
    rows = [row | {"user": f"u{i // 2}"} for i, row in enumerate(plain_rows(12))]
    trainer = preparing(tmp_path, train_dataset=as_dataset(rows))
    trainer.save_model()
    output = DeletionService(trainer, KEY, id_column="user").unlearn(ids=["u2", "u5"], config=GIVEN)
    # Rows 4 and 5, 10 and 11, of which 4 was dropped.
    assert output.report.counts["forget_rows"] == 3 and output.entry is not None and output.entry.rows == 3
    gone = trainer.memory.row_identity.forgotten
    assert trainer.view.rows.numbers_at(np.flatnonzero(gone)).tolist() == [11, 10, 5]
    with pytest.raises(AlreadyForgottenError):
        DeletionService(trainer, KEY, id_column="user").unlearn(ids=["u5"], request_id="another", config=GIVEN)


# --- what numbers may be ----------------------------------------------------------------------------------------------


def test_kinds_of_numbers(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    mask = np.zeros(12, dtype=bool)
    mask[[1, 4]] = True
    kinds = [[1, 4], (1, 4), {4, 1}, np.array([1, 4]), torch.tensor([1, 4]), mask, mask.tolist(), torch.tensor(mask)]
    kinds += [as_dataset([{"n": 1}, {"n": 4}])["n"], range(1, 5, 3)]
    for numbers in kinds:
        result = trainer.unlearn(forget_indices=numbers, config=GIVEN, dry_run=True)
        assert result.report.counts["forget_rows"] == 2
    for wrong, words in (
        (mask[:-1], "mask of 11 booleans, and train_dataset has 12 rows"),
        ("14", "is a str: give a list of row numbers"),
        (7, "is a int: give a list of row numbers"),
        ({"rows": [1]}, "is a dict: give a list of row numbers"),
        ([1.5], "flat list of whole numbers"),
        ([[1], [2, 3]], "give a list of row numbers"),
    ):
        with pytest.raises(RequestError, match=words):
            trainer.unlearn(forget_indices=wrong, config=GIVEN)


# --- data that changed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["datasets", "torch"])
@pytest.mark.parametrize("change", ["relabelled", "replaced", "swapped"])
def test_one_changed_row_among_many_is_noticed(tmp_path: Path, kind: str, change: str) -> None:
    rows = plain_rows(600)
    trainer = make_trainer(tmp_path, "plain", rows=rows, kind=kind, settings={"per_device_train_batch_size": 200})
    trainer.train()
    changed = copy.deepcopy(rows)
    if change == "relabelled":
        changed[123]["labels"] = (changed[123]["labels"] + 1) % 3
    elif change == "replaced":
        changed[123] = plain_rows(1, seed=8)[0]
    else:
        changed[123], changed[456] = changed[456], changed[123]
    trainer.train_dataset = as_dataset(changed) if kind == "datasets" else RowList(changed)
    with pytest.raises(MemoryMismatchError, match="row numbers would name other rows"):
        trainer.unlearn(forget_indices=[123], config=GIVEN)


def test_the_queue_goes_by_content(tmp_path: Path) -> None:
    rows = plain_rows(40)
    trainer = make_trainer(
        tmp_path,
        "plain",
        rows=rows,
        settings={"per_device_train_batch_size": 16},
        callbacks=[IAUCallback(WITH_CURVATURE)],
    )
    trainer.train()
    trainer.save_model()
    service = DeletionService(trainer, KEY)
    service.queue(forget_indices=[1, 2, 3])
    trainer.train_dataset = as_dataset([*rows[20:], *rows[:20]])  # the same rows elsewhere
    with pytest.raises(MemoryMismatchError):
        service.queue(forget_indices=[5])
    output = service.serve_queue(config=GIVEN)
    assert output is not None and output.report.counts["forget_rows"] == 3
    assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == [1, 2, 3]
    service.queue(as_dataset(rows[7:8]))
    trainer.train_dataset = as_dataset(rows[20:])
    with pytest.raises(RequestError, match="1 of the 1 rows that wait are not in train_dataset any more"):
        service.serve_queue(config=GIVEN)


# --- rows without anything to forget ----------------------------------------------------------------------------------


def test_rows_without_labels_that_count_are_left_out(tmp_path: Path) -> None:
    rows = language_rows(12)
    for number in (2, 5):
        rows[number]["labels"] = [-100] * len(rows[number]["labels"])
    rows[7]["labels"] = [rows[7]["labels"][0], *[-100] * (len(rows[7]["labels"]) - 1)]  # the first predicts nothing
    trainer = make_trainer(tmp_path, "llama", rows=rows)
    trainer.train()
    before = state_of(trainer.model)
    with pytest.warns(UserWarning, match="3 of the 3 requested rows have no label that counts"):
        assert not trainer.unlearn(forget_indices=[2, 5, 7], config=GIVEN).applied
    assert_bits(trainer.model, before)
    result = trainer.unlearn(forget_indices=[2, 3], config=GIVEN)
    assert result.report.counts["forget_rows"] == 1 and result.report.counts["left_out_rows"] == 1


# --- copies -----------------------------------------------------------------------------------------------------------


def with_copies() -> list[dict[str, Any]]:
    rows = plain_rows(12)
    rows[5], rows[8] = dict(rows[3]), dict(rows[3])
    return rows


def test_copies_that_stay_are_told(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", rows=with_copies(), callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    result = trainer.unlearn(forget_indices=[3, 5], config=GIVEN)
    assert result.report.counts["copies_left"] == 1 and result.report.verdict != "ok"
    assert any("1 training rows that stay are exact copies" in sentence for sentence in result.report.warnings)
    result = trainer.unlearn(forget_indices=[8], config=GIVEN)
    assert "copies_left" not in result.report.counts


@pytest.mark.parametrize("with_key", [True, False])
def test_a_forgotten_number_never_stands_for_another_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_key: bool
) -> None:
    if with_key:
        monkeypatch.setenv("HF_IAU_KEY", KEY)
    trainer = make_trainer(tmp_path, "plain", rows=with_copies(), callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    trainer.unlearn(forget_indices=[3], config=GIVEN)
    with pytest.raises(AlreadyForgottenError, match="1 of the 2 rows"):
        trainer.unlearn(forget_indices=[3, 9], config=GIVEN)
    trainer.unlearn(forget_indices=[8], config=GIVEN)
    assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == [3, 8]


def test_an_id_whose_row_has_copies_is_one_row(tmp_path: Path) -> None:
    rows = [row | {"user": f"u{i}"} for i, row in enumerate(with_copies())]
    trainer = make_trainer(tmp_path, "plain", rows=rows, callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    trainer.save_model()
    service = DeletionService(trainer, KEY, id_column="user")
    service.unlearn(ids=["u5"], config=GIVEN)
    service.unlearn(ids=["u5", "u1"], config=GIVEN)
    assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == [1, 5]


# --- held-out and test rows -------------------------------------------------------------------------------------------


def test_held_out_and_test_rows_are_no_training_rows(tmp_path: Path) -> None:
    rows, fresh = plain_rows(200), plain_rows(100, seed=5)
    trainer = make_trainer(tmp_path, "plain", rows=rows, settings={"per_device_train_batch_size": 70})
    trainer.train()
    before = state_of(trainer.model)
    train, held_out = as_dataset(rows), as_dataset(fresh)
    for argument in ("held_out_dataset", "test_dataset"):
        for others, words in (
            (train, "200 of the 200"),
            (train.select([1, 2, 3]), "3 of the 3"),
            (datasets.concatenate_datasets([held_out, train.select(range(9))]), "9 of the 109"),
        ):
            given = {"held_out_dataset": held_out} | {argument: others}
            with pytest.raises(RequestError, match=f"{words} .* are training rows.*{argument}="):
                trainer.unlearn(forget_indices=[1, 2, 3], config=GIVEN, **given)
    assert_bits(trainer.model, before)
    # One chance copy is left out and told.
    chance = datasets.concatenate_datasets([held_out, train.select([7])])
    result = trainer.unlearn(forget_indices=[1, 2, 3], config=GIVEN, held_out_dataset=chance, test_dataset=chance)
    assert result.report.counts["held_out_rows"] == result.report.counts["test_rows"] == 100
    assert sum("are copies of training rows and were left out" in sentence for sentence in result.report.warnings) == 2


# --- gathering anew ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_key", [True, False])
def test_gathering_anew_leaves_forgotten_rows_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, with_key: bool
) -> None:
    if with_key:
        monkeypatch.setenv("HF_IAU_KEY", KEY)
    trainer = make_trainer(tmp_path, "plain", callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    trainer.unlearn(forget_indices=[2, 7], config=GIVEN)
    trainer.save_model()
    held = trainer.memory if with_key else type(trainer.memory).load(tmp_path)
    rows = trainer.train_dataset
    model = plain()
    model.load_state_dict(trainer.model.state_dict())
    if not with_key:
        with pytest.raises(RequestError, match="2 of these 12 rows were forgotten"):
            gather(model, rows, config=WITH_CURVATURE, previous=held)
        kept = [i for i in range(12) if i not in (2, 7)]
        assert gather(model, rows.select(kept), config=WITH_CURVATURE, previous=held).n_rows == 10
        return
    for dataset, out in ((rows, [2, 7]), (rows.select([7, 0, 1, 2]), [0, 3])):
        memory = gather(model, dataset, config=WITH_CURVATURE, previous=held)
        assert memory.n_rows == len(dataset) - 2 and memory.forgotten_rows == 2
        assert memory.row_identity is not None and np.flatnonzero(memory.row_identity.forgotten).tolist() == out
    # The folder that a model was loaded from is looked at without being named.
    model.name_or_path = str(tmp_path)
    assert gather(model, rows, config=WITH_CURVATURE).forgotten_rows == 2


# --- rows that cannot be measured -------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["held_out_dataset", "test_dataset"])
def test_a_broken_row_is_told_before_anything_is_changed(tmp_path: Path, argument: str) -> None:
    settings = {"per_device_train_batch_size": 20}
    trainer = make_trainer(
        tmp_path, "plain", rows=plain_rows(60), settings=settings, callbacks=[IAUCallback(WITH_CURVATURE)]
    )
    trainer.train()
    before = state_of(trainer.model)
    broken = plain_rows(20, seed=5)
    broken[3]["features"] = [float("nan")] * 6
    name = argument.removesuffix("_dataset").replace("_", "-")
    with pytest.raises(
        RequestError, match=f"1 of the 20 {name} rows looked at have a loss that is not finite.*position 3"
    ):
        trainer.unlearn(forget_indices=[1, 2], config=GIVEN, **{argument: as_dataset(broken)})
    assert_bits(trainer.model, before)


def test_a_copy_of_another_person_is_a_request_of_its_own(tmp_path: Path) -> None:
    rows = [row | {"user": f"u{i}"} for i, row in enumerate(with_copies())]
    trainer = make_trainer(tmp_path, "plain", rows=rows, callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    trainer.save_model()
    service = DeletionService(trainer, KEY, id_column="user")
    assert service.unlearn(ids=["u3"], config=GIVEN).applied
    assert service.unlearn(ids=["u8"], config=GIVEN).applied  # the same content, another row
    assert not service.unlearn(ids=["u3"], config=GIVEN).applied
    assert np.flatnonzero(trainer.memory.row_identity.forgotten).tolist() == [3, 8]
