"""`bad-teacher`, `l1-sparse`, `fisher-forgetting` and `unrolling-sgd` against plain restatements."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from baselines import KEPT, assert_close, copy_in_training, exact_trainer, loss_of, row_batches
from scipy.stats import kstest
from tiny_models import build, rows_of
from transformers import set_seed
from unlearning_trainers import FORGET, ROWS, gradient_loop, make_trainer, state_of

from hf_iau import UnlearningTrainer
from hf_iau.errors import RequestError
from hf_iau.methods.baselines.bad_teacher import BadTeacherConfig
from hf_iau.methods.baselines.fisher_forgetting import FisherForgettingConfig
from hf_iau.methods.baselines.l1_sparse import L1SparseConfig
from hf_iau.methods.baselines.unrolling_sgd import UnrollingSGDConfig

SEED = 3  # of `arguments`


def unlearn(trainer: UnlearningTrainer, method: str, config: Any, **kwargs: Any) -> Any:
    return trainer.unlearn(forget_indices=FORGET, method=method, config=config, **kwargs)


# bad-teacher


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_bad_teacher_teaches_the_forget_rows_and_the_old_model_the_others(
    temperature: float, tmp_path: Path
) -> None:
    trainer = exact_trainer(tmp_path, "resnet")
    good, bad, student = copy.deepcopy(trainer.model).eval(), copy.deepcopy(trainer.model).eval(), None
    set_seed(SEED)
    for module in bad.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    student = copy_in_training(trainer)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    rows = [rows_of("resnet", ROWS)[i] for i in FORGET + KEPT]
    for epoch in range(2):
        order = np.random.default_rng([SEED, epoch]).permutation(ROWS)
        for start in range(0, ROWS, 4):
            chosen = order[start : start + 4]
            batch = trainer.data_collator([dict(rows[i]) for i in chosen])
            ours = F.log_softmax(student(**batch)["logits"] / temperature, dim=1)
            with torch.no_grad():
                from_bad, from_good = (
                    F.softmax(teacher(**batch)["logits"] / temperature, dim=1) for teacher in (bad, good)
                )
            is_forget = torch.tensor(chosen < len(FORGET))[:, None]
            wanted = torch.where(is_forget, from_bad, from_good)
            optimizer.zero_grad()
            F.kl_div(ours, wanted, reduction="batchmean").backward()
            optimizer.step()
    config = BadTeacherConfig(
        epochs=2, lr=0.05, optimizer="sgd", momentum=0.0, retain_share=1.0, temperature=temperature
    )
    report = unlearn(trainer, "bad-teacher", config).report
    assert_close(trainer.model, student, 1e-9)
    assert report.diagnostics["drawn_rows"] == len(KEPT)


def test_a_share_of_the_retained_rows_is_drawn(tmp_path: Path) -> None:
    report = unlearn(exact_trainer(tmp_path), "bad-teacher", BadTeacherConfig(retain_share=0.5)).report
    assert report.diagnostics["drawn_rows"] == int(0.5 * len(KEPT))
    assert report.diagnostics["retained_rows"] == len(KEPT)


def test_the_bad_teacher_serves_language_models_by_token(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "gpt2")
    curve = unlearn(trainer, "bad-teacher", BadTeacherConfig(epochs=4, lr=1e-2)).report.diagnostics
    assert curve["divergence_by_epoch"][-1] < curve["divergence_by_epoch"][0]


# l1-sparse


def test_the_pull_towards_zero_fades_linearly(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    expected = copy_in_training(trainer)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    for epoch in range(4):
        for rows in row_batches(KEPT, 3, SEED, epoch):
            weight = 0.05 * [1.0, 0.75, 0.5, 0.25][epoch]
            optimizer.zero_grad()
            (loss_of(trainer, expected, rows) + weight * sum(p.abs().sum() for p in expected.parameters())).backward()
            optimizer.step()
    unlearn(trainer, "l1-sparse", L1SparseConfig(epochs=4, lr=0.02, gamma=0.05, batch_size=3))
    assert_close(trainer.model, expected)


# fisher-forgetting


def test_the_noise_has_the_stated_variance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divided by √(α/F) the noise is standard normal. F is drawn here, to be known exactly."""
    trainer = exact_trainer(tmp_path)
    before = state_of(trainer.model)
    alpha = 1e-6
    fisher = {name: torch.rand_like(p).mul(12).exp() * 1e-5 for name, p in trainer.model.named_parameters()}
    asked = []

    def known(context: Any, source: Any, kind: str) -> Any:
        asked.append((len(source), kind))
        return fisher, len(source)

    monkeypatch.setattr("hf_iau.methods.baselines.fisher_forgetting.fisher_diagonal", known)
    scores = []
    for seed in range(10):
        trainer.args.seed = seed
        result = unlearn(trainer, "fisher-forgetting", FisherForgettingConfig(alpha=alpha, largest_inverse=1e4))
        for name, value in trainer.model.named_parameters():
            deviation = (alpha * (1 / (fisher[name] + 1e-8)).clamp(max=1e4)).sqrt()
            scores.append(((value.detach() - before[name]) / deviation).flatten())
        result.revert()
    assert asked == [(len(KEPT), "true")] * 10
    assert any(bool((1 / f > 1e4).any()) for f in fisher.values())  # the cut is tested as well
    assert kstest(torch.cat(scores).numpy(), "norm").pvalue > 0.05
    assert float(torch.cat(scores).var()) == pytest.approx(1.0, abs=0.15)


