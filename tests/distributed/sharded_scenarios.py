"""Models sharded by `fully_shard` over two or three processes. Each function is run in all of them."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from tiny_models import PlainClassifier, RowList, WrongBackward, as_dataset, build, pad_right, plain_rows, rows_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from unlearning_trainers import EXACT, FORGET, WITH_CURVATURE, make_trainer, relative_distance, renewed, state_of

from hf_iau import (
    DeletionService,
    GatherConfig,
    GradientMemory,
    IAUCallback,
    IAUConfig,
    UnlearningTrainer,
    check_row_gradients,
    estimate,
    gather,
    register_method,
)
from hf_iau.curvature import Curvature, fit_curvature
from hf_iau.curvature.sharded_blocks import RemoteBlock
from hf_iau.data import ModelRowLoss, RowSource, predict_rows
from hf_iau.data.trainer_rows import model_of
from hf_iau.distributed import (
    full_parameters,
    full_tensor,
    get_rank,
    is_main_process,
    is_sharded,
    processes,
    to_local,
)
from hf_iau.errors import IAUError, ParallelError
from hf_iau.memory.gradient_sum import sum_row_gradients
from hf_iau.methods.base import find_method
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.iau.multi_step import MultiStep, MultiStepResult, MultiStepRows
from hf_iau.methods.iau.targets import ForgetTargets
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.methods.weights import WeightSnapshot

GIVEN = IAUConfig(scale=0.1, damping=0.05, retain_weight=0.01)  # finished with a damping of its own


def join() -> None:
    """The processes as a plain program would join them."""
    PartialState(cpu=True)


def source_of(rows: list[dict[str, Any]], batch_size: int = 2) -> RowSource:
    return RowSource(as_dataset(rows), pad_right(), batch_size=batch_size, name="some rows")


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full_tensor(tensor) for name, tensor in tensors.items()}


def shard(model: nn.Module, blocks: Any = (), **settings: Any) -> nn.Module:
    """FSDP2, as it is usually put: each block, then the whole."""
    settings.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for block in blocks:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    return model


def _bert_trainer(folder: Path, model: nn.Module, **kwargs: Any) -> UnlearningTrainer:
    # Rows enough for one process to have a batch more than the other.
    return make_trainer(folder, "bert", model=model, settings={"per_device_train_batch_size": 3}, **kwargs)


def _wholly(model: nn.Module) -> dict[str, Tensor]:
    with full_parameters(model):
        return state_of(model)


def _parameters(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return {name: state[name] for name, _ in model.named_parameters()}


def _train_step(model: nn.Module) -> None:
    """A step of a training loop; all rows in every process, so that FSDP's mean is that of one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(**pad_right()(rows_of("bert", 12)))["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()


