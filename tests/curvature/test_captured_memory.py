"""What a fit of the curvature holds while it passes rows through the model, and that holding less changes no number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from curvature_loop import build, make_source
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, default_data_collator

from hf_iau.curvature import fit_curvature
from hf_iau.curvature.fit import Fit
from hf_iau.curvature.layer_hooks import LayerHooks
from hf_iau.curvature.layers import plan_layers
from hf_iau.data import RowSource
from hf_iau.utils.timing import peak_allocated_bytes

_TOKENS, _ROWS = 24, 16


def adapted(layers: int = 3) -> nn.Module:
    """A BERT of width 128 with LoRA on every linear layer."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 100,
        "hidden_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "max_position_embeddings": _TOKENS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
    }
    wanted = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "key", "value", "dense"])
    return get_peft_model(BertForSequenceClassification(BertConfig(**settings)), wanted)


def texts() -> RowSource:
    rng = np.random.default_rng(0)
    rows = [{"input_ids": rng.integers(1, 100, _TOKENS).tolist(), "labels": i % 3} for i in range(_ROWS)]
    return RowSource(rows, default_data_collator, batch_size=_ROWS)


def test_a_fit_holds_a_training_pass_and_the_factors() -> None:
    model, source = adapted(), texts()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = source.first_batch()
    passed = peak_allocated_bytes(lambda: torch.autograd.grad(model(**inputs).loss, trainable))
    found: list[Any] = []
    peak = peak_allocated_bytes(lambda: found.append(fit_curvature(model, source, cache_bytes=0)))
    assert found[0].coverage()["kronecker"] == sum(parameter.numel() for parameter in trainable)
    assert found[0].nbytes() < passed
    assert peak <= passed + found[0].nbytes()


@pytest.mark.parametrize("name", ["bert", "gpt2", "cnn", "twice"])
@pytest.mark.parametrize("cache_bytes", [0, 2**24])
def test_using_a_layer_at_once_gives_the_same_numbers(
    name: str, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = build(name)
    found = fit_curvature(model, make_source(rows), cache_bytes=cache_bytes)
    monkeypatch.setattr(Fit, "uses_at_once", False)
    run = LayerHooks.run
    monkeypatch.setattr(LayerHooks, "run", lambda capture, loss, take=None: run(capture, loss))
    expected = fit_curvature(model, make_source(rows), cache_bytes=cache_bytes)
    for key, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[key], tensor), key


def test_no_more_gradients_are_asked_for_than_lead_to_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """With LoRA those of the first layer's narrow matrices; every layer is seen all the same."""
    model, source = adapted(), texts()
    layers = plan_layers(model, kronecker=True, max_factor_size=4096).layers
    inputs = source.first_batch()
    asked: list[int] = []
    grad = torch.autograd.grad

    def watched(outputs: Any, edges: Any, **settings: Any) -> Any:
        found = grad(outputs, edges, **settings)
        asked.extend(g.shape[-1] for g in found)
        return found

    monkeypatch.setattr(torch.autograd, "grad", watched)
    taken: list[str] = []
    with LayerHooks(model, layers) as capture:
        left = capture.run(lambda: model(**inputs).loss, lambda layer, calls: taken.append(layer.name))
    assert asked == [4, 4, 4]  # query, key and value of the first layer
    assert not left and sorted(taken) == sorted(layer.name for layer in layers)
