"""Every fast path against a for-loop over rows and positions, in float64."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from curvature_loop import (
    build,
    collate,
    covariances,
    dense,
    make_source,
    one_by_one,
    random_vector,
    relative,
    trainable,
)
from torch import nn

from hf_iau.curvature import Curvature, DiagonalBlock, KroneckerBlock, fit_curvature
from hf_iau.curvature.eigenvectors import (
    divide_and_conquer_bytes,
    eigenvector_bytes,
    eigenvectors,
    spare_for_eigenvectors,
)
from hf_iau.curvature.fit_rows import FitRows
from hf_iau.curvature.layers import plan_layers
from hf_iau.data import ModelRowLoss, UserRowLoss
from hf_iau.errors import NonFiniteGradientError
from hf_iau.utils.timing import peak_allocated_bytes

MODELS = ["mlp", "frozen", "cnn", "twice", "positions", "bypassed", "gpt2", "llama", "bert", "bert-mlm", "lora", "vit"]


def check_against_loop(model: nn.Module, rows: list, curvature: Curvature, *, rtol: float = 1e-10) -> None:
    gradients, count = one_by_one(model, rows)
    assert (curvature.n_rows, curvature.n_targets) == (len(rows), count)
    assert sum(curvature.coverage().values()) == sum(p.numel() for p in trainable(model).values())
    assert [name for block in curvature.blocks.values() for name in block.shapes] == list(trainable(model))
    vector = random_vector(model)
    solved, multiplied = curvature.solve(vector, 0.1), curvature.multiply(vector)
    largest = max(block.mean_eigenvalue for block in curvature.blocks.values())
    for block in curvature.blocks.values():
        if isinstance(block, DiagonalBlock):
            expected = {name: sum(g[name] ** 2 for g in gradients) / count for name in block.shapes}
            for name, values in block.values.items():
                torch.testing.assert_close(values, expected[name], rtol=rtol, atol=1e-13 * largest)
            continue
        assert isinstance(block, KroneckerBlock)
        for group, (inputs, outputs) in enumerate(covariances(model, rows, block)):
            for basis, covariance in ((block.input_basis[group], inputs), (block.output_basis[group], outputs)):
                torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis)).double(), rtol=0, atol=1e-12)
                rotated = basis.T @ covariance @ basis
                off = rotated - torch.diag(rotated.diagonal())
                assert float(off.abs().max()) <= 1e-10 * float(rotated.abs().max()), block.name
        matrices = [block.layout.matrix(g) for g in gradients]
        expected_values = sum((block.output_basis.mT @ m @ block.input_basis) ** 2 for m in matrices) / count
        torch.testing.assert_close(block.values, expected_values, rtol=rtol, atol=1e-13 * largest)
        shift = 0.1 * block.values.mean()
        part = {name: vector[name] for name in block.shapes}
        for group, c in enumerate(dense(block)):
            v = block.layout.matrix(part)[group].reshape(-1)
            product = block.layout.matrix({name: multiplied[name] for name in part})[group].reshape(-1)
            assert float((product - c @ v).norm()) <= 1e-10 * float(c.norm() * v.norm())
            if not block.dead:
                found = block.layout.matrix({name: solved[name] for name in part})[group].reshape(-1)
                expected_step = torch.linalg.solve(c + shift * torch.eye(len(c)).double(), v)
                assert float((found - expected_step).norm()) <= 1e-10 * float(expected_step.norm())


@pytest.mark.parametrize("name", MODELS)
def test_factors_eigenvalues_and_steps(name: str) -> None:
    model, rows = build(name)
    rtol = 1e-6 if name == "llama" else 1e-10  # its RMSNorm computes in float32
    check_against_loop(model, rows, fit_curvature(model, make_source(rows)), rtol=rtol)


@pytest.mark.parametrize("batch_size", [1, 4, 10])
def test_convolutions_with_many_positions(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """Evenly spaced rows make the bases, whatever the batches; all rows make the eigenvalues."""
    model, rows = build("cnn")
    plain = fit_curvature(model, make_source(rows))
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    positions = {}
    for name in convolutions:
        model.get_submodule(name).register_forward_hook(
            lambda m, _, out, n=name: positions.update({n: out[0, 0].numel()})
        )
    with torch.no_grad():
        model(**collate(rows[:1]))
    budget = 4 * positions[convolutions[0]]  # four of the ten rows, for the first convolution
    monkeypatch.setattr("hf_iau.curvature.factor_sums.BASIS_POSITIONS", budget)
    thinned = fit_curvature(model, make_source(rows, batch_size))
    gradients, count = one_by_one(model, rows)
    for name, block in thinned.blocks.items():
        if not isinstance(block, KroneckerBlock):
            continue
        share = min(1.0, budget / (positions[name] * len(rows))) if name in positions else 1.0
        chosen = [i for i in range(len(rows)) if np.floor((i + 1) * share) > np.floor(i * share)]
        assert len(chosen) == 4 or name != convolutions[0]
        for group, (inputs, outputs) in enumerate(covariances(model, rows, block, chosen=chosen)):
            for basis, covariance in ((block.input_basis[group], inputs), (block.output_basis[group], outputs)):
                rotated = basis.T @ covariance @ basis
                off = rotated - torch.diag(rotated.diagonal())
                assert float(off.abs().max()) <= 1e-10 * float(rotated.abs().max()), name
        matrices = [block.layout.matrix(g) for g in gradients]
        expected = sum((block.output_basis.mT @ m @ block.input_basis) ** 2 for m in matrices) / count
        torch.testing.assert_close(block.values, expected, rtol=1e-10, atol=1e-14)
    first = thinned.blocks[convolutions[0]]
    assert not torch.allclose(first.input_basis.abs(), plain.blocks[convolutions[0]].input_basis.abs(), atol=1e-3)


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt2", "bert", "lora"])
def test_diagonal_kind(name: str) -> None:
    model, rows = build(name)
    curvature = fit_curvature(model, make_source(rows), kind="diagonal")
    assert set(curvature.coverage()) == {"diagonal"}
    check_against_loop(model, rows, curvature)


@pytest.mark.parametrize("name", ["cnn", "gpt2"])
def test_layers_over_the_size_limit(name: str) -> None:
    model, rows = build(name)
    curvature = fit_curvature(model, make_source(rows), max_factor_size=10)
    reasons = [layer["reason"] for layer in curvature.layers() if "max_factor_size=10" in (layer["reason"] or "")]
    assert reasons
    assert "kronecker" in curvature.coverage()
    check_against_loop(model, rows, curvature)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_counts_once(mode: str) -> None:
    plain, rows = build("none")
    expected = fit_curvature(plain, make_source(rows))
    model, _ = build(mode)
    model.load_state_dict(plain.state_dict())
    found = fit_curvature(model, make_source(rows))
    assert found.coverage() == expected.coverage() == {"kronecker": expected.coverage()["kronecker"]}
    vector = random_vector(model)
    assert relative(found.solve(vector, 0.1), expected.solve(vector, 0.1)) < 1e-10
    check_against_loop(plain, rows, found)


@pytest.mark.parametrize("name", ["mlp", "cnn", "twice", "gpt2", "bert"])
def test_cache_and_second_pass_agree(name: str) -> None:
    model, rows = build(name)
    cached = fit_curvature(model, make_source(rows))
    again = fit_curvature(model, make_source(rows), cache_bytes=0)
    assert (cached.details["passes"], again.details["passes"]) == (1, 2)
    for key, tensor in cached.tensors().items():
        torch.testing.assert_close(again.tensors()[key], tensor, rtol=1e-10, atol=1e-14)


def test_some_batches_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second pass begins behind what the cache could hold, whole batches of it."""
    model, rows = build("bert")
    expected = fit_curvature(model, make_source(rows))
    seen: list[int] = []
    batches = FitRows.batches

    def watched(rows: FitRows, what: str, start: int = 0) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        seen.append(start)
        return batches(rows, what, start)

    monkeypatch.setattr(FitRows, "batches", watched)
    for size in (1, 16_000, 36_000):
        found = fit_curvature(model, make_source(rows), cache_bytes=size)
        assert found.details["passes"] == 2
        for key, tensor in expected.tensors().items():
            torch.testing.assert_close(found.tensors()[key], tensor, rtol=1e-10, atol=1e-14)
    starts = seen[1::2]
    assert starts[0] == 0 < starts[1] < starts[2] < len(rows) and not any(seen[::2])


