"""Precision, checkpointing, compiled code and the memory device change what a pass costs, not what it finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import CLASSES, FEATURES, as_dataset, bert, build, pad_right, plain, plain_rows, rows_of, text_rows
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from unlearning_trainers import EXACT, FORGET, WITH_CURVATURE, collator, make_trainer, parameters_of

import hf_iau
from hf_iau import ConfigError, GatherConfig, GradientMemory, IAUCallback, IAUConfig, check_row_gradients
from hf_iau.data import ModelRowLoss, RowSource, evaluation_mode
from hf_iau.data.precision import compute_settings, memory_device
from hf_iau.memory.gradient_sum import sum_row_gradients
from hf_iau.unlearn.transaction import WeightTransaction
from hf_iau.utils.vectors import GradientAccumulator

STEP = IAUConfig(scale=0.1, damping=1.0, retain_weight=0.01)


def gathered(model: nn.Module, family: str, **config: Any) -> GradientMemory:
    settings = {"gradient_sum": "full", "progress": False, "batch_size": 5} | config
    dtype = next(model.parameters()).dtype
    return hf_iau.gather(
        model, as_dataset(rows_of(family, 12)), data_collator=collator(dtype), config=GatherConfig(**settings)
    )


def assert_same(one: GradientMemory, other: GradientMemory, tolerance: float) -> None:
    """Sums, preconditioned sums and kinds of curvature agree."""
    assert one.gradient_sum is not None and other.gradient_sum is not None
    assert one.curvature is not None and other.curvature is not None
    assert one.curvature.coverage() == other.curvature.coverage()
    assert list(one.parameters) == list(other.parameters)
    for left, right in (
        (one.gradient_sum, other.gradient_sum),
        (one.curvature.solve(one.gradient_sum, 0.1), other.curvature.solve(one.gradient_sum, 0.1)),
    ):
        scale = max(float(tensor.abs().max()) for tensor in left.values())
        for name, tensor in left.items():
            torch.testing.assert_close(right[name], tensor, rtol=tolerance, atol=tolerance * scale)


# --- gradient checkpointing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "vit", "lora"])
def test_checkpointing_changes_no_number(family: str) -> None:
    plainly = build(family, dtype=torch.float64)
    recomputing = build(family, dtype=torch.float64)
    recomputing.gradient_checkpointing_enable()
    assert_same(gathered(plainly, family), gathered(recomputing, family), 1e-9)


def saved_bytes(model: nn.Module) -> int:
    """Bytes that autograd keeps between forward and backward, outside of what is recomputed."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with evaluation_mode(model), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = ModelRowLoss()(model, pad_right()(text_rows(8, length=(16, 17))))
        loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def test_checkpointing_saves_memory_while_gathering() -> None:
    plainly, recomputing = bert(num_hidden_layers=4), bert(num_hidden_layers=4)
    recomputing.gradient_checkpointing_enable()
    assert saved_bytes(recomputing) < 0.3 * saved_bytes(plainly)


