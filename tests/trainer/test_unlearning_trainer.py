"""What `unlearn()` changes, what it leaves alone, and how it is undone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import bert
from torch import Tensor, nn
from unlearning_trainers import (
    EXACT,
    FORGET,
    ROWS,
    WITH_CURVATURE,
    assert_bits,
    gradient_loop,
    make_trainer,
    parameters_of,
    state_of,
)

from hf_iau import (
    AlreadyForgottenError,
    GatherConfig,
    GradientMemory,
    IAUCallback,
    IAUConfig,
    IAUPaperConfig,
    IAUReleasedConfig,
    UnlearningTrainer,
    gather,
    register_method,
)
from hf_iau.data.model_mode import placed_on
from hf_iau.errors import (
    IAUError,
    MemoryFileError,
    MissingMemoryError,
    RequestError,
    StaleMemoryError,
    UnsupportedModelError,
)
from hf_iau.methods.base import _METHODS
from hf_iau.methods.baselines.retrain import RetrainConfig
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.unlearn import run as serving
from hf_iau.unlearn import update_memory as moved_memory
from hf_iau.unlearn.record import FinishedRequest

PAPER = IAUPaperConfig(eta=1e-3)
GIVEN = IAUConfig(scale=0.1, damping=1.0)


def forget(trainer: UnlearningTrainer, rows: Any = FORGET, **kwargs: Any) -> Any:
    """A request with `iau-released`, unless told otherwise."""
    return trainer.unlearn(forget_indices=rows, **({"method": "iau-released"} | kwargs))


def trained(folder: Path, family: str = "bert", config: GatherConfig = EXACT, **kwargs: Any) -> UnlearningTrainer:
    trainer = make_trainer(folder, family, callbacks=[IAUCallback(config)], **kwargs)
    trainer.train()
    return trainer


# What moves, and what does not


@pytest.mark.parametrize("method, config", [("iau-paper", PAPER), ("iau-released", None), ("iau", GIVEN)])
@pytest.mark.parametrize("family", ["bert", "resnet", "lora"])
def test_every_trainable_parameter_moves_and_nothing_else(
    family: str, method: str, config: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, family)
    if family == "bert":
        for parameter in trainer.model.bert.embeddings.parameters():
            parameter.requires_grad = False
    trainer.gather(WITH_CURVATURE)
    before = state_of(trainer.model)
    result = forget(trainer, method=method, config=config)
    moves = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    # A key's bias shifts all scores of a softmax alike, so its gradient is nothing but rounding.
    for name, value in state_of(trainer.model).items():
        if name not in moves:
            assert torch.equal(value, before[name]), f"{name} is frozen or a buffer, and moved"
        elif not name.endswith("key.bias"):
            assert not torch.equal(value, before[name]), f"{name} is trainable, and did not move"
    assert len(moves) < len(before)
    assert result.applied
    assert result.report.diagnostics["step_norm"] > 0


@pytest.mark.parametrize(
    "named", [{"forget_indices": []}, {"forget_indices": torch.zeros(0)}, {"forget_dataset": None}]
)
def test_an_empty_request_is_a_no_op_with_a_warning(named: dict[str, Any], tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    if "forget_dataset" in named:
        named = {"forget_dataset": trainer.train_dataset.select([])}
    before, memory = state_of(trainer.model), trainer.memory
    with pytest.warns(UserWarning, match="names no rows: nothing was forgotten"):
        result = trainer.unlearn(**named)
    assert_bits(trainer.model, before)
    assert not result.applied
    assert result.memory is memory is trainer.memory
    assert result.report.counts == {"forget_rows": 0}
    with pytest.raises(RequestError, match="changed nothing"):
        result.revert()


def test_revert_restores_every_bit_and_the_memory(tmp_path: Path) -> None:
    trainer = trained(tmp_path, "resnet")
    before, memory = state_of(trainer.model), trainer.memory
    result = forget(trainer)
    assert trainer.memory is result.memory is not memory
    after = state_of(trainer.model)
    result.revert()
    assert_bits(trainer.model, before)
    assert trainer.memory is memory
    assert not result.applied
    with pytest.raises(RequestError, match="reverted already"):
        result.revert()
    forget(trainer)  # the same rows may be asked for again, with the same result
    assert_bits(trainer.model, after)


def test_revert_refuses_to_overwrite_weights_that_moved_since(tmp_path: Path) -> None:
    trainer = trained(tmp_path, config=WITH_CURVATURE)
    before = state_of(trainer.model)
    first = forget(trainer)
    between = state_of(trainer.model)
    second = forget(trainer, [2], method="iau", config=GIVEN)
    with pytest.raises(RequestError, match="moved since"):
        first.revert()
    second.revert()
    assert_bits(trainer.model, between)
    first.revert()
    assert_bits(trainer.model, before)
    third = forget(trainer)
    trainer.train()
    trained_on = state_of(trainer.model)
    with pytest.raises(RequestError, match="moved since"):
        third.revert()
    assert_bits(trainer.model, trained_on)


def test_a_dry_run_leaves_every_bit_and_reports(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    before, memory = state_of(trainer.model), trainer.memory
    result = forget(trainer, dry_run=True)
    assert_bits(trainer.model, before)
    assert not result.applied
    assert trainer.memory is memory
    assert result.report.before["forget_loss"] != result.report.after["forget_loss"]
    real = forget(trainer)
    assert real.report.after == result.report.after
    with pytest.raises(RequestError):
        result.revert()


class Broken(RuntimeError):
    """Something that no code expects."""


def break_gradient(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("hf_iau.methods.base.sum_row_gradients", explode)


def break_update_halfway(patch: pytest.MonkeyPatch) -> None:
    def some_of_it(model: nn.Module, step: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for parameter in list(model.parameters())[:3]:
                parameter.add_(1.0)
            for buffer in model.buffers():
                buffer.zero_()
        raise Broken

    patch.setattr("hf_iau.methods.iau_released.apply_step", some_of_it)


def break_memory(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GradientMemory, "after_step", explode)


def break_measuring_after(patch: pytest.MonkeyPatch) -> None:
    measure, calls = serving.measure_model, []

    def second_time(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return explode() if len(calls) == 2 else measure(*args, **kwargs)

    patch.setattr(serving, "measure_model", second_time)


def break_report(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(serving.UnlearningReport, "build", explode)


def break_commit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("hf_iau.unlearn.transaction.weights_fingerprint", explode)


def interrupt(patch: pytest.MonkeyPatch) -> None:
    def by_hand(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    patch.setattr(moved_memory, "step_norm", by_hand)


def explode(*args: Any, **kwargs: Any) -> Any:
    raise Broken


STAGES = [
    break_gradient,
    break_update_halfway,
    break_memory,
    break_measuring_after,
    break_report,
    break_commit,
    interrupt,
]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_any_exception_leaves_the_weights_and_the_trainer_as_they_were(
    stage: Callable[[pytest.MonkeyPatch], None], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, "resnet")
    memory = trainer.gather(EXACT)
    before = state_of(trainer.model)
    with pytest.MonkeyPatch.context() as patch:
        stage(patch)
        with pytest.raises((Broken, KeyboardInterrupt)):
            forget(trainer)
    assert_bits(trainer.model, before)
    assert trainer.memory is memory
    assert forget(trainer).applied


def test_a_step_to_infinity_is_not_taken(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.gather(EXACT)
    before = state_of(trainer.model)
    with pytest.raises(RequestError, match=r"non-finite.*not applied.*shorter step"):
        forget(trainer, method="iau-paper", config=IAUPaperConfig(eta=1e300))
    assert_bits(trainer.model, before)


# What is as before afterwards


@pytest.mark.parametrize("training", [True, False])
def test_no_trace_is_left_on_model_process_or_trainer(training: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "gpt2", model_settings={"dropout": 0.1}, settings={"bf16": True})
    trainer.train()  # Accelerate wraps forward in autocast
    trainer.gather(EXACT)
    model = trainer.model
    model.train(training)
    model.transformer.h[0].train(not training)
    model.config.use_cache = True
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number)) if number % 2 else None
    flags = [module.training for module in model.modules()]
    gradients = [parameter.grad for parameter in model.parameters()]
    values = [None if gradient is None else gradient.clone() for gradient in gradients]
    wrapper = model.__dict__["forward"]
    assert wrapper is not model.__dict__["_original_forward"]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()

    forget(trainer)

    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is gradient for parameter, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(a is b or torch.equal(a, b) for a, b in zip(gradients, values, strict=True))
    assert model.config.use_cache is True
    assert model.__dict__["forward"] is wrapper
    assert random.getstate() == states[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_data_set_that_draws_numbers_does_not_move_the_generators(tmp_path: Path) -> None:
    class Drawing(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, position: int) -> Any:
            torch.rand(1), np.random.rand(), random.random()
            return self.rows[position]

    trainer = make_trainer(tmp_path, kind="torch")
    trainer.train_dataset = Drawing(trainer.train_dataset)
    trainer.gather(EXACT)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index]
    forget(trainer)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_dropout_and_batch_statistics_are_off(tmp_path: Path) -> None:
    """The update is that of the evaluated model, whatever mode it is in."""
    results = []
    for training in (True, False):
        trainer = make_trainer(tmp_path, "bert", model_settings={"dropout": 0.5})
        trainer.model.train(training)
        trainer.gather(EXACT)
        forget(trainer)
        results.append(state_of(trainer.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_training_goes_on_and_drops_the_stale_memory(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.remove_callback(IAUCallback)
    trainer.train()
    trainer.gather(EXACT)
    forget(trainer)
    before = parameters_of(trainer.model)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert trainer.memory is None
    with pytest.raises(AlreadyForgottenError):
        forget(trainer)
    with pytest.raises(MissingMemoryError):
        forget(trainer, [0, 2])


def gathering(trainer: UnlearningTrainer) -> list[IAUCallback]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, IAUCallback)]


def test_a_callback_is_added_where_none_was_given(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert len(gathering(trainer)) == 1
    trainer.train()
    assert trainer.memory.curvature is not None and trainer.memory.settings["curvature"] == GatherConfig().curvature
    assert trainer.unlearn(forget_indices=[1], config=IAUConfig(scale=0.1, damping=1.0)).applied
    own = IAUCallback(EXACT)
    trainer.add_callback(own)
    assert gathering(trainer) == [own]
    assert gathering(make_trainer(tmp_path, callbacks=[own])) == [own]


def test_a_memory_that_was_given_is_gathered_anew_by_training(tmp_path: Path) -> None:
    given = trained(tmp_path / "first").memory
    trainer = make_trainer(tmp_path / "second", memory=given)
    assert trainer.memory is given
    trainer.train()
    assert trainer.memory is not given
    trainer.memory.check_model(trainer.model)


class Shuffling(torch.utils.data.IterableDataset):
    """Rows without numbers, which cannot be gathered from."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_what_cannot_be_gathered_unasked_is_trained_all_the_same(tmp_path: Path, caplog: Any) -> None:
    trainer = make_trainer(tmp_path)
    retained = trainer.train_dataset
    trainer.train_dataset = Shuffling(list(retained))
    before = parameters_of(trainer.model)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    told = [record for record in caplog.records if "No gradient memory will be gathered" in record.message]
    assert len(told) == 1 and trainer.memory is None
    trainer.train_dataset = retained
    with pytest.raises(MissingMemoryError, match=r"Gathering after training was not possible: .*trainer\.gather\(\)"):
        trainer.unlearn(forget_indices=[1])
    rest = retained.select(range(2, len(retained)))
    assert trainer.unlearn(forget_indices=[1], method="iau-released", retain_dataset=rest).applied  # needs no memory
    own = IAUCallback(EXACT)
    trainer.add_callback(own)
    trainer.train_dataset = Shuffling(list(retained))
    with pytest.raises(UnsupportedModelError):  # who asks for a memory is told before compute is spent
        trainer.train()