@pytest.mark.parametrize("little", [False, True])
def test_bytes_of_finding_eigenvectors(little: bool) -> None:
    """Two matrices less, and nothing outside of PyTorch's allocator, where there is little to spare."""
    size = 300
    covariance = torch.randn(1, size, size)
    covariance = covariance @ covariance.mT
    plan = plan_layers(nn.Linear(size, 5, bias=False), kronecker=True, max_factor_size=size)
    plan.kronecker[0].temporary_bytes = size if little else 2**30
    found = covariance.clone()
    tracemalloc.start()
    spare = spare_for_eigenvectors(plan.kronecker[0])
    peak = peak_allocated_bytes(lambda: eigenvectors(found, "layer", spare=spare))
    elsewhere = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak == pytest.approx(eigenvector_bytes(plan), rel=0.05)
    assert eigenvector_bytes(plan) == (1 if little else 3) * 8 * size**2
    assert divide_and_conquer_bytes(plan) == 3 * 8 * size**2
    assert elsewhere < 8 * size**2
    identity = torch.eye(size)[None]
    torch.testing.assert_close(found.mT @ found, identity, rtol=0.0, atol=1e-5)
    rotated = found.mT @ covariance @ found
    torch.testing.assert_close(rotated, rotated.diagonal(dim1=1, dim2=2).diag_embed(), rtol=1e-4, atol=1e-2)


