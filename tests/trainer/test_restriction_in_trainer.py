"""Gradient restriction inside `UnlearningTrainer`'s training step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import bert, build, gpt2, pad_right, plain, resnet
from torch import Tensor, nn
from transformers import Trainer
from unlearning_trainers import EXACT, FORGET, make_trainer, parameters_of, state_of

from hf_iau import IAUCallback, UnlearningTrainer
from hf_iau.errors import ConfigError
from hf_iau.trainer.restriction import RestrictionConfig

RESTRICTIONS = {
    "exact": "exact",
    "finite-difference": "finite-difference",
    "config": RestrictionConfig(mode="finite-difference", alpha=0.1, every=2, norm="per-tensor"),
}


def eager(**settings: Any) -> nn.Module:
    return bert(attn_implementation="eager", **settings)


class Recorder(UnlearningTrainer):
    """Keeps the gradients of the first step as the optimizer sees them, and the micro-batches that made them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.micro_batches: list[dict[str, Tensor]] = []
        self.first_gradients: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        self.micro_batches.append({name: value.clone() for name, value in inputs.items()})
        loss = super().training_step(model, inputs, num_items_in_batch)
        if len(self.micro_batches) == self.args.gradient_accumulation_steps:
            self.first_gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return loss


@pytest.mark.parametrize("name", RESTRICTIONS)
def test_training_with_restriction(name: str, tmp_path: Path) -> None:
    ends = []
    for restriction in (None, RESTRICTIONS[name]):
        trainer = make_trainer(tmp_path, model=eager(), restriction=restriction, callbacks=[IAUCallback(EXACT)])
        before = parameters_of(trainer.model)
        output = trainer.train()
        assert torch.isfinite(torch.tensor(output.training_loss))
        assert output.global_step == 3
        moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
        assert len(moved) == len(before)
        ends.append(parameters_of(trainer.model))
        # The restriction is no part of the row loss: the memory fits, and requests are served.
        assert trainer.memory is not None and trainer.memory.loss["kind"] == "model"
        assert trainer.unlearn(forget_indices=FORGET, method="iau-released").applied
    assert any(not torch.equal(ends[0][n], ends[1][n]) for n in ends[0])


# A language model's loss is computed in single precision whatever its weights are: too coarse for a finite difference.
STEPS = [("bert", "exact"), ("bert", "finite-difference"), ("plain", "exact"), ("plain", "finite-difference")]


@pytest.mark.parametrize("norm", ["whole", "per-tensor"])
@pytest.mark.parametrize("family, mode", [*STEPS, ("gpt2", "exact")])
def test_the_gradient_of_a_step_is_the_formula(family: str, mode: str, norm: str, tmp_path: Path) -> None:
    """Two micro-batches; each adds ∇L + α∇‖∇L‖ of its own loss, scaled as the Trainer scales it."""
    alpha = 0.3
    model = {"bert": eager, "plain": plain, "gpt2": lambda: gpt2(attn_implementation="eager")}[family]().double()
    settings = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
    }
    recorders = []
    for restriction in (None, RestrictionConfig(mode=mode, alpha=alpha, norm=norm, epsilon=1e-6)):  # type: ignore[arg-type]
        recorder = make_trainer(
            tmp_path,
            family,
            model=copy.deepcopy(model),
            trainer_class=Recorder,
            settings=settings,
            restriction=restriction,
        )
        recorder.train()
        assert isinstance(recorder, Recorder)
        assert len(recorder.micro_batches) == 2
        recorders.append(recorder)
    unrestricted, restricted = recorders

    parameters = dict(model.named_parameters())
    first_order = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    second_order = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for batch in restricted.micro_batches:
        loss = model.train()(**batch)["loss"] * share(restricted, batch)
        gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        norms = torch.stack([gradient.norm() for gradient in gradients])
        term = alpha * (norms.sum() if norm == "per-tensor" else norms.norm())
        seconds = torch.autograd.grad(term, list(parameters.values()), allow_unused=True)
        for name, gradient, second in zip(parameters, gradients, seconds, strict=True):
            first_order[name] += gradient.detach()
            second_order[name] += 0 if second is None else second

    def distance(one: dict[str, Tensor], *others: dict[str, Tensor]) -> float:
        rest = {name: value - sum(other[name] for other in others) for name, value in one.items()}
        return float(sum(float(value.square().sum()) for value in rest.values()) ** 0.5)

    tolerance = 1e-4 if mode == "finite-difference" else 1e-5 if family == "gpt2" else 1e-9
    assert distance(unrestricted.first_gradients, first_order) < 1e-5 * distance(first_order)
    assert distance(second_order) > 1e-2 * distance(first_order)
    assert distance(restricted.first_gradients, first_order, second_order) < tolerance * distance(second_order)


