"""Estimated bytes against what is then held."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memorising_network import CLASSES, WIDTH, Classifier, Scene, draw, fit
from tiny_models import FAMILIES, as_dataset, build, pad_right, rows_of
from torch import nn
from transformers import TrainingArguments

import hf_iau
from hf_iau import ConfigError, GatherConfig, IAUConfig, UnlearningTrainer, UnsupportedModelError, cost_estimate
from hf_iau.curvature import Curvature
from hf_iau.data import ModelRowLoss, RowSource
from hf_iau.memory.gradient_sum import sum_row_gradients
from hf_iau.methods.iau import method
from hf_iau.methods.iau.multi_step import MultiStepWork
from hf_iau.methods.iau.run import CalibrationRun
from hf_iau.unlearn.transaction import WeightTransaction
from hf_iau.utils.timing import peak_allocated_bytes

QUIET: dict[str, Any] = {"progress": False, "batch_size": 6}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_has_the_bytes_that_were_estimated(family: str) -> None:
    model, rows = build(family), as_dataset(rows_of(family, 12))
    config = GatherConfig(gradient_sum="full", **QUIET)
    estimated = hf_iau.estimate(model, rows, config, data_collator=pad_right(), probe=False)
    memory = hf_iau.gather(model, rows, data_collator=pad_right(), config=config)
    assert memory.gradient_sum is not None and memory.curvature is not None
    assert estimated.bytes["memory"] == pytest.approx(memory.nbytes(), rel=0.2)
    assert estimated.bytes["factors"] == pytest.approx(memory.curvature.nbytes(), rel=0.2)
    assert estimated.bytes["gradient_sum"] == sum(t.numel() * t.element_size() for t in memory.gradient_sum.values())
    assert sum(estimated.coverage.values()) == sum(memory.curvature.coverage().values())
    source = RowSource(rows, pad_right(), batch_size=4)
    sum_row_gradients(model, ModelRowLoss(), source)
    kept = [p for p in model.parameters() if p.requires_grad]
    assert estimated.bytes["gradients"] == sum(p.numel() * p.element_size() for p in kept)
    copies = WeightTransaction(model).copies.values()
    assert estimated.bytes["weights"] == sum(t.numel() * t.element_size() for t in copies)


@pytest.mark.parametrize("setting", ["diagonal", "identity", "none", "ekfac with narrow factors"])
def test_every_kind_of_curvature(setting: str) -> None:
    kind, *narrow = setting.split(" with ")
    config = GatherConfig(curvature=kind, max_factor_size=17 if narrow else 4096, gradient_sum="none", **QUIET)  # type: ignore[arg-type]
    model, rows = build("bert"), as_dataset(rows_of("bert", 12))
    estimated = hf_iau.estimate(model, rows, config, data_collator=pad_right(), probe=False)
    memory = hf_iau.gather(model, rows, data_collator=pad_right(), config=config)
    assert estimated.bytes["memory"] == pytest.approx(memory.nbytes(), rel=0.2)
    assert estimated.coverage == ({} if memory.curvature is None else memory.curvature.coverage())


class Wide(Classifier):
    """Weights so large that all else is small beside them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, CLASSES)


@pytest.mark.parametrize(("kind", "width"), [("none", 700), ("full", 500)])
def test_peaks_of_gathering_and_of_a_request(kind: Any, width: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    train, held_out = draw(600, 1), draw(300, 2)
    model = fit(Wide(width), train, 3, seed=0)
    config = GatherConfig(gradient_sum=kind, progress=False, batch_size=32, curvature_rows=200)
    wishes = IAUConfig(multi_step=False)
    estimated = hf_iau.estimate(
        model, train, config, method_config=wishes, request_rows=60, held_out_rows=300, prediction_batch_size=300
    )
    found: list[Any] = []
    peak = peak_allocated_bytes(lambda: found.append(hf_iau.gather(model, train, config=config)))
    assert estimated.bytes["gathering_peak"] - estimated.bytes["weights"] == pytest.approx(peak, rel=0.2)
    trainer = UnlearningTrainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=32,
            per_device_eval_batch_size=300,
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        memory=found[0],
    )
    peak = peak_allocated_bytes(lambda: found.append(trainer.unlearn(forget_indices=np.arange(60), config=wishes)))
    assert estimated.bytes["request"] == pytest.approx(peak, rel=0.2)
    trainer.memory.relative_path += 1.0  # as if requests had taken the weights far from where they were
    peak = peak_allocated_bytes(lambda: found.append(trainer.unlearn(forget_indices=np.arange(60, 120), config=wishes)))
    assert found[-1].report.diagnostics["curvature"]["renewed"]
    assert estimated.bytes["request"] + estimated.bytes["renewal"] == pytest.approx(peak, rel=0.2)


