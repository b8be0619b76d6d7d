"""What is gathered on an accelerator is what is gathered on the CPU, and lies where it was asked to lie."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import MODULE, on_both, simulated_device
from tiny_models import as_dataset, build, pad_right, rows_of
from torch import Tensor, nn
from unlearning_trainers import assert_bits, make_trainer, state_of

import hf_iau
from hf_iau import GatherConfig, GradientMemory, UnsupportedModelError
from hf_iau.curvature import fit_curvature
from hf_iau.curvature.layers import plan_layers
from hf_iau.data import ModelRowLoss, RowSource
from hf_iau.memory.gradient_sum import sum_row_gradients

CPU = torch.device("cpu")
EXACT = GatherConfig(gradient_sum="full", progress=False, batch_size=5)


def gathered(device: torch.device, family: str, config: GatherConfig, **model: Any) -> GradientMemory:
    return hf_iau.gather(
        build(family, **model).to(device), as_dataset(rows_of(family, 12)), data_collator=pad_right(), config=config
    )


def devices_of(memory: GradientMemory) -> set[torch.device]:
    tensors = [*(memory.gradient_sum or {}).values()]
    tensors += [] if memory.curvature is None else memory.curvature.tensors().values()
    return {tensor.device for tensor in tensors}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative to the length of the second."""
    away = sum(float((one[name].cpu().double() - other[name].cpu().double()).square().sum()) for name in other)
    return (away / sum(float(t.double().square().sum()) for t in other.values())) ** 0.5


def assert_alike(on_device: GradientMemory, on_cpu: GradientMemory, tolerance: float = 1e-5) -> None:
    """The same sums, and the same gradients preconditioned (eigenvectors themselves are not unique)."""
    assert on_cpu.gradient_sum is not None and on_device.gradient_sum is not None
    assert distance(on_device.gradient_sum, on_cpu.gradient_sum) < tolerance
    assert on_device.gradient_sum_error == pytest.approx(on_cpu.gradient_sum_error, rel=1e-3)
    if on_cpu.curvature is None:
        return
    assert on_device.curvature is not None
    assert [layer["kind"] for layer in on_device.curvature.layers()] == [
        layer["kind"] for layer in on_cpu.curvature.layers()
    ]
    expected = on_cpu.curvature.solve(on_cpu.gradient_sum, 0.1)
    found = on_device.curvature.solve(on_device.gradient_sum, 0.1)
    assert {t.device for t in found.values()} == {t.device for t in on_device.gradient_sum.values()}
    assert distance(found, expected) < 100 * tolerance
    assert distance(on_device.curvature.multiply(found), on_cpu.curvature.multiply(expected)) < 100 * tolerance


@pytest.mark.parametrize("family", ["bert", "gpt2", "resnet", "lora"])
def test_each_family(family: str) -> None:
    on_cpu, on_device = on_both(lambda device: gathered(device, family, EXACT))
    assert {device.type for device in devices_of(on_device)} == {"simulated"}
    assert_alike(on_device, on_cpu)


