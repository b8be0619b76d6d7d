"""Sums over vectors as large as the weights, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_iau.distributed import inner_product
from hf_iau.utils import vectors
from hf_iau.utils.timing import peak_allocated_bytes
from hf_iau.utils.vectors import GradientAccumulator, pieces, storage_dtype


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4), (1, 40), (0, 3)])
def test_pieces_are_the_whole(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PIECE", 6)
    one, other = torch.randn(shape), torch.randn(shape, dtype=torch.float64)
    squares = float(one.double().square().sum() + other.square().sum())
    assert inner_product((t, t) for t in (one, other)) == pytest.approx(squares, rel=1e-14)
    assert inner_product([(other, one)]) == pytest.approx(float((other * one.double()).sum()), rel=1e-12, abs=1e-15)
    for part, same in pieces(one, other):
        part.add_(1.0)
        same.copy_(part)
    assert torch.equal(one.double(), other)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_rounding_loses_is_added_to_the_next(dtype: torch.dtype, sparse: bool) -> None:
    """Large gradients that cancel leave the small ones behind, as they do in twice the precision."""
    torch.manual_seed(0)
    first, second = nn.Parameter(torch.zeros(300, 2, dtype=dtype)), nn.Parameter(torch.zeros(3, dtype=dtype))
    parameters = {"first": first, "second": second}
    accumulator = GradientAccumulator(parameters)
    exact = np.zeros((300, 2), dtype=np.longdouble)
    for number in range(200):
        gradient = (torch.randn(300, 2, dtype=torch.float64) * (1e4 if number in (0, 199) else 1.0)).to(dtype)
        exact += gradient.double().numpy()
        added = gradient.to_sparse(1) if sparse else gradient.clone()
        first.grad = added if first.grad is None else first.grad + added
        accumulator.add(at_once=True)
    sums = accumulator.finish()
    assert first.grad is None and sums["first"].dtype == storage_dtype(dtype)
    assert not sums["second"].any() and sums["second"].shape == (3,)
    error = float(np.abs(sums["first"].numpy().astype(np.longdouble) - exact).max())
    # One rounding of the result and one of every gradient, though 200 sums were made.
    assert error <= (3 if not sparse else 200) * float(torch.finfo(storage_dtype(dtype)).eps) * float(
        np.abs(exact).max()
    )


def test_gradients_of_some_batches_are_added_up_by_autograd() -> None:
    weight = nn.Parameter(torch.zeros(4))
    accumulator = GradientAccumulator({"weight": weight})
    kept = []
    for _ in range(9):
        (weight * torch.arange(4.0)).sum().backward()
        accumulator.add()
        kept.append(None if weight.grad is None else float(weight.grad[1]))
    assert kept == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, None, 1.0]
    assert accumulator.finish()["weight"].tolist() == [0.0, 9.0, 18.0, 27.0]


def test_a_sum_on_another_device_is_made_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.zeros(4))
    for same, dtype in ((True, torch.float32), (False, torch.float64)):
        monkeypatch.setattr(vectors, "is_same_device", lambda one, other, same=same: same)
        accumulator = GradientAccumulator({"weight": weight}, torch.device("cpu"))
        for _ in range(2):
            weight.grad = torch.arange(4.0)
            accumulator.add(at_once=True)
        assert accumulator._sums["weight"].dtype == dtype
        assert (weight.grad is None) != same
        found = accumulator.finish()["weight"]
        assert found.dtype == torch.float32 and found.tolist() == [0.0, 2.0, 4.0, 6.0]


def test_bytes_of_a_sum() -> None:
    weight = nn.Parameter(torch.zeros(1000, 1000))
    found: list[Any] = []

    def work() -> None:
        accumulator = GradientAccumulator({"weight": weight})
        for _ in range(10):
            weight.sum().backward()
            accumulator.add(at_once=True)
        found.append(accumulator.finish())

    assert peak_allocated_bytes(work) == pytest.approx(2 * 4e6, rel=0.4)  # sum and gradient; and pieces
    assert found[0]["weight"].eq(10.0).all()