def sharded(folder: Path) -> dict[str, Any]:
    """A training step, gathering and a request, alone and then with sharded parameters; memories are exchanged."""
    rows = as_dataset(rows_of("bert", 12))
    alone = build("bert", dtype=torch.float64)
    _train_step(alone)
    start = state_of(alone)
    memory = gather(alone, rows, data_collator=pad_right(), config=WITH_CURVATURE)
    memory.save(folder / f"alone-{os.environ['RANK']}")
    # The Trainer joins the processes, so what is done alone uses the method itself.
    forget = source_of([rows_of("bert", 12)[i] for i in FORGET])
    find_method("iau", GIVEN)[0].run(ForgetContext(alone, ModelRowLoss(), forget, memory), GIVEN)
    expected = state_of(alone)

    trainer = _bert_trainer(folder / "trainer", model := build("bert", dtype=torch.float64))
    shard(model, model.bert.encoder.layer)
    _train_step(model)
    _train = _wholly(model)
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    model(**pad_right()(rows_of("bert", 4)))  # leaves the outermost module whole
    found = gather(model, rows, data_collator=pad_right(), config=WITH_CURVATURE)
    assert found.gradient_sum is not None
    assert all(isinstance(total, DTensor) for total in found.gradient_sum.values())
    found.save(folder / "sharded")
    dist.barrier()
    whole = found.unsharded()
    other = GradientMemory.load(folder / f"alone-{get_rank()}")
    other.model = {**other.model, "weights": found.model["weights"]}  # trained to the same but for rounding
    trainer.unlearning_state.given = found
    output = trainer.unlearn(forget_indices=FORGET, config=GIVEN)
    after = _wholly(model)
    still_sharded = all(isinstance(p, DTensor) for p in model.parameters())
    output.revert()
    reverted = all(torch.equal(p.to_local(), before[name]) for name, p in model.named_parameters())  # type: ignore[attr-defined]
    from_other = _bert_trainer(folder / "trainer", model, memory=other)
    os.environ["HF_IAU_KEY"] = "0123456789abcdef" * 4
    DeletionService(from_other).unlearn(forget_indices=FORGET, config=GIVEN)
    from_alone = _wholly(model)
    saved = GradientMemory.load(folder / "trainer")
    saved.check_model(model)
    from_other.save_model(str(folder / "again"))
    dist.barrier()
    again = GradientMemory.load(folder / "again")
    again.check_model(model)
    weights = [load_file(folder / name / "model.safetensors") for name in ("trainer", "again")]
    _train_step(model)  # still trains
    if is_main_process():
        save_file({n: v.contiguous() for n, v in after.items()}, folder / "after.safetensors")
        save_file({n: v.contiguous() for n, v in _train.items()}, folder / "before.safetensors")
    assert memory.gradient_sum is not None
    assert whole.gradient_sum is not None
    assert memory.curvature is not None
    assert found.curvature is not None
    solved = [c.solve(memory.gradient_sum, 0.1) for c in (memory.curvature, found.curvature)]
    return {
        "training": relative_distance(_train, start, {n: torch.zeros_like(v) for n, v in start.items()}),
        "sums": relative_distance(whole.gradient_sum, memory.gradient_sum, _zeros(memory.gradient_sum)),
        "solved": relative_distance(solved[1], solved[0], _zeros(solved[0])),
        "weights": relative_distance(after, expected, start),
        "saved": all(same_bits_of(found, _parameters(from_alone, model)) for found in weights),
        "memory": [saved.forgotten_rows, again.forgotten_rows],
        "architectures": json.loads((folder / "again" / "config.json").read_text())["architectures"],
        "from_alone": relative_distance(from_alone, expected, start),
        "class": found.model["class"],
        "still_sharded": still_sharded,
        "reverted": reverted,
        "moved_after": not same_bits_of(_wholly(model), from_alone),
    }


def _zeros(vector: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in vector.items()}


def same_bits_of(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


def forget_alone(folder: Path) -> dict[str, Any]:
    """One process serves a request with the weights and the memory that two processes left."""
    saved = folder.parent / "sharded-2"
    model = build("bert", dtype=torch.float64)
    model.load_state_dict(load_file(saved / "before.safetensors"), strict=False)
    start = state_of(model)
    trainer = _bert_trainer(folder / "trainer", model, memory=GradientMemory.load(saved / "sharded"))
    trainer.unlearn(forget_indices=FORGET, config=GIVEN)
    expected = load_file(saved / "after.safetensors")
    return {"weights": relative_distance(state_of(model), expected, start)}


def sharded_kinds(folder: Path) -> dict[str, Any]:
    """Tied weights, bf16 in training, replicas of shards: the distance of sums and factors from a plain model's."""
    rows = source_of(rows_of("gpt2", 7))
    alone = build("gpt2", dtype=torch.float64)
    vector = sum_row_gradients(alone, ModelRowLoss(), rows).tensors
    expected = fit_curvature(alone, rows).solve(vector, 0.1)
    join()
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "kept whole": {"reshard_after_forward": False},
        "as Accelerate does": {},
        "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
        "replicas": {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))},
    }
    found: dict[str, Any] = {}
    for name, settings in kinds.items():
        model = build("gpt2", dtype=torch.float64)
        blocks: list[Any] = list(model.transformer.h)  # type: ignore[union-attr, arg-type]
        if name == "as Accelerate does":  # one group of several modules
            blocks.append([model.transformer.ln_f, model.transformer.wte, model.lm_head])  # type: ignore[union-attr]
        shard(model, blocks, **settings)
        before = _training_gradients(model)
        total = sum_row_gradients(model, ModelRowLoss(), rows, track_batches=True)
        curvature = fit_curvature(model, rows)
        solved = whole(curvature.solve(total.tensors, 0.1))
        after = _training_gradients(model)
        found[name] = {
            "sums": relative_distance(whole(total.tensors), vector, _zeros(vector)),
            "solved": relative_distance(solved, expected, _zeros(expected)),
            "norm": total.norm() / _norm(vector) - 1.0,
            "batch_rows": sum(count for count, _ in total.batches),
            "kinds": sorted(curvature.coverage()),
            "trains_as_before": all(torch.equal(before[n], after[n]) for n in before),
        }
    return found