def test_gathering_unasked_that_fails_after_training_leaves_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr("hf_iau.trainer.callback.gather_without", lambda *a, **k: 1 / 0)
    trainer.train()
    assert trainer.memory is None
    with pytest.raises(MissingMemoryError, match="not possible: division by zero"):
        forget(trainer)


def test_a_request_is_committed_while_its_weights_are_whole_and_undone_by_what_that_raises(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    before, memory = state_of(trainer.model), trainer.memory
    finished: list[FinishedRequest] = []

    def refuse(request: FinishedRequest) -> None:
        assert any(not torch.equal(value, before[name]) for name, value in request.context.model.named_parameters())
        finished.append(request)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        forget(trainer, commit=refuse)
    assert_bits(trainer.model, before)
    assert trainer.memory is memory
    output = forget(trainer, commit=finished.append)
    first, second = finished
    assert second.report is output.report and second.memory is output.memory
    assert first.record.after == second.record.after and second.record.effect.step_norm > 0
    assert second.record.after["forget_loss"] == output.report.after["forget_loss"]
    with pytest.raises(RequestError, match="contradict each other"):
        forget(trainer, commit=finished.append, dry_run=True)


def test_training_goes_on_and_gathers_anew(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    old = forget(trainer).memory
    trainer.train()
    memory = trainer.memory
    assert memory is not None and memory is not old
    assert (memory.n_rows, memory.forgotten_rows, memory.gradient_sum_kind) == (ROWS - len(FORGET), len(FORGET), "full")
    forget(trainer, [0, 2])


def test_weights_that_were_moved_by_hand_do_not_fit_the_memory(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    with torch.no_grad():
        trainer.model.classifier.bias.add_(1e-3)
    with pytest.raises(StaleMemoryError, match="weights"):
        forget(trainer)


# The memory after a request


@pytest.mark.parametrize("config, kind", [(EXACT, "none"), (WITH_CURVATURE, "first-order")])
def test_the_memory_moves_with_the_weights(config: GatherConfig, kind: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, config=config)
    old = trainer.memory
    assert old is not None and old.label_counts is not None
    labels = [str(trainer.train_dataset[i]["labels"]) for i in FORGET]
    result = forget(trainer)
    new = result.memory
    assert new is trainer.memory
    assert (new.n_rows, new.n_targets) == (ROWS - len(FORGET), ROWS - len(FORGET))
    assert (new.forgotten_rows, new.forgotten_targets) == (len(FORGET), len(FORGET))
    assert new.label_counts == {label: count - labels.count(label) for label, count in old.label_counts.items()}
    assert new.gradient_sum_kind == kind
    assert (new.gradient_sum is None) == (kind == "none")
    assert new.model["weights"] != old.model["weights"]
    assert new.relative_path == pytest.approx(result.report.diagnostics["relative_step_norm"])
    new.check_model(trainer.model)
    with pytest.raises(StaleMemoryError):
        old.check_model(trainer.model)


def test_the_moved_gradient_sum_is_nearer_to_the_true_one(tmp_path: Path) -> None:
    """n_r·C·Δ goes the right way: Σ_r at the old weights is farther from Σ_r at the new ones."""
    trainer = trained(tmp_path, "plain", config=WITH_CURVATURE, settings={"max_steps": 20})
    rows = [trainer.train_dataset.with_format("torch")[i] for i in range(ROWS)]
    kept = [dict(row) for i, row in enumerate(rows) if i not in FORGET]
    before = gradient_loop(trainer.model, kept)[0]
    moved = forget(trainer, method="iau-paper", config=IAUPaperConfig(eta=1e-4)).memory.gradient_sum
    after = gradient_loop(trainer.model, kept)[0]

    def distance(sums: dict[str, Tensor]) -> float:
        return float(sum(float((sums[name] - after[name]).square().sum()) for name in after) ** 0.5)

    assert 0 < distance(moved) < 0.9 * distance(before)


def test_the_same_rows_cannot_be_forgotten_twice_but_others_can(tmp_path: Path) -> None:
    trainer = trained(tmp_path, config=WITH_CURVATURE)
    forget(trainer)
    again = trainer.train_dataset.select([4, 5])
    for request in ({"forget_indices": [4, 5]}, {"forget_dataset": again}):
        with pytest.raises(RequestError, match="1 of the 2 rows were already forgotten"):
            trainer.unlearn(**request, method="iau", config=GIVEN)
    result = forget(trainer, [2, 5], method="iau", config=GIVEN)
    assert result.memory.n_rows == ROWS - len(FORGET) - 2
    assert result.memory.forgotten_rows == len(FORGET) + 2
    with pytest.raises(MissingMemoryError, match=r"'first-order'.*retain_dataset"):
        forget(trainer, [0])


def test_sequential_requests_of_the_published_methods(tmp_path: Path) -> None:
    """Their exact sum is gathered anew, without the forgotten rows; or the retained rows are given."""
    trainer = trained(tmp_path)
    forget(trainer)
    memory = trainer.gather(EXACT)
    kept = [i for i in range(ROWS) if i not in FORGET]
    assert (memory.n_rows, memory.forgotten_rows) == (len(kept), len(FORGET))
    expected = gradient_loop(trainer.model, [trainer.train_dataset[i] for i in kept])[0]
    for name, total in memory.gradient_sum.items():
        torch.testing.assert_close(total.double(), expected[name], rtol=0, atol=1e-5, msg=name)
    before = state_of(trainer.model)
    second = forget(trainer, [0, 2])
    from_memory = state_of(trainer.model)
    second.revert()
    assert_bits(trainer.model, before)
    retain = trainer.train_dataset.select([i for i in kept if i not in (0, 2)])
    forget(trainer, [0, 2], retain_dataset=retain)
    for name, value in trainer.model.named_parameters():
        clear = (value - from_memory[name]).abs() < 1e-6
        assert float(clear.float().mean()) > 0.9 or name.endswith("key.bias"), name


def test_save_model_writes_the_memory_of_the_saved_weights(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    forget(trainer)
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    loaded = GradientMemory.load(folder)
    loaded.check_model(trainer.model)
    assert loaded.n_rows == ROWS - len(FORGET)
    # What training itself saved still belongs to the weights before the request.
    with pytest.raises(StaleMemoryError):
        GradientMemory.load(tmp_path).check_model(trainer.model)


@pytest.mark.parametrize("crash", [False, True])
def test_an_ended_memory_is_removed_from_the_folder(
    crash: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(tmp_path)
    trainer.save_model()
    before = state_of(trainer.model)
    (tmp_path / "_iau" / "ledger.jsonl").write_text("kept")
    result = forget(trainer, method="retrain", config=RetrainConfig(model_init=lambda: bert(seed=4)))
    assert trainer.memory is None and GradientMemory.load(tmp_path)  # nothing was saved yet
    if crash:
        removed = Path.unlink

        def stopped(path: Path, *args: Any, **kwargs: Any) -> None:
            if path.suffix == ".safetensors":
                raise KeyboardInterrupt
            removed(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", stopped)
            with pytest.raises(KeyboardInterrupt):
                trainer.save_model()
        with pytest.raises(MemoryFileError, match="No gradient memory"):
            GradientMemory.load(tmp_path)
    trainer.save_model()
    assert sorted(path.name for path in (tmp_path / "_iau").iterdir()) == [".gitignore", "card.json", "ledger.jsonl"]
    assert make_trainer(tmp_path, model=trainer.model).memory is None
    # A memory that was gathered at the new weights meanwhile is not touched.
    gather(trainer.model, trainer.train_dataset, config=EXACT, data_collator=trainer.data_collator).save(
        tmp_path / "_iau"
    )
    trainer.save_model()
    GradientMemory.load(tmp_path).check_model(trainer.model)
    result.revert()
    assert_bits(trainer.model, before)
    trainer.save_model()
    GradientMemory.load(tmp_path).check_model(trainer.model)


def test_a_checkpoint_of_training_carries_no_memory(tmp_path: Path) -> None:
    trainer = trained(tmp_path, settings={"save_strategy": "steps", "save_steps": 1})
    names = [path.name for folder in tmp_path.glob("checkpoint-*") for path in folder.rglob("*")]
    assert names and not [name for name in names if "memory" in name or name == "_iau"]
    assert (tmp_path / "_iau" / "memory.json").is_file()
    assert trainer.memory is not None


def test_a_memory_that_is_given_or_lies_beside_the_model_is_used(tmp_path: Path) -> None:
    first = trained(tmp_path)
    model = first.model
    found = make_trainer(tmp_path, model=model)  # from output_dir/_iau
    assert found.memory is not None
    given = make_trainer(tmp_path / "elsewhere", model=model, memory=first.memory)
    assert given.memory is first.memory
    results = []
    for trainer in (first, found, given):
        result = forget(trainer)
        results.append(state_of(model))
        result.revert()
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in results[0])


# Methods of users


def test_a_registered_method_runs(tmp_path: Path) -> None:
    @register_method
    class Shrink:
        """Makes every weight a little smaller."""

        name = "shrink"
        config_class = IAUReleasedConfig
        citation = "nobody"

        def check(self, context: ForgetContext, config: IAUReleasedConfig) -> None:
            if len(context.forget) > 5:
                raise RequestError("shrink takes at most 5 rows.")

        def run(self, context: ForgetContext, config: IAUReleasedConfig) -> MethodOutcome:
            with torch.no_grad():
                for parameter in context.model.parameters():
                    parameter.mul_(1 - config.lr)
            return MethodOutcome(diagnostics={"shrunk_by": config.lr}, warnings=["It is smaller now."], verdict="check")

    try:
        trainer = make_trainer(tmp_path, "plain")
        before = parameters_of(trainer.model)
        with pytest.raises(RequestError, match="at most 5"):
            forget(trainer, list(range(6)), method="shrink")
        result = forget(trainer, method="shrink", config=IAUReleasedConfig(lr=0.1))
    finally:
        _METHODS.pop("shrink")
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name] * 0.9)
    assert result.report.method == "shrink"
    assert result.report.config == {"lr": 0.1}
    assert result.report.diagnostics["shrunk_by"] == 0.1
    assert result.report.verdict == "check"
    assert "It is smaller now." in result.report.warnings
    assert result.memory is None
    result.revert()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def test_a_class_that_is_no_method_is_not_registered() -> None:
    class Half:
        name = "half"

        def run(self) -> None: ...

    with pytest.raises(IAUError, match="Half lacks"):
        register_method(Half)


# The report


def test_the_report_has_every_set_and_the_retrained_models(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    test_rows = trainer.eval_dataset.select([0, 1, 2])
    result = forget(trainer, test_dataset=test_rows, retrained_model=[bert(seed=1), bert(seed=2)])
    report = result.report
    for figures in (report.before, report.after, report.retrained):
        assert figures is not None
        for key in ("forget_accuracy", "forget_loss", "retain_loss", "held_out_loss", "test_loss", "mia_auc_test"):
            assert figures[key] is not None, key
    assert report.gap is not None and report.noise_floor is not None
    assert report.counts["forget_rows"] == len(FORGET)
    assert report.counts["train_rows"] == ROWS
    assert report.counts["retain_rows_measured"] == ROWS - len(FORGET)
    assert report.seed == trainer.args.seed
    assert report.config == {"lr": 1e-3}
    assert {"check", "measure_before", "gradient", "update", "measure_after", "measure_retrained"} <= set(
        report.seconds
    )
    assert report.per_row_suppressed
    report.save(tmp_path / "report")
    assert (tmp_path / "report" / "report.json").is_file()


@pytest.mark.parametrize("failing", [False, True])
def test_a_retrained_model_is_put_back_where_and_as_it_was(
    failing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trained(tmp_path)
    retrained = bert(seed=1).train()
    retrained.classifier.eval()
    modes, bits = [module.training for module in retrained.modules()], state_of(retrained)
    moves, measured = [], serving.measure_model

    def moved(module: nn.Module, device: torch.device) -> nn.Module:
        moves.append((module, torch.device(device)))
        return module

    def measure(model: nn.Module, *splits: Any) -> Any:
        if model is retrained:
            assert moves == [(retrained, torch.device("meta"))]  # as if that were the trainer's device
            if failing:
                raise RequestError("cannot be measured")
        return measured(model, *splits)

    monkeypatch.setattr(serving, "measure_model", measure)
    monkeypatch.setattr(serving, "placed_on", lambda model, _: placed_on(model, torch.device("meta")))
    monkeypatch.setattr(type(retrained), "to", moved)
    for layer_class in {type(module) for module in retrained.modules()}:
        monkeypatch.setattr(layer_class, "to", moved)
    with pytest.raises(RequestError) if failing else contextlib.nullcontext():
        forget(trainer, retrained_model=retrained)
    own = [module for module in retrained.modules() if any(True for _ in module.parameters(recurse=False))]
    assert [(module, device) for module, device in moves[1:] if module in own] == [
        (m, torch.device("cpu")) for m in own
    ]
    assert [module.training for module in retrained.modules()] == modes
    assert_bits(retrained, bits)
