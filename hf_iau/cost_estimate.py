"""`estimate`: what gathering and a request will cost, before anything is run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_iau.curvature import fit_curvature
from hf_iau.curvature.call_cache import cached_size, usual_cache_bytes
from hf_iau.curvature.eigenvectors import eigenvector_bytes
from hf_iau.curvature.layer_hooks import LayerHooks
from hf_iau.curvature.layers import LayerPlan, MatrixLayer, plan_layers, spare_bytes
from hf_iau.curvature.row_loop import LOOP_ROWS
from hf_iau.data import RowLoss, RowSource, evaluation_mode, predict_rows
from hf_iau.data.precision import compute_settings
from hf_iau.data.row_loss import UserLossFunction
from hf_iau.data.rows import Collator, sample_positions
from hf_iau.data.validation import check_before_gathering
from hf_iau.distributed import full_parameters
from hf_iau.distributed.wrappers import unwrap_model
from hf_iau.errors import ConfigError
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.gathering import choose_row_loss, default_collator, keep_input_columns
from hf_iau.memory.gradient_sum import sum_row_gradients, trainable_parameters
from hf_iau.methods.iau.config import ENOUGH_FORGET_ROWS, FEWEST_COMPARED_ROWS, IAUConfig
from hf_iau.methods.iau.curvature_renewal import FEWEST_ROWS
from hf_iau.methods.iau.multi_step import MOST_STEPS, USUAL_STEPS, MultiStepWork, anchor_rows
from hf_iau.unlearn.transaction import model_state
from hf_iau.utils.devices import memory_counters, synchronise
from hf_iau.utils.timing import peak_allocated_bytes
from hf_iau.utils.vectors import piece, storage_dtype

PROBE_BATCHES = 3
# Vectors as large as the trained weights that a request of `iau` holds beside its copy of them: a gradient sum, and its
# direction or the gradients that it is made of; and further ones where it walks. Counted with the allocator; the tests
# count again.
_VECTORS, _VECTORS_OF_WALK = 2, 5
# Looks at the calibration rows that a request of one step takes (5 to 14 in the benchmarks, 7 as a rule), solves with the
# curvature, and rows that its report measures.
_TRIALS, _SOLVES, _RETAINED, _HELD_OUT = 8, 6, 2000, 4000


@dataclass(frozen=True)
class Estimate:
    """What is to be expected.

    Attributes:
        bytes: `weights` (all of the model's), `gradients`, `gradient_sum`, `factors`, `memory` (the two before), what
            autograd keeps for a batch (`activations`), what gathering and a request hold at most beside the weights and
            the memory (`gathering`, `request`; `walk` comes on top where a request has to be walked, `renewal` where it
            first estimates the curvature anew), and the peak of either with all of these but the two on top
            (`gathering_peak`, `request_peak`). An optimizer that is still alive comes on top.
        seconds: `gradient_sum`, `curvature`, `gather` (the two before) and `unlearn`; where a request has to be walked,
            `walk` comes on top with the usual number of steps and `multi_step_at_most` with the most; where it first estimates
            the curvature anew, because requests have moved the weights far (`IAUConfig(renew_curvature=…)`), `renewal`
            does; empty without a probe.
        rows: rows of the training set, of a gradient sum, of the curvature, of its renewal, of a request and of calibration.
        coverage: parameters by kind of curvature.
    """

    bytes: dict[str, int]
    seconds: dict[str, float]
    rows: dict[str, int]
    coverage: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        names = ("bytes", "seconds", "rows", "coverage")
        return {name: dict(getattr(self, name)) for name in names}

    def table(self) -> list[tuple[str, str]]:
        """Lines of a label and a figure with its unit."""
        lines = [(f"{name.replace('_', ' ')}", f"{size / 2**20:,.1f} MiB") for name, size in self.bytes.items()]
        walks = {
            "multi_step": f"walk, {USUAL_STEPS} steps (usual)",
            "multi_step_at_most": f"walk, {MOST_STEPS} steps (the most)",
        }
        lines += [(walks.get(name, name.replace("_", " ")), f"{value:,.1f} s") for name, value in self.seconds.items()]
        lines += [(f"rows: {name.replace('_', ' ')}", f"{count:,}") for name, count in self.rows.items()]
        return lines + [(f"parameters: {name}", f"{count:,}") for name, count in self.coverage.items()]

    def __str__(self) -> str:
        lines = self.table()
        left, right = (max(len(line[column]) for line in lines) for column in (0, 1))
        return "\n".join(f"{label:<{left}}  {figure:>{right}}" for label, figure in lines)


def estimate(
    model: nn.Module,
    dataset: Any,
    config: GatherConfig | None = None,
    *,
    method_config: IAUConfig | None = None,
    request_rows: int | None = None,
    held_out_rows: int = 2000,
    prediction_batch_size: int | None = None,
    data_collator: Collator | None = None,
    processing_class: Any = None,
    row_loss: UserLossFunction | RowLoss | None = None,
    compute_loss_func: Callable[..., Tensor] | None = None,
    label_smoothing_factor: float = 0.0,
    device: torch.device | str | None = None,
    probe: bool = True,
) -> Estimate:
    """Expected bytes and seconds of gathering and of one request of `iau`.

    Bytes follow from the model's layers; for seconds and activations a few batches are passed through it. They are those of
    a process that holds all of the model and the memory, as under DDP; of a sharded model each holds a part.

    Args:
        model: the model that is to be gathered from; left as it was found.
        dataset: its training rows.
        config: what is to be gathered; default `GatherConfig()`.
        method_config: of the request; default `IAUConfig()`.
        request_rows: rows of the request; default: a hundredth of the training rows.
        held_out_rows: rows that calibration may look at.
        prediction_batch_size: rows of a batch without gradients (`per_device_eval_batch_size`); default: as with them.
        data_collator, processing_class, row_loss, compute_loss_func, label_smoothing_factor, device: as for `gather`.
        probe: pass three batches through the model; without it there are no seconds and no activations.

    Raises:
        ConfigError: a number of rows is out of range.
        UnsupportedModelError: the model or the rows cannot be gathered from.
    """
    config, wishes, model = config or GatherConfig(), method_config or IAUConfig(), unwrap_model(model)
    source = RowSource(
        keep_input_columns(model, dataset, "training rows"),
        data_collator or default_collator(processing_class),
        batch_size=config.batch_size or 32,
        device=device or next(model.parameters()).device,
        name="training rows",
    )
    check_before_gathering(model, source.dataset)
    known = len(source)
    asked = max(1, known // 100) if request_rows is None else request_rows
    if not 0 < asked < max(known, 2) or held_out_rows < 0:
        raise ConfigError(
            f"request_rows={request_rows}, held_out_rows={held_out_rows}: give a number of rows below the {known} training "
            "rows, and one of at least 0."
        )
    summed = {"none": 0, "full": known, "sampled": min(config.sample_rows, known)}[config.gradient_sum]
    curved = min(config.curvature_rows, known) if config.curvature in ("ekfac", "diagonal") else 0
    left = min(curved, known - asked)
    renewed = wishes.renew_curvature is not None and not wishes.is_given and left >= FEWEST_ROWS * curved
    rows = {
        "training": known,
        "gradient_sum": summed,
        "curvature": curved,
        "renewal": left if renewed else 0,
        "request": asked,
        "held_out": min(held_out_rows, wishes.held_out_rows),
    }
    loss = choose_row_loss(
        row_loss=row_loss, compute_loss_func=compute_loss_func, label_smoothing_factor=label_smoothing_factor
    )
    with compute_settings(config.precision, config.memory_device), full_parameters(model):
        plan = plan_layers(model, kronecker=config.curvature == "ekfac", max_factor_size=config.max_factor_size)
        coverage, factors = _factors(model, plan, config)
        seconds, activations, cached = _probe(model, source, loss, config, wishes, plan, rows) if probe else ({}, 0, 0)
        predictions = _prediction_bytes(model, source, prediction_batch_size) if probe else 0
        sizes = _sizes(
            model, config, plan, factors, activations, cached, predictions, source.batch_size, bool(rows["renewal"])
        )
    return Estimate(sizes, seconds, rows, coverage)


def _sizes(
    model: nn.Module,
    config: GatherConfig,
    plan: LayerPlan,
    factors: int,
    activations: int,
    cached: int,
    predictions: int,
    batch_size: int,
    renewed: bool,
) -> dict[str, int]:
    parameters = trainable_parameters(model)
    weights = sum(t.numel() * t.element_size() for t in model_state(model).values())
    gradients = sum(p.numel() * p.element_size() for p in parameters.values())
    vector = sum(p.numel() * storage_dtype(p.dtype).itemsize for p in parameters.values())
    total = 0 if config.gradient_sum == "none" else vector
    # While the sum is made there are no factors yet, and while the factors are made no gradients. The eigenvalues are
    # made after the eigenvectors, from each row's gradients.
    matrices = [(layer.layout.group_outputs * layer.layout.columns * layer.layout.groups) for layer in plan.kronecker]
    eigenvalues, largest = 4 * sum(matrices), 4 * max(matrices, default=0)
    temporary = min(batch_size * largest, spare_bytes(parameters.values()))
    curved = max(
        cached + eigenvector_bytes(plan) - eigenvalues, cached + activations - eigenvalues, activations + temporary
    )
    gathering = max((gradients + activations - factors) * bool(total), curved * bool(factors), 0)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    # A layer's direction and, of Σ_D, what the curvature makes of its step; and float64 copies of pieces of them.
    at_once = max((piece(p.device) for p in parameters.values()), default=0)
    of_layer = (1 + bool(total)) * largest + 4 * 8 * at_once
    copies = weights - frozen
    request = copies + _VECTORS * vector + max(predictions, activations, of_layer)
    # The old curvature is kept, for `revert`, beside the new one, which is fitted before there are any vectors.
    renewal = max(copies + factors + max(curved, 0) - request, factors)
    return {
        "weights": weights,
        "gradients": gradients,
        "gradient_sum": total,
        "factors": factors,
        "memory": total + factors,
        "activations": activations,
        "gathering": gathering,
        "gathering_peak": weights + total + factors + gathering,
        "request": request,
        "multi_step": _VECTORS_OF_WALK * vector,
        "renewal": renewal * renewed,
        "request_peak": weights + total + factors + request,
    }


def _factors(model: nn.Module, plan: LayerPlan, config: GatherConfig) -> tuple[dict[str, int], int]:
    """Parameters by kind of curvature, and the factors' bytes."""
    parameters = trainable_parameters(model)
    if config.curvature in ("none", "identity"):
        return ({} if config.curvature == "none" else {"identity": sum(p.numel() for p in parameters.values())}), 0
    coverage, size = {"kronecker": 0, "diagonal": 0}, 0
    in_matrices: set[str] = set()
    for layer in plan.kronecker if config.curvature == "ekfac" else []:
        layout = layer.layout
        entries = layout.group_outputs * layout.columns
        size += layout.groups * (layout.columns**2 + layout.group_outputs**2 + entries) * layer.dtype.itemsize
        coverage["kronecker"] += layout.groups * entries
        in_matrices |= set(layer.parameters.values())
    for name, parameter in parameters.items():
        if name not in in_matrices:
            coverage["diagonal"] += parameter.numel()
            size += parameter.numel() * (8 if parameter.dtype == torch.float64 else 4)
    return {kind: count for kind, count in coverage.items() if count}, size


def _probe(
    model: nn.Module,
    source: RowSource,
    loss: RowLoss,
    config: GatherConfig,
    wishes: IAUConfig,
    plan: LayerPlan,
    rows: dict[str, int],
) -> tuple[dict[str, float], int, int]:
    """Seconds, bytes of a batch's activations, and bytes that the curvature's fit keeps between its two statistics."""
    batch = min(source.batch_size, len(source))
    drawn = source.select(sample_positions(len(source), PROBE_BATCHES * batch, config.seed))
    one, several = drawn.select(range(batch)), len(drawn) / batch
    sum_row_gradients(model, loss, one)  # warms up
    gradient = _seconds(lambda: sum_row_gradients(model, loss, drawn), source.device) / len(drawn)
    forward = _seconds(lambda: predict_rows(model, drawn), source.device) / len(drawn)
    activations = _saved_bytes(model, loss, one)

    curvature, renewal, solve, cached = 0.0, 0.0, 0.0, 0
    if rows["curvature"]:
        cached, limit = (
            _cached_bytes(model, loss, one, plan) * rows["curvature"] // batch,
            usual_cache_bytes(model, plan),
        )
        overflows = cached > limit
        looped = 0.0
        if plan.loose:
            single = one.select(range(min(3, batch))).resized(1)
            looped = _seconds(lambda: sum_row_gradients(model, loss, single), source.device) / len(single)

        def fit(some: RowSource) -> Any:
            return fit_curvature(
                model,
                some,
                kind=config.curvature,  # type: ignore[arg-type]
                fisher=config.fisher,
                row_loss=loss,
                seed=config.seed,
                max_factor_size=config.max_factor_size,
                factor_device=config.factor_device or config.memory_device,
                cache_bytes=0 if overflows else limit,
            )

        first = _seconds(lambda: fit(one), source.device) - looped * min(LOOP_ROWS, batch)
        fitted: list[Any] = []
        more = _seconds(lambda: fitted.append(fit(drawn)), source.device) - looped * min(LOOP_ROWS, len(drawn))
        each = max(more - first, 0.0) / (several - 1) if several > 1 else max(first, 0.0)
        constant = max(first - each, 0.0)
        curvature, renewal = (
            constant + each * rows[name] / batch + looped * min(LOOP_ROWS, rows[name])
            for name in ("curvature", "renewal")
        )
        zeros = {name: torch.ones_like(p, dtype=torch.float64) for name, p in trainable_parameters(model).items()}
        solve = _seconds(lambda: fitted[0].solve(zeros, 0.1), source.device)
        cached = min(cached, limit)
    total = gradient * rows["gradient_sum"]

    asked = rows["request"]
    calibrated = not wishes.is_given and rows["held_out"] > 0
    own = asked >= ENOUGH_FORGET_ROWS  # then the forget rows set the target, as a rule
    draws = [min(size, rows["training"] // 10) for size in wishes.proxy_rows] if calibrated and not own else []
    proxies = sum(draws)
    target = asked if own else proxies / max(len(draws), 1)
    looked_at = _TRIALS * (rows["held_out"] + target) if calibrated else 0.0
    measured = 2 * (asked + min(_RETAINED, rows["training"]) + min(_HELD_OUT, rows["held_out"]))
    known = 2 * min(_RETAINED, rows["training"])
    unlearn = gradient * (asked + proxies) + forward * (looked_at + measured + known)
    unlearn += solve * (_SOLVES if calibrated else 1)
    seconds = {"gradient_sum": total, "curvature": curvature, "gather": total + curvature, "unlearn": unlearn}
    free = wishes.scale is None and wishes.retain_weight is None
    if calibrated and wishes.multi_step and free and asked >= FEWEST_COMPARED_ROWS:
        retained = source.select(sample_positions(len(source), min(_RETAINED, rows["training"] - asked), config.seed))
        anchors = anchor_rows(model, retained)
        for name, steps in {"multi_step": USUAL_STEPS, "multi_step_at_most": MOST_STEPS}.items():
            work = MultiStepWork.of(
                steps, forget=asked, held_out=rows["held_out"], known=len(retained), anchors=anchors
            )
            seconds[name] = gradient * work.gradients + forward * work.forwards + solve * work.solves
    if rows["renewal"]:
        seconds["renewal"] = renewal
    return seconds, activations, cached


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    def now() -> float:
        synchronise(device)
        return time.perf_counter()

    started = now()
    work()
    return now() - started


def _saved_bytes(model: nn.Module, loss: RowLoss, batch: RowSource) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of a batch, weights not counted."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with evaluation_mode(model), torch.enable_grad():
        inputs = batch.first_batch()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            value, _ = loss(model, inputs)
        del value
    weights = {tensor.untyped_storage().data_ptr() for tensor in model_state(model).values()}
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def _prediction_bytes(model: nn.Module, source: RowSource, batch_size: int | None) -> int:
    """The most bytes that a batch takes without gradients."""
    rows = min(batch_size or source.batch_size, len(source))
    batch = source.select(range(rows)).resized(rows)
    counters = memory_counters(source.device)
    before = 0 if counters is None else counters.memory_allocated(source.device)
    return peak_allocated_bytes(lambda: predict_rows(model, batch), source.device) - before


def _cached_bytes(model: nn.Module, loss: RowLoss, batch: RowSource, plan: LayerPlan) -> int:
    """Bytes of a batch that the curvature's fit would keep to spare its second pass."""
    size = 0
    with evaluation_mode(model), torch.enable_grad(), LayerHooks(model, plan.layers) as capture:
        inputs = batch.first_batch()
        calls = capture.run(lambda: loss(model, inputs)[0])
        for layer in plan.kronecker:
            if layer.name not in calls:
                continue
            assert isinstance(layer, MatrixLayer)
            positions = sum(g.numel() for _, g in calls[layer.name]) // (layer.layout.outputs * len(batch))
            shape = (layer.layout.groups, len(batch), max(positions, 1))
            size += cached_size(shape, layer.layout.columns, layer.layout.group_outputs) * layer.dtype.itemsize
    return size


__all__ = ["Estimate", "estimate"]