def _norm(vector: dict[str, Tensor]) -> float:
    return float(sum(float(t.square().sum()) for t in vector.values()) ** 0.5)


def _training_gradients(model: nn.Module) -> dict[str, Tensor]:
    """This process's part of the gradients of a training step, as FSDP2 is set up for it."""
    inputs = pad_right()(rows_of("gpt2", 2))
    model(**inputs)["loss"].backward()
    gradients = {name: p.grad.to_local().clone() for name, p in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    return gradients


def few_rows_of_shards(folder: Path) -> dict[str, Any]:
    """No more rows than processes, rows without any target, and a layer whose rows cannot be told apart."""
    rows = rows_of("bert-tokens", 5)
    for row in rows[3:]:
        row["labels"] = [-100] * len(row["labels"])
    model = build("bert-tokens", dtype=torch.float64, num_hidden_layers=1)

    def numbers(model: nn.Module) -> dict[str, Any]:
        numbers: dict[str, Any] = {}
        for n in (1, 2, 5):
            some = source_of(rows[:n], 1)
            total = sum_row_gradients(model, ModelRowLoss(), some, track_batches=True)
            curvature = fit_curvature(model, some)
            predicted = predict_rows(model, some)
            numbers[str(n)] = {
                "counts": [total.n_rows, total.n_targets, total.rows_without_targets],
                "more_counts": [curvature.n_rows, curvature.n_targets, len(predicted)],
                "batch_rows": sum(count for count, _ in total.batches),
                "loss": total.loss,
                "losses": predicted.loss[:3].tolist(),
                "vectors": [whole(total.tensors), whole(curvature.solve(total.tensors, 0.1))],
            }
        return numbers

    alone = numbers(model)
    join()
    sync_errors = numbers(shard(model, model.bert.encoder.layer))  # type: ignore[union-attr]
    distances = {}
    for n, expected in alone.items():
        pairs = zip(sync_errors[n].pop("vectors"), expected.pop("vectors"), strict=True)
        distances[n] = [relative_distance(one, other, _zeros(other)) for one, other in pairs]
    return {"alone": alone, "sync_errors": sync_errors, "distances": distances}


class Merged(nn.Module):
    """A classifier of which one layer sees rows and positions in another order, and one is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.ones(6))
        self.first = nn.Linear(6, 5)
        self.convolution = nn.Conv1d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.output = nn.Linear(20, 3)
        self.bypassed = nn.Linear(6, 5)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        features = features * self.scale
        hidden = torch.tanh(self.norm(self.first(features) + nn.functional.linear(features, self.bypassed.weight)))
        logits = self.output(torch.tanh(self.convolution(hidden[:, None])).flatten(1))
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def all_kinds_of_layers(folder: Path) -> dict[str, Any]:
    """Convolutions, raw and bypassed parameters, and one that FSDP2 was told to leave alone."""
    rows = source_of(plain_rows(7))
    alone = Merged()
    expected = fit_curvature(alone, rows)
    vector = sum_row_gradients(alone, ModelRowLoss(), rows).tensors
    join()
    model = Merged()
    shard(model, [model.first], ignored_params={model.norm.weight})
    total = sum_row_gradients(model, ModelRowLoss(), rows).tensors
    found = fit_curvature(model, rows)
    pairs = [(total, vector), (found.solve(total, 0.1), expected.solve(vector, 0.1))]
    pairs.append((found.multiply(total), expected.multiply(vector)))
    held = {name: block.owner for name, block in found.blocks.items()}
    return {
        "distances": [relative_distance(whole(one), other, _zeros(other)) for one, other in pairs],
        "layers": found.layers() == but_for_rounding(expected, found),
        "held": held,
        "names": list(found.blocks) == list(expected.blocks),
        "left_alone": not isinstance(total["norm.weight"], DTensor),
        "bytes": [found.nbytes(), expected.nbytes()],
    }


def but_for_rounding(expected: Curvature, found: Curvature) -> list[dict[str, Any]]:
    """The lines of `expected`, with the figures of `found` where the two are equal but for rounding."""
    lines = expected.layers()
    for line, other in zip(lines, found.layers(), strict=True):
        if abs(line["mean_eigenvalue"] - other["mean_eigenvalue"]) <= 1e-5 * abs(line["mean_eigenvalue"]):
            line["mean_eigenvalue"] = other["mean_eigenvalue"]
    return lines


@contextmanager
def watched(model: nn.Module, *, all_tensors: bool = False) -> Iterator[dict[str, int]]:
    """The most bytes of parameters that FSDP2 had gathered, and of all tensors that this process held, at one time.

    All tensors are counted where asked for, at every third exchange between the processes (the allocator's events are
    of one thread, and gloo frees in others).
    """
    groups = [g for m in model.modules() if isinstance(m, FSDPModule) for g in m._get_fsdp_state()._fsdp_param_groups]
    most = {"gathered": 0, "held": 0, "looks": 0}
    wait, exchange = FSDPParamGroup.wait_for_unshard, processes._exchange

    def look() -> None:
        most["looks"] += 1
        if all_tensors and most["looks"] % 3 == 0:
            most["held"] = max(most["held"], held_bytes())

    def wait_and_look(group: FSDPParamGroup) -> None:
        wait(group)
        outputs = [o for g in groups for p in g.fsdp_params for o in p.all_gather_outputs]
        most["gathered"] = max(most["gathered"], sum(output.untyped_storage().nbytes() for output in outputs))
        look()

    def look_and_exchange(*args: Any, **kwargs: Any) -> Any:
        look()
        return exchange(*args, **kwargs)

    FSDPParamGroup.wait_for_unshard = wait_and_look  # type: ignore[method-assign]
    processes._exchange = look_and_exchange
    try:
        yield most
    finally:
        FSDPParamGroup.wait_for_unshard = wait  # type: ignore[method-assign]
        processes._exchange = exchange


def held_bytes() -> int:
    """Bytes of all tensors that Python knows of, those of this process's part of sharded ones."""
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter, DTensor)]
    local = [o._local_tensor if isinstance(o, DTensor) else o for o in found]
    stores = [o.untyped_storage() for o in local if type(o) in (Tensor, nn.Parameter) and not o.is_meta]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


