"""What every baseline has in common: rollback, revert, dry run, memory, sequence, and clear errors."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from baseline_settings import quick_settings
from baselines import KEPT, exact_trainer
from tiny_models import RowList, pad_right, rows_of
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from unlearning_trainers import FORGET, ROWS, WITH_CURVATURE, assert_bits, make_trainer, state_of

from hf_iau import UnlearningTrainer
from hf_iau.data import RowSource
from hf_iau.data.digests import row_bytes
from hf_iau.errors import ConfigError, NonFiniteGradientError, RequestError
from hf_iau.methods.base import available_methods
from hf_iau.methods.baselines.bad_teacher import BadTeacherConfig
from hf_iau.methods.baselines.fine_tune import FineTuneConfig
from hf_iau.methods.baselines.fisher_forgetting import FisherForgettingConfig
from hf_iau.methods.baselines.gradient_ascent import GradientAscentConfig
from hf_iau.methods.baselines.influence_cg import InfluenceCGConfig
from hf_iau.methods.baselines.l1_sparse import L1SparseConfig
from hf_iau.methods.baselines.neggrad_plus import NegGradPlusConfig
from hf_iau.methods.baselines.retrain import RetrainConfig
from hf_iau.methods.baselines.salun import SalUnConfig
from hf_iau.methods.baselines.scrub import SCRUBConfig
from hf_iau.methods.baselines.ssd import SSDConfig
from hf_iau.methods.baselines.training_loop import TrainingLoopConfig
from hf_iau.methods.baselines.unrolling_sgd import UnrollingSGDConfig
from hf_iau.methods.context import remaining_positions

FAMILY = "resnet"  # has BatchNorm statistics, which move too
CONFIGS = quick_settings(FAMILY)
EPOCHS = [name for name, config in CONFIGS.items() if isinstance(config, TrainingLoopConfig)]
NEED_RETAINED = [name for name in CONFIGS if name not in ("gradient-ascent", "unrolling-sgd")]

BATCHES = {"per_device_train_batch_size": 5}  # a plain Trainer may not be left with a single row, for BatchNorm


def test_no_baseline_is_left_out() -> None:
    assert sorted([*CONFIGS, "iau", "iau-paper", "iau-released"]) == available_methods()


class Broken(Exception):
    pass


def unlearn(trainer: UnlearningTrainer, method: str, rows: Any = FORGET, **kwargs: Any) -> Any:
    return trainer.unlearn(forget_indices=rows, **({"method": method, "config": CONFIGS[method]} | kwargs))


@pytest.mark.parametrize("method", CONFIGS)
def test_a_baseline_moves_the_model_and_is_reverted_bit_for_bit(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, FAMILY, settings=BATCHES)
    memory = trainer.gather(WITH_CURVATURE)
    trainer.model.train()
    before, generator = state_of(trainer.model), torch.get_rng_state()
    flags = [module.training for module in trainer.model.modules()]

    dry = unlearn(trainer, method, dry_run=True)
    assert_bits(trainer.model, before)
    assert trainer.memory is memory
    result = unlearn(trainer, method)

    after = state_of(trainer.model)
    assert dry.report.after == result.report.after  # it follows from the seed
    assert any(not torch.equal(after[name], before[name]) for name in after)
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in trainer.model.modules()] == flags
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert result.report.method == method
    assert result.report.seconds["update"] > 0
    assert "update" in result.report.peak_memory_bytes
    result.revert()
    assert_bits(trainer.model, before)
    assert trainer.memory is memory


@pytest.mark.parametrize("method", CONFIGS)
def test_the_memory_afterwards_claims_nothing_that_does_not_hold(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, FAMILY, settings=BATCHES)
    trainer.gather(WITH_CURVATURE)
    result = unlearn(trainer, method)
    if method == "retrain":
        assert result.memory is trainer.memory is None
        assert any("trainer.gather()" in sentence for sentence in result.report.warnings)
    else:
        assert result.memory is trainer.memory
        # One step along the forget rows' gradient moves the sum along with it; many steps do not.
        assert result.memory.gradient_sum_kind == ("first-order" if method == "influence-cg" else "none")
        assert result.memory.n_rows == ROWS - len(FORGET)
        result.memory.check_model(trainer.model)
    anew = trainer.gather(WITH_CURVATURE)  # without the forgotten rows
    assert trainer.memory is anew
    assert (anew.n_rows, anew.forgotten_rows, anew.gradient_sum_kind) == (ROWS - len(FORGET), len(FORGET), "full")


@pytest.mark.parametrize("method", CONFIGS)
def test_requests_follow_one_another(method: str, tmp_path: Path) -> None:
    """The second one neither retains nor forgets the rows of the first, and equals one with the rows named."""
    trainer = make_trainer(tmp_path, FAMILY, settings=BATCHES)
    unlearn(trainer, method)
    if method != "retrain":  # which makes the weights anew, without any of them
        with pytest.raises(RequestError, match="already forgotten"):
            unlearn(trainer, method, [FORGET[0], 2])
    between = state_of(trainer.model)
    second = unlearn(trainer, method, [2, 3])
    after = state_of(trainer.model)
    if method in NEED_RETAINED:
        assert second.report.diagnostics["retained_rows"] == ROWS - len(FORGET) - 2
        second.revert()
        assert_bits(trainer.model, between)
        kept = [i for i in KEPT if i not in (2, 3)]
        unlearn(trainer, method, [2, 3], retain_dataset=trainer.train_dataset.select(kept))
        assert_bits(trainer.model, after)


@pytest.mark.parametrize("method", [*EPOCHS, "retrain"])
def test_an_exception_halfway_leaves_every_bit(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, FAMILY, settings=BATCHES)
    trainer.gather(WITH_CURVATURE)
    before, memory = state_of(trainer.model), trainer.memory
    passes = []

    def break_third(module: nn.Module, args: Any, output: Any) -> None:
        if module.training and type(module).__name__ == "ResNetForImageClassification":
            passes.append(module)
            if len(passes) == 3:
                raise Broken

    hook = register_module_forward_hook(break_third)
    config = replace(CONFIGS[method], epochs=3) if method in EPOCHS else CONFIGS[method]
    try:
        with pytest.raises(Broken):
            unlearn(trainer, method, config=config)
    finally:
        hook.remove()
    assert len(passes) == 3
    assert_bits(trainer.model, before)
    assert trainer.memory is memory


@pytest.mark.parametrize(
    "method, part",
    [
        ("ssd", "ssd.dampening_factor"),
        ("influence-cg", "influence_cg.apply_step"),
        ("unrolling-sgd", "unrolling_sgd.apply_step"),
    ],
)
def test_an_exception_while_weights_are_written_leaves_every_bit(
    method: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, FAMILY, settings=BATCHES)
    before = state_of(trainer.model)
    calls = []

    def halfway(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        if method == "ssd" and len(calls) < 3:
            return torch.full_like(args[0], 0.5)
        with torch.no_grad():
            next(trainer.model.parameters()).zero_()
        raise Broken

    monkeypatch.setattr(f"hf_iau.methods.baselines.{part}", halfway)
    with pytest.raises(Broken):
        unlearn(trainer, method)
    assert_bits(trainer.model, before)


@pytest.mark.parametrize("method", NEED_RETAINED)
def test_missing_retained_rows_are_named(method: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, FAMILY, settings=BATCHES)
    rows = trainer.train_dataset.select(FORGET)
    trainer.train_dataset = None
    with pytest.raises(RequestError, match=rf"'{method}' needs the retained rows.*retain_dataset="):
        trainer.unlearn(rows, method=method, config=CONFIGS[method])


def test_as_many_copies_of_a_row_stay_as_were_not_forgotten(tmp_path: Path) -> None:
    rows = rows_of("plain", ROWS)
    rows[9] = dict(rows[1])  # a copy that is kept
    trainer = make_trainer(tmp_path, "plain", rows=rows)
    first = unlearn(trainer, "fine-tune", [1])
    assert first.report.diagnostics["retained_rows"] == ROWS - 1
    second = unlearn(trainer, "fine-tune", [5])
    assert second.report.diagnostics["retained_rows"] == ROWS - 2
    first_rows = trainer.train_dataset.select([9])
    third = trainer.unlearn(first_rows, method="fine-tune", config=CONFIGS["fine-tune"])
    assert third.report.diagnostics["retained_rows"] == ROWS - 3


def test_rows_forgotten_earlier_are_found_without_reading_all_others() -> None:
    class Counting(RowList):
        reads = 0

        def __getitem__(self, position: int) -> dict[str, Tensor]:
            self.reads += 1
            return super().__getitem__(position)

    rows = rows_of("plain", ROWS)
    rows[9] = dict(rows[1])
    dataset = Counting(rows)
    gone = Counter(row_bytes(dataset[i]) for i in (1, 5))
    kept = [i for i in range(ROWS) if i not in (1, 4, 5)]
    for likely, reads in (((5, 1), 2), ((5, 7, 99, 4, 1), 3), ((), 5), ((2, 3), 5)):
        dataset.reads = 0
        source = RowSource(dataset, pad_right())  # a source remembers what it has read
        assert remaining_positions(source, gone, [4], likely) == kept
        assert dataset.reads == reads, likely
    assert remaining_positions(source, gone, [4], (9, 5)) == [0, 1, 2, 3, 6, 7, 8, 10, 11]  # a copy is as good
    dataset.reads = 0
    assert remaining_positions(source, Counter(), [4]) == [i for i in range(ROWS) if i != 4]
    assert dataset.reads == 0


@pytest.mark.parametrize(
    "family, frozen", [("bert", "bert.embeddings"), ("lora", "base_layer")], ids=["partly frozen", "LoRA"]
)
@pytest.mark.parametrize("method", [name for name in CONFIGS if name not in ("retrain", "unrolling-sgd")])
def test_frozen_parameters_do_not_move(method: str, family: str, frozen: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, family)
    for name, parameter in trainer.model.named_parameters():
        if frozen in name:
            parameter.requires_grad = False
    before = state_of(trainer.model)
    unlearn(trainer, method)
    moved: dict[str, Tensor] = {n: p for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(parameter.requires_grad for parameter in moved.values())


def test_a_language_model_is_counted_in_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "gpt2")
    targets = trainer.gather(WITH_CURVATURE).n_targets
    result = unlearn(trainer, "gradient-ascent")
    rows = [trainer.train_dataset[i]["labels"] for i in FORGET]
    assert result.memory.n_targets == targets - sum(sum(t != -100 for t in labels[1:]) for labels in rows)


@pytest.mark.parametrize(
    "build_config, match",
    [
        (lambda: FineTuneConfig(epochs=0), r"epochs=0\): give a whole number >= 1"),
        (lambda: FineTuneConfig(epochs=1.5), "whole number"),
        (lambda: FineTuneConfig(lr=float("nan")), r"lr=nan\): give a finite number >= 0"),
        (lambda: FineTuneConfig(optimizer="adam"), "choose one of 'sgd', 'adamw'"),
        (lambda: FineTuneConfig(batch_size=0), "batch_size=0"),
        (lambda: GradientAscentConfig(momentum=1.0), "momentum=1.0.*< 1"),
        (lambda: GradientAscentConfig(weight_decay=-1), "weight_decay=-1"),
        (lambda: NegGradPlusConfig(alpha=1.5), r"NegGradPlusConfig\(alpha=1.5\).*<= 1"),
        (
            lambda: SalUnConfig(salient_share=0.0),
            r"SalUnConfig\(salient_share=0.0\): give a finite number > 0 and <= 1",
        ),
        (lambda: SSDConfig(selection=0), "selection=0"),
        (lambda: SCRUBConfig(epochs=2), "max_epochs=3, epochs=2.*at least as many"),
        (lambda: SCRUBConfig(temperature=0.0), "temperature=0.0"),
        (lambda: InfluenceCGConfig(curvature="fisher"), "choose one of 'gauss-newton', 'hessian'"),
        (lambda: InfluenceCGConfig(damping=float("inf")), "damping=inf"),
        (lambda: BadTeacherConfig(retain_share=1.2), "retain_share=1.2"),
        (lambda: L1SparseConfig(gamma=-1e-5), "gamma=-1e-05"),
        (lambda: FisherForgettingConfig(alpha=-1), "alpha=-1"),
        (lambda: UnrollingSGDConfig(lr=0.0), "lr=0.0"),
        (lambda: RetrainConfig(initial_weights="nowhere"), "safetensors file"),
        (lambda: RetrainConfig(model_init=3), "a function that makes a model"),
        (lambda: RetrainConfig(model_init=lambda: nn.Linear(1, 1), initial_weights="x"), "both"),
    ],
)
def test_bad_settings_are_refused_when_they_are_made(build_config: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build_config()


def test_a_diverging_request_is_stopped_and_undone(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    before = state_of(trainer.model)
    with pytest.raises((NonFiniteGradientError, RequestError), match=r"nothing was changed|not applied"):
        unlearn(trainer, "gradient-ascent", config=GradientAscentConfig(lr=1e300, epochs=4))
    assert_bits(trainer.model, before)