def test_weights_that_do_not_matter_get_no_more_noise_than_the_cut(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "bert")
    before = state_of(trainer.model)
    unlearn(trainer, "fisher-forgetting", FisherForgettingConfig(alpha=1e-6, largest_inverse=100.0))
    for name, value in trainer.model.named_parameters():
        if name.endswith("key.bias"):  # without any gradient
            deviation = float((value - before[name]).detach().std())
            assert deviation == pytest.approx(1e-2, rel=0.6)
        assert float((value - before[name]).detach().abs().max()) < 6e-2


# unrolling-sgd


def test_unrolling_adds_back_the_first_gradient_of_the_forget_rows(tmp_path: Path) -> None:
    trainer = exact_trainer(
        tmp_path,
        settings={"num_train_epochs": 5, "max_steps": -1, "learning_rate": 0.02, "gradient_accumulation_steps": 2},
    )
    before = state_of(trainer.model)
    first = build("plain", dtype=torch.float64, seed=9)
    gradient, _ = gradient_loop(first, [rows_of("plain", ROWS)[i] for i in FORGET])
    config = UnrollingSGDConfig(model_init=lambda: build("plain", dtype=torch.float64, seed=9))
    result = unlearn(trainer, "unrolling-sgd", config)
    for name, value in trainer.model.named_parameters():
        expected = before[name] + 0.02 * 5 / (4 * 2) * gradient[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=name)
    assert any("is for SGD" in sentence for sentence in result.report.warnings)
    result.revert()
    given = UnrollingSGDConfig(model_init=config.model_init, lr=0.3, epochs=2.5, batch_size=3)
    report = unlearn(trainer, "unrolling-sgd", given).report
    for name, value in trainer.model.named_parameters():
        expected = before[name] + 0.3 * 2.5 / 3 * gradient[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=name)
    assert not any("is for SGD" in sentence for sentence in report.warnings)


def test_unrolling_undoes_one_step_of_sgd_exactly(tmp_path: Path) -> None:
    """One step from θ₀ on all rows, unlearned, is the step on the retained rows at the same divisor."""
    start = build("plain", dtype=torch.float64, seed=9)
    gradient, _ = gradient_loop(start, rows_of("plain", ROWS))
    of_kept, _ = gradient_loop(start, [rows_of("plain", ROWS)[i] for i in KEPT])
    model = copy.deepcopy(start)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.1 * gradient[name] / ROWS
    trainer = exact_trainer(tmp_path, model=model)
    config = UnrollingSGDConfig(model_init=lambda: start, lr=0.1, epochs=1, batch_size=ROWS)
    unlearn(trainer, "unrolling-sgd", config)
    for name, value in trainer.model.named_parameters():
        expected = dict(start.named_parameters())[name] - 0.1 * of_kept[name] / ROWS
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12, msg=name)


def test_unrolling_counts_steps_where_training_did(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)  # three steps of four rows are one epoch of twelve
    report = unlearn(trainer, "unrolling-sgd", UnrollingSGDConfig(model_init=lambda: build("plain").double())).report
    assert report.diagnostics["epochs"] == 1.0


def test_unrolling_needs_to_know_where_training_started(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"'unrolling-sgd' needs the model.*UnrollingSGDConfig\(model_init="):
        unlearn(exact_trainer(tmp_path), "unrolling-sgd", None)