def memory_of_shards(folder: Path) -> dict[str, Any]:
    """What a process holds while it gathers, and the files that are written layer by layer."""
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 2}
    model = build("bert", **settings)
    join()
    shard(model, model.bert.encoder.layer)  # type: ignore[union-attr]
    rows = as_dataset(rows_of("bert", 6))
    config = GatherConfig(gradient_sum="full", batch_size=2, progress=False)
    gc.collect()
    before = held_bytes()
    with watched(model, all_tensors=True) as spread:
        memory = gather(model, rows, data_collator=pad_right(), config=config)
    memory.save(folder / "spread")
    dist.barrier()
    held = held_bytes() - before
    nbytes, fingerprint = memory.nbytes(), memory.model
    assert memory.curvature is not None
    away = [block for block in memory.curvature.blocks.values() if isinstance(block, RemoteBlock)]
    with pytest.raises(ParallelError, match=f"held by process {1 - dist.get_rank()} alone"):
        away[0].apply({}, torch.square)
    everything = memory.unsharded()
    files = {}
    if is_main_process():
        everything.save(folder / "whole")
        files = {name: next((folder / name).glob("*.safetensors")).name for name in ("spread", "whole")}
        read = GradientMemory.load(folder / "spread")
        assert read.gradient_sum is not None
        assert everything.gradient_sum is not None
        assert all(torch.equal(read.gradient_sum[n], t) for n, t in everything.gradient_sum.items())
    del memory, everything
    gc.collect()
    with watched(model, all_tensors=True) as at_once, full_parameters(model):
        expected = gather(model, rows, data_collator=pad_right(), config=config)
    return {
        "parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
        "spread": {**spread, "held": spread["held"] - before},
        "at_once": {**at_once, "held": at_once["held"] - before},
        "held": held,
        "bytes": [nbytes, expected.nbytes()],
        "files": files,
        "fingerprints": fingerprint == expected.model,
    }


