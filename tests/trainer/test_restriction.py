"""Gradient restriction: against the released formula, against itself, and what it must leave alone."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from several_processes import run_in_processes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from hf_iau.errors import ConfigError, IAUError, UnsupportedModelError
from hf_iau.trainer.restriction import GradientRestriction, RestrictionConfig

MODES = ["exact", "finite-difference"]
NORMS = ["whole", "per-tensor"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def smooth_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def rows(n: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 6, dtype=dtype), torch.randint(0, 3, (n,))


def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(x), y)


def restricted(
    model: nn.Module, compute_loss: Callable[[], Tensor], mode: str = "exact", **settings: Any
) -> dict[str, Tensor]:
    """The gradients left by one restricted backward pass, by parameter name."""
    model.zero_grad()
    config = RestrictionConfig(mode=mode, **settings)  # type: ignore[arg-type]
    GradientRestriction(config, model).backward(model, compute_loss, lambda loss: loss.backward())
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def term(model: nn.Module, compute_loss: Callable[[], Tensor], mode: str, **settings: Any) -> Tensor:
    """α∇‖∇L‖ alone, flattened."""
    plain = restricted(model, compute_loss, "none")
    both = restricted(model, compute_loss, mode, **settings)
    return torch.cat([(both[name] - plain[name]).flatten() for name in plain])


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance, msg=name)


# The formula


@pytest.mark.parametrize("norm", NORMS)
def test_exact_is_the_formula_differentiated_twice(norm: str) -> None:
    model, (x, y) = smooth_model(), rows()
    loss = F.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    released = sum(gradient.norm() for gradient in gradients)
    whole = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    total = loss + 0.3 * (released if norm == "per-tensor" else whole)
    expected = dict(
        zip(dict(model.named_parameters()), torch.autograd.grad(total, list(model.parameters())), strict=True)
    )
    assert_same(restricted(model, mean_loss(model, x, y), alpha=0.3, norm=norm), expected, 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_finite_difference_agrees_with_exact_on_a_smooth_model(norm: str) -> None:
    model, (x, y) = smooth_model(), rows()
    loss = mean_loss(model, x, y)
    exact = term(model, loss, "exact", alpha=0.005, norm=norm)
    assert relative_error(term(model, loss, "finite-difference", norm=norm, epsilon=1e-6), exact) < 1e-4
    # A forward difference: its error falls with the step.
    assert relative_error(term(model, loss, "finite-difference", norm=norm, epsilon=1e-3), exact) < 2e-2


@pytest.mark.parametrize("norm", NORMS)
def test_the_default_step_suits_single_precision(norm: str) -> None:
    model, (x, y) = smooth_model(), rows()
    exact = term(model, mean_loss(model, x, y), "exact", alpha=0.1, norm=norm)
    single = copy.deepcopy(model).float()
    approximate = term(single, mean_loss(single, x.float(), y), "finite-difference", alpha=0.1, norm=norm)
    assert relative_error(approximate.double(), exact) < 2e-2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_a_scaled_loss_scales_the_sum(mode: str, norm: str) -> None:
    """So nobody has to know by how much the Trainer divided the loss of a micro-batch."""
    model, (x, y) = smooth_model(), rows()
    full = restricted(model, mean_loss(model, x, y), mode, alpha=0.2, norm=norm)
    quarter = restricted(model, lambda: F.cross_entropy(model(x), y) / 4, mode, alpha=0.2, norm=norm)
    assert_same({name: 4 * gradient for name, gradient in quarter.items()}, full, 1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_backward_may_scale(mode: str) -> None:
    model, (x, y) = smooth_model(), rows()
    full = restricted(model, mean_loss(model, x, y), mode, alpha=0.2)
    model.zero_grad()
    restriction = GradientRestriction(RestrictionConfig(mode=mode, alpha=0.2), model)  # type: ignore[arg-type]
    restriction.backward(model, mean_loss(model, x, y), lambda loss: (loss / 4).backward())
    assert_same({name: 4 * p.grad for name, p in model.named_parameters() if p.grad is not None}, full, 1e-9)


@pytest.mark.parametrize("norm", NORMS)
def test_a_tensor_with_zero_gradient(norm: str) -> None:
    """Its own norm has no derivative there, which is taken as 0; the other tensors' norms have one by it."""
    model, (x, y) = smooth_model(), rows()
    loss = mean_loss(model, x, y)
    with torch.no_grad():
        model[2].weight.zero_()
    assert not restricted(model, loss, "none")["0.weight"].any()
    exact = term(model, loss, "exact", norm=norm)
    assert relative_error(term(model, loss, "finite-difference", norm=norm, epsilon=1e-6), exact) < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_a_zero_gradient_adds_nothing(mode: str, norm: str) -> None:
    model, (x, y) = smooth_model(), rows()
    gradients = restricted(model, lambda: 0.0 * F.cross_entropy(model(x), y), mode, norm=norm)
    assert all(not gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("mode", MODES)
def test_all_weights_zero(mode: str) -> None:
    model, (x, y) = smooth_model(), rows()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    gradients = restricted(model, mean_loss(model, x, y), mode)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


# What the Trainer relies on


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_the_plain_loss_is_returned(mode: str) -> None:
    model, (x, y) = smooth_model(), rows()
    restriction = GradientRestriction(RestrictionConfig(mode=mode, alpha=1.0), model)  # type: ignore[arg-type]
    loss = restriction.backward(model, mean_loss(model, x, y), lambda loss: loss.backward())
    assert loss.shape == () and not loss.requires_grad
    assert loss == F.cross_entropy(model(x), y)


@pytest.mark.parametrize("mode", ["none", *MODES])
def test_micro_batches_accumulate(mode: str) -> None:
    model, first, second = smooth_model(), rows(), rows()
    parts = [restricted(model, mean_loss(model, *batch), mode, alpha=0.1) for batch in (first, second)]
    model.zero_grad()
    restriction = GradientRestriction(RestrictionConfig(mode=mode, alpha=0.1), model)  # type: ignore[arg-type]
    for batch in (first, second):
        restriction.backward(model, mean_loss(model, *batch), lambda loss: loss.backward())
    accumulated = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(accumulated, {name: parts[0][name] + parts[1][name] for name in parts[0]}, 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_alpha_zero_is_the_plain_pass(mode: str) -> None:
    model, (x, y) = smooth_model(), rows()
    loss = mean_loss(model, x, y)
    assert_same(restricted(model, loss, mode, alpha=0.0), restricted(model, loss, "none"))


@pytest.mark.parametrize(("mode", "passes"), [("exact", 1), ("finite-difference", 2)])
def test_every_second_micro_batch(mode: str, passes: int) -> None:
    model, (x, y) = smooth_model(), rows()
    plain = restricted(model, mean_loss(model, x, y), "none")
    full = restricted(model, mean_loss(model, x, y), mode, alpha=0.5)
    config = RestrictionConfig(mode=mode, alpha=0.5, every=2)  # type: ignore[arg-type]
    restriction = GradientRestriction(config, model)
    forwards: list[int] = []

    def compute_loss() -> Tensor:
        forwards.append(restriction.calls)
        return F.cross_entropy(model(x), y)

    for call in (1, 2, 3, 4):
        model.zero_grad()
        restriction.backward(model, compute_loss, lambda loss: loss.backward())
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same(found, plain if call % 2 else full)
    assert [forwards.count(call) for call in (1, 2, 3, 4)] == [1, passes, 1, passes]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("norm", NORMS)
def test_frozen_and_unused_parameters(mode: str, norm: str) -> None:
    model, (x, y) = smooth_model(), rows()
    model[2].requires_grad_(False)
    model.register_module("unused", nn.Linear(2, 2, dtype=torch.float64))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = restricted(model, lambda: F.cross_entropy(model[:5](x), y), mode, alpha=0.1, norm=norm)
    assert gradients.keys() == {"0.weight", "0.bias", "4.weight", "4.bias"}
    assert_same({name: p.detach() for name, p in model.named_parameters()}, before)
    frozen_out = [p for p in model[:5].parameters() if p.requires_grad]
    loss = F.cross_entropy(model[:5](x), y)
    norms = torch.stack([g.norm() for g in torch.autograd.grad(loss, frozen_out, create_graph=True)])
    total = loss + 0.1 * (norms.sum() if norm == "per-tensor" else norms.norm())
    expected = torch.autograd.grad(total, frozen_out)
    for gradient, value in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=1e-12 if mode == "exact" else 1e-2, atol=1e-4)


def test_a_frozen_half_precision_base_with_single_precision_adapters() -> None:
    base, head = nn.Linear(6, 6).bfloat16().requires_grad_(False), nn.Linear(6, 3)
    model, (x, y) = nn.ModuleList([base, head]), rows(dtype=torch.float32)
    gradients = restricted(model, lambda: F.cross_entropy(head(base(x.bfloat16()).float()), y), "finite-difference")
    assert gradients.keys() == {"1.weight", "1.bias"}


# What the second pass leaves behind


class Noisy(nn.Module):
    """A model that draws from all four random generators and writes to its buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.norm, self.cumulative = nn.BatchNorm1d(8), nn.BatchNorm1d(8, momentum=None)
        self.register_buffer("constant", torch.zeros(1).expand(4))
        self.draws: list[tuple[float, float, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.draws.append((random.random(), float(np.random.rand()), torch.rand(3)))
        hidden = self.cumulative(self.norm(self.first(x)))
        return self.second(F.dropout(torch.tanh(hidden), 0.5, training=self.training))


def test_both_passes_draw_the_same_numbers() -> None:
    model, (x, y) = Noisy(), rows(dtype=torch.float32)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    restricted(model, mean_loss(model, x, y), "finite-difference")
    after = (random.random(), np.random.rand(), torch.rand(3))
    first, second = model.draws
    assert first[:2] == second[:2] and torch.equal(first[2], second[2])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    model(x)
    assert after[:2] == (random.random(), np.random.rand()) and torch.equal(after[2], torch.rand(3))


def test_dropout_masks_are_the_same_in_both_passes() -> None:
    """With other masks the difference quotient would be of the order of 1/ε."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    x, y = rows()

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    terms = []
    for mode in MODES:
        torch.manual_seed(3)
        plain = restricted(model, loss, "none")
        torch.manual_seed(3)
        both = restricted(model, loss, mode, epsilon=1e-6)
        terms.append(torch.cat([(both[name] - plain[name]).flatten() for name in plain]))
    assert relative_error(terms[1], terms[0]) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_batch_norm_statistics_are_updated_once(mode: str) -> None:
    model, (x, y) = Noisy(), rows(dtype=torch.float32)
    once = copy.deepcopy(model)
    once(x)
    restricted(model, mean_loss(model, x, y), mode)
    assert model.training and model.norm.training
    assert model.norm.num_batches_tracked == 1
    assert_same(dict(model.named_buffers()), dict(once.named_buffers()))


def test_normalisation_is_by_batch_statistics_in_both_passes() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = rows()
    loss = mean_loss(model, x, y)
    exact, approximate = term(model, loss, "exact"), term(model, loss, "finite-difference", epsilon=1e-6)
    assert relative_error(approximate, exact) < 1e-4


def test_both_passes_start_from_the_same_buffers() -> None:
    """As power iterations and other states do that a forward pass reads and moves on."""

    class Growing(nn.Linear):
        scale: Tensor

        def forward(self, x: Tensor) -> Tensor:
            self.scale += 1
            return torch.tanh(super().forward(x) * self.scale)

    model, (x, y) = Growing(6, 3).double(), rows()
    model.register_buffer("scale", torch.ones(()))
    terms = []
    for mode in MODES:
        both = restricted(model, mean_loss(model, x, y), mode, epsilon=1e-6)
        assert model.scale == 2
        model.scale.fill_(1)
        plain = restricted(model, mean_loss(model, x, y), "none")
        model.scale.fill_(1)
        terms.append(torch.cat([(both[name] - plain[name]).flatten() for name in plain]))
    assert relative_error(terms[1], terms[0]) < 1e-4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("failing_pass", [None, 1, 2, "backward"])
def test_nothing_moves(norm: str, failing_pass: int | str | None) -> None:
    model, (x, y) = Noisy(), rows(dtype=torch.float32)
    once = copy.deepcopy(model)
    if failing_pass != 1:
        once(x)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        weights["second.bias"][0] = model.second.bias[0] = -0.0
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    identities = [id(parameter.grad) for parameter in model.parameters()]
    moved: list[bool] = []

    def compute_loss() -> Tensor:
        moved.append(not torch.equal(model.first.weight, weights["first.weight"]))
        if failing_pass == len(moved):
            raise KeyboardInterrupt
        return F.cross_entropy(model(x), y)

    def backward(loss: Tensor) -> None:
        if failing_pass == "backward":
            raise KeyboardInterrupt
        loss.backward()

    restriction = GradientRestriction(RestrictionConfig(mode="finite-difference", norm=norm), model)  # type: ignore[arg-type]
    if failing_pass is None:
        restriction.backward(model, compute_loss, backward)
    else:
        with pytest.raises(KeyboardInterrupt):
            restriction.backward(model, compute_loss, backward)
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.grad is not None)
    assert moved == ([False] if failing_pass == 1 else [False, True])
    assert [id(parameter.grad) for parameter in model.parameters()] == identities
    for name, parameter in model.named_parameters():
        assert parameter.detach().numpy().tobytes() == weights[name].numpy().tobytes(), name
    assert_same(dict(model.named_buffers()), dict(once.named_buffers()))