def test_both_ways_to_eigenvectors_agree() -> None:
    """Of several groups, one one without anything in it, in float64: up to their signs."""
    inputs = torch.randn(3, 9, 9, dtype=torch.float64)
    covariance = inputs @ inputs.mT
    covariance[2] = 0.0
    one, other = (eigenvectors(covariance.clone(), "layer", spare=spare) for spare in (0, 2**30))
    torch.testing.assert_close((one[:2].mT @ other[:2]).abs(), torch.eye(9).double().expand(2, 9, 9), atol=1e-9, rtol=0)
    torch.testing.assert_close(one[2].mT @ one[2], torch.eye(9).double())
    with pytest.raises(NonFiniteGradientError, match="layer 'wide' overflows"):
        eigenvectors(covariance * torch.inf, "wide", spare=0)


def test_a_decomposition_that_does_not_converge_is_tried_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **settings: Any) -> Any:
        raise np.linalg.LinAlgError("it did not converge")

    covariance = torch.diag(torch.tensor([3.0, 1.0, 2.0]))[None]
    monkeypatch.setattr("scipy.linalg.eigh", fails)
    found = eigenvectors(covariance.clone(), "layer", spare=0)
    rotated = found.mT @ covariance @ found
    torch.testing.assert_close(rotated[0].diagonal(), torch.tensor([1.0, 2.0, 3.0]))


def test_small_temporaries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cnn", "gpt2", "twice"):
        model, rows = build(name)
        expected = fit_curvature(model, make_source(rows), cache_bytes=0)
        for size in (1, 3000):
            monkeypatch.setattr("hf_iau.curvature.layers.spare_bytes", lambda _, size=size: size)
            for kind in ("ekfac", "diagonal"):
                found = fit_curvature(model, make_source(rows), kind=kind, cache_bytes=0)
                check_against_loop(model, rows, found)
                if kind == "ekfac":
                    vector = random_vector(model)
                    assert relative(found.multiply(vector), expected.multiply(vector)) < 1e-10
            monkeypatch.undo()


