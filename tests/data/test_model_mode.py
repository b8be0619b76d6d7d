"""`evaluation_mode` leaves no trace, whatever happens inside."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import bert, build, image_rows, llama, lora, pad_right, resnet, rows_of, text_rows
from torch import nn

from hf_iau.data import evaluation_mode


@pytest.fixture
def bf16() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Prepares models the way the Trainer does under `bf16=True`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    yield accelerator.prepare_model
    AcceleratorState._reset_state(reset_partial_state=True)


def leave(model: nn.Module, action: Callable[[], Any], failing: bool) -> None:
    """Run `action` inside the context, which is left in an orderly way or by an exception."""
    try:
        with evaluation_mode(model) as inside:
            assert inside is model
            action()
            if failing:
                raise KeyError("inside")
    except KeyError:
        assert failing


FAILING = pytest.mark.parametrize("failing", [False, True], ids=["orderly", "exception"])


@FAILING
def test_training_flags_of_every_module(failing: bool) -> None:
    model = bert(dropout=0.5).train()
    model.bert.encoder.layer[0].eval()
    model.bert.encoder.layer[1].attention.eval()
    before = [module.training for module in model.modules()]
    assert True in before and False in before
    seen = []
    leave(model, lambda: seen.extend(module.training for module in model.modules()), failing)
    assert not any(seen)
    assert [module.training for module in model.modules()] == before


@FAILING
@pytest.mark.parametrize("cached", [True, False])
def test_use_cache(cached: bool, failing: bool) -> None:
    model = llama(use_cache=cached)
    seen = []

    def run() -> None:
        seen.append(model.config.use_cache)
        seen.append(model(**pad_right()(rows_of("llama", 2))).past_key_values)

    leave(model, run, failing)
    assert seen == [False, None]
    assert model.config.use_cache is cached


@FAILING
def test_use_cache_of_a_model_inside_adapters(failing: bool) -> None:
    model = lora()
    model.base_model.model.config.use_cache = True
    seen = []
    leave(model, lambda: seen.append(model.base_model.model.config.use_cache), failing)
    assert seen == [False] and model.base_model.model.config.use_cache is True


@FAILING
def test_gradients(failing: bool) -> None:
    model = bert()
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number)) if number % 2 else None
    before = [parameter.grad for parameter in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in before]

    def run() -> None:
        assert all(parameter.grad is None for parameter in model.parameters())
        model(**pad_right()(text_rows(3))).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    leave(model, run, failing)
    for parameter, grad, value in zip(model.parameters(), before, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or grad.equal(value)


@FAILING
def test_random_states(failing: bool) -> None:
    model = bert(dropout=0.5)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = (random.random(), np.random.random(), torch.rand(3))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)

    def run() -> None:
        random.random()
        np.random.random()
        torch.rand(5)
        random.seed(1)

    leave(model, run, failing)
    assert random.random() == expected[0]
    assert np.random.random() == expected[1]
    assert torch.rand(3).equal(expected[2])


@FAILING
def test_batch_norm_statistics(failing: bool) -> None:
    model = resnet().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any("running_mean" in name for name in before) and any("num_batches_tracked" in name for name in before)
    leave(model, lambda: model(**pad_right()(image_rows(4))).loss.backward(), failing)
    assert all(buffer.equal(before[name]) for name, buffer in model.named_buffers())
    # Outside, in training mode, the statistics move: the test would see it.
    model(**pad_right()(image_rows(4)))
    assert not all(buffer.equal(before[name]) for name, buffer in model.named_buffers())


@FAILING
def test_accelerates_autocast_wrapper(bf16: Callable[[nn.Module], nn.Module], failing: bool) -> None:
    inputs = pad_right()(text_rows(4))
    plain = bert().eval()(**inputs).logits.detach()
    model = bf16(bert())
    wrapper = model.__dict__["forward"]
    original = model.__dict__["_original_forward"]
    autocast = model.eval()(**inputs).logits.detach()
    assert not autocast.equal(plain)  # the wrapper is at work
    seen = []
    leave(model.train(), lambda: seen.append(model(**inputs).logits.detach()), failing)
    assert seen[0].equal(plain)
    assert model.__dict__["forward"] is wrapper and model.__dict__["_original_forward"] is original
    assert model.eval()(**inputs).logits.detach().equal(autocast)


@FAILING
def test_adapters_prepared_for_autocast(bf16: Callable[[nn.Module], nn.Module], failing: bool) -> None:
    inputs = pad_right()(text_rows(4))
    plain = lora().eval()(**inputs).logits.detach()
    model = bf16(lora())
    autocast = model.eval()(**inputs).logits.detach()
    seen = []
    leave(model, lambda: seen.append(model(**inputs).logits.detach()), failing)
    assert seen[0].equal(plain) and not autocast.equal(plain)
    assert model(**inputs).logits.detach().equal(autocast)


@FAILING
def test_autocast_of_the_caller_is_off_inside_and_on_again(failing: bool) -> None:
    model, inputs = bert().eval(), pad_right()(text_rows(4))
    plain = model(**inputs).logits.detach()
    seen = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leave(model, lambda: seen.append(model(**inputs).logits.detach()), failing)
        assert torch.is_autocast_enabled("cpu")
        assert not model(**inputs).logits.detach().equal(plain)
    assert seen[0].equal(plain)


def test_an_unprepared_models_own_forward_is_left_alone() -> None:
    model = build("plain")
    calls = []
    own = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = counted
    with evaluation_mode(model):
        model(**pad_right()(rows_of("plain", 2)))
    assert calls and model.__dict__["forward"] is counted


def test_nested_contexts() -> None:
    model = bert(dropout=0.5).train()
    with evaluation_mode(model):
        with evaluation_mode(model):
            assert not model.training
        assert not model.training
    assert model.training