def test_an_outer_autocast_sees_the_perturbed_weights() -> None:
    model, (x, y) = smooth_model(torch.float32), rows(256, torch.float32)
    exact = term(model, mean_loss(model, x, y), "exact", alpha=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = mean_loss(model, x, y)
        approximate = term(model, loss, "finite-difference", alpha=1.0, epsilon=3e-2)
    assert torch.cosine_similarity(approximate, exact, dim=0) > 0.8


# Attention, checkpointing, wrappers


def bert(implementation: str, **settings: Any) -> BertForSequenceClassification:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**sizes, vocab_size=20, max_position_embeddings=16, num_labels=3, **settings)
    config._attn_implementation = implementation
    return BertForSequenceClassification(config)


def llama(implementation: str) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlamaConfig(**sizes, vocab_size=20, max_position_embeddings=16)
    config._attn_implementation = implementation
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("build", [bert, llama])
def test_exact_refuses_fused_attention(build: Callable[[str], nn.Module]) -> None:
    model = build("sdpa")
    for wrapped in (model, nn.ModuleDict({"inner": model})):
        with pytest.raises(ValueError, match=r"attn_implementation='eager'.*restriction='finite-difference'"):
            GradientRestriction(RestrictionConfig(mode="exact"), wrapped)
    for mode in ("none", "finite-difference"):
        GradientRestriction(RestrictionConfig(mode=mode), model)  # type: ignore[arg-type]
    GradientRestriction(RestrictionConfig(mode="exact"), build("eager"))