class LayerWithDropout(GradientCheckpointingLayer):
    """Looks at its own `training` flag, as BART's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(FEATURES, FEATURES)
        self.calls = 0

    def forward(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        return F.dropout(torch.tanh(self.inner(hidden)), 0.5, training=self.training)


class WithLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = LayerWithDropout()
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.head(self.layer(features))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_layers_recompute_without_their_dropout() -> None:
    torch.manual_seed(0)
    model = WithLayers().train()
    plainly = gathered(model, "plain")
    model.layer.gradient_checkpointing = True
    model.layer._gradient_checkpointing_func = None  # Transformers' own way, which is not to be taken
    model.layer.calls = 0
    source = RowSource(as_dataset(plain_rows(8)), pad_right(), batch_size=4)
    sum_row_gradients(model, ModelRowLoss(), source)
    assert model.layer.calls == 2 + 2 * 2  # two to find the scale of the loss, then twice a batch
    assert_same(plainly, gathered(model, "plain"), 1e-6)
    assert model.layer.training and "forward" not in model.layer.__dict__


def test_checkpointing_in_a_trainer(tmp_path: Path) -> None:
    after = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path / str(checkpointing),
            "llama-classifier",
            settings={"gradient_checkpointing": checkpointing},
            callbacks=[IAUCallback(WITH_CURVATURE)],
        )
        trainer.train()
        trainer.unlearn(forget_indices=FORGET, config=STEP)
        after.append(parameters_of(trainer.model))
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-4, atol=1e-5)


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_compiled_code_left() -> Any:
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_gathers_like_the_plain_one(in_place: bool) -> None:
    expected = gathered(plain().double(), "plain")
    model: Any = plain().double()
    if in_place:
        model.compile(backend="aot_eager")
        model.hidden.compile(backend="aot_eager")
    else:
        model = torch.compile(model, backend="aot_eager")
    inputs = collator(torch.float64)(plain_rows(4))
    model(**inputs)["loss"].backward()  # compiled before our hooks come
    assert_same(expected, gathered(model, "plain"), 1e-10)
    rows = as_dataset(plain_rows(6))
    assert check_row_gradients(model, rows, data_collator=collator(torch.float64)).passed
    assert torch.compiler.is_compiling() is False and model(**inputs)["loss"].requires_grad


@pytest.mark.parametrize("how", ["argument", "model"])
def test_a_compiled_model_is_trained_and_forgets(how: str, tmp_path: Path) -> None:
    after = []
    for compiled in (False, True):
        family = "bert" if how == "model" else "plain"
        model: Any = build(family, **({"num_hidden_layers": 1} if how == "model" else {}))
        settings: dict[str, Any] = {
            "remove_unused_columns": False
        }  # a compiled model's forward takes (*args, **kwargs)
        if compiled and how == "model":
            model = torch.compile(model, backend="eager")
        elif compiled:
            settings |= {"torch_compile": True, "torch_compile_backend": "eager"}
        folder = tmp_path / str(compiled)
        callbacks = [IAUCallback(WITH_CURVATURE)]
        trainer = make_trainer(folder, family, model=model, settings=settings, callbacks=callbacks)
        trainer.train()
        trainer.unlearn(forget_indices=FORGET, config=STEP)
        after.append({name.removeprefix("_orig_mod."): p for name, p in parameters_of(trainer.model).items()})
    assert after[0].keys() == after[1].keys()
    for name, value in after[0].items():
        torch.testing.assert_close(after[1][name], value, rtol=1e-3, atol=1e-4)


# --- precision --------------------------------------------------------------------------------------------------------


def test_the_error_of_bfloat16_passes() -> None:
    full, narrow = gathered(bert(), "bert"), gathered(bert(), "bert", precision="bfloat16")
    assert full.gradient_sum is not None and narrow.gradient_sum is not None and narrow.curvature is not None
    source = RowSource(as_dataset(rows_of("bert", 12)), pad_right(), batch_size=1)
    rows = [sum_row_gradients(bert(), ModelRowLoss(), source.select([i])).norm() for i in range(12)]
    error = sum(float((full.gradient_sum[n] - t).square().sum()) for n, t in narrow.gradient_sum.items()) ** 0.5
    assert 1e-5 < error / sum(rows) < 1e-2
    assert {t.dtype for t in narrow.gradient_sum.values()} == {torch.float32}
    assert {t.dtype for t in narrow.curvature.tensors().values()} == {torch.float32}
    assert full.curvature is not None and full.curvature.coverage() == narrow.curvature.coverage()
    one, other = (memory.curvature.solve(full.gradient_sum, 0.1) for memory in (full, narrow))  # type: ignore[union-attr]
    length = sum(float(t.square().sum()) for t in one.values()) ** 0.5
    distance = sum(float((one[name] - t).square().sum()) for name, t in other.items()) ** 0.5
    assert distance / length < 0.1


def test_a_request_works_in_the_precision_of_its_memory(tmp_path: Path) -> None:
    """Settings are read back from the file; autocast is on in every pass of the request and off after it."""
    model = bert()
    gathered(model, "bert", precision="bfloat16").save(tmp_path)
    memory = GradientMemory.load(tmp_path)
    seen: set[torch.dtype] = set()
    handle = model.classifier.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    make_trainer(tmp_path / "run", model=model, memory=memory).unlearn(forget_indices=FORGET, config=STEP)
    handle.remove()
    assert seen == {torch.bfloat16}
    assert not torch.is_autocast_enabled("cpu")
    assert model(**pad_right()(text_rows(2)))["logits"].dtype == torch.float32


def test_casts_of_moved_weights_are_not_remembered() -> None:
    model, inputs = plain(), pad_right()(plain_rows(4))
    with compute_settings("bfloat16"), evaluation_mode(model), torch.enable_grad():
        before = model(**inputs)["logits"].detach().clone()
        with torch.no_grad():
            model.output.bias.add_(1.0)
        assert not torch.equal(model(**inputs)["logits"], before)


@pytest.mark.parametrize(
    "setting", [{"precision": "float16"}, {"memory_device": "nowhere"}, {"factor_device": "gpu0"}], ids=str
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    (name, value), *_ = setting.items()
    with pytest.raises(ConfigError, match=rf"{name}='{value}'"):
        GatherConfig(**setting)


# --- memory device ----------------------------------------------------------------------------------------------------


def test_the_memory_device_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is as large as the weights is put where it was asked for, in gathering and in the request after it."""
    asked: list[torch.device] = []
    to = Tensor.to

    def watched(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.extend(device for device in args if isinstance(device, torch.device) and device.type == "cpu")
        return to(tensor, *args, **kwargs)

    results = []
    for device in (None, "cpu"):
        model = bert()
        memory = gathered(model, "bert", memory_device=device)
        assert memory.settings["memory_device"] == device
        trainer = make_trainer(tmp_path, model=model, memory=memory)
        asked.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "to", watched)
            trainer.unlearn(forget_indices=FORGET, config=STEP)
        results.append((parameters_of(model), len(asked)))
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())
    assert results[1][1] >= len(results[0][0])  # at least the copy of every weight
    assert memory_device(torch.device("meta")).type == "meta"  # type: ignore[union-attr]
    with compute_settings(memory_device="cpu"):
        assert memory_device(torch.device("meta")) == torch.device("cpu")


