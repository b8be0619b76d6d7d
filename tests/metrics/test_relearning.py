"""Relearn time of models that know, have hidden, or never knew the forget rows."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from memorising_network import Classifier, draw, fit
from torch.utils.data import default_collate

from hf_iau.data import RowSource, predict_rows
from hf_iau.errors import ConfigError, RequestError
from hf_iau.metrics.relearning import first_reached, relearn_time


@pytest.fixture(scope="module")
def scene():
    """A model that knows 40 rows by heart, one that has hidden them, and one trained without them."""
    train = draw(200, 0)
    forget, retained = train.take(np.arange(40)), train.take(np.arange(40, 200))
    torch.manual_seed(0)
    start = Classifier()
    knows = fit(copy.deepcopy(start), train, 200, 0)
    hidden = copy.deepcopy(knows)
    with torch.no_grad():
        hidden.head.bias += torch.tensor([3.0, -3.0, 3.0, -3.0])
    source = RowSource(forget, default_collate, batch_size=16, name="forget rows")
    return knows, hidden, fit(copy.deepcopy(start), retained, 200, 1), source


def test_what_was_hidden_comes_back_sooner_than_what_is_not_known(scene):
    knows, hidden, retrained, source = scene
    before = predict_rows(knows, source)
    options = {"target_loss": 2 * before.mean_loss, "learning_rate": 5e-3, "max_epochs": 60}
    assert relearn_time(knows, source, **options).steps == 0
    found = {name: relearn_time(model, source, **options) for name, model in (("hidden", hidden), ("new", retrained))}
    assert all(one.reached for one in found.values())
    assert 0 < found["hidden"].steps < found["new"].steps
    one = found["new"]
    assert one.steps == one.measured_at[-1] and one.epochs == one.steps / 3  # 40 rows in batches of 16
    assert one.losses[-1] <= options["target_loss"] < min(one.losses[:-1])
    assert first_reached(one.losses, options["target_loss"]) == one.epochs


def test_the_model_and_the_random_state_are_left_alone(scene):
    _, _, retrained, source = scene
    weights = copy.deepcopy(retrained.state_dict())
    state = torch.get_rng_state()
    first = relearn_time(retrained, source, target_accuracy=1.0, learning_rate=5e-3, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, retrained.state_dict()[name]) for name, value in weights.items())
    assert first == relearn_time(retrained, source, target_accuracy=1.0, learning_rate=5e-3, seed=3)
    assert first.losses != relearn_time(retrained, source, target_accuracy=1.0, learning_rate=5e-3, seed=4).losses


def test_first_steps_are_those_of_a_plain_loop(scene):
    _, _, retrained, source = scene
    found = relearn_time(retrained, source, target_loss=0.0, max_epochs=2, measure_every=1, learning_rate=1e-3, seed=7)
    learner = copy.deepcopy(retrained)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3, weight_decay=0)
    generator = torch.Generator().manual_seed(7)
    losses = [predict_rows(learner, source).mean_loss]
    for _ in range(2):
        for batch in torch.randperm(40, generator=generator).split(16):
            optimizer.zero_grad()
            learner(source.dataset.inputs[batch], source.dataset.labels[batch])["loss"].backward()
            optimizer.step()
            losses.append(predict_rows(learner, source).mean_loss)
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert found.measured_at == tuple(range(7))
    assert not found.reached and found.steps is None and found.epochs is None


def test_accuracy_as_target(scene):
    _, hidden, _, source = scene
    found = relearn_time(hidden, source, target_accuracy=0.9, learning_rate=5e-3, measure_every=1)
    assert found.reached and found.accuracies[-1] >= 0.9 > max(found.accuracies[:-1])


def test_first_reached():
    assert first_reached([3.0, 2.0, 1.0, 2.0], 2.0) == 1
    assert first_reached([0.1, 0.5, 0.9], 0.5, higher_is_better=True) == 1
    assert first_reached([float("nan"), 3.0], 2.0) is None


def test_bad_input(scene):
    knows, _, _, source = scene
    with pytest.raises(ConfigError, match="target_accuracy"):
        relearn_time(knows, source)
    with pytest.raises(ConfigError, match="learning_rate=0"):
        relearn_time(knows, source, target_loss=0.1, learning_rate=0)
    with pytest.raises(RequestError, match="nothing to relearn"):
        relearn_time(knows, source.select([]), target_loss=0.1)
    frozen = copy.deepcopy(knows).requires_grad_(False)
    with pytest.raises(RequestError, match="requires_grad"):
        relearn_time(frozen, source, target_loss=0.1)
