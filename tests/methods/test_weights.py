"""Snapshots of weights: put back bit for bit, and moved from."""

from __future__ import annotations

import pytest
import torch
from tiny_models import plain

from hf_iau.methods.weights import WeightSnapshot

NAMES = ["hidden.weight", "output.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_move_starts_from_the_snapshot_however_often_it_is_made(dtype: torch.dtype) -> None:
    model = plain().to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    snapshot = WeightSnapshot.of(model, NAMES)
    step = {name: torch.full_like(before[name], 0.1, dtype=torch.float64) for name in NAMES}
    for _ in range(2):
        snapshot.move(step)
        for name, value in model.named_parameters():
            expected = (before[name].double() + 0.1).to(dtype) if name in NAMES else before[name]
            assert torch.equal(value, expected), name
    snapshot.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_only_what_was_kept_is_put_back() -> None:
    model = plain()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    snapshot = WeightSnapshot.of(model, NAMES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    snapshot.restore()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name] if name in NAMES else before[name] + 1.0), name


def test_copies_that_there_are_already_are_not_made_again() -> None:
    model = plain()
    copies = {name: p.detach().clone() for name, p in model.named_parameters()}
    snapshot = WeightSnapshot.of(model, NAMES, copies)
    assert list(snapshot.copies) == NAMES and all(snapshot.copies[name] is copies[name] for name in NAMES)
