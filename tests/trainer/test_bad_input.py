"""Bad input to `unlearn()`: an error that names the argument, its value and the way out, before compute is spent."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import RowList, as_dataset, bert, build, plain, rows_of
from torch import Tensor, nn
from torch.utils.data import Subset
from unlearning_trainers import (
    EXACT,
    FORGET,
    ROWS,
    WITH_CURVATURE,
    arguments,
    assert_bits,
    make_trainer,
    parameters_of,
    state_of,
)

from hf_iau import GatherConfig, GradientMemory, IAUConfig, IAUPaperConfig, IAUReleasedConfig, UnlearningTrainer
from hf_iau.errors import (
    CalibrationError,
    ConfigError,
    IAUError,
    MemoryFileError,
    MemoryMismatchError,
    MissingMemoryError,
    NonFiniteGradientError,
    RequestError,
    StaleMemoryError,
    UnsupportedModelError,
)

RELEASED: dict[str, Any] = {"method": "iau-released"}


def forbid_forward(model: nn.Module) -> Any:
    """From now on a forward pass fails the test."""

    def fail(*args: Any) -> None:
        raise AssertionError("a forward pass ran")

    return model.register_forward_pre_hook(fail)


def refused(
    trainer: UnlearningTrainer, error: type[IAUError], message: str, *, look: bool = False, **request: Any
) -> None:
    """The request raises `error` with `message`, and nothing ran or moved (`look`: a few rows were looked at)."""
    before = state_of(trainer.model)
    hook = None if look else forbid_forward(trainer.model)
    try:
        with pytest.raises(error, match=message):
            trainer.unlearn(**(RELEASED | request))
    finally:
        if hook is not None:
            hook.remove()
    assert_bits(trainer.model, before)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> UnlearningTrainer:
    """A trainer with a full memory; no test changes it."""
    trainer = make_trainer(tmp_path_factory.mktemp("shared"))
    trainer.gather(WITH_CURVATURE)
    return trainer


@pytest.fixture(autouse=True)
def _shared_is_left_alone(shared: UnlearningTrainer) -> Iterator[None]:
    before = state_of(shared.model)
    yield
    assert_bits(shared.model, before)


# The rows


def test_neither_or_both_ways_to_name_rows(shared: UnlearningTrainer) -> None:
    refused(shared, RequestError, "given neither: pass either forget_dataset= or forget_indices=")
    both = {"forget_dataset": shared.train_dataset.select(FORGET), "forget_indices": FORGET}
    refused(shared, RequestError, "given both: pass either", **both)


@pytest.mark.parametrize(
    "indices, message",
    [
        (
            [0, ROWS],
            rf"forget_indices holds 1 numbers outside 0\.\.{ROWS - 1}, e\.g\. {ROWS}: train_dataset has {ROWS}",
        ),
        ([-1, 3], r"forget_indices holds 1 numbers outside 0\.\.11, e\.g\. -1"),
        ([10**12], "outside"),
        ([3, 3, 5], "names 1 rows more than once, e.g. row 3: name each row once"),
        (torch.tensor([2, 2]), "more than once, e.g. row 2"),
        ([1.0, 2.0], "type float64: give a flat list of whole numbers"),
        ([[1, 2]], r"shape \(1, 2\)"),
        (3, "is a int: give a list of row numbers"),
        ([True] * (ROWS + 1), "mask of 13 booleans, and train_dataset has 12 rows"),
        ([True] * ROWS, "that is all of them"),
        (["1"], "give a flat list of whole numbers"),
        ({1, 99}, r"1 numbers outside 0\.\.11, e\.g\. 99"),
        (torch.tensor([1.5]), "float32"),
    ],
    ids=repr,
)
def test_row_indices(indices: Any, message: str, shared: UnlearningTrainer) -> None:
    refused(shared, RequestError, message, forget_indices=indices)


def test_row_indices_without_a_training_set(shared: UnlearningTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=shared.model, memory=shared.memory, train_dataset=None)
    refused(trainer, RequestError, "trainer has none: pass forget_dataset=", forget_indices=FORGET)


def test_repeated_rows_in_forget_dataset(shared: UnlearningTrainer) -> None:
    rows = shared.train_dataset
    refused(
        shared,
        RequestError,
        "forget_dataset holds the row at position 1 2 times but train_dataset only 1 times",
        forget_dataset=rows.select([2, 5, 5]),
    )
    torch_rows = Subset(RowList(rows_of("bert", ROWS)), [4, 4])
    refused(shared, RequestError, "forget_dataset names row 4 more than once", forget_dataset=torch_rows)


@pytest.mark.parametrize("given", [[1, 2], range(3), np.arange(3), torch.arange(3), ("u17", "u23")], ids=str)
def test_row_numbers_in_place_of_rows(given: Any, shared: UnlearningTrainer) -> None:
    refused(shared, RequestError, r"which is no row: give row numbers as forget_indices=", forget_dataset=given)


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_rows_without_labels(kind: str, shared: UnlearningTrainer) -> None:
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in rows_of("bert", 3)]
    forget = as_dataset(rows) if kind == "datasets" else RowList(rows)
    message = r"\['attention_mask', 'input_ids'\] and no labels.*train_dataset.select"
    refused(shared, RequestError, message, forget_dataset=forget)


def test_rows_with_other_columns(shared: UnlearningTrainer) -> None:
    more = as_dataset([row | {"token_type_ids": [0] * len(row["input_ids"])} for row in rows_of("bert", 3)])
    message = r"'token_type_ids'\] but the training rows have \['attention_mask', 'input_ids', 'labels'\]"
    refused(shared, RequestError, message, forget_dataset=more)
    raw = datasets.Dataset.from_dict({"text": ["a", "b"], "topic": [0, 1]})
    refused(shared, RequestError, r"columns \['text', 'topic'\], none of which the model takes", forget_dataset=raw)


@pytest.mark.parametrize("which", ["held_out_dataset", "test_dataset", "retain_dataset"])
def test_other_rows_with_other_columns(which: str, shared: UnlearningTrainer) -> None:
    rows = as_dataset([{"input_ids": row["input_ids"], "labels": 0} for row in rows_of("bert", 3, seed=2)])
    name = {"held_out_dataset": "held-out", "test_dataset": "test", "retain_dataset": "retained"}[which]
    message = rf"{name} rows have columns \['input_ids', 'labels'\] but the forget rows have \['attention_mask'"
    refused(shared, RequestError, message, forget_indices=FORGET, **{which: rows})


def test_all_rows(shared: UnlearningTrainer, tmp_path: Path) -> None:
    refused(shared, RequestError, f"forget {ROWS} of {ROWS} training rows, that is all", forget_indices=range(ROWS))
    refused(shared, RequestError, "that is all of them", forget_dataset=shared.train_dataset)
    trainer = make_trainer(tmp_path)  # without a memory too
    refused(
        trainer,
        RequestError,
        "that is all of them",
        forget_indices=range(ROWS),
        retain_dataset=trainer.train_dataset.select([0]),
    )


@pytest.mark.parametrize("which", ["forget_dataset", "train_dataset", "retain_dataset", "held_out_dataset"])
@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_data_sets_without_row_numbers(which: str, kind: str, shared: UnlearningTrainer, tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(rows_of("bert", ROWS))

    stream = shared.train_dataset.to_iterable_dataset() if kind == "datasets" else Stream()
    message = r"IterableDataset|Stream, which has no row numbers.*map-style"
    trainer, request = shared, {"forget_indices": FORGET}
    if which == "train_dataset":
        trainer = make_trainer(tmp_path, model=shared.model, memory=shared.memory, train_dataset=stream)
        refused(trainer, UnsupportedModelError, message, **request)
        request = {"forget_dataset": shared.train_dataset.select(FORGET)}
    elif which == "forget_dataset":
        request = {which: stream}
    else:
        request[which] = stream
    refused(trainer, UnsupportedModelError, message, **request)


def augmented(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows with noise that is drawn each time they are read."""

    def noise(batch: dict[str, Any]) -> dict[str, Any]:
        values = [torch.tensor(v) + torch.randn(3, 8, 8) for v in batch["pixel_values"]]
        return {"pixel_values": values, "labels": batch["labels"]}

    rows = rows.select(range(len(rows)))
    rows.set_transform(noise)
    return rows


