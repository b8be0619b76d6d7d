"""Steps: how they are taken, put together and measured, and what they do to a gradient sum."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import plain
from torch import nn
from unlearning_trainers import WITH_CURVATURE, make_trainer

from hf_iau.methods.step import apply_step, corrected_step, moved_gradient_sum, step_norm, weights_norm


@pytest.fixture
def model() -> nn.Module:
    return plain()


def test_a_step_is_added_to_the_parameters_it_names(model: nn.Module) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = {"hidden.weight": torch.randn(10, 6, dtype=torch.float64)}
    apply_step(model, step, scale=-0.5)
    for name, value in model.named_parameters():
        change = -0.5 * step[name] if name in step else torch.zeros(())
        assert torch.equal(value, (before[name].double() + change).float()), name


def test_a_step_is_rounded_once(model: nn.Module) -> None:
    """Added in double precision: a float32 scale would lose the last bits before the sum."""
    model = model.to(torch.bfloat16)
    before = model.output.bias.detach().clone()
    step = torch.full((3,), 2.0**-9, dtype=torch.float64)
    apply_step(model, {"output.bias": step}, scale=3.0)
    assert torch.equal(model.output.bias.detach(), (before.double() + 3.0 * step).to(torch.bfloat16))


def test_norms(model: nn.Module) -> None:
    assert step_norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}) == 5.0
    parameters = dict(model.named_parameters())
    flat = torch.cat([parameters[name].detach().double().flatten() for name in ("hidden.bias", "output.weight")])
    assert weights_norm(model, ["hidden.bias", "output.weight"]) == pytest.approx(float(flat.norm()), rel=1e-12)


def test_directions_are_put_together() -> None:
    forget, finish = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([10.0, -1.0])}
    assert corrected_step(forget, finish, 2.0, 0.5)["a"].tolist() == [-3.0, 4.5]
    assert corrected_step(forget, finish, 2.0, 0.0)["a"].tolist() == [2.0, 4.0]
    assert corrected_step(forget, None, 2.0, 0.5)["a"].tolist() == [2.0, 4.0]


def test_the_gradient_sum_moves_by_the_curvature(tmp_path: Path) -> None:
    """Σ′_D = Σ_D − Σ_f + n_r·C·Δ."""
    trainer = make_trainer(tmp_path, "plain")
    memory = trainer.gather(WITH_CURVATURE)
    assert memory.gradient_sum is not None and memory.curvature is not None
    total = {name: tensor.clone() for name, tensor in memory.gradient_sum.items()}
    forget = {name: torch.randn_like(tensor) for name, tensor in total.items()}
    step = {name: torch.randn_like(tensor) for name, tensor in total.items()}
    moved = moved_gradient_sum(memory.gradient_sum, forget, memory.curvature, step, 9)
    bent = memory.curvature.multiply(step)
    for name, tensor in moved.items():
        assert tensor.dtype == total[name].dtype == torch.float32
        torch.testing.assert_close(tensor, total[name] - forget[name] + 9 * bent[name])
        assert torch.equal(memory.gradient_sum[name], total[name])
    # A step against the curvature raises nothing: Δ·CΔ ≥ 0.
    assert sum(float((step[name] * bent[name].double()).sum()) for name in step) > 0