def test_empirical_fisher_uses_the_row_loss() -> None:
    model, rows = build("gpt2", n=6)
    found = fit_curvature(model, make_source(rows), kind="diagonal", fisher="empirical", row_loss=ModelRowLoss())
    sums = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
    count = 0
    model.eval()
    for row in rows:
        inputs = collate([row])
        targets = int((inputs["labels"][:, 1:] != -100).sum())
        loss = model(**inputs).loss * targets
        for (name, _), g in zip(sums.items(), torch.autograd.grad(loss, list(trainable(model).values())), strict=True):
            sums[name] += g**2
        count += targets
    assert found.n_targets == count
    ones = {name: torch.ones_like(p) for name, p in trainable(model).items()}
    assert relative(found.multiply(ones), {name: total / count for name, total in sums.items()}) < 1e-10


def test_regression_fisher_is_the_gauss_newton_matrix() -> None:
    torch.manual_seed(0)
    model, rows = build("mlp", n=1000)
    model.body[2] = nn.Linear(6, 1).double()
    rows = [{"x": row["x"], "labels": torch.randn(()).double()} for row in rows]
    found = fit_curvature(model, make_source(rows, 200), kind="diagonal")
    expected = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
    for row in rows:
        output = model(row["x"][None])["logits"].sum()
        for (name, _), g in zip(
            expected.items(), torch.autograd.grad(output, list(trainable(model).values())), strict=True
        ):
            expected[name] += 2 * g**2 / len(rows)
    bias = "body.2.bias"
    torch.testing.assert_close(found.blocks["body.2"].values[bias], expected[bias], rtol=0.15, atol=0)


def test_weight_decay_is_added_to_every_eigenvalue() -> None:
    model, rows = build("bert", n=6)
    plain = fit_curvature(model, make_source(rows))
    decayed = fit_curvature(model, make_source(rows), weight_decay=0.01)
    vector = random_vector(model)
    expected = {name: tensor + 0.01 * vector[name] for name, tensor in plain.multiply(vector).items()}
    assert relative(decayed.multiply(vector), expected) < 1e-12


def test_a_sum_over_processes_equals_all_rows() -> None:
    """Two halves, each summed with the other's statistics, as an all-reduce would."""
    model, rows = build("bert", n=8)
    expected = fit_curvature(model, make_source(rows))
    ids = np.arange(8)
    recorded: list[list[torch.Tensor]] = [[], []]
    # The bases must be those of the sum, so replay: with n reductions known, the first i of them are final.
    for _ in range(60):
        known = min(len(recorded[0]), len(recorded[1]))
        for half in (0, 1):
            calls = [0]

            def reduce(
                tensor: torch.Tensor, half: int = half, calls: list[int] = calls, known: int = known
            ) -> torch.Tensor:
                number = calls[0]
                calls[0] += 1
                if number < known:
                    recorded[half][number] = tensor.clone()
                    return recorded[0][number] + recorded[1][number]
                if number == len(recorded[half]):
                    recorded[half].append(tensor.clone())
                return tensor * 2

            part = make_source(rows[half * 4 : half * 4 + 4])
            found = fit_curvature(model, part, row_ids=ids[half * 4 : half * 4 + 4], reduce=reduce)
        if known == calls[0]:
            break
    assert (found.n_rows, found.n_targets) == (8, 8)
    vector = random_vector(model)
    assert relative(found.solve(vector, 0.1), expected.solve(vector, 0.1)) < 1e-9


def test_user_row_loss_that_returns_a_loss_a_row() -> None:
    model, rows = build("mlp")

    def loss(model: nn.Module, inputs: dict) -> torch.Tensor:
        logits = model(inputs["x"])["logits"]
        return nn.functional.cross_entropy(logits, inputs["labels"], reduction="none")

    curvature = fit_curvature(model, make_source(rows), fisher="empirical", row_loss=UserRowLoss(loss))
    assert curvature.n_targets == len(rows)
    curvature.check()
