"""`random-labels`, `salun`, `ssd`, `scrub` and `influence-cg` against plain restatements."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from baselines import KEPT, assert_close, copy_in_training, exact_trainer, loss_of, row_batches
from tiny_models import bert, multi_label_rows, plain_rows, rows_of
from torch import Tensor, nn
from unlearning_trainers import FORGET, ROWS, assert_bits, gradient_loop, make_trainer, state_of

from hf_iau import UnlearningTrainer
from hf_iau.errors import ConfigError, UnsupportedModelError
from hf_iau.methods.baselines.influence_cg import CurvatureProduct, InfluenceCGConfig
from hf_iau.methods.baselines.random_labels import RandomLabelsConfig, other_labels
from hf_iau.methods.baselines.salun import SalUnConfig, saliency_mask
from hf_iau.methods.baselines.scrub import SCRUBConfig
from hf_iau.methods.baselines.ssd import SSDConfig, dampening_factor
from hf_iau.unlearn.prepare import request_context
from hf_iau.unlearn.rows import NamedRows
from hf_iau.utils.timing import PhaseTimer

SEED = 3  # of `arguments`
CLASSES = 3


def unlearn(trainer: UnlearningTrainer, method: str, config: Any, **kwargs: Any) -> Any:
    return trainer.unlearn(forget_indices=FORGET, method=method, config=config, **kwargs)


# random-labels and salun


def test_other_labels_are_never_the_own_and_equally_likely() -> None:
    labels = torch.tensor([0, 1, 2, 3, -100]).repeat(3000)
    drawn = other_labels(labels, 4, np.random.default_rng(0))
    assert bool((drawn[labels == -100] == -100).all())
    for label in range(4):
        counts = torch.bincount(drawn[labels == label], minlength=4)
        assert counts[label] == 0
        others = counts[torch.arange(4) != label].double() / 3000
        assert float((others - 1 / 3).abs().max()) < 4 * (2 / 9 / 3000) ** 0.5


def restated_random_labels(trainer: UnlearningTrainer, config: Any, mask: dict[str, Tensor] | None) -> nn.Module:
    model = copy_in_training(trainer)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay)
    for epoch in range(config.epochs):
        draws = np.random.default_rng([SEED, epoch, 1])
        batches = []
        for rows in row_batches(FORGET, 3, SEED, epoch):
            shift = draws.integers(1, CLASSES, size=len(rows))
            batches.append(
                [row | {"labels": int((row["labels"] + s) % CLASSES)} for row, s in zip(rows, shift, strict=False)]
            )
        for rows in batches + row_batches(KEPT, 3, SEED, epoch):
            optimizer.zero_grad()
            loss_of(trainer, model, rows).backward()
            for name, parameter in model.named_parameters():
                if mask is not None:
                    parameter.grad *= mask[name]
            optimizer.step()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if mask is not None:
                        parameter[~mask[name]] = start[name][~mask[name]]
    return model


def test_random_labels_is_sgd_on_other_labels_and_then_on_the_retained_rows(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    config = RandomLabelsConfig(epochs=2, lr=0.05, batch_size=3)
    expected = restated_random_labels(trainer, config, None)
    unlearn(trainer, "random-labels", config)
    assert_close(trainer.model, expected)


def test_salun_moves_the_salient_weights_alone(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    before = state_of(trainer.model)
    config = SalUnConfig(epochs=2, lr=0.05, batch_size=3, salient_share=0.3, weight_decay=0.1)
    gradient, _ = gradient_loop(trainer.model, [rows_of("plain", ROWS)[i] for i in FORGET])
    entries = torch.cat([tensor.flatten() for tensor in gradient.values()]).abs()
    threshold = entries.sort(descending=True).values[int(0.3 * len(entries)) - 1]
    mask = {name: tensor.abs() >= threshold for name, tensor in gradient.items()}
    expected = restated_random_labels(trainer, config, mask)
    result = unlearn(trainer, "salun", config)
    assert_close(trainer.model, expected)
    moved = {name: value != before[name] for name, value in trainer.model.named_parameters()}
    assert all(torch.equal(moved[name], mask[name]) for name in mask)
    assert result.report.diagnostics["salient_weights"] == int(0.3 * len(entries))


def test_the_saliency_mask_ranks_over_all_parameters_and_breaks_ties() -> None:
    gradient = {"a": torch.tensor([[1.0, -5.0], [0.0, 2.0]]), "b": torch.tensor([-4.0, 0.5])}
    mask = saliency_mask(gradient, 0.5)
    assert mask["a"].tolist() == [[False, True], [False, True]]
    assert mask["b"].tolist() == [True, False]
    equal = saliency_mask({"a": torch.ones(10)}, 0.3)
    assert int(equal["a"].sum()) == 3
    assert int(saliency_mask({"a": torch.ones(10)}, 1e-6)["a"].sum()) == 1


@pytest.mark.parametrize("method", ["random-labels", "salun"])
@pytest.mark.parametrize("family", ["bert-tokens", "gpt2"])
def test_relabelling_refuses_other_tasks_by_name(method: str, family: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'{method}' serves single-label.*not token prediction"):
        unlearn(make_trainer(tmp_path, family), method, None)


@pytest.mark.parametrize("method", ["salun", "scrub"])
def test_several_labels_a_row_are_refused(method: str, tmp_path: Path) -> None:
    model = bert(problem_type="multi_label_classification")
    trainer = make_trainer(tmp_path, model=model, rows=multi_label_rows(ROWS))
    with pytest.raises(UnsupportedModelError, match="not multi-label classification"):
        unlearn(trainer, method, None)


# ssd


def squared_gradients(trainer: UnlearningTrainer, family: str, numbers: list[int]) -> dict[str, Tensor]:
    """The mean over rows of the squared gradient of a row's loss: a loop over single rows."""
    rows, model = rows_of(family, ROWS), copy.deepcopy(trainer.model).eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for number in numbers:
        gradients = torch.autograd.grad(loss_of(trainer, model, [rows[number]]), list(model.parameters()))
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient.square() / len(numbers)
    return total