class Precise(PlainClassifier):
    """In float64, wide enough to learn rows by heart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.output = nn.Linear(6, 24), nn.Linear(24, 3)
        self.double()

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return super().forward(features.double(), labels)


def by_heart(rows: list[dict[str, Any]]) -> nn.Module:
    """A model that knows `rows`, whose labels have little to do with them, and no others."""
    model = Precise()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    batch = pad_right()(rows)
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    return model


def noisy_rows(n: int, seed: int) -> list[dict[str, Any]]:
    labels = plain_rows(n, seed=seed + 50)
    return [row | {"labels": other["labels"]} for row, other in zip(plain_rows(n, seed=seed), labels, strict=True)]


def calibrated_on_shards(folder: Path) -> dict[str, Any]:
    """A request whose k, λ and c are found on held-out rows; in one process, of a model that is not sharded."""
    rows, held_out = noisy_rows(160, 1), as_dataset(noisy_rows(120, 2))
    model = by_heart(rows)
    trainer = make_trainer(folder / "trainer", "plain", model=model, rows=rows, eval_dataset=held_out)
    trainer.gather(GatherConfig(gradient_sum="full", progress=False))
    found: dict[str, Any] = {"before": _norms(model)}
    if dist.is_initialized() and dist.get_world_size() > 1:
        memory = trainer.memory
        assert memory is not None
        assert not memory.is_sharded
        shard(model, [model.hidden])
    output = trainer.unlearn(forget_indices=list(range(30)))
    assert output.memory is not None
    calibration = output.report.diagnostics["calibration"]
    found |= {
        "calibration": {name: calibration[name] for name in ("scale", "damping", "retain_weight", "source")},
        "after": {name: value for name, value in output.report.after.items() if isinstance(value, float)},
        "weights": _norms(model),
        "memory": [output.memory.is_sharded, output.memory.gradient_sum_kind, output.memory.nbytes()],
        "sum": _norm(whole(output.memory.gradient_sum or {})),
    }
    again = trainer.unlearn(forget_indices=list(range(30, 50)))
    found["remembered"] = again.report.diagnostics["calibration"]["source"]
    again.revert()
    found["renewed"] = renewed(trainer)
    output.revert()
    found["reverted"] = _norms(model) == found["before"]
    return found


def _norms(model: nn.Module) -> list[float]:
    return [float(full_tensor(p.detach()).norm()) for _, p in model.named_parameters()]


def many_steps_on_shards(folder: Path) -> dict[str, Any]:
    """Many short steps, alone and then on shards."""
    rows = noisy_rows(60, 1)
    sources = [RowSource(as_dataset(part), pad_right(), batch_size=8) for part in (rows[:25], rows[25:])]
    sources.append(RowSource(as_dataset(noisy_rows(50, 2)), pad_right(), batch_size=16))
    model = by_heart(rows)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}

    def take(model: nn.Module) -> MultiStepResult:
        everything = RowSource(as_dataset(rows), pad_right(), batch_size=8)
        curvature = fit_curvature(model, everything)
        targets = ForgetTargets.of(*(predict_rows(model, source) for source in sources))
        return MultiStep(WeightSnapshot.of(model, start), curvature, MultiStepRows(*sources), targets).run()

    alone = take(model)
    join()
    path = take(shard(model, [model.hidden]))
    return {
        "steps": [path.steps, alone.steps],
        "remaining": [path.share_remaining, alone.share_remaining],
        "distance": relative_distance(whole(path.step), alone.step, _zeros(alone.step)),
        "unchanged": all(torch.equal(full_tensor(p.detach()), start[name]) for name, p in model.named_parameters()),
    }


@dataclass(frozen=True)
class FailingConfig:
    where: int = 1


@register_method
class Failing:
    """Changes the weights, of shards too, and then fails in one process."""

    name: ClassVar[str] = "failing"
    config_class: ClassVar[type] = FailingConfig
    citation: ClassVar[str] = "none"
    works_on_shards: ClassVar[bool] = True

    def check(self, context: ForgetContext, config: FailingConfig) -> None:
        """Needs nothing."""

    def run(self, context: ForgetContext, config: FailingConfig) -> MethodOutcome:
        assert is_sharded(context.model)
        with torch.no_grad():
            for number, parameter in enumerate(context.model.parameters()):
                local = to_local(parameter)
                local += float("nan") if config.where < 0 and number == 0 and get_rank() == 1 else 0.1
        if get_rank() == config.where:
            raise OSError("no space left")
        return MethodOutcome()


def all_or_nothing_on_shards(folder: Path) -> dict[str, Any]:
    """Requests that fail, are empty, or are dry runs leave every bit of the shards; one that is saved writes it all."""
    os.environ["HF_IAU_KEY"] = "0123456789abcdef" * 4
    trainer = make_trainer(folder / "trainer", "bert", model=(model := build("bert", num_hidden_layers=5)))
    shard(model, model.bert.encoder.layer)  # type: ignore[union-attr]
    rows = as_dataset(rows_of("bert", 12))
    trainer.unlearning_state.given = gather(model, rows, data_collator=pad_right(), config=WITH_CURVATURE)
    before = {name: to_local(p).clone() for name, p in model.named_parameters()}

    def unchanged() -> bool:
        return all(torch.equal(to_local(p), before[name]) for name, p in model.named_parameters())

    found: dict[str, Any] = {}
    calls: dict[str, dict[str, Any]] = {
        "fails": {"forget_indices": FORGET, "method": "failing"},
        "not finite": {"forget_indices": FORGET, "method": "failing", "config": FailingConfig(-1)},
        "nothing": {"forget_indices": []},
        "dry": {"forget_indices": FORGET, "config": GIVEN, "dry_run": True},
    }
    for name, settings in calls.items():
        error = None
        try:
            trainer.unlearn(**settings)
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        found[name] = [error, unchanged()]
    with watched(model) as seen:
        output = trainer.unlearn(forget_indices=FORGET, config=GIVEN)
    found["gathered"] = [seen["gathered"], sum(p.numel() * p.element_size() for p in model.parameters())]
    found["moved"] = not unchanged()
    assert output.memory is not None
    found["spread"] = output.memory.is_sharded
    output.memory.check_model(model)
    output.memory.save(folder / "newer")
    dist.barrier()
    newer = GradientMemory.load(folder / "newer")
    newer.check_model(model)
    found["sums"] = all(
        torch.equal(full_tensor(total), (newer.gradient_sum or {})[name])
        for name, total in (output.memory.gradient_sum or {}).items()
    )
    output.revert()
    found["reverted"] = unchanged()
    trainer.unlearn(forget_indices=FORGET, method="gradient-ascent")  # written for whole parameters
    found["other method"] = not unchanged()
    return found


def trained_by_trainer(folder: Path) -> dict[str, Any]:
    """FSDP2 through the Trainer. Accelerate chooses it on accelerators only: here it takes two CPUs for such."""
    os.environ |= {
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "1",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "HF_IAU_KEY": "0123456789abcdef" * 4,
    }
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    settings = {"optim": "sgd", "weight_decay": 0.1}

    def trainer_of(model: nn.Module) -> UnlearningTrainer:
        callbacks = [IAUCallback(WITH_CURVATURE)]
        return make_trainer(
            folder / "trainer", model=model, callbacks=callbacks, settings=settings, dtype=torch.float64
        )

    try:
        trainer_of(build("bert")).train()
    except IAUError as error:
        found["version 1"] = str(error)
    os.environ["FSDP_VERSION"] = "2"
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = trainer_of(build("bert", dtype=torch.float64))
    trainer.train()
    model = model_of(trainer)
    memory = trainer.memory
    assert memory is not None
    found["sharded"] = [trainer.is_fsdp_enabled, is_sharded(model), memory.is_sharded]
    found["decay"] = sorted(set(memory.weight_decay.values()))
    saved = GradientMemory.load(folder / "trainer")
    saved.check_model(model)
    # What is made of a plain model with these weights.
    alone = build("bert", dtype=torch.float64)
    alone.load_state_dict(start := _wholly(model), strict=False)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, weight_decay=0.1)
    rows = as_dataset(rows_of("bert", 12))
    expected = gather(alone, rows, data_collator=pad_right(), config=WITH_CURVATURE, optimizer=optimizer)
    found["all decayed"] = sorted(memory.weight_decay) == sorted(trainer.get_decay_parameter_names(alone))
    sums, reference = whole(memory.gradient_sum or {}), expected.gradient_sum or {}
    found["sums"] = relative_distance(sums, reference, _zeros(reference))
    trainer.save_model()
    DeletionService(trainer).unlearn(forget_indices=FORGET, config=GIVEN)
    expected.weight_decay = memory.weight_decay
    forget = source_of([rows_of("bert", 12)[i] for i in FORGET])
    find_method("iau", GIVEN)[0].run(ForgetContext(alone, ModelRowLoss(), forget, expected), GIVEN)
    found["weights"] = relative_distance(_wholly(model), state_of(alone), start)
    on_disk = load_file(folder / "trainer" / "model.safetensors")
    found["saved"] = same_bits_of(on_disk, _parameters(_wholly(model), model))
    GradientMemory.load(folder / "trainer").check_model(model)
    before = _wholly(model)
    trainer.train()  # goes on
    found["trained"] = not same_bits_of(before, _wholly(model))
    found["again"] = trainer.memory is not memory
    return found


class Broken(PlainClassifier):
    """Its losses are right and add up; the gradient of a bias does not."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        bias = WrongBackward.apply(self.output.bias, len(features))
        logits = nn.functional.linear(torch.tanh(self.hidden(features)), self.output.weight, bias)
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def checked(folder: Path) -> dict[str, Any]:
    """`check_row_gradients` of a right and of a wrong model, sharded and (before) not."""
    rows, language = RowList(plain_rows()), as_dataset(rows_of("gpt2", 6))

    def numbers(put: Callable[[nn.Module], nn.Module]) -> dict[str, Any]:
        good = check_row_gradients(put(build("gpt2")), language, data_collator=pad_right())
        torch.manual_seed(0)
        bad = check_row_gradients(put(Broken()), rows, batch_sizes=(2,))
        return {"good": [good.passed, good.tolerance, good.rows], "bad": [bad.failing, bad.relative_error]}

    alone = numbers(lambda model: model)
    join()
    model = build("bert")
    first = estimate(model, as_dataset(rows_of("bert", 6)), data_collator=pad_right(), probe=False)
    shard(model)
    second = estimate(model, as_dataset(rows_of("bert", 6)), data_collator=pad_right())
    sizes = [first.bytes["memory"], second.bytes["memory"]]
    return {"alone": alone, "sync_errors": numbers(shard), "estimate": sizes, "sharded": is_sharded(model)}


