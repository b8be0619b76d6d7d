"""Every way to name the rows, the loss and the batches comes to the same weights; every task is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    RowList,
    as_dataset,
    bert,
    bert_tokens,
    build,
    multi_label_rows,
    pad_right,
    regression_rows,
    rows_of,
    text_rows,
    token_rows,
)
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast
from unlearning_trainers import (
    EXACT,
    FORGET,
    ROWS,
    WITH_CURVATURE,
    gradient_loop,
    make_trainer,
    parameters_of,
    relative_distance,
)

from hf_iau import GatherConfig, IAUCallback, IAUConfig, IAUPaperConfig, UnlearningTrainer
from hf_iau.errors import CoupledRowsError, RequestError, UnsupportedModelError

PAPER: dict[str, Any] = {"method": "iau-paper", "config": IAUPaperConfig(eta=3e-3)}


def after(trainer: UnlearningTrainer, gather: GatherConfig = EXACT, **request: Any) -> dict[str, Tensor]:
    """The weights after a memory was gathered and a request made."""
    trainer.gather(gather)
    result = trainer.unlearn(**(PAPER | request))
    assert result.applied
    return parameters_of(trainer.model)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert all(torch.equal(one[name], other[name]) for name in other)


# How rows are named


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What `forget_indices=` as a list comes to."""
    return after(make_trainer(tmp_path_factory.mktemp("usual")), forget_indices=FORGET)


@pytest.mark.parametrize(
    "indices",
    [
        tuple(FORGET),
        np.array(FORGET),
        np.array(FORGET, dtype=np.uint8),
        torch.tensor(FORGET),
        torch.tensor(FORGET, dtype=torch.int32),
        range(1, 8, 3),
        [np.int64(i) for i in FORGET],
    ],
    ids=lambda indices: type(indices).__name__,
)
@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_row_indices_of_every_type(indices: Any, kind: str, usual: dict[str, Tensor], tmp_path: Path) -> None:
    assert_same(after(make_trainer(tmp_path, kind=kind), forget_indices=indices), usual)


FORGET_DATASETS: dict[str, Callable[[UnlearningTrainer], Any]] = {
    "select": lambda trainer: trainer.train_dataset.select(FORGET),
    "filter": lambda trainer: trainer.train_dataset.filter(lambda row, number: number in FORGET, with_indices=True),
    "datasets.Dataset": lambda trainer: as_dataset([rows_of("bert", ROWS)[i] for i in FORGET]),
    "with torch format": lambda trainer: trainer.train_dataset.with_format("torch").select(FORGET),
    "torch Dataset": lambda trainer: RowList([rows_of("bert", ROWS)[i] for i in FORGET]),
    "Subset of torch": lambda trainer: Subset(RowList(rows_of("bert", ROWS)), FORGET),
    "Subset of datasets": lambda trainer: Subset(trainer.train_dataset, FORGET),
    "list of rows": lambda trainer: [rows_of("bert", ROWS)[i] for i in FORGET],
}