def test_what_it_says() -> None:
    model, rows = build("lora"), as_dataset(rows_of("lora", 30))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimated = hf_iau.estimate(model, rows, GatherConfig(**QUIET), data_collator=pad_right(), request_rows=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(estimated.seconds) == {"gradient_sum", "curvature", "gather", "unlearn", "renewal"}
    assert all(value > 0 for value in estimated.seconds.values())
    assert estimated.seconds["gather"] == estimated.seconds["gradient_sum"] + estimated.seconds["curvature"]
    assert estimated.bytes["activations"] > 0
    assert json.loads(json.dumps(estimated.to_dict())) == estimated.to_dict()
    lines = str(estimated).splitlines()
    assert len(lines) == len(estimated.table()) and len({len(line) for line in lines}) == 1
    assert "memory" in str(estimated) and "MiB" in lines[0]
    unprobed = hf_iau.estimate(model, rows, GatherConfig(**QUIET), data_collator=pad_right(), probe=False)
    assert unprobed.seconds == {} and unprobed.bytes["activations"] == 0


def test_the_work_of_many_steps_is_that_of_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are counted, for seconds depend on what else the machine does."""
    torch.manual_seed(0)
    train, held_out = draw(1200, 1), draw(800, 2)
    model = fit(Classifier(), train, epochs=90, seed=0)  # sure of its rows
    memory = hf_iau.gather(model, train, config=GatherConfig(batch_size=128, progress=False))
    rows: dict[str, int] = {}

    def count(module: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        kind = "gradients" if torch.is_grad_enabled() else "forwards"
        rows[kind] = rows.get(kind, 0) + len(inputs["labels"])

    chosen, solved = CalibrationRun.multi_step, Curvature.solve

    def choose(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Curvature, "solve", solve)
            hook = model.register_forward_pre_hook(count, with_kwargs=True)
            try:
                return chosen(*args)
            finally:
                hook.remove()

    def solve(*args: Any) -> Any:
        rows["solves"] = rows.get("solves", 0) + 1
        return solved(*args)

    monkeypatch.setattr(CalibrationRun, "multi_step", choose)
    trainer = Scene(model, train, held_out, held_out, memory, dict(model.state_dict())).trainer(tmp_path)
    report = trainer.unlearn(forget_indices=np.arange(200)).report
    steps = len(report.diagnostics["calibration"]["step_curve"])
    assert "multi_step" in report.diagnostics and steps > 2
    work = MultiStepWork.of(steps, forget=200, held_out=800, retained=1000, reference=1000)
    assert rows["gradients"] == pytest.approx(work.gradients, rel=0.15)
    assert rows["forwards"] == pytest.approx(work.forwards, rel=0.15)
    assert rows["solves"] == pytest.approx(work.solves, abs=2)


def test_seconds_of_many_steps_come_on_top_where_there_can_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_estimate, "_seconds", lambda work, device: work() is None or 1.0)
    model, train = Classifier(), draw(600, 1)
    settings: dict[str, Any] = {"held_out_rows": 300, "config": GatherConfig(batch_size=32, progress=False)}
    seconds = hf_iau.estimate(model, train, request_rows=50, **settings).seconds
    # A pass over three batches took a second, whatever was done; so did a solve.
    for name, steps in (("multi_step", 8), ("multi_step_at_most", 40)):
        looked_at = steps * 256 + 3 * 50 + 550 + 550 + 300
        gradients = steps * 50 + (steps - 1) * 256
        assert seconds[name] == pytest.approx((gradients + looked_at) / 96 + 2 * steps - 1)
    for changes in (
        {"request_rows": 19},
        {"method_config": IAUConfig(multi_step=False)},
        {"method_config": IAUConfig(scale=0.1)},
        {"held_out_rows": 0},
    ):
        assert "multi_step" not in hf_iau.estimate(model, train, **({"request_rows": 50} | settings | changes)).seconds


def test_the_work_of_a_renewal_is_that_of_the_renewal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are counted, for seconds depend on what else the machine does."""
    torch.manual_seed(0)
    train, held_out, model = draw(640, 1), draw(300, 2), Classifier()
    config = GatherConfig(batch_size=32, curvature_rows=600, progress=False)
    rows = [0]
    model.register_forward_pre_hook(lambda module, args, inputs: rows.append(len(inputs["labels"])), with_kwargs=True)

    def counted(work: Callable[[], Any], device: Any = None) -> float:
        before = sum(rows)
        work()
        return float(sum(rows) - before)

    monkeypatch.setattr(cost_estimate, "_seconds", counted)
    estimated = hf_iau.estimate(model, train, config, request_rows=160, held_out_rows=300)
    assert estimated.rows["curvature"] == 600 and estimated.rows["renewal"] == 480
    memory = hf_iau.gather(model, train, config=config)
    trainer = Scene(model, train, held_out, held_out, memory, dict(model.state_dict())).trainer(tmp_path)
    memory.relative_path += 1.0
    renew = method.with_near_curvature
    spent: list[float] = []
    found: list[Any] = []

    def watched(*args: Any) -> Any:
        spent.append(counted(lambda: found.append(renew(*args))))
        return found[-1]

    monkeypatch.setattr(method, "with_near_curvature", watched)
    report = trainer.unlearn(forget_indices=np.arange(160), config=IAUConfig(multi_step=False)).report
    assert report.diagnostics["curvature"]["renewed"] and report.diagnostics["curvature"]["rows"] == 480
    assert spent == [pytest.approx(estimated.seconds["renewal"], rel=0.05)]
    assert estimated.seconds["curvature"] == pytest.approx(spent[0] * 600 / 480, rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"method_config": IAUConfig(renew_curvature=None)},
        {"method_config": IAUConfig(scale=0.1, damping=0.1)},
        {"config": GatherConfig(curvature="identity", progress=False)},
        {"config": GatherConfig(curvature="none", progress=False)},
        {"request_rows": 350},  # leaves fewer than half of the rows
    ],
    ids=["never", "given", "identity", "none", "few rows"],
)
def test_no_renewal_is_estimated_where_there_is_none(changes: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"config": GatherConfig(progress=False), "request_rows": 250, "held_out_rows": 0}
    usual, other = (hf_iau.estimate(Classifier(), draw(600, 1), **(settings | found)) for found in ({}, changes))
    assert usual.seconds["renewal"] > 0 and usual.bytes["renewal"] > 0 and usual.rows["renewal"] == 350
    assert "renewal" not in other.seconds and other.bytes["renewal"] == 0 and other.rows["renewal"] == 0


def test_the_text_tells_the_usual_number_of_steps_from_the_most() -> None:
    settings: dict[str, Any] = {"held_out_rows": 300, "config": GatherConfig(batch_size=32, progress=False)}
    estimated = hf_iau.estimate(Classifier(), draw(600, 1), request_rows=50, **settings)
    lines = dict(estimated.table())
    assert lines["multi-step, 8 steps (usual)"] == f"{estimated.seconds['multi_step']:,.1f} s"
    assert lines["multi-step, 40 steps (the most)"] == f"{estimated.seconds['multi_step_at_most']:,.1f} s"
    assert lines["renewal"] == f"{estimated.seconds['renewal']:,.1f} s"


def test_bad_input() -> None:
    model, rows = build("plain"), as_dataset(rows_of("plain", 8))
    with pytest.raises(ConfigError, match=r"request_rows=8.*below the 8 training rows"):
        hf_iau.estimate(model, rows, request_rows=8, data_collator=pad_right())
    with pytest.raises(UnsupportedModelError, match="empty"):
        hf_iau.estimate(model, rows.select([]), data_collator=pad_right())