def test_random_transforms(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "vit")
    clean = trainer.train_dataset
    memory = trainer.gather(EXACT)
    noisy = make_trainer(tmp_path, "vit", model=trainer.model, memory=memory, train_dataset=augmented(clean))
    message = r"forget rows change each time they are read.*set_transform.*without augmentation"
    refused(noisy, UnsupportedModelError, message, forget_indices=FORGET)
    refused(noisy, UnsupportedModelError, message, forget_dataset=augmented(clean).select(FORGET))
    refused(
        noisy,
        UnsupportedModelError,
        "retained rows change each time",
        forget_dataset=clean.select(FORGET),
        retain_dataset=augmented(clean),
    )
    # The rows themselves, without augmentation, are served.
    assert noisy.unlearn(clean.select(FORGET), **RELEASED).applied


def test_retain_datasets(shared: UnlearningTrainer) -> None:
    refused(shared, RequestError, "retain_dataset is empty", forget_indices=FORGET, retain_dataset=[])
    message = rf"retain_dataset has {ROWS} rows, 3 of which are forget rows: pass only the rows to be kept"
    refused(shared, RequestError, message, forget_indices=FORGET, retain_dataset=shared.train_dataset)


# The memory


def test_no_memory_and_no_retain_set(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    message = "neither a memory nor retain_dataset=.*IAUCallback.*gradient_sum='full'"
    for request in (RELEASED, {"method": "iau-paper", "config": IAUPaperConfig(eta=1.0)}):
        refused(trainer, MissingMemoryError, message, forget_indices=FORGET, **request)
    refused(
        trainer,
        MissingMemoryError,
        r"method='iau' needs a gradient memory.*gather\(",
        forget_indices=FORGET,
        method="iau",
    )


@pytest.mark.parametrize(
    "config, kind",
    [
        (GatherConfig(gradient_sum="sampled", sample_rows=8, curvature="none", progress=False), "sampled"),
        (GatherConfig(gradient_sum="none", curvature="none", progress=False), "none"),
    ],
)
def test_sums_that_are_not_exact(config: GatherConfig, kind: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.gather(config)
    message = f"'{kind}'.*gradient_sum='full'.*retain_dataset="
    for method, settings in (("iau-paper", IAUPaperConfig(eta=1.0)), ("iau-released", None)):
        message = f"method='{method}' needs the exact gradient sum.*{message}"
        refused(trainer, MissingMemoryError, message, forget_indices=FORGET, method=method, config=settings)
        message = f"'{kind}'.*gradient_sum='full'.*retain_dataset="


def test_iau_without_curvature(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.gather(EXACT)
    message = "needs curvature but the memory holds none.*curvature='ekfac'.*'iau-paper' or 'iau-released'"
    refused(trainer, MissingMemoryError, message, forget_indices=FORGET, method="iau")


def test_memory_of_another_model(shared: UnlearningTrainer, tmp_path: Path) -> None:
    assert shared.memory is not None
    wider = make_trainer(tmp_path, model=bert(hidden_size=8), memory=shared.memory)
    both = f"architecture {shared.memory.model['architecture'][:8]}.*but the model is a BertForSequenceClassification"
    refused(wider, MemoryMismatchError, both, forget_indices=FORGET)
    other = make_trainer(tmp_path, model=bert(seed=1), memory=shared.memory)
    weights = f"belongs to weights {shared.memory.model['weights'][:8]} but the model now has [0-9a-f]{{8}}.*gather"
    refused(other, StaleMemoryError, weights, forget_indices=FORGET)


def test_memory_of_other_data(shared: UnlearningTrainer, tmp_path: Path) -> None:
    memory = shared.memory
    assert memory is not None
    for rows, count in ((rows_of("bert", ROWS, seed=7), ROWS), (rows_of("bert", 20), 20)):
        trainer = make_trainer(tmp_path, model=shared.model, memory=memory, rows=rows)
        both = rf"gathered from {ROWS} rows.*content {memory.data['content'][:8]}.*has {count} rows.*forget_dataset"
        refused(trainer, MemoryMismatchError, both, forget_indices=FORGET)
    shuffled = make_trainer(
        tmp_path, model=shared.model, memory=memory, train_dataset=shared.train_dataset.shuffle(seed=1)
    )
    refused(shuffled, MemoryMismatchError, "row numbers would name other rows", forget_indices=FORGET)


def another_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return 2 * F.cross_entropy(outputs["logits"], labels, reduction="sum") / (num_items_in_batch or 1)


def weighted_by(weight: float) -> Callable[..., Tensor]:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return weight * F.cross_entropy(outputs["logits"], labels, reduction="sum") / (num_items_in_batch or 1)

    return loss


def test_memory_of_another_loss(shared: UnlearningTrainer, tmp_path: Path) -> None:
    with_memory = {"model": shared.model, "memory": shared.memory}
    both = r"gathered with the loss \{'kind': 'model'\} but the request uses \{'kind': "
    trainer = make_trainer(tmp_path, compute_loss_func=another_loss, **with_memory)
    refused(trainer, MemoryMismatchError, both + "'compute_loss_func', .*another_loss", forget_indices=FORGET)
    trainer = make_trainer(tmp_path, settings={"label_smoothing_factor": 0.1}, **with_memory)
    refused(trainer, MemoryMismatchError, both + "'label smoothing', 'epsilon': '0.1'", forget_indices=FORGET)


@pytest.mark.parametrize("named", ["forget_indices", "forget_dataset"])
def test_a_loss_of_the_same_code_with_other_weights(named: str, tmp_path: Path) -> None:
    """Only its values tell: the loss of a few training rows is remembered."""
    first = make_trainer(tmp_path, compute_loss_func=weighted_by(1.0))
    memory = first.gather(EXACT)
    other = make_trainer(tmp_path, model=first.model, memory=memory, compute_loss_func=weighted_by(1.5))
    request: Any = FORGET if named == "forget_indices" else first.train_dataset.select(FORGET)
    message = r"loss of the first training rows was [\d.]+ when the memory was gathered and is [\d.]+ now"
    refused(other, MemoryMismatchError, message, look=True, **{named: request})


def test_memory_of_another_schema(shared: UnlearningTrainer, tmp_path: Path) -> None:
    assert shared.memory is not None
    header = shared.memory.save(tmp_path / "_iau")
    values = json.loads(header.read_text())
    header.write_text(json.dumps(values | {"schema_version": 99}))
    trainer = make_trainer(tmp_path, model=shared.model)
    message = r"memory.json has schema version 99; this hf_iau reads version 5.*gather anew"
    refused(trainer, MemoryMismatchError, message, forget_indices=FORGET)


def truncate(folder: Path) -> None:
    file = next(folder.glob("memory-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(folder: Path) -> None:
    file = next(folder.glob("memory-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose_tensors(folder: Path) -> None:
    next(folder.glob("memory-*.safetensors")).unlink()


def cut_header(folder: Path) -> None:
    header = folder / "memory.json"
    header.write_text(header.read_text()[:200])


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_tensors, cut_header], ids=lambda f: f.__name__)
def test_damaged_memory_beside_the_model(
    damage: Callable[[Path], None], shared: UnlearningTrainer, tmp_path: Path
) -> None:
    assert shared.memory is not None
    shared.memory.save(tmp_path / "_iau")
    damage(tmp_path / "_iau")
    trainer = make_trainer(tmp_path, model=shared.model)
    refused(trainer, MemoryFileError, "corrupt|truncated|missing", forget_indices=FORGET)


def test_parameters_of_the_memory_that_are_frozen_now(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.gather(EXACT)
    trainer.model.classifier.weight.requires_grad = False
    message = "1 parameters that the memory covers are absent or frozen here, e.g. 'classifier.weight'"
    refused(trainer, UnsupportedModelError, message, forget_indices=FORGET)


def test_a_model_that_is_frozen(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.model.requires_grad_(False)
    kept = trainer.train_dataset.select([0, 2])
    refused(trainer, UnsupportedModelError, "nothing that could forget", forget_indices=FORGET, retain_dataset=kept)


# The model


def test_data_parallel(shared: UnlearningTrainer, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(UnsupportedModelError, match=r"nn.DataParallel over n_gpu=2.*accelerate launch"):
        UnlearningTrainer(model=bert(), args=args, train_dataset=shared.train_dataset)
    trainer = make_trainer(tmp_path)
    trainer.model_wrapped = nn.DataParallel(trainer.model)
    kept = trainer.train_dataset.select([0, 2])
    refused(
        trainer, UnsupportedModelError, "nn.DataParallel.*accelerate launch", forget_indices=FORGET, retain_dataset=kept
    )


@pytest.mark.parametrize("split", ["forget", "retain"])
def test_a_gradient_that_is_not_finite_names_the_row(split: str, tmp_path: Path) -> None:
    rows = rows_of("plain", ROWS)
    rows[4]["features"] = rows[4]["features"] * float("nan")
    trainer = make_trainer(tmp_path, "plain", rows=rows)
    forget = FORGET if split == "forget" else [0, 2]  # row 4 is the second of the three
    position, name = (1, "forget rows") if split == "forget" else (2, "retained rows")
    kept = trainer.train_dataset.select([i for i in range(ROWS) if i not in forget])
    before = state_of(trainer.model)
    error: type[Exception] = NonFiniteGradientError
    message = rf"Row {position} of the {name} has a non-finite .*drop that row"
    if split == "retain":  # seen before anything is done
        error, message = RequestError, rf"1 of the 10 {name} looked at .* not finite, .* at position {position}"
    with pytest.raises(error, match=message):
        trainer.unlearn(forget_indices=forget, retain_dataset=kept, **RELEASED)
    assert_bits(trainer.model, before)


class WithoutLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = plain()

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.inner(features)["logits"]}


def test_a_forward_that_returns_no_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "plain", model=WithoutLoss())
    calls: list[int] = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    kept = trainer.train_dataset.select([i for i in range(ROWS) if i not in FORGET])
    message = r"WithoutLoss.forward returned no scalar `loss`.*compute_loss_func=.*row_loss="
    refused(trainer, UnsupportedModelError, message, look=True, forget_indices=FORGET, retain_dataset=kept)
    assert len(calls) == 1
    with pytest.raises(UnsupportedModelError, match=message):
        trainer.gather(EXACT)


# Method, configuration and the rest


def test_methods_and_configurations(shared: UnlearningTrainer) -> None:
    rows = {"forget_indices": FORGET}
    known = r"choose one of .*iau, iau-paper, iau-released"
    refused(shared, ConfigError, f"method='newton' is unknown: {known}", **rows, method="newton")
    message = "config is a IAUReleasedConfig but method='iau-paper' takes a IAUPaperConfig"
    refused(shared, ConfigError, message, **rows, method="iau-paper", config=IAUReleasedConfig())
    refused(shared, ConfigError, "config is a dict", **rows, config={"lr": 1.0})
    refused(shared, ConfigError, "config is a type", **rows, config=IAUReleasedConfig)
    missing = r"'iau-paper' has no default configuration \(.*'eta'\): pass config=IAUPaperConfig"
    refused(shared, ConfigError, missing, **rows, method="iau-paper")


@pytest.mark.parametrize(
    "make, values, message",
    [
        (IAUPaperConfig, {"eta": float("nan")}, r"eta=nan\): give a finite number"),
        (IAUPaperConfig, {"eta": float("inf")}, "eta=inf"),
        (IAUPaperConfig, {"eta": -1.0}, "eta=-1.0.*>= 0"),
        (IAUPaperConfig, {"eta": "1e-3"}, "eta='1e-3'"),
        (IAUPaperConfig, {"eta": None}, "eta=None"),
        (IAUPaperConfig, {"eta": 1.0, "retain_weight": float("nan")}, "retain_weight=nan"),
        (IAUReleasedConfig, {"lr": -1e-3}, "lr=-0.001.*>= 0"),
        (IAUReleasedConfig, {"lr": float("nan")}, "lr=nan"),
        (IAUReleasedConfig, {"lr": "fast"}, "lr='fast'"),
        (IAUConfig, {"scale": -1.0}, "scale=-1.0"),
        (IAUConfig, {"damping": float("inf")}, "damping=inf"),
        (IAUConfig, {"max_relative_step": 0.0}, "max_relative_step=0.0"),
        (IAUConfig, {"calibrate_on": "test rows"}, "calibrate_on='test rows'.*'proxies'"),
        (IAUConfig, {"held_out_rows": 5}, "held_out_rows=5.*>= 100"),
        (GatherConfig, {"gradient_sum": "some"}, "gradient_sum='some'.*'full', 'sampled', 'none'"),
        (GatherConfig, {"sample_rows": 0}, "sample_rows=0"),
        (GatherConfig, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_values_of_configurations(make: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**values)


def test_too_few_held_out_rows_to_calibrate(shared: UnlearningTrainer) -> None:
    message = r"held_out_dataset has 6 rows, too few to calibrate.*at least 100.*IAUConfig\(scale="
    refused(shared, CalibrationError, message, forget_indices=FORGET, method="iau")


def test_a_retrained_model_that_is_none(shared: UnlearningTrainer) -> None:
    message = "retrained_model='path/to/model' is a str: give a model"
    refused(shared, RequestError, message, forget_indices=FORGET, retrained_model="path/to/model")
    refused(shared, RequestError, "is a dict", forget_indices=FORGET, retrained_model=[{}])


def test_restriction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mode='approximate'.*none, exact, finite-difference"):
        make_trainer(tmp_path, restriction="approximate")
    with pytest.raises(ConfigError, match=r"restriction=0.005: give a RestrictionConfig"):
        make_trainer(tmp_path, restriction=0.005)


def test_every_error_is_one_of_ours_and_a_value_error() -> None:
    for error in (RequestError, ConfigError, MemoryMismatchError, MemoryFileError, MissingMemoryError):
        assert issubclass(error, IAUError) and issubclass(error, ValueError)


def test_the_same_memory_is_accepted_where_nothing_is_wrong(shared: UnlearningTrainer, tmp_path: Path) -> None:
    """The refusals above are about what they say: the same trainer serves a request that is in order."""
    model = build("bert")
    assert shared.memory is not None
    trainer = make_trainer(tmp_path, model=model, memory=replace(shared.memory))
    assert isinstance(trainer.memory, GradientMemory)
    before = parameters_of(model)
    assert trainer.unlearn(forget_indices=FORGET, **RELEASED).applied
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())