@pytest.mark.parametrize("name", FORGET_DATASETS)
def test_forget_datasets_of_every_type(name: str, usual: dict[str, Tensor], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert_same(after(trainer, forget_dataset=FORGET_DATASETS[name](trainer)), usual)


def test_forget_rows_without_a_training_set(usual: dict[str, Tensor], tmp_path: Path) -> None:
    memory = make_trainer(tmp_path).gather(EXACT)
    trainer = make_trainer(tmp_path, memory=memory, train_dataset=None)
    result = trainer.unlearn(as_dataset([rows_of("bert", ROWS)[i] for i in FORGET]), **PAPER)
    assert_same(parameters_of(trainer.model), usual)
    assert result.report.before["retain_loss"] is None
    assert any("No retained rows" in sentence for sentence in result.report.warnings)


def test_rows_of_two_same_contents_are_two_rows(tmp_path: Path) -> None:
    """A training set may hold a row twice; both may be forgotten, and one of them alone."""
    rows = rows_of("bert", ROWS)
    rows[5] = rows[1]
    both = make_trainer(tmp_path, rows=rows)
    assert_same(
        after(both, forget_dataset=both.train_dataset.select([1, 5])),
        after(make_trainer(tmp_path, rows=rows), forget_indices=[1, 5]),
    )
    one = after(make_trainer(tmp_path, rows=rows), forget_indices=[1])
    assert not torch.equal(one["classifier.weight"], parameters_of(both.model)["classifier.weight"])


@pytest.mark.parametrize("remove", [True, False])
@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_unused_columns(remove: bool, kind: str, usual: dict[str, Tensor], tmp_path: Path) -> None:
    rows = [row | {"number": i} for i, row in enumerate(rows_of("bert", ROWS))]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all(("number" in row) is not remove for row in batch)
        return pad_right()([{key: value for key, value in row.items() if key != "number"} for row in batch])

    trainer = make_trainer(
        tmp_path,
        rows=rows,
        kind=kind,
        eval_dataset=None,
        data_collator=collate,
        settings={"remove_unused_columns": remove},
    )
    assert_same(after(trainer, forget_dataset=Subset(trainer.train_dataset, FORGET)), usual)


def test_held_out_rows_may_lack_an_unused_column(usual: dict[str, Tensor], tmp_path: Path) -> None:
    rows = [row | {"number": i} for i, row in enumerate(rows_of("bert", ROWS))]
    trainer = make_trainer(tmp_path, rows=rows, kind="torch")  # the held-out rows have no number
    assert_same(after(trainer, forget_indices=FORGET), usual)


def test_rows_made_by_a_fixed_transform(tmp_path: Path) -> None:
    """`set_transform` that always gives the same row is no augmentation."""
    rows = rows_of("vit", ROWS)

    def pixels(batch: dict[str, Any]) -> dict[str, Any]:
        values = [torch.tensor(v, dtype=torch.float32) / 2 for v in batch["pixel_values"]]
        return {"pixel_values": values, "labels": batch["labels"]}

    stored = as_dataset(rows)
    stored.set_transform(pixels)
    trainer = make_trainer(tmp_path, "vit", train_dataset=stored)
    halved = [row | {"pixel_values": row["pixel_values"] / 2} for row in rows]
    expected = after(make_trainer(tmp_path, "vit", rows=halved), forget_indices=FORGET)
    assert_same(after(trainer, forget_indices=FORGET), expected)


def test_a_language_model_whose_labels_the_collator_makes(tmp_path: Path) -> None:
    """The usual recipe: rows of `input_ids` alone, and `DataCollatorForLanguageModeling(mlm=False)`."""
    tokenizer = word_tokenizer()
    rows = [{"input_ids": row["input_ids"]} for row in text_rows(ROWS)]
    trainer = make_trainer(
        tmp_path,
        "gpt2",
        rows=rows,
        eval_dataset=None,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    before = parameters_of(trainer.model)
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    of_forget = gradient_loop(trainer.model, [labelled[i] for i in FORGET])[0]
    of_retain = gradient_loop(trainer.model, [row for i, row in enumerate(labelled) if i not in FORGET])[0]
    for name, value in after(trainer, forget_indices=FORGET).items():
        expected = before[name].double() + 3e-3 * (of_forget[name] - of_retain[name])
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6, msg=name)


def test_a_collator_that_masks_at_random_is_refused(tmp_path: Path) -> None:
    masking = DataCollatorForLanguageModeling(word_tokenizer(), mlm=True, mlm_probability=0.5)
    rows = [{"input_ids": row["input_ids"]} for row in text_rows(ROWS, length=(12, 16))]
    trainer = make_trainer(tmp_path, rows=rows, eval_dataset=None, data_collator=masking)
    retain = trainer.train_dataset.select(range(2, ROWS))
    with pytest.raises(UnsupportedModelError, match="data_collator=DataCollatorForLanguageModeling collates the same"):
        trainer.unlearn(forget_indices=[0, 1], retain_dataset=retain, **PAPER)


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"[PAD]": 0, "[EOS]": 1, "[MASK]": 2, **{f"w{i}": i for i in range(3, 24)}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[PAD]")),
        pad_token="[PAD]",
        eos_token="[EOS]",
        mask_token="[MASK]",
    )


# Held-out rows


def test_eval_datasets_in_a_dictionary(tmp_path: Path) -> None:
    rows = as_dataset(rows_of("bert", 6, seed=1))
    trainer = make_trainer(tmp_path, eval_dataset={"only": rows})
    trainer.gather(EXACT)
    result = trainer.unlearn(forget_indices=FORGET, **PAPER)
    assert result.report.counts["held_out_rows"] == 6
    several = make_trainer(tmp_path, eval_dataset={"one": rows, "other": rows.select([0, 1])})
    several.gather(EXACT)
    with pytest.raises(RequestError, match=r"dictionary of 2 data sets \(one, other\).*held_out_dataset="):
        several.unlearn(forget_indices=FORGET, **PAPER)
    chosen = several.unlearn(forget_indices=FORGET, held_out_dataset=several.eval_dataset["other"], **PAPER)
    assert chosen.report.counts["held_out_rows"] == 2


def test_no_held_out_rows_are_reported(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_dataset=None)
    trainer.gather(EXACT)
    report = trainer.unlearn(forget_indices=FORGET, **PAPER).report
    assert report.after["held_out_loss"] is None and report.after["mia_auc"] is None
    assert report.warnings