@pytest.mark.parametrize("family", ["plain", "resnet", "bert"])
def test_ssd_dampens_what_the_formula_says(family: str, tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path, family)
    before = state_of(trainer.model)
    of_forget = squared_gradients(trainer, family, FORGET)
    of_all = squared_gradients(trainer, family, list(range(ROWS)))
    config = SSDConfig(selection=1.2, dampening=0.9)
    result = unlearn(trainer, "ssd", config)
    dampened = undampened = 0
    for name, value in trainer.model.named_parameters():
        f, d = of_forget[name].flatten(), of_all[name].flatten()
        old, new = before[name].flatten(), value.flatten()
        for i in range(len(f)):
            if abs(float(f[i] - 1.2 * d[i])) < 1e-12:  # rounding decides (a key's bias has no gradient)
                continue
            if f[i] > 1.2 * d[i]:
                assert float(new[i]) == pytest.approx(float(min(0.9 * d[i] / f[i], 1.0) * old[i]), rel=1e-9, abs=1e-13)
                dampened += 1
            else:
                assert new[i] == old[i]
                undampened += 1
    assert min(dampened, undampened) > 20
    assert result.report.diagnostics["dampened_weights"] >= dampened
    assert_bits_of_buffers(trainer.model, before)


def assert_bits_of_buffers(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_threshold_that_nothing_can_pass_is_reported(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    before = state_of(trainer.model)
    report = unlearn(trainer, "ssd", SSDConfig(selection=ROWS / len(FORGET))).report
    assert any(
        sentence.startswith("No weight was dampened") and " 4, rows by" in sentence for sentence in report.warnings
    )
    assert_bits(trainer.model, before)


def test_dampening_never_enlarges_a_weight_and_leaves_dead_ones() -> None:
    factor = dampening_factor(torch.tensor([4.0, 4.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]), 2.0, 10.0)
    assert factor.tolist() == [1.0, 0.0, 1.0, 1.0]
    factor = dampening_factor(torch.tensor([4.0]), torch.tensor([1.0]), 2.0, 0.5)
    assert factor.tolist() == [0.125]


# scrub


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_scrub_alternates_between_max_and_min_steps(temperature: float, tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path, "resnet")
    config = SCRUBConfig(
        epochs=3,
        max_epochs=2,
        lr=0.02,
        alpha=0.3,
        gamma=0.8,
        temperature=temperature,
        batch_size=3,
        decay_epochs=(1,),
        decay_rate=0.5,
    )
    teacher, model = copy.deepcopy(trainer.model).eval(), copy_in_training(trainer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    kinds = []

    def divergence(rows: list[Any]) -> tuple[Tensor, Tensor]:
        batch = trainer.data_collator([dict(row) for row in rows])
        outputs = model(**batch)
        with torch.no_grad():
            old = F.softmax(teacher(**batch)["logits"] / temperature, dim=1)
        new = F.log_softmax(outputs["logits"] / temperature, dim=1)
        return outputs["loss"], F.kl_div(new, old, reduction="batchmean") * temperature**2

    for epoch in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 if epoch < 1 else 0.01
        if epoch < 2:
            for rows in row_batches(FORGET, 3, SEED, epoch, "resnet"):
                kinds.append("max")
                optimizer.zero_grad()
                (-divergence(rows)[1]).backward()
                optimizer.step()
        for rows in row_batches(KEPT, 3, SEED, epoch, "resnet"):
            kinds.append("min")
            optimizer.zero_grad()
            loss, distance = divergence(rows)
            (0.8 * loss + 0.3 * distance).backward()
            optimizer.step()
    unlearn(trainer, "scrub", config)
    assert kinds == ["max", "min", "min", "min"] * 2 + ["min"] * 3
    assert_close(trainer.model, model, 1e-9)


def test_max_steps_of_scrub_lead_away_from_the_teacher_on_the_forget_rows(tmp_path: Path) -> None:
    distances = {}
    for max_epochs in (0, 4):
        trainer = exact_trainer(tmp_path)
        batch = trainer.data_collator([dict(rows_of("plain", ROWS)[i]) for i in FORGET])
        with torch.no_grad():
            old = trainer.model(**batch)["logits"].log_softmax(dim=1)
            unlearn(trainer, "scrub", SCRUBConfig(max_epochs=max_epochs, lr=0.05, decay_epochs=()))
            new = trainer.model(**batch)["logits"].log_softmax(dim=1)
        distances[max_epochs] = float(F.kl_div(new, old, reduction="batchmean", log_target=True))
    assert distances[4] > 1.1 * distances[0] > 0


def test_scrub_serves_language_models_by_token(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "gpt2")
    report = unlearn(trainer, "scrub", SCRUBConfig(epochs=2, max_epochs=1, lr=0.05)).report
    assert report.after["retain_loss"] < report.before["retain_loss"]


# influence-cg


def dense_curvature(model: nn.Module, numbers: list[int], kind: str) -> Tensor:
    """The Hessian (or Gauss-Newton matrix) of the mean loss, entry by entry."""
    rows = [rows_of("plain", ROWS)[i] for i in numbers]
    features = torch.tensor(np.stack([row["features"] for row in rows]), dtype=torch.float64)
    labels = torch.tensor([row["labels"] for row in rows])
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def logits(vector: Tensor) -> Tensor:
        parts = vector.split([s.numel() for s in shapes])
        given = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return torch.func.functional_call(model, given, (features,))["logits"]

    if kind == "hessian":
        return torch.autograd.functional.hessian(lambda v: F.cross_entropy(logits(v), labels), flat)
    jacobian = torch.autograd.functional.jacobian(logits, flat)
    p = logits(flat).detach().softmax(dim=1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for row in range(len(rows)):
        bend = torch.diag(p[row]) - torch.outer(p[row], p[row])
        total += jacobian[row].T @ bend @ jacobian[row]
    return total / len(rows)


@pytest.mark.parametrize("kind, damping", [("gauss-newton", 0.05), ("hessian", 1.5)])
def test_influence_is_the_exact_solve_of_the_dense_system(kind: str, damping: float, tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    before = state_of(trainer.model)
    matrix = dense_curvature(trainer.model, KEPT, kind)
    gradient, _ = gradient_loop(trainer.model, [rows_of("plain", ROWS)[i] for i in FORGET])
    right = torch.cat([gradient[name].flatten() for name, _ in trainer.model.named_parameters()]) / len(KEPT)
    expected = 2.0 * torch.linalg.solve(matrix + damping * torch.eye(len(right), dtype=torch.float64), right)
    config = InfluenceCGConfig(
        curvature=kind, damping=damping, scale=2.0, iterations=500, tolerance=1e-12, curvature_rows=None
    )
    report = unlearn(trainer, "influence-cg", config).report
    moved = torch.cat([(value - before[name]).flatten() for name, value in trainer.model.named_parameters()])
    torch.testing.assert_close(moved.detach(), expected, rtol=1e-8, atol=1e-12)
    assert report.diagnostics["relative_residual"] < 1e-12
    assert report.after["forget_loss"] > report.before["forget_loss"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "resnet"])
def test_gauss_newton_products_of_attention_and_convolution_models(family: str, tmp_path: Path) -> None:
    """vᵀ(Gv) is the curvature along v, and G is symmetric."""
    trainer = exact_trainer(tmp_path, family)
    forget = trainer.train_dataset.select(FORGET)
    context = request_context(trainer.view, NamedRows(forget, np.array(FORGET)), None, None, PhaseTimer())
    product = CurvatureProduct(context, context.retained_rows("test"), "gauss-newton")
    product.scale_of(product.source)
    size = sum(p.numel() for p in product.parameters)
    one, other = torch.randn(2, size, dtype=torch.float64)
    assert float(one @ product(other)) == pytest.approx(
        float(other @ product(one)), rel=1e-6
    )  # Llama norms are float32
    assert float(one @ product(one)) > 0


def test_bounded_rows_and_few_iterations_are_reported(tmp_path: Path) -> None:
    config = InfluenceCGConfig(curvature_rows=4, iterations=2, tolerance=1e-9)
    report = unlearn(exact_trainer(tmp_path), "influence-cg", config).report
    assert report.diagnostics["curvature_rows"] == 4
    assert report.diagnostics["iterations"] == 2
    assert any("stopped after 2 iterations" in sentence for sentence in report.warnings)


def test_negative_curvature_and_foreign_losses_are_refused(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    before = state_of(trainer.model)
    with pytest.raises(ConfigError, match=r"not positive definite.*raise damping"):
        unlearn(trainer, "influence-cg", InfluenceCGConfig(curvature="hessian", damping=0.0, iterations=500))
    assert_bits(trainer.model, before)

    def own(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs.pop("labels")
        return F.cross_entropy(model(**inputs)["logits"], labels, reduction="none")

    foreign = exact_trainer(tmp_path, row_loss=own, rows=plain_rows(ROWS))
    with pytest.raises(UnsupportedModelError, match=r"row_loss.*curvature='hessian'"):
        unlearn(foreign, "influence-cg", None)
    config = InfluenceCGConfig(curvature="hessian", damping=1.5, tolerance=1e-10)
    unlearn(foreign, "influence-cg", config)
    unlearn(trainer, "influence-cg", config)
    assert_close(foreign.model, trainer.model, 1e-9)
