"""`IAUCallback` in real training runs of a plain Trainer."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from row_loop import class_loss, relative_error, row_gradients
from tiny_models import RowList, as_dataset, bert, image_rows, pad_right, plain, plain_rows, resnet, text_rows
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_iau import (
    CoupledRowsError,
    GatherConfig,
    GradientMemory,
    IAUCallback,
    MissingMemoryError,
    NonFiniteGradientError,
    StaleMemoryError,
    UnlearningTrainer,
    UnsupportedModelError,
    gather,
)
from hf_iau.memory.fingerprints import data_fingerprint, model_fingerprint

CONFIG = GatherConfig(gradient_sum="full", curvature="none", batch_size=4, precision="float32", progress=False)
ROWS = 16


def make_trainer(
    folder: Path,
    *,
    model: nn.Module | None = None,
    rows: Any = None,
    callbacks: list[Any] | None = None,
    config: GatherConfig = CONFIG,
    kind: type[Trainer] = Trainer,
    trainer: dict[str, Any] | None = None,
    **arguments: Any,
) -> tuple[Trainer, IAUCallback]:
    callback = IAUCallback(config)
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    made = kind(
        model=model if model is not None else bert(dropout=0.1),
        args=TrainingArguments(**(settings | arguments)),
        train_dataset=rows if rows is not None else as_dataset(text_rows(ROWS)),
        data_collator=pad_right(),
        callbacks=[callback, *(callbacks or [])],
        **(trainer or {}),
    )
    return made, callback


def assert_at_weights(memory: GradientMemory, model: nn.Module, rows: Any = None) -> None:
    """The memory's sum is that of a plain loop at the weights of `model`."""
    memory.check_model(model)
    reference, each = row_gradients(model, rows or text_rows(ROWS), pad_right(), class_loss)
    assert memory.gradient_sum is not None
    assert relative_error(memory.gradient_sum, reference, each) <= 1e-5


# --- the same numbers in a fresh process ------------------------------------------------------------------------------

