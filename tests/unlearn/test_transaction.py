"""Weights are changed wholly or not at all, and can be changed back."""

from __future__ import annotations

import pytest
import torch
from tiny_models import resnet
from torch import nn
from unlearning_trainers import assert_bits, state_of

from hf_iau.errors import RequestError
from hf_iau.unlearn.transaction import WeightTransaction


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(1)


@pytest.fixture
def model() -> nn.Module:
    return resnet()


def test_an_exception_puts_every_bit_back(model: nn.Module) -> None:
    before = state_of(model)

    def interrupted() -> None:
        with WeightTransaction(model):
            change(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert_bits(model, before)


def test_rollback_keeps_nan_and_signed_zeros(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    before = next(model.parameters()).detach().clone().view(torch.int32)
    transaction = WeightTransaction(model)
    change(model)
    transaction.rollback()
    assert torch.equal(next(model.parameters()).detach().view(torch.int32), before)


def test_commit_keeps_the_change_and_revert_undoes_it_once(model: nn.Module) -> None:
    before = state_of(model)
    with WeightTransaction(model) as transaction:
        change(model)
        undo = transaction.commit()
    after = state_of(model)
    assert not torch.equal(after["classifier.1.bias"], before["classifier.1.bias"])
    undo()
    assert_bits(model, before)
    with pytest.raises(RequestError, match="called twice"):
        undo()


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_revert_refuses_weights_that_moved_since(what: str, model: nn.Module) -> None:
    transaction = WeightTransaction(model)
    with pytest.raises(RequestError, match="before the update was applied"):
        transaction.revert()
    change(model)
    undo = transaction.commit()
    with torch.no_grad():
        next(model.parameters() if what == "parameter" else model.buffers()).view(-1)[0] += 1e-3
    moved = state_of(model)
    with pytest.raises(RequestError, match="moved since this request"):
        undo()
    assert_bits(model, moved)


def test_the_move_is_told_in_double_precision(model: nn.Module) -> None:
    transaction = WeightTransaction(model)
    name, parameter = next(iter(model.named_parameters()))
    old = parameter.detach().clone()
    change(model)
    move = transaction.moved([name])
    assert list(move) == [name]
    assert move[name].dtype == torch.float64
    assert torch.equal(move[name], parameter.detach().double() - old.double())
    assert torch.equal(transaction.before(name), old)


def test_expanded_constants_are_left_alone() -> None:
    """A buffer that shares memory with itself cannot be written, and need not be."""
    model = nn.Linear(2, 2)
    model.register_buffer("constant", torch.zeros(1).expand(4))
    before = state_of(model)
    transaction = WeightTransaction(model)
    with torch.no_grad():
        model.weight.add_(1)
    transaction.rollback()
    assert_bits(model, before)