def troubles(folder: Path) -> dict[str, Any]:
    """Errors during passes through a sharded model: told by all processes, and nothing is left behind."""
    join()
    model = shard(build("plain"))
    rows = plain_rows(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = pad_right()(rows[:2])

    def gradients() -> list[Tensor]:
        optimizer.zero_grad()
        model(**inputs)["loss"].backward()
        return [p.grad.to_local().clone() for p in model.parameters()]  # type: ignore[union-attr]

    expected = gradients()
    bad = [dict(row) for row in rows]
    bad[4]["features"] = bad[4]["features"] * float("inf")

    def fails(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        model(**inputs)
        raise OSError("in the middle of a pass")

    class Unreadable(RowList):
        def __getitem__(self, position: int) -> dict[str, Tensor]:
            if position == 5 and get_rank() == 1:
                raise OSError("a broken disk")
            return super().__getitem__(position)

    unreadable = RowSource(Unreadable(rows), pad_right(), batch_size=2, name="some rows")
    memory = gather(model, as_dataset(rows), config=WITH_CURVATURE)
    (folder / "file").touch()
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: memory.save(folder / "file"),
        "curvature": lambda: fit_curvature(model, source_of(bad)),
        "unreadable sum": lambda: sum_row_gradients(model, ModelRowLoss(), unreadable),
        "unreadable curvature": lambda: fit_curvature(model, unreadable),
        "unreadable prediction": lambda: predict_rows(model, unreadable),
        "loss": lambda: gather(model, as_dataset(rows), config=EXACT, row_loss=fails),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    found["gradients"] = [torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True)]
    model.set_requires_gradient_sync(False)  # type: ignore[operator]
    model(**inputs)["loss"].backward()
    try:
        sum_row_gradients(model, ModelRowLoss(), source_of(rows))
    except IAUError as error:
        found["not reduced"] = str(error)
    return found


def sharded_refusals(folder: Path) -> dict[str, Any]:
    """What is not FSDP2 alone is refused; a bad row of one process does not hang the other."""
    join()
    found = {}
    rows = as_dataset(plain_rows(6))
    mesh = init_device_mesh("cpu", (2,))
    tensor_parallel = build("plain")
    parallelize_module(tensor_parallel, mesh, {"hidden": ColwiseParallel()})
    fsdp2 = build("plain")
    fully_shard(fsdp2, mesh=mesh)
    bad_rows = plain_rows(6)
    bad_rows[5]["features"] = bad_rows[5]["features"] * float("nan")

    def with_older_pytorch() -> None:
        reset = FSDPModule.reset_iter_state
        del FSDPModule.reset_iter_state
        try:
            gather(fsdp2, rows, config=EXACT)
        finally:
            FSDPModule.reset_iter_state = reset  # type: ignore[method-assign]

    calls = {
        "older PyTorch": with_older_pytorch,
        "tensor parallel": lambda: gather(tensor_parallel, rows, config=EXACT),
        "adam": lambda: gather(fsdp2, rows, config=GatherConfig(curvature="adam")),
        "bad row": lambda: sum_row_gradients(fsdp2, ModelRowLoss(), source_of(bad_rows)),
        "train": lambda: make_trainer(folder / "trainer", "plain", model=fsdp2).train(),
    }
    for name, call in calls.items():
        try:
            call()
        except IAUError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found