def test_exact_takes_a_model_without_attention() -> None:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1])
    GradientRestriction(RestrictionConfig(mode="exact"), ResNetForImageClassification(config))


@pytest.mark.parametrize("build", [bert, llama])
def test_transformers_agree_across_kernels(build: Callable[[str], nn.Module]) -> None:
    """The finite difference through fused attention against double backward through the eager one."""
    eager, fused = build("eager").double().eval(), build("sdpa").double().eval()
    fused.load_state_dict(eager.state_dict())
    ids = torch.randint(0, 20, (4, 7))
    labels = ids if build is llama else torch.tensor([0, 1, 2, 0])
    exact = term(eager, lambda: eager(input_ids=ids, labels=labels).loss, "exact")
    approximate = term(fused, lambda: fused(input_ids=ids, labels=labels).loss, "finite-difference", epsilon=1e-5)
    # Llama's rotary tables and norms are computed in float32 whatever the weights are.
    assert relative_error(approximate, exact) < (1e-3 if build is bert else 5e-2)


def test_attention_outside_transformers_is_refused_when_it_fails() -> None:
    x = torch.randn(2, 1, 4, 8)

    class Attention(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            hidden = super().forward(x)
            return F.scaled_dot_product_attention(hidden, hidden, hidden)

    model = Attention(8, 8)
    with pytest.raises(UnsupportedModelError, match="finite-difference"):
        restricted(model, lambda: model(x).square().mean(), "exact")


def test_exact_refuses_reentrant_checkpointing_switched_on_later() -> None:
    model = bert("eager")
    restriction = GradientRestriction(RestrictionConfig(mode="exact"), model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant"):
        restriction.backward(model, lambda: torch.zeros(()), lambda loss: None)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Sequential, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.inner[1:], self.inner[0](x), use_reentrant=self.use_reentrant)
        return hidden


@pytest.mark.parametrize(("mode", "use_reentrant"), [("exact", False), (MODES[1], False), (MODES[1], True)])
def test_checkpointing_changes_nothing(mode: str, use_reentrant: bool) -> None:
    model, (x, y) = smooth_model(), rows()
    wrapped = Checkpointed(model, use_reentrant)
    plain = restricted(model, mean_loss(model, x, y), mode, alpha=0.1)
    saved = restricted(wrapped, mean_loss(wrapped, x, y), mode, alpha=0.1)
    assert_same({name.removeprefix("inner."): gradient for name, gradient in saved.items()}, plain, 1e-12)


def test_exact_reports_reentrant_checkpointing_of_any_model() -> None:
    wrapped, (x, y) = Checkpointed(smooth_model(), use_reentrant=True), rows()
    with pytest.raises(UnsupportedModelError, match="re-entrant"):
        restricted(wrapped, mean_loss(wrapped, x, y), "exact")


def test_half_precision_parameters_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"0\.weight.*dtype=torch\.float32"):
        GradientRestriction(RestrictionConfig(mode="finite-difference"), smooth_model(torch.bfloat16))