CONFIGS = {
    "sampled": replace(EXACT, gradient_sum="sampled", sample_rows=8, batch_size=2),
    "diagonal": replace(EXACT, curvature="diagonal"),
    "identity": replace(EXACT, curvature="identity"),
    "empirical": replace(EXACT, fisher="empirical"),
    "narrow factors": replace(EXACT, max_factor_size=16),
    "offloaded": replace(EXACT, memory_device="cpu"),
    "factors offloaded": replace(EXACT, factor_device="cpu"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_each_setting(kind: str) -> None:
    config = CONFIGS[kind]
    on_cpu, on_device = on_both(lambda device: gathered(device, "bert", config))
    assert_alike(on_device, on_cpu)
    kinds = {device.type for device in devices_of(on_device)}
    assert kinds == {"offloaded": {"cpu"}, "factors offloaded": {"cpu", "simulated"}}.get(kind, {"simulated"})


def test_a_second_pass_is_made_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing may be cached between the two statistics of EK-FAC."""
    monkeypatch.setattr("hf_iau.curvature.estimators.usual_cache_bytes", lambda *_: 0)
    for config in (EXACT, CONFIGS["factors offloaded"]):
        on_cpu, on_device = on_both(lambda device, config=config: gathered(device, "resnet", config))
        assert on_device.curvature is not None and on_device.curvature.details["passes"] == 2
        assert_alike(on_device, on_cpu)


def test_half_precision_passes() -> None:
    """What is added up stays float32; which operations are rounded is the device's own choice."""
    config = replace(EXACT, fisher="empirical", precision="bfloat16")
    on_cpu, on_device = on_both(lambda device: gathered(device, "bert", config))
    assert on_device.gradient_sum is not None and on_device.curvature is not None
    assert {t.dtype for t in on_device.curvature.tensors().values()} == {torch.float32}
    assert on_cpu.gradient_sum is not None
    assert distance(on_device.gradient_sum, on_cpu.gradient_sum) < 0.05
    exact = gathered(CPU, "bert", replace(config, precision="float32")).gradient_sum
    assert exact is not None and 1e-4 < distance(on_device.gradient_sum, exact) < 0.05


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    def gather(device: torch.device) -> GradientMemory:
        model: Any = build("bert").to(device).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        return hf_iau.gather(model, as_dataset(rows_of("bert", 12)), data_collator=pad_right(), config=EXACT)

    on_cpu, on_device = on_both(gather)
    assert_alike(on_device, on_cpu)


class OnTwoDevices(nn.Module):
    """A classifier whose second half lies on another device, as with `device_map="auto"`."""

    def __init__(self, first: torch.device, second: torch.device) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.LayerNorm(10)).to(first)
        self.output = nn.Linear(10, 3).to(second)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.output(self.hidden(features).to(self.output.weight.device))
        outputs = {"logits": logits}
        if labels is not None:
            outputs["loss"] = nn.functional.cross_entropy(logits, labels.to(logits.device))
        return outputs


@pytest.mark.parametrize("config", [EXACT, CONFIGS["sampled"], CONFIGS["offloaded"]], ids=str)
@pytest.mark.parametrize("order", [1, -1])
def test_a_model_spread_over_devices(config: GatherConfig, order: int) -> None:
    def gather(device: torch.device) -> GradientMemory:
        model = OnTwoDevices(*(CPU, device)[::order])
        return hf_iau.gather(model, as_dataset(rows_of("plain", 12)), data_collator=pad_right(), config=config)

    on_cpu, on_device = on_both(gather)
    assert_alike(on_device, on_cpu)


def test_a_device_is_waited_for_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a parameter: numbers that Python reads from the device while it sums sampled gradients."""
    reads = []
    read = MODULE.synchronising
    monkeypatch.setattr(MODULE, "synchronising", lambda op: reads.append(op) or read(op))
    with simulated_device() as device:
        model, rows = build("bert").to(device), as_dataset(rows_of("bert", 12))
        source = RowSource(rows, pad_right(), batch_size=2, device=device)
        loss = ModelRowLoss()
        sum_row_gradients(model, loss, source, track_batches=True)  # finds the loss's scale
        counts = []
        for some in (source.select(range(4)), source):
            reads.clear()
            sum_row_gradients(model, loss, some, track_batches=True)
            counts.append(len(reads))
    assert 0 < counts[1] - counts[0] <= 3 * 4  # of four batches more; the model has 37 parameters


def test_a_device_is_waited_for_once_a_layer_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """While covariances are summed: to see which positions are live. The batch itself takes a few reads more."""
    reads = []
    monkeypatch.setattr("hf_iau.curvature.row_loop.LOOP_ROWS", 1)
    monkeypatch.setattr(MODULE, "synchronising", reads.append)
    with simulated_device() as device:
        model, rows = build("bert").to(device), as_dataset(rows_of("bert", 16))
        counts = []
        for n in (8, 16):
            reads.clear()
            source = RowSource(rows, pad_right(), batch_size=4, device=device).select(range(n))
            fit_curvature(model, source, cache_bytes=2**30)
            counts.append(len(reads))
    layers = len(plan_layers(model, kronecker=True, max_factor_size=4096).kronecker)
    assert 0 < counts[1] - counts[0] <= 2 * (layers + 5)  # of two batches more


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.linalg.LinAlgError])
def test_one_factor_is_diagonalised_on_the_cpu_where_the_device_cannot(
    error: type[RuntimeError], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    own, where = torch.linalg.eigh, []

    def fails_once(matrix: Tensor, **settings: Any) -> Any:
        where.append(matrix.device.type)
        if where == ["simulated"] * 3:
            raise error("for this one")
        return own(matrix, **settings)

    with simulated_device() as device:
        expected = gathered(device, "bert", EXACT)
        monkeypatch.setattr(torch.linalg, "eigh", fails_once)
        with caplog.at_level("INFO", "hf_iau.curvature.eigenvectors"):
            found = gathered(device, "bert", EXACT)
        assert {device.type for device in devices_of(found)} == {"simulated"}
        assert where[:5] == ["simulated", "simulated", "simulated", "cpu", "simulated"] and where.count("cpu") == 1
        (record,) = [record for record in caplog.records if record.name == "hf_iau.curvature.eigenvectors"]
        assert "is diagonalised on the CPU" in record.message and error.__name__ in record.message
        assert_alike(found, expected)


def test_a_model_without_its_weights_is_refused() -> None:
    model, rows = build("plain"), as_dataset(rows_of("plain", 12))
    model.hidden.weight = nn.Parameter(model.hidden.weight.to("meta"))
    with pytest.raises(UnsupportedModelError, match=r"'hidden.weight' is on the device 'meta'.*Load the model whole"):
        hf_iau.gather(model, rows, data_collator=pad_right(), config=EXACT)
    with pytest.raises(UnsupportedModelError, match="'meta'"):
        hf_iau.check_row_gradients(model, rows, data_collator=pad_right())


def test_a_device_without_float64_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("hf_iau.data.validation.WITHOUT_FLOAT64", ("simulated",))
    with simulated_device() as device:
        with pytest.raises(UnsupportedModelError, match=r"'simulated' has no float64.*use_cpu=True"):
            gathered(device, "plain", EXACT)
        with pytest.raises(UnsupportedModelError, match="has no float64"):  # before anything is trained
            make_trainer(tmp_path, "plain", settings={"use_cpu": False})


class Quantised(nn.Module):
    """A linear layer with a frozen weight of whole numbers that is multiplied in bfloat16."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = float(layer.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((layer.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.bfloat16() @ (self.weight.bfloat16() * self.scale).T).to(x.dtype)


class Adapted(nn.Module):
    """A quantised layer with a low-rank adapter, as with QLoRA, between trained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = Quantised(nn.Linear(6, 12)), nn.Linear(6, 4), nn.Linear(4, 12, bias=False)
        self.output = nn.Linear(12, 3)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.output(torch.tanh(self.base(features) + self.up(self.down(features))))
        return {"logits": logits} | ({} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)})


def test_adapters_on_a_quantised_base_get_kronecker_factors() -> None:
    """The base rounds differently from batch to batch, which the checks must not take for coupled rows."""

    def gather(device: torch.device) -> GradientMemory:
        torch.manual_seed(1)
        model = Adapted().to(device)
        rows = as_dataset(rows_of("plain", 12))
        check = hf_iau.check_row_gradients(model, rows, data_collator=pad_right())
        assert check.passed and check.tolerance == 2e-2
        memory = hf_iau.gather(model, rows, data_collator=pad_right(), config=EXACT)
        assert memory.curvature is not None and set(memory.curvature.coverage()) == {"kronecker"}
        return memory

    on_cpu, on_device = on_both(gather)
    assert_alike(on_device, on_cpu, tolerance=1e-3)


def test_files_are_the_same_from_every_device(tmp_path: Path) -> None:
    def round_trip(device: torch.device) -> GradientMemory:
        memory = gathered(device, "lora", EXACT)
        memory.save(tmp_path / device.type)
        loaded = GradientMemory.load(tmp_path / device.type)
        loaded.check_model(build("lora").to(device))
        assert memory.gradient_sum is not None and loaded.gradient_sum is not None
        assert distance(loaded.gradient_sum, memory.gradient_sum) == 0.0
        return loaded

    on_cpu, on_device = on_both(round_trip)
    assert_alike(on_device, on_cpu)


def test_nothing_is_left_behind_on_the_device() -> None:
    with simulated_device() as device:
        model = build("bert").to(device)
        rows, before, held = as_dataset(rows_of("bert", 12)), state_of(model), MODULE.memory_allocated()
        memory = hf_iau.gather(model, rows, data_collator=pad_right(), config=CONFIGS["offloaded"])
        assert MODULE.memory_allocated() == held
        assert_bits(model, before)
        assert memory.nbytes() > 0


def test_the_check_of_row_gradients_and_the_estimate() -> None:
    def look(device: torch.device) -> tuple[Any, Any]:
        model, rows = build("bert").to(device), as_dataset(rows_of("bert", 12))
        check = hf_iau.check_row_gradients(model, rows, data_collator=pad_right())
        expected = hf_iau.estimate(model, rows, EXACT, data_collator=pad_right())
        return check, expected

    (check_on_cpu, on_cpu), (check_on_device, on_device) = on_both(look)
    assert check_on_cpu.passed and check_on_device.passed
    for name in ("weights", "gradients", "gradient_sum", "factors"):
        assert on_device.bytes[name] == on_cpu.bytes[name]
    assert on_device.bytes["activations"] == pytest.approx(on_cpu.bytes["activations"], rel=0.2)
    assert on_device.seconds["gather"] > 0
