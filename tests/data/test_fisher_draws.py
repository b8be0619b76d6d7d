"""Labels drawn by importance: the Fisher matrix is right on average, and less noisy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_iau.data.targets import Targets, TaskKind, _draw_by_importance


def gradients(logits: torch.Tensor, rows: torch.Tensor, n_rows: int, seeds: range) -> torch.Tensor:
    """`(seeds, rows, classes)`: the summed gradient with respect to a row's logits."""
    order = torch.zeros_like(rows)
    for row in range(n_rows):
        order[rows == row] = torch.arange(int((rows == row).sum()))
    found = []
    for seed in seeds:
        leaf = logits.clone().requires_grad_(True)
        labels = torch.zeros(len(rows), dtype=torch.long)
        kind = TaskKind.SINGLE_LABEL if n_rows == len(rows) else TaskKind.TOKENS
        targets = Targets(kind, leaf, labels, rows, n_rows, order)
        (gradient,) = torch.autograd.grad(targets.fisher_loss(np.arange(n_rows), seed), leaf)
        found.append(torch.zeros(n_rows, logits.shape[1], dtype=logits.dtype).index_add_(0, rows, gradient))
    return torch.stack(found)


def fisher(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(dim=1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@pytest.mark.parametrize("sharpness", [1.0, 6.0])
def test_second_moment_is_the_fisher_matrix(sharpness):
    logits = sharpness * torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = gradients(logits, torch.arange(3), 3, range(4000))
    moment = torch.einsum("sri,srj->rij", g, g) / len(g)
    expected = fisher(logits)
    for row in range(3):
        assert float((moment[row] - expected[row]).norm()) < 0.08 * float(expected[row].norm())


def test_draws_are_those_of_a_plain_loop_and_sum_up_no_floats(monkeypatch):
    """A sum of floats along a line is what `torch.use_deterministic_algorithms` refuses on GPUs."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(400, 7)) * rng.choice([0.1, 1, 5, 20], size=(400, 1)))
    p, uniforms = logits.softmax(dim=1), torch.from_numpy(rng.random((400, 2)))
    summed = torch.Tensor.cumsum

    def whole_numbers_only(tensor, dim):
        assert not tensor.is_floating_point()
        return summed(tensor, dim)

    monkeypatch.setattr(torch.Tensor, "cumsum", whole_numbers_only)
    drawn, weights = _draw_by_importance(p, uniforms)
    for i in range(len(p)):
        row = p[i].numpy()
        importance = [row[y] * sum((row[j] - (j == y)) ** 2 for j in range(7)) for y in range(7)]
        q = np.asarray(importance) / sum(importance)
        y = int(np.searchsorted(q.cumsum(), uniforms[i, 0].item(), side="right"))
        assert int(drawn[i]) == y
        sign = -1 if uniforms[i, 1] < 0.5 else 1
        assert float(weights[i]) == pytest.approx(sign * np.sqrt(row[y] / q[y]), rel=1e-9)


def test_targets_of_one_row_stay_uncorrelated():
    logits = 3 * torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    g = gradients(logits, torch.zeros(4, dtype=torch.long), 1, range(6000))[:, 0]
    expected = fisher(logits).sum(dim=0)  # no cross terms
    assert float((g.T @ g / len(g) - expected).norm()) < 0.08 * float(expected.norm())


def test_sure_models_are_drawn_with_far_less_noise():
    """One class has probability 0.99: the trace of a plain draw's g gᵀ is nearly always tiny, now it is constant."""
    logits = torch.zeros(1, 5, dtype=torch.float64)
    logits[0, 2] = 6.0
    g = gradients(logits, torch.arange(1), 1, range(400))[:, 0]
    traces = g.square().sum(dim=1)
    expected = float(fisher(logits)[0].trace())
    assert float(traces.std()) < 0.05 * expected
    p = logits.softmax(dim=1)[0]
    drawn = torch.multinomial(p, 400, replacement=True, generator=torch.Generator().manual_seed(0))
    plain = (p - torch.nn.functional.one_hot(drawn, 5)).square().sum(dim=1)
    assert float(plain.std()) > 3 * expected


def test_a_certain_model_gives_no_gradient_and_no_nan():
    logits = torch.tensor([[1000.0, 0.0, 0.0]], dtype=torch.float64)
    g = gradients(logits, torch.arange(1), 1, range(5))
    assert torch.isfinite(g).all() and float(g.abs().max()) < 1e-12