def share(trainer: Recorder, batch: dict[str, Tensor]) -> float:
    """What the Trainer makes of a micro-batch's mean loss."""
    if type(trainer.model).__name__ == "GPT2LMHeadModel":  # honours num_items_in_batch: a sum over tokens, divided
        items = trainer._get_num_items_in_batch(trainer.micro_batches, trainer.args.device)  # type: ignore[arg-type]
        return int((batch["labels"][:, 1:] != -100).sum()) / int(items)
    # BERT takes num_items_in_batch and ignores it, so nobody divides.
    return 1.0 if trainer.model_accepts_loss_kwargs else 1 / len(trainer.micro_batches)


def test_none_is_the_trainer_bit_for_bit(tmp_path: Path) -> None:
    ends = []
    for trainer_class, kwargs in (
        (Trainer, {}),
        (UnlearningTrainer, {}),
        (UnlearningTrainer, {"restriction": "none"}),
        (UnlearningTrainer, {"restriction": RestrictionConfig(mode="none", alpha=1.0)}),
        (UnlearningTrainer, {"restriction": RestrictionConfig(mode="exact", alpha=0.0)}),
    ):
        model = bert(dropout=0.1)
        trainer = make_trainer(
            tmp_path,
            model=model,
            trainer_class=trainer_class,  # type: ignore[arg-type]
            settings={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
            **kwargs,
        )
        trainer.train()
        ends.append(state_of(model))
    for other in ends[1:]:
        assert all(torch.equal(ends[0][name], other[name]) for name in ends[0])


def test_every_counts_micro_batches(tmp_path: Path) -> None:
    """With every=4 and two steps of two micro-batches each, the first step is a plain one."""
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "max_steps": 2}
    firsts, ends = [], []
    for restriction in (None, RestrictionConfig(mode="exact", alpha=0.5, every=4)):
        trainer = make_trainer(
            tmp_path, model=eager(), trainer_class=Recorder, settings=settings, restriction=restriction
        )
        trainer.train()
        assert isinstance(trainer, Recorder)
        firsts.append(trainer.first_gradients)
        ends.append(parameters_of(trainer.model))
    assert all(torch.equal(firsts[0][name], firsts[1][name]) for name in firsts[0])
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_batch_statistics_move_once_a_micro_batch(tmp_path: Path) -> None:
    """The second pass of a finite difference leaves BatchNorm's running statistics alone."""
    buffers = []
    for restriction in (None, RestrictionConfig(mode="finite-difference")):
        trainer = make_trainer(tmp_path, "resnet", model=resnet(), settings={"max_steps": 1}, restriction=restriction)
        trainer.train()
        buffers.append({name: buffer.clone() for name, buffer in trainer.model.named_buffers()})
    assert buffers[0]
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[0])


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_exact_with_fused_attention_names_both_remedies_at_construction(family: str, tmp_path: Path) -> None:
    message = r"restriction='exact' with attn_implementation='sdpa'.*attn_implementation='eager'.*finite-difference"
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, family, restriction="exact")


def test_finite_difference_works_with_fused_attention_and_under_bf16(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, restriction="finite-difference", settings={"bf16": True}, callbacks=[IAUCallback(EXACT)]
    )
    assert build("bert").config._attn_implementation == "sdpa"
    trainer.train()
    assert all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    assert trainer.unlearn(forget_indices=FORGET, method="iau-released").applied


def test_model_init_gets_it_too(tmp_path: Path) -> None:
    ends = []
    for kwargs in ({"model": eager(seed=3)}, {"model_init": lambda: eager(seed=3)}):
        trainer = make_trainer(tmp_path, restriction="exact", **kwargs)
        trainer.train()
        ends.append(parameters_of(trainer.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_optimizers_that_step_in_the_backward_pass_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=eager())
    args = trainer.args
    args.optim = "lomo"  # its package need not be installed to be refused
    with pytest.raises(ConfigError, match="optim='lomo' steps inside the backward pass"):
        UnlearningTrainer(
            model=eager(),
            args=args,
            train_dataset=trainer.train_dataset,
            data_collator=pad_right(),
            restriction="exact",
        )