# How the loss is given

WEIGHTS = torch.tensor([1.0, 3.0, 0.5])


def weighted(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    weights = WEIGHTS.to(outputs["logits"].dtype)
    return F.cross_entropy(outputs["logits"], labels, weight=weights, reduction="sum") / (num_items_in_batch or 1)


def weighted_rows(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    labels = inputs.pop("labels")
    logits = model(**inputs)["logits"]
    return F.cross_entropy(logits, labels, weight=WEIGHTS.to(logits.dtype), reduction="none")


class WeightedTrainer(UnlearningTrainer):
    """The loss as an overridden `compute_loss` has it."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = weighted(outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


LOSSES: dict[str, dict[str, Any]] = {
    "compute_loss_func": {"compute_loss_func": weighted},
    "row_loss": {"row_loss": weighted_rows},
    "compute_loss": {"trainer_class": WeightedTrainer},
}


@pytest.mark.parametrize("given", LOSSES)
def test_class_weights(given: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, dtype=torch.float64, **LOSSES[given])
    before = parameters_of(trainer.model)
    parameters = dict(trainer.model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for number, row in enumerate(rows_of("bert", ROWS)):
        loss = weighted_rows(trainer.model.eval(), pad_right()([row])).sum()
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += gradient if number in FORGET else -gradient
    expected = {name: before[name] + 3e-3 * total[name] for name in before}
    assert relative_distance(after(trainer, forget_indices=FORGET), expected, before) < 1e-10


@pytest.mark.parametrize("given", LOSSES)
def test_a_trained_loss_is_the_one_that_is_unlearned(given: str, tmp_path: Path) -> None:
    """Through training and its callback, and the memory refuses another loss."""
    trainer = make_trainer(tmp_path, callbacks=[IAUCallback(EXACT)], **LOSSES[given])
    trainer.train()
    assert trainer.memory is not None and trainer.memory.loss["kind"] == given
    other = make_trainer(tmp_path, model=trainer.model, memory=trainer.memory)
    with pytest.raises(ValueError, match=rf"'kind': '{given}'.*'kind': 'model'"):
        other.unlearn(forget_indices=FORGET, **PAPER)
    assert trainer.unlearn(forget_indices=FORGET, **PAPER).applied


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_label_smoothing(family: str, tmp_path: Path) -> None:
    epsilon = 0.2
    trainer = make_trainer(
        tmp_path, family, settings={"label_smoothing_factor": epsilon}, callbacks=[IAUCallback(EXACT)]
    )
    trainer.train()
    before = parameters_of(trainer.model)
    parameters = dict(trainer.model.named_parameters())
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for number, row in enumerate(rows_of(family, ROWS)):
        batch = pad_right()([row])
        labels = batch.pop("labels")
        logits = trainer.model.eval()(**batch)["logits"]
        if family == "gpt2":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = F.cross_entropy(logits, labels, label_smoothing=epsilon, reduction="sum")
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            total[name] += gradient if number in FORGET else -gradient
    trainer.unlearn(forget_indices=FORGET, **PAPER)
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value.double(), before[name] + 3e-3 * total[name], rtol=0, atol=1e-6, msg=name)


def test_compute_loss_with_a_column_of_its_own(tmp_path: Path) -> None:
    class RowWeightTrainer(UnlearningTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            weight, labels = inputs.pop("weight"), inputs.pop("labels")
            losses = F.cross_entropy(model(**inputs)["logits"], labels, reduction="none")
            return (losses * weight).sum() / num_items_in_batch

    rows = [row | {"weight": float(i)} for i, row in enumerate(rows_of("bert", ROWS))]

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        stacked = pad_right()([{k: v for k, v in row.items() if k != "weight"} for row in batch])
        return stacked | {"weight": torch.tensor([row["weight"] for row in batch])}

    trainer = make_trainer(
        tmp_path,
        rows=rows,
        eval_dataset=None,
        data_collator=collate,
        trainer_class=RowWeightTrainer,
        settings={"remove_unused_columns": False},
        callbacks=[IAUCallback(EXACT)],
    )
    trainer.train()
    memory = trainer.memory
    assert memory is not None
    expected = sum(
        i * gradient_loop(trainer.model, [row])[0]["classifier.bias"] for i, row in enumerate(rows_of("bert", ROWS))
    )
    torch.testing.assert_close(memory.gradient_sum["classifier.bias"].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_loss_that_couples_rows_is_refused_without_a_memory_too(tmp_path: Path) -> None:
    def mean_of_batch(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return weighted_rows(model, inputs).mean()

    trainer = make_trainer(tmp_path, row_loss=mean_of_batch)
    before = parameters_of(trainer.model)
    retain = trainer.train_dataset.select([i for i in range(ROWS) if i not in FORGET])
    with pytest.raises(CoupledRowsError, match="rows are coupled"):
        trainer.unlearn(forget_indices=FORGET, retain_dataset=retain, **PAPER)
    assert_same(parameters_of(trainer.model), before)


def test_model_init(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model_init=lambda: bert(seed=4), callbacks=[IAUCallback(EXACT)])
    trainer.train()
    first = trainer.model
    trainer.unlearn(forget_indices=FORGET, **PAPER)
    trainer.train()  # a new model from model_init, of the rows that are left
    assert trainer.model is not first and trainer.memory.n_rows == ROWS - len(FORGET)
    before = parameters_of(trainer.model)
    trainer.unlearn(forget_indices=[0, 2], **PAPER)
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


# How rows are batched


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("family", ["bert", "resnet", "gpt2", "lora"])
def test_the_batches_do_not_matter(family: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    start = parameters_of(build(family, dtype=dtype))
    shapes = [
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 5, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 12, "per_device_eval_batch_size": 1},
    ]
    ends = [
        after(make_trainer(tmp_path, family, dtype=dtype, settings=settings), forget_indices=FORGET)
        for settings in shapes
    ]
    if family != "resnet":
        padded = make_trainer(tmp_path, family, dtype=dtype, data_collator=pad_right(5))
        ends.append(after(padded, forget_indices=FORGET))
    for end in ends[1:]:
        assert relative_distance(end, ends[0], start) < tolerance


# Tasks

TASKS: dict[str, tuple[Callable[[], nn.Module], Callable[..., list[dict[str, Any]]], bool]] = {
    "multi-label": (
        lambda: bert(problem_type="multi_label_classification"),
        multi_label_rows,
        True,
    ),
    "regression": (lambda: bert(1, problem_type="regression"), regression_rows, False),
    "regression of several outputs": (
        lambda: bert(2, problem_type="regression"),
        lambda n, seed=0: regression_rows(n, outputs=2, seed=seed),
        False,
    ),
    "token classification": (bert_tokens, token_rows, True),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", ["iau-paper", "iau-released", "iau"])
def test_tasks_from_training_to_report(task: str, method: str, tmp_path: Path) -> None:
    make_model, make_rows, has_accuracy = TASKS[task]
    rows = make_rows(ROWS)
    trainer = make_trainer(
        tmp_path,
        model=make_model(),
        rows=rows,
        eval_dataset=as_dataset(make_rows(6, seed=1)),
        callbacks=[IAUCallback(WITH_CURVATURE)],
    )
    trainer.train()
    memory, before = trainer.memory, parameters_of(trainer.model)
    assert memory is not None
    config = {"iau-paper": IAUPaperConfig(eta=1e-3), "iau": IAUConfig(scale=0.1, damping=1.0)}.get(method)
    result = trainer.unlearn(forget_indices=FORGET, method=method, config=config)
    report = result.report
    for figures in (report.before, report.after):
        assert np.isfinite(figures["forget_loss"]) and np.isfinite(figures["held_out_loss"])
        assert (figures["forget_accuracy"] is not None) is has_accuracy
    assert result.memory is not None and 0 < result.memory.n_targets < memory.n_targets
    assert report.after["forget_loss"] != report.before["forget_loss"]
    if method == "iau":  # the others correct towards the retained rows, which may help the forget rows
        assert report.after["forget_loss"] > report.before["forget_loss"]
    if method == "iau-paper":
        parts = [rows[i] for i in FORGET], [row for i, row in enumerate(rows) if i not in FORGET]
        now = parameters_of(trainer.model)
        result.revert()
        of_forget, of_retain = (gradient_loop(trainer.model, part)[0] for part in parts)
        expected = {name: before[name].double() + 1e-3 * (of_forget[name] - of_retain[name]) for name in before}
        for name, value in now.items():
            torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6, msg=name)


def test_tasks_with_several_label_columns_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import BertForPreTraining

    config = bert(2).config
    rows = [
        {key: row[key] for key in ("input_ids", "attention_mask")} | {"next_sentence_label": 1}
        for row in rows_of("bert", ROWS)
    ]
    settings = {"label_names": ["next_sentence_label"]}
    trainer = make_trainer(tmp_path, model=BertForPreTraining(config), rows=rows, eval_dataset=None, settings=settings)
    with pytest.raises(UnsupportedModelError, match=r"'next_sentence_label'.*but for question answering"):
        trainer.unlearn(forget_indices=FORGET, retain_dataset=trainer.train_dataset.select([0, 2]), **PAPER)