@pytest.mark.parametrize("mode", MODES)
def test_fp16_loss_scaling_is_refused(mode: str) -> None:
    config = RestrictionConfig(mode=mode)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"fp16.*bf16=True"):
        GradientRestriction(config, smooth_model(), mixed_precision="fp16")
    assert GradientRestriction(config, smooth_model(), mixed_precision="bf16").epsilon == 1e-2
    assert GradientRestriction(config, smooth_model(), mixed_precision="no").epsilon == 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_data_parallel_is_refused(mode: str) -> None:
    with pytest.raises(UnsupportedModelError, match="DataParallel"):
        GradientRestriction(RestrictionConfig(mode=mode), nn.DataParallel(smooth_model()))  # type: ignore[arg-type]


def test_sparse_gradients_and_layer_wise_optimizers_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    with pytest.raises(UnsupportedModelError, match="sparse=False"):
        restricted(embedding, lambda: embedding(torch.tensor([1, 2])).square().sum(), "finite-difference")
    model, (x, y) = smooth_model(), rows()
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(UnsupportedModelError, match="layer-wise"):
        restricted(model, mean_loss(model, x, y), "finite-difference")


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("mode", ["fd", "Exact", None]),
        ("norm", ["l2", None]),
        ("alpha", [-0.1, float("nan"), float("inf"), "0.1", True]),
        ("every", [0, -1, 1.5, True, "2"]),
        ("epsilon", [0.0, -1e-3, float("nan"), float("inf"), "1e-3"]),
    ],
)
def test_bad_values_are_named(argument: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ConfigError) as caught:
            RestrictionConfig(**{argument: value})
        assert f"{argument}={value!r}" in str(caught.value) and "give" in str(caught.value)
        assert isinstance(caught.value, (ValueError, IAUError))


