"""What cannot be gathered from is refused, by name, before compute is spent."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from tiny_models import PlainClassifier, RowList, as_dataset, bert, pad_right, plain, plain_rows, text_rows
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from hf_iau import (
    ConfigError,
    GatherConfig,
    IAUCallback,
    IAUError,
    NonFiniteGradientError,
    UnsupportedModelError,
    gather,
)

CONFIG = GatherConfig(gradient_sum="full", curvature="none", batch_size=4, progress=False)


class Counted(PlainClassifier):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += 1
        return super().forward(features, labels)


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(plain_rows())


class Augmented(RowList):
    """Adds noise to a row each time it is read."""

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        row = super().__getitem__(position)
        return row | {"features": row["features"] + torch.randn(6)}


def noisy() -> datasets.Dataset:
    rng = np.random.default_rng(0)

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        features = np.asarray(batch["features"], dtype=np.float32)
        return batch | {"features": list(features + rng.normal(size=features.shape).astype(np.float32))}

    dataset = as_dataset(plain_rows())
    dataset.set_transform(transform)
    return dataset


DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "datasets.IterableDataset": (lambda: as_dataset(plain_rows()).to_iterable_dataset(), "IterableDataset"),
    "torch IterableDataset": (Stream, "Stream"),
    "generator": (lambda: iter(plain_rows()), "no row numbers"),
    "random set_transform": (noisy, "set_transform"),
    "random __getitem__": (lambda: Augmented(plain_rows()), "augmentation"),
    "no rows": (lambda: as_dataset(plain_rows()).select([]), "empty"),
    "no rows in a torch data set": (lambda: RowList([]), "empty"),
    "other columns": (lambda: as_dataset(text_rows()).remove_columns("labels"), "input_ids"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_sets_are_refused_before_any_forward_pass(name: str) -> None:
    make, said = DATA[name]
    model = Counted()
    with pytest.raises(UnsupportedModelError, match=said):
        gather(model, make(), data_collator=pad_right(), config=CONFIG)
    assert model.calls == 0


@pytest.mark.parametrize("rows", [as_dataset(plain_rows()), RowList(plain_rows())], ids=["datasets", "torch"])
def test_data_parallel(rows: Any) -> None:
    model = Counted()
    with pytest.raises(UnsupportedModelError, match=r"nn\.DataParallel.*accelerate launch"):
        gather(nn.DataParallel(model), rows, data_collator=pad_right(), config=CONFIG)
    assert model.calls == 0


def test_nothing_trainable() -> None:
    model = Counted().requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match="requires_grad"):
        gather(model, RowList(plain_rows()), config=CONFIG)
    assert model.calls == 0


class NoLoss(PlainClassifier):
    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(features)


class NoLabels(PlainClassifier):
    def forward(self, features: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(features)


class LossByRow(PlainClassifier):
    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = super().forward(features)
        return outputs | {"loss": outputs["logits"].square().sum(dim=1)}


class BareLogits(PlainClassifier):
    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(features)["logits"]


@pytest.mark.parametrize("make", [NoLoss, NoLabels, LossByRow, BareLogits])
@pytest.mark.parametrize("rows", [as_dataset(plain_rows()), RowList(plain_rows())], ids=["datasets", "torch"])
def test_a_forward_that_returns_no_loss(make: type[PlainClassifier], rows: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{make.__name__}.*loss"):
        gather(make(), rows, data_collator=pad_right(), config=CONFIG)


def test_rows_without_labels() -> None:
    dataset = as_dataset(text_rows()).remove_columns("labels")
    with pytest.raises(IAUError, match="labels"):
        gather(bert(), dataset, data_collator=pad_right(), config=CONFIG)


def test_a_row_loss_that_is_neither_each_rows_nor_a_sum() -> None:
    with pytest.raises(UnsupportedModelError, match="row_loss returned"):
        gather(plain(), RowList(plain_rows()), config=CONFIG, row_loss=lambda model, inputs: model(**inputs)["logits"])
    with pytest.raises(UnsupportedModelError, match="row_loss returned float"):
        gather(plain(), RowList(plain_rows()), config=CONFIG, row_loss=lambda model, inputs: 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 5, 11])
def test_a_non_finite_gradient_names_its_row(row: int, value: float) -> None:
    rows = plain_rows()
    rows[row]["features"][2] = value
    if value == float("inf"):  # through a tanh an infinite feature does harm by its own gradient, inf · 0
        rows[row]["features"][3] = -value
    model = plain()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(NonFiniteGradientError, match=f"Row {row} of the training rows"):
        gather(model, RowList(rows), config=CONFIG)
    assert all(parameter.equal(old) for parameter, old in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_non_finite_gradient_of_a_finite_loss_names_row_and_parameter() -> None:
    def row_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        # The square root has no gradient at zero, which only row 7 reaches.
        distance = (inputs["features"] * model.hidden.weight[0]).square().sum(dim=1)
        return model(**inputs)["logits"].square().sum(dim=1) + distance.sqrt()

    rows = plain_rows()
    rows[7]["features"][:] = 0.0
    with pytest.raises(NonFiniteGradientError, match=r"Row 7 .*gradient of 'hidden.weight'"):
        gather(plain(), RowList(rows), config=CONFIG, row_loss=row_loss)


def test_weights_that_are_not_finite() -> None:
    model = plain()
    with torch.no_grad():
        model.output.bias[0] = float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"Row 0 .*weights"):
        gather(model, RowList(plain_rows()), config=CONFIG)


@pytest.mark.parametrize(
    "values",
    [
        {"gradient_sum": "some"},
        {"gradient_sum": None},
        {"curvature": "kfac"},
        {"fisher": "exact"},
        {"sample_rows": 1},
        {"sample_rows": 10.0},
        {"sample_rows": "many"},
        {"sample_rows": True},
        {"curvature_rows": 0},
        {"curvature_rows": None},
        {"curvature_rows": True},
        {"max_factor_size": 0},
        {"batch_size": 0},
        {"batch_size": -3},
        {"batch_size": 2.5},
        {"batch_size": "8"},
        {"seed": -1},
        {"seed": 0.5},
        {"seed": None},
    ],
    ids=str,
)
def test_bad_configurations(values: dict[str, Any]) -> None:
    (name, value), *_ = values.items()
    with pytest.raises(ConfigError) as caught:
        GatherConfig(**values)
    assert f"{name}={value!r}" in str(caught.value)


def test_good_configurations() -> None:
    config = GatherConfig(batch_size=1, sample_rows=2, curvature_rows=1, seed=2**40)
    assert GatherConfig(**config.to_dict()) == config
    assert GatherConfig(batch_size=None).batch_size is None


@pytest.mark.parametrize("factor", [-0.1, 1.0, 2.0, float("nan")])
def test_bad_label_smoothing(factor: float) -> None:
    with pytest.raises(ConfigError, match="label_smoothing_factor"):
        gather(plain(), RowList(plain_rows()), config=CONFIG, label_smoothing_factor=factor)


# --- training engines -------------------------------------------------------------------------------------------------


def begin(callback: IAUCallback, model: nn.Module, rows: Any, **changed: Any) -> None:
    """Call `on_train_begin` as a Trainer with these arguments would."""
    args = {
        "n_gpu": 1,
        "output_dir": None,
        "deepspeed": None,
        "fsdp": [],
        "label_smoothing_factor": 0.0,
        "per_device_train_batch_size": 4,
        "device": torch.device("cpu"),
        "remove_unused_columns": True,
    }
    loader = types.SimpleNamespace(dataset=rows, collate_fn=pad_right())
    callback.on_train_begin(
        types.SimpleNamespace(**(args | changed)),  # type: ignore[arg-type]
        types.SimpleNamespace(global_step=0),  # type: ignore[arg-type]
        types.SimpleNamespace(),  # type: ignore[arg-type]
        model=model,
        train_dataloader=loader,
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n_gpu": 4}, "DataParallel.*n_gpu=4"),
        ({"deepspeed": "zero3.json"}, "deepspeed"),
        ({"fsdp": ["full_shard"]}, "fsdp"),
        ({"fsdp": "full_shard auto_wrap"}, "fsdp='full_shard auto_wrap'"),
        ({"fsdp": True}, "fsdp"),
    ],
)
def test_engines_whose_parameters_cannot_be_seen(changed: dict[str, Any], said: str) -> None:
    model = Counted()
    with pytest.raises(UnsupportedModelError, match=said):
        begin(IAUCallback(CONFIG), model, RowList(plain_rows()), **changed)
    assert model.calls == 0


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_engines_chosen_by_the_launcher(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counted()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UnsupportedModelError, match=variable):
        begin(IAUCallback(CONFIG), model, RowList(plain_rows()))
    assert model.calls == 0
    monkeypatch.setenv(variable, "false")
    begin(IAUCallback(CONFIG), model, RowList(plain_rows()))


@pytest.mark.parametrize("name", DATA)
def test_the_callback_refuses_data_sets_before_training(name: str) -> None:
    make, said = DATA[name]
    model = Counted()
    with pytest.raises(UnsupportedModelError, match=said):
        begin(IAUCallback(CONFIG), model, make())
    assert model.calls == 0


def test_the_callback_refuses_data_parallel_models() -> None:
    with pytest.raises(UnsupportedModelError, match=r"nn\.DataParallel.*accelerate launch"):
        begin(IAUCallback(CONFIG), nn.DataParallel(plain()), as_dataset(plain_rows()))


def test_augmented_rows_are_taken_with_the_clean_ones_beside_them() -> None:
    clean = RowList(plain_rows())
    begin(IAUCallback(CONFIG, dataset=clean), plain(), Augmented(plain_rows()))


def test_no_training_yet_no_memory() -> None:
    callback = IAUCallback(CONFIG)
    assert not callback.has_memory
    with pytest.raises(IAUError, match=r"trainer.train\(\)"):
        _ = callback.memory
