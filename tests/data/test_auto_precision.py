"""`precision="auto"`: passes run under the autocast that the Trainer trains under, and a request under the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import as_dataset, bert, build, rows_of
from torch import Tensor, nn
from unlearning_trainers import WITH_CURVATURE, collator, make_trainer, parameters_of

import hf_iau
from hf_iau import GatherConfig, GradientMemory, IAUCallback, IAUConfig, check_row_gradients
from hf_iau.data.precision import resolve_precision

GIVEN = IAUConfig(scale=0.1, damping=1.0)
BF16 = {"bf16": True}


def refuse_float32(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    """As attention kernels do it that were written for half precision alone."""
    half = any(isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) for x in inputs)
    if not (half or torch.is_autocast_enabled("cpu")):
        raise RuntimeError("this kernel takes fp16 and bf16 alone")


def picky(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.register_forward_pre_hook(refuse_float32)
    return model


def test_kernels_that_refuse_float32(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, model=picky(bert()), settings=BF16, callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    assert trainer.memory.settings["precision"] == "bfloat16"
    result = trainer.unlearn(forget_indices=[1, 4], config=GIVEN)
    assert result.applied and result.report.counts["held_out_rows"] == 6
    trainer.save_model()
    # A fresh process that is not told of bf16.
    model = picky(bert())
    model.load_state_dict(trainer.model.state_dict())
    fresh = make_trainer(tmp_path, model=model, memory=GradientMemory.load(tmp_path))
    assert fresh.unlearn(forget_indices=[2], config=GIVEN).applied
    trainer.gather()
    exact = [IAUCallback(GatherConfig(precision="float32", progress=False))]
    other = make_trainer(tmp_path / "float32", model=picky(bert()), settings=BF16, callbacks=exact)
    with pytest.raises(RuntimeError, match="this kernel takes"):
        other.train()
    assert check_row_gradients(
        picky(bert()), as_dataset(rows_of("bert", 8)), data_collator=collator(torch.float32), precision="bfloat16"
    ).passed


def test_without_mixed_precision_it_is_float32_bit_for_bit(tmp_path: Path) -> None:
    memories = []
    for precision in ("auto", "float32"):
        config = GatherConfig(gradient_sum="full", precision=precision, progress=False)  # type: ignore[arg-type]
        trainer = make_trainer(tmp_path / precision, callbacks=[IAUCallback(config)])
        trainer.train()
        assert trainer.memory.settings["precision"] == "float32"
        trainer.unlearn(forget_indices=[1, 4], config=GIVEN)
        memories.append(parameters_of(trainer.model))
    assert all(value.equal(memories[1][name]) for name, value in memories[0].items())


def test_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    config = GatherConfig(precision="float32", progress=False)
    trainer = make_trainer(tmp_path, settings=BF16, callbacks=[IAUCallback(config)])
    trainer.train()
    assert trainer.memory.settings["precision"] == "float32"


def test_what_auto_comes_to() -> None:
    assert resolve_precision("auto", "no", None) == resolve_precision("auto", None, None) == "float32"
    assert resolve_precision("auto", "bf16", None) == "bfloat16"
    # A row's gradient may lie below the smallest number of fp16.
    assert resolve_precision("auto", "fp16", torch.device("cpu")) == "bfloat16"
    for asked in ("float32", "bfloat16"):
        assert resolve_precision(asked, "fp16", None) == asked


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_a_step_under_bf16_is_that_of_float32_to_a_few_percent(family: str) -> None:
    rows = as_dataset(rows_of(family, 12))
    steps = []
    for precision in ("float32", "bfloat16"):
        config = GatherConfig(gradient_sum="full", precision=precision, progress=False)  # type: ignore[arg-type]
        memory = hf_iau.gather(build(family), rows, data_collator=collator(torch.float32), config=config)
        assert memory.gradient_sum is not None and memory.curvature is not None
        assert all(tensor.dtype == torch.float32 for tensor in memory.gradient_sum.values())
        step = memory.curvature.solve(memory.gradient_sum, 0.1)
        steps.append(torch.cat([step[name].double().flatten() for name in sorted(step)]))
    exact, rounded = steps
    cosine = float(exact @ rounded / (exact.norm() * rounded.norm()))
    length = float(rounded.norm() / exact.norm())
    assert cosine > 0.99 and abs(length - 1.0) < 0.1