# In the Trainer and on two processes


class RestrictedTrainer(Trainer):
    """The smallest trainer with a restricted training step."""

    restriction: GradientRestriction

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)

        def compute_loss() -> Tensor:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            scaled = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            return loss if scaled else loss / self.current_gradient_accumulation_steps

        return self.restriction.backward(model, compute_loss, self.accelerator.backward)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_training_with_accumulation(tmp_path: Path, label_smoothing: float) -> None:
    """'none' trains as the stock Trainer does, bit for bit; the two other modes agree with each other."""
    settings = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    start = bert("eager", **settings)
    data = [{"input_ids": torch.randint(0, 20, (5,)).tolist(), "labels": i % 3} for i in range(8)]
    ends = {}
    for mode in ("stock", "none", *MODES):
        model = copy.deepcopy(start)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            learning_rate=0.5,
            optim="sgd",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            label_smoothing_factor=label_smoothing,
        )
        trainer = (Trainer if mode == "stock" else RestrictedTrainer)(model=model, args=arguments, train_dataset=data)
        if mode != "stock":
            config = RestrictionConfig(mode=mode, alpha=0.05)  # type: ignore[arg-type]
            trainer.restriction = GradientRestriction(config, model)
        trainer.train()
        ends[mode] = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert torch.equal(ends["stock"], ends["none"])
    exact, approximate = ends["exact"] - ends["none"], ends["finite-difference"] - ends["none"]
    assert exact.norm() > 0
    assert relative_error(approximate, exact) < 5e-2