def test_sums_on_the_memory_device() -> None:
    source = RowSource(as_dataset(plain_rows(8)), pad_right(), batch_size=4)
    with compute_settings(memory_device="cpu"):
        total = sum_row_gradients(plain(), ModelRowLoss(), source)
    expected = sum_row_gradients(plain(), ModelRowLoss(), source)
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in total.tensors.items())
    assert {tensor.device.type for tensor in total.tensors.values()} == {"cpu"}
    assert EXACT.memory_device is None


def test_what_a_request_keeps_lies_on_the_memory_device() -> None:
    """The device "meta" stands in for another one than the model's."""
    model, elsewhere = plain(), torch.device("meta")
    with compute_settings(memory_device=elsewhere):
        source = RowSource(as_dataset(plain_rows(8)), pad_right(), batch_size=4).keep_batches()
        transaction = WeightTransaction(model, memory_device(None))
        moved = transaction.moved(["hidden.weight"])
        accumulator = GradientAccumulator(dict(model.named_parameters()), memory_device(None))
        for _ in range(9):
            model(**pad_right()(plain_rows(4)))["loss"].backward()
            accumulator.add()
            assert all(p.grad is None for p in model.parameters())  # no room is taken for them in the next forward pass
        sums = accumulator.finish()
    assert source._batches is not None
    kept = [tensor for _, inputs in source._batches for tensor in inputs.values()]
    for tensor in (*kept, *transaction.copies.values(), moved["hidden.weight"], *sums.values()):
        assert tensor.device == elsewhere
    assert all(p.grad is None for p in model.parameters())