FRESH_PROCESS = """
import json, sys
from pathlib import Path
from tiny_models import RowList, as_dataset, pad_right, text_rows
from transformers import BertForSequenceClassification
from hf_iau import GatherConfig, gather
from hf_iau.memory.fingerprints import data_fingerprint, model_fingerprint

root, rows, config = Path(sys.argv[1]), text_rows(int(sys.argv[2])), GatherConfig(**json.loads(sys.argv[3]))
prints = {}
for run in sys.argv[4:]:
    model = BertForSequenceClassification.from_pretrained(root / run)
    data = RowList(rows) if run == "float32" else as_dataset(rows)
    gather(model, data, data_collator=pad_right(), config=config).save(root / f"fresh-{run}")
    prints[run] = {"model": model_fingerprint(model), "data": data_fingerprint(model, data)}
print(json.dumps(prints))
"""
RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.1},
    "bf16": {"bf16": True},
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Models trained here, their memories, and the memories that another process makes of the saved models."""
    root = tmp_path_factory.mktemp("runs")
    config = GatherConfig(
        gradient_sum="full", curvature="ekfac", curvature_rows=8, batch_size=4, precision="float32", progress=False
    )
    made: dict[str, dict[str, Any]] = {}
    for run, arguments in RUNS.items():
        trainer, callback = make_trainer(root / run, config=config, num_train_epochs=2, **arguments)
        trainer.train()
        trainer.save_model()
        made[run] = {"trainer": trainer, "memory": callback.memory, "folder": root / run}
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, str(root), str(ROWS), json.dumps(config.to_dict()), *RUNS],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    prints = json.loads(done.stdout.splitlines()[-1])
    for run in RUNS:
        made[run] |= {"fresh": GradientMemory.load(root / f"fresh-{run}"), "prints": prints[run]}
    return made


@pytest.mark.parametrize("run", RUNS)
def test_memory_equals_that_of_a_fresh_process(run: str, processes: dict[str, dict[str, Any]]) -> None:
    memory, fresh = processes[run]["memory"], processes[run]["fresh"]
    model = processes[run]["trainer"].model
    _, each = row_gradients(model, text_rows(ROWS), pad_right(), class_loss)
    assert relative_error(memory.gradient_sum, fresh.gradient_sum, each) <= 1e-7
    assert memory.model == fresh.model and memory.data == fresh.data and memory.n_rows == fresh.n_rows == ROWS
    assert memory.loss["kind"] == fresh.loss["kind"] == "model"
    assert memory.loss["probe"] == pytest.approx(fresh.loss["probe"], rel=1e-6)
    assert fresh.label_counts == (None if run == "float32" else memory.label_counts)  # a torch data set is not counted
    left, right = memory.curvature.tensors(), fresh.curvature.tensors()
    assert left.keys() == right.keys()
    # Eigenvectors may turn where eigenvalues meet: the curvature is compared by what it does to a vector.
    vector = {name: tensor.float() for name, tensor in memory.gradient_sum.items()}
    one, other = memory.curvature.multiply(vector), fresh.curvature.multiply(vector)
    distance = sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5
    assert distance <= 1e-4 * sum(float(tensor.square().sum()) for tensor in other.values()) ** 0.5
    if run == "bf16":
        assert "_original_forward" in model.__dict__  # autocast was in force


@pytest.mark.parametrize("run", RUNS)
def test_memory_is_at_the_final_weights(run: str, processes: dict[str, dict[str, Any]]) -> None:
    saved = BertForSequenceClassification.from_pretrained(processes[run]["folder"])
    assert_at_weights(processes[run]["memory"], saved)
    assert_at_weights(GradientMemory.load(processes[run]["folder"]), saved)


@pytest.mark.parametrize("run", RUNS)
def test_fingerprints_are_those_of_a_fresh_process(run: str, processes: dict[str, dict[str, Any]]) -> None:
    model = processes[run]["trainer"].model
    for dataset in (as_dataset(text_rows(ROWS)), RowList(text_rows(ROWS))):
        assert data_fingerprint(model, dataset) == processes[run]["prints"]["data"]
    assert model_fingerprint(model) == processes[run]["prints"]["model"]


@pytest.mark.parametrize("run", ["float32", "bf16"])
def test_gather_after_training_in_the_same_process(run: str, processes: dict[str, dict[str, Any]]) -> None:
    trainer, memory = processes[run]["trainer"], processes[run]["memory"]
    again = gather(trainer.model, trainer.train_dataset, data_collator=pad_right(), config=CONFIG)
    assert all(again.gradient_sum[name].equal(tensor) for name, tensor in memory.gradient_sum.items())


# --- what training leaves behind --------------------------------------------------------------------------------------


def test_files_are_private_and_below_the_output_directory(processes: dict[str, dict[str, Any]]) -> None:
    folder = processes["float32"]["folder"] / "_iau"
    files = list(folder.iterdir())
    assert sorted(file.suffix for file in files) == ["", ".json", ".safetensors"]  # beside .gitignore
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


def test_training_itself_is_not_changed(tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path / "with", num_train_epochs=2)
    trainer.train()
    other, _ = make_trainer(tmp_path / "without", num_train_epochs=2)
    other.remove_callback(IAUCallback)
    other.train()
    for one, two in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert one.equal(two)


def test_batch_norm_statistics_are_those_of_training(tmp_path: Path) -> None:
    rows = as_dataset(image_rows(8)).with_format("torch")
    trainer, callback = make_trainer(tmp_path, model=resnet(), rows=rows)
    seen: dict[str, Tensor] = {}

    class Statistics(TrainerCallback):
        def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            seen.update({name: buffer.clone() for name, buffer in model.named_buffers()})

    trainer.add_callback(Statistics)
    trainer.train()
    assert seen and all(buffer.equal(seen[name]) for name, buffer in trainer.model.named_buffers())
    assert_at_weights(callback.memory, trainer.model, image_rows(8))


def test_checkpoints_hold_nothing_of_the_memory(tmp_path: Path) -> None:
    for kind in (Trainer, UnlearningTrainer):
        trainer, callback = make_trainer(tmp_path / kind.__name__, kind=kind, save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.train()  # with a memory at hand from the first run
        checkpoints = sorted((tmp_path / kind.__name__).glob("checkpoint-*"))
        assert checkpoints
        for checkpoint in checkpoints:
            names = [str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*")]
            assert not [name for name in names if "iau" in name or "memory" in name]
            assert "IAUCallback" not in (checkpoint / "trainer_state.json").read_text()
            for tensors in checkpoint.glob("*.safetensors"):
                assert b"gradient_sum" not in tensors.read_bytes()
        assert callback.has_memory


def test_save_can_be_switched_off(tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path)
    callback.save = False
    trainer.train()
    assert callback.has_memory and not (tmp_path / "_iau").exists()


# --- the ways a run can go --------------------------------------------------------------------------------------------


def scripted(scores: list[float]) -> dict[str, Any]:
    """Evaluation figures that do not depend on the model: one epoch after the other."""
    left = iter(scores)
    return {
        "eval_dataset": as_dataset(text_rows(4, seed=1)),
        "compute_metrics": lambda prediction: {"score": next(left)},
    }


BEST = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
    "greater_is_better": True,
}


def test_load_best_model_at_end(tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path, num_train_epochs=3, trainer=scripted([0.1, 0.9, 0.2]), **BEST)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-8")
    best = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-8")
    last = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-12")
    assert_at_weights(callback.memory, best)
    assert_at_weights(callback.memory, trainer.model)
    with pytest.raises(StaleMemoryError):
        callback.memory.check_model(last)


def test_early_stopping(tmp_path: Path) -> None:
    trainer, callback = make_trainer(
        tmp_path,
        num_train_epochs=9,
        trainer=scripted([0.5, 0.4, 0.3]),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=1)],
        **BEST,
    )
    trainer.train()
    assert trainer.state.global_step == 8 and trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert_at_weights(callback.memory, trainer.model)
    assert_at_weights(callback.memory, BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-4"))


class OutOfMemoryOnce(TrainerCallback):
    """Fails in the third training step of the first attempt."""

    failed = False

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and not self.failed:
            self.failed = True
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def test_auto_find_batch_size(tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path, callbacks=[OutOfMemoryOnce()], auto_find_batch_size=True)
    begun = []
    own = callback.on_train_begin

    def on_train_begin(args: TrainingArguments, state: TrainerState, *rest: Any, **kwargs: Any) -> None:
        begun.append(state.train_batch_size)
        own(args, state, *rest, **kwargs)

    callback.on_train_begin = on_train_begin  # type: ignore[method-assign]
    trainer.train()
    assert len(begun) == 2 and begun[1] < begun[0] == 4
    assert callback.memory.n_rows == ROWS
    assert_at_weights(callback.memory, trainer.model)


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_several_runs(arguments: dict[str, Any], tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path, **arguments)
    memories = []
    for _ in range(3):
        trainer.train()
        memories.append(callback.memory)
        assert_at_weights(memories[-1], trainer.model)
        GradientMemory.load(tmp_path).check_model(trainer.model)
    assert len({memory.model["weights"] for memory in memories}) == 3
    assert len(list((tmp_path / "_iau").glob("memory*"))) == 2


def test_resume_with_restored_callback_states(tmp_path: Path) -> None:
    settings = BEST | {
        "num_train_epochs": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "restore_callback_states_from_checkpoint": True,
    }
    stop, again = (EarlyStoppingCallback(early_stopping_patience=5) for _ in range(2))
    whole, first = make_trainer(tmp_path / "whole", callbacks=[stop], trainer=scripted([0.1] * 9), **settings)
    whole.train()
    resumed, second = make_trainer(tmp_path / "resumed", callbacks=[again], trainer=scripted([0.1] * 9), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed.state.global_step == whole.state.global_step == 8
    # The early-stopping callback was replaced; ours is still the user's own object, and has the memory.
    assert again not in resumed.callback_handler.callbacks
    assert [cb for cb in resumed.callback_handler.callbacks if isinstance(cb, IAUCallback)] == [second]
    assert_at_weights(second.memory, resumed.model)
    assert_at_weights(first.memory, whole.model)
    GradientMemory.load(tmp_path / "resumed").check_model(resumed.model)


def test_resume_a_finished_run(tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    weights = callback.memory.model["weights"]
    trainer, callback = make_trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train(resume_from_checkpoint=True)
    assert callback.memory.model["weights"] == weights
    assert_at_weights(callback.memory, trainer.model)


def ended(callback: IAUCallback, trainer: Trainer, *, search: bool, logged: bool) -> None:
    """The end of a run as the callback sees it."""
    state, control = TrainerState(is_hyper_param_search=search), TrainerControl()
    given = {"model": trainer.model, "train_dataloader": trainer.get_train_dataloader(), "optimizer": None}
    callback.on_train_begin(trainer.args, state, control, **given)
    callback.on_log(trainer.args, state, control, logs={"loss": 1.0}, **given)
    if logged:
        callback.on_log(trainer.args, state, control, logs={"train_runtime": 1.0}, **given)
    callback.on_train_end(trainer.args, state, control, **given)


def test_a_pruned_trial_gathers_nothing(tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path)
    ended(callback, trainer, search=True, logged=False)
    assert not callback.has_memory and not (tmp_path / "_iau").exists()
    with pytest.raises(MissingMemoryError):
        _ = callback.memory
    ended(callback, trainer, search=True, logged=True)
    assert_at_weights(callback.memory, trainer.model)
    # A pruned trial after a finished one does not leave the finished one's memory in force.
    ended(callback, trainer, search=True, logged=False)
    assert not callback.has_memory
    ended(callback, trainer, search=False, logged=False)
    assert callback.has_memory


def test_a_finished_trial_of_a_search_gathers(tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path)

    class Search(TrainerCallback):
        def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
            state.is_hyper_param_search = True

    trainer.add_callback(Search)
    trainer.train()
    assert trainer.state.is_hyper_param_search
    assert_at_weights(callback.memory, trainer.model)


@pytest.mark.parametrize("error", [RuntimeError("no memory left"), KeyError("labels"), TypeError("not a tensor")])
def test_a_failure_of_gathering_does_not_lose_the_training(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    trainer, callback = make_trainer(tmp_path)
    with monkeypatch.context() as patched, caplog.at_level("ERROR"):
        patched.setattr(sys.modules[IAUCallback.__module__], "gather_without", fail)
        output = trainer.train()
    assert output.global_step == 4 and "Gathering failed" in caplog.text
    assert not callback.has_memory and not (tmp_path / "_iau").exists()
    with pytest.raises(MissingMemoryError, match="Gathering failed") as caught:
        _ = callback.memory
    assert caught.value.__cause__ is error
    trainer.train()  # the next run is not held back by it
    assert_at_weights(callback.memory, trainer.model)


def test_a_row_that_cannot_be_gathered_does_not_lose_the_training(tmp_path: Path) -> None:
    class Diverging(TrainerCallback):
        def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            with torch.no_grad():
                model.output.bias.fill_(float("nan"))

    trainer, callback = make_trainer(tmp_path, model=plain(), rows=RowList(plain_rows()), callbacks=[Diverging()])
    assert trainer.train().global_step == 3
    with pytest.raises(MissingMemoryError) as caught:
        _ = callback.memory
    assert isinstance(caught.value.__cause__, NonFiniteGradientError)


def test_a_folder_that_cannot_be_written_does_not_lose_training_or_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "_iau").write_text("in the way")
    trainer, callback = make_trainer(tmp_path)
    with caplog.at_level("ERROR"):
        trainer.train()
    assert "Gathering failed" in caplog.text
    assert_at_weights(callback.memory, trainer.model)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_label_smoothing_of_the_trainer(tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path, label_smoothing_factor=0.2)
    trainer.train()
    assert callback.memory.loss["kind"] == "label smoothing" and callback.memory.loss["epsilon"] == "0.2"
    reference, each = row_gradients(
        trainer.model,
        text_rows(ROWS),
        pad_right(),
        lambda logits, labels: F.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.2),
    )
    assert relative_error(callback.memory.gradient_sum, reference, each) <= 1e-5


def double(logits: Tensor, labels: Tensor) -> Tensor:
    return 2.0 * F.cross_entropy(logits, labels, reduction="sum")


def test_row_loss_given_to_the_callback(tmp_path: Path) -> None:
    def row_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs.pop("labels")
        return double(model(**inputs).logits, labels)

    trainer, callback = make_trainer(tmp_path)
    callback.row_loss = row_loss
    trainer.train()
    assert callback.memory.loss["kind"] == "row_loss" and "row_loss" in callback.memory.loss["function"]
    reference, each = row_gradients(trainer.model, text_rows(ROWS), pad_right(), double)
    assert relative_error(callback.memory.gradient_sum, reference, each) <= 1e-5


def mean_of_batch(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return double(outputs["logits"], labels) / num_items_in_batch


def test_an_unlearning_trainers_loss_is_known_to_its_callback(tmp_path: Path) -> None:
    trainer, callback = make_trainer(tmp_path, kind=UnlearningTrainer, trainer={"compute_loss_func": mean_of_batch})
    trainer.train()
    assert callback.memory.loss["kind"] == "compute_loss_func"
    reference, each = row_gradients(trainer.model, text_rows(ROWS), pad_right(), double)
    assert relative_error(callback.memory.gradient_sum, reference, each) <= 1e-5


def test_a_coupled_loss_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def contrastive(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        inputs.pop("labels")
        vectors = F.normalize(model(**inputs).logits, dim=1)
        return (vectors @ vectors.T).logsumexp(dim=1).sum()

    trainer, callback = make_trainer(tmp_path)
    callback.row_loss = contrastive
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(CoupledRowsError):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(one.equal(two) for one, two in zip(trainer.model.parameters(), before, strict=True))


REFUSED: dict[str, Callable[[], Any]] = {
    "random transform": lambda: as_dataset(text_rows(ROWS)).with_transform(
        lambda batch: batch | {"input_ids": [torch.randint(2, 20, (6,)).tolist() for _ in batch["input_ids"]]}
    ),
    "streaming": lambda: as_dataset(text_rows(ROWS)).to_iterable_dataset(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_cannot_be_gathered_from_is_refused_before_the_first_step(name: str, tmp_path: Path) -> None:
    trainer, _ = make_trainer(tmp_path, rows=REFUSED[name](), max_steps=2, remove_unused_columns=False)
    with pytest.raises(UnsupportedModelError):
        trainer.train()
    assert trainer.state.global_step == 0