def average_in_each_process(folder: Path) -> int:
    """Run in each of two processes.

    Returns:
        How many gradients were compared.
    """
    torch.distributed.init_process_group("gloo")
    rank, compared = torch.distributed.get_rank(), 0
    torch.manual_seed(0)
    bare = smooth_model()
    batches = [[rows(4 + rank) for rank in (0, 1)] for _ in range(4)]
    for mode in ("none", *MODES):
        single = functools.partial(restricted, bare, mode=mode, alpha=0.2)
        model = DistributedDataParallel(copy.deepcopy(bare))
        restriction = GradientRestriction(RestrictionConfig(mode=mode, alpha=0.2), model)  # type: ignore[arg-type]
        # Twice two micro-batches, of which the first is not synchronised.
        for step in (0, 2):
            model.zero_grad()
            for batch in (step, step + 1):
                model.require_backward_grad_sync = batch == step + 1
                loss = mean_loss(model, *batches[batch][rank])
                restriction.backward(model, loss, lambda loss: loss.backward())
            parts = [single(mean_loss(bare, *batches[step + i][process])) for i in (0, 1) for process in (0, 1)]
            expected = {name: sum(part[name] for part in parts) / 2 for name in parts[0]}
            found = {name: p.grad for name, p in model.module.named_parameters() if p.grad is not None}
            assert_same(found, expected, 1e-9)
            compared += len(found)
    return compared


@pytest.mark.slow
def test_processes_average_their_restricted_gradients(tmp_path: Path) -> None:
    ended = run_in_processes(Path(__file__), tmp_path, "average_in_each_process:2")["average_in_each_process:2"]
    assert [process.get("error", "did not end") for process in ended] == [None, None], ended
    assert all(process["result"] > 0 for process in ended)
