"""`estimate`: what gathering and a request will cost, before anything is run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_iau.curvature import Curvature, fit_curvature
from hf_iau.curvature.call_cache import cached_size, usual_cache_bytes
from hf_iau.curvature.eigenvectors import eigenvector_bytes
from hf_iau.curvature.layer_hooks import LayerHooks
from hf_iau.curvature.layers import LayerPlan, MatrixLayer, plan_layers, spare_bytes
from hf_iau.curvature.row_loop import LOOP_ROWS
from hf_iau.data import RowLoss, RowSource, evaluation_mode, predict_rows
from hf_iau.data.digests import sample_positions
from hf_iau.data.precision import compute_settings
from hf_iau.data.row_loss import UserLossFunction
from hf_iau.data.rows import Collator
from hf_iau.distributed import full_parameters
from hf_iau.distributed.wrappers import unwrap_model
from hf_iau.errors import ConfigError
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.gathering import check_before_gathering, choose_row_loss, default_collator, keep_input_columns
from hf_iau.memory.gradient_sum import sum_row_gradients, trainable_parameters
from hf_iau.methods.context import ROWS_LOOKED_AT
from hf_iau.methods.iau.config import ENOUGH_FORGET_ROWS, FEWEST_COMPARED_ROWS, IAUConfig
from hf_iau.methods.iau.curvature_renewal import FEWEST_ROWS
from hf_iau.methods.iau.multi_step import MOST_STEPS, USUAL_STEPS, MultiStepWork
from hf_iau.methods.iau.multi_step_gradients import reference_size
from hf_iau.methods.weights import model_state
from hf_iau.utils.devices import memory_counters, synchronise
from hf_iau.utils.timing import peak_allocated_bytes
from hf_iau.utils.vectors import piece, storage_dtype

PROBE_BATCHES = 3
# Vectors as large as the trained weights that a request of `iau` holds beside its copy of them: a gradient sum, and its
# direction or the gradients that it is made of; and further ones where it takes many steps. Counted with the allocator;
# the tests count again.
_VECTORS, _VECTORS_OF_MANY_STEPS = 2, 5
# Trials that a request of one step takes (5 to 14 in the benchmarks, 7 as a rule), and solves with the curvature.
_TRIALS, _SOLVES = 8, 6
# Most held-out rows that its report measures.
_HELD_OUT = 2 * ROWS_LOOKED_AT


@dataclass(frozen=True)
class Estimate:
    """What is to be expected.

    Attributes:
        bytes: `weights` (all of the model's), `gradients`, `gradient_sum`, `factors`, `memory` (the two before), what
            autograd keeps for a batch (`activations`), what gathering and a request hold at most beside the weights and
            the memory (`gathering`, `request`; `multi_step` comes on top where a request takes many steps, `renewal`
            where it first estimates the curvature anew), and the peak of either with all of these but the two on top
            (`gathering_peak`, `request_peak`). An optimizer that is still alive comes on top.
        seconds: `gradient_sum`, `curvature`, `gather` (the two before) and `unlearn`; where a request takes many
            steps, `multi_step` comes on top with the usual number of them and `multi_step_at_most` with the most; where
            it first estimates the curvature anew, because requests have moved the weights far
            (`IAUConfig(renew_curvature=…)`), `renewal` does; empty without a probe.
        rows: rows of the training set, of a gradient sum, of the curvature, of its renewal, of a request and of
            calibration.
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
        steps = {
            "multi_step": f"multi-step, {USUAL_STEPS} steps (usual)",
            "multi_step_at_most": f"multi-step, {MOST_STEPS} steps (the most)",
        }
        lines += [(steps.get(name, name.replace("_", " ")), f"{value:,.1f} s") for name, value in self.seconds.items()]
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
    held_out_rows: int = ROWS_LOOKED_AT,
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

    Bytes follow from the model's layers; for seconds and activations a few batches are passed through it. They are
    those of a process that holds all of the model and the memory, as under DDP; of a sharded model each holds a part.

    Args:
        model: the model that is to be gathered from; left as it was found.
        dataset: its training rows.
        config: what is to be gathered; default `GatherConfig()`. `precision="auto"` knows of no Trainer here: give
            "bfloat16" where training uses autocast.
        method_config: of the request; default `IAUConfig()`.
        request_rows: rows of the request; default: a hundredth of the training rows.
        held_out_rows: rows that calibration may look at.
        prediction_batch_size: rows of a batch without gradients (`per_device_eval_batch_size`); default: as with them.
        data_collator, processing_class, row_loss, compute_loss_func, label_smoothing_factor, device: as for `gather`.
        probe: pass three batches through the model; without it there are no seconds and no activations.

    Returns:
        Bytes, seconds and counts by name; `print` shows them as a table.

    Raises:
        ConfigError: a number of rows is out of range.
        UnsupportedModelError: the model or the rows cannot be gathered from.
    """
    config, method_config, model = config or GatherConfig(), method_config or IAUConfig(), unwrap_model(model)
    config = config.resolved()
    source = RowSource(
        keep_input_columns(model, dataset, "training rows"),
        data_collator or default_collator(processing_class),
        batch_size=config.batch_size or 32,
        device=device or next(model.parameters()).device,
        name="training rows",
    )
    check_before_gathering(model, source.dataset)
    rows = _rows(len(source), config, method_config, request_rows, held_out_rows)
    loss = choose_row_loss(
        row_loss=row_loss, compute_loss_func=compute_loss_func, label_smoothing_factor=label_smoothing_factor
    )
    with compute_settings(config.pass_precision, config.memory_device), full_parameters(model):
        plan = plan_layers(model, kronecker=config.curvature == "ekfac", max_factor_size=config.max_factor_size)
        coverage, factors = _factors(model, plan, config)
        probed = _Probe(model, source, loss, config, plan, rows) if probe else None
        of_batch = _BatchBytes()
        if probed is not None:
            predictions = _prediction_bytes(model, source, prediction_batch_size)
            of_batch = _BatchBytes(probed.activations, predictions, probed.curvature.cached)
        sizes = _sizes(model, config, plan, factors, of_batch, source.batch_size, bool(rows["renewal"]))
        return Estimate(sizes, {} if probed is None else probed.seconds(method_config), rows, coverage)


def _rows(
    training: int, config: GatherConfig, method_config: IAUConfig, request_rows: int | None, held_out_rows: int
) -> dict[str, int]:
    """See `Estimate.rows`."""
    request = max(1, training // 100) if request_rows is None else request_rows
    if not 0 < request < max(training, 2) or held_out_rows < 0:
        raise ConfigError(
            f"request_rows={request_rows}, held_out_rows={held_out_rows}: give a number of rows below the {training} "
            "training rows, and one of at least 0."
        )
    summed = {"none": 0, "full": training, "sampled": min(config.sample_rows, training)}[config.gradient_sum]
    curvature = min(config.curvature_rows, training) if config.curvature in ("ekfac", "diagonal") else 0
    retained = min(curvature, training - request)
    may_renew = method_config.renew_curvature is not None and not method_config.is_given
    return {
        "training": training,
        "gradient_sum": summed,
        "curvature": curvature,
        "renewal": retained if may_renew and retained >= FEWEST_ROWS * curvature else 0,
        "request": request,
        "held_out": min(held_out_rows, method_config.held_out_rows),
    }


@dataclass(frozen=True)
class _BatchBytes:
    """What autograd keeps for a batch, what one without gradients takes, and what a fit keeps for its second pass."""

    activations: int = 0
    predictions: int = 0
    cached: int = 0


def _sizes(
    model: nn.Module,
    config: GatherConfig,
    plan: LayerPlan,
    factors: int,
    of_batch: _BatchBytes,
    batch_size: int,
    renewed: bool,
) -> dict[str, int]:
    """See `Estimate.bytes`."""
    parameters = trainable_parameters(model)
    weights = sum(t.numel() * t.element_size() for t in model_state(model).values())
    gradients = sum(p.numel() * p.element_size() for p in parameters.values())
    vector = sum(p.numel() * storage_dtype(p.dtype).itemsize for p in parameters.values())
    total = 0 if config.gradient_sum == "none" else vector
    activations = of_batch.activations
    # While the sum is made there are no factors yet, and while the factors are made no gradients. The eigenvalues are
    # made after the eigenvectors, from each row's gradients.
    matrices = [(layer.layout.group_outputs * layer.layout.columns * layer.layout.groups) for layer in plan.kronecker]
    eigenvalues, largest = 4 * sum(matrices), 4 * max(matrices, default=0)
    temporary = min(batch_size * largest, spare_bytes(parameters.values()))
    fit = max(
        of_batch.cached + eigenvector_bytes(plan) - eigenvalues,
        of_batch.cached + activations - eigenvalues,
        activations + temporary,
    )
    gathering = max((gradients + activations - factors) * bool(total), fit * bool(factors), 0)
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    # A layer's direction and, of Σ_D, what the curvature makes of its step; and float64 copies of pieces of them.
    at_once = max((piece(p.device) for p in parameters.values()), default=0)
    of_layer = (1 + bool(total)) * largest + 4 * 8 * at_once
    copies = weights - frozen
    request = copies + _VECTORS * vector + max(of_batch.predictions, activations, of_layer)
    # The old curvature is kept, for `revert`, beside the new one, which is fitted before there are any vectors.
    renewal = max(copies + factors + max(fit, 0) - request, factors)
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
        "multi_step": _VECTORS_OF_MANY_STEPS * vector,
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


@dataclass(frozen=True)
class _CurvatureCost:
    """Seconds of a fit, of one at a renewal and of a division by the curvature; bytes kept for the second pass."""

    fit: float = 0.0
    renewal: float = 0.0
    solve: float = 0.0
    cached: int = 0


class _Probe:
    """A few batches passed through the model, and what they foretell of a whole pass.

    Args:
        model, source, loss, config, plan: what is gathered, from which rows.
        rows: how many rows each pass has, see `Estimate.rows`.
    """

    def __init__(
        self,
        model: nn.Module,
        source: RowSource,
        loss: RowLoss,
        config: GatherConfig,
        plan: LayerPlan,
        rows: dict[str, int],
    ) -> None:
        self.model, self.source, self.loss, self.config, self.plan, self.rows = model, source, loss, config, plan, rows
        self.batch = min(source.batch_size, len(source))
        self.drawn = source.select(sample_positions(len(source), PROBE_BATCHES * self.batch, config.seed))
        self.one = self.drawn.select(range(self.batch))
        sum_row_gradients(model, loss, self.one)  # warms up
        self.gradient = self._per_row(lambda: sum_row_gradients(model, loss, self.drawn))
        self.forward = self._per_row(lambda: predict_rows(model, self.drawn))
        self.activations = _saved_bytes(model, loss, self.one)
        self.curvature = self._curvature_cost() if rows["curvature"] else _CurvatureCost()

    def _per_row(self, work: Callable[[], Any]) -> float:
        return _seconds(work, self.source.device) / len(self.drawn)

    def _curvature_cost(self) -> _CurvatureCost:
        """From a fit to one batch and one to several: what the first costs more than each further one is constant."""
        rows, device, drawn = self.rows, self.source.device, self.drawn
        limit = usual_cache_bytes(self.model, self.plan)
        cached = _cached_bytes(self.model, self.loss, self.one, self.plan) * rows["curvature"] // self.batch
        cache_bytes = 0 if cached > limit else limit
        looped, several = self._looped(), len(drawn) / self.batch
        first = _seconds(lambda: self._fit(self.one, cache_bytes), device) - looped * min(LOOP_ROWS, self.batch)
        fitted: list[Curvature] = []
        more = _seconds(lambda: fitted.append(self._fit(drawn, cache_bytes)), device)
        more -= looped * min(LOOP_ROWS, len(drawn))
        each = max(more - first, 0.0) / (several - 1) if several > 1 else max(first, 0.0)
        constant = max(first - each, 0.0)
        fit, renewal = (
            constant + each * rows[name] / self.batch + looped * min(LOOP_ROWS, rows[name])
            for name in ("curvature", "renewal")
        )
        ones = {name: torch.ones_like(p, dtype=torch.float64) for name, p in trainable_parameters(self.model).items()}
        solve = _seconds(lambda: fitted[0].solve(ones, 0.1), device)
        return _CurvatureCost(fit, renewal, solve, min(cached, limit))

    def _looped(self) -> float:
        """Seconds a row of layers whose rows are looped over, of which a fit takes no more than `LOOP_ROWS`."""
        if not self.plan.loose:
            return 0.0
        single = self.one.select(range(min(3, self.batch))).resized(1)
        return _seconds(lambda: sum_row_gradients(self.model, self.loss, single), self.source.device) / len(single)

    def _fit(self, rows: RowSource, cache_bytes: int) -> Curvature:
        config = self.config
        return fit_curvature(
            self.model,
            rows,
            kind=config.curvature,  # type: ignore[arg-type]
            fisher=config.fisher,
            row_loss=self.loss,
            seed=config.seed,
            max_factor_size=config.max_factor_size,
            factor_device=config.factor_device or config.memory_device,
            cache_bytes=cache_bytes,
        )

    def seconds(self, method_config: IAUConfig) -> dict[str, float]:
        """See `Estimate.seconds`."""
        rows, curvature = self.rows, self.curvature
        total = self.gradient * rows["gradient_sum"]
        calibrated = not method_config.is_given and rows["held_out"] > 0
        seconds = {"gradient_sum": total, "curvature": curvature.fit, "gather": total + curvature.fit}
        seconds["unlearn"] = self._one_step(method_config, calibrated)
        free = method_config.scale is None and method_config.retain_weight is None
        if calibrated and method_config.multi_step and free and rows["request"] >= FEWEST_COMPARED_ROWS:
            seconds |= self._many_steps()
        if rows["renewal"]:
            seconds["renewal"] = curvature.renewal
        return seconds

    def _one_step(self, method_config: IAUConfig, calibrated: bool) -> float:
        rows = self.rows
        request, training = rows["request"], rows["training"]
        own = request >= ENOUGH_FORGET_ROWS  # then the forget rows set the target, as a rule
        draws = [min(size, training // 10) for size in method_config.proxy_rows] if calibrated and not own else []
        target = request if own else sum(draws) / max(len(draws), 1)
        retained = min(ROWS_LOOKED_AT, training)
        tried = _TRIALS * (rows["held_out"] + target) if calibrated else 0.0
        measured = 2 * (request + retained + min(_HELD_OUT, rows["held_out"]))
        seconds = self.gradient * (request + sum(draws)) + self.forward * (tried + measured + 2 * retained)
        return seconds + self.curvature.solve * (_SOLVES if calibrated else 1)

    def _many_steps(self) -> dict[str, float]:
        """With the usual number of steps, and with the most."""
        rows, source = self.rows, self.source
        size = min(ROWS_LOOKED_AT, rows["training"] - rows["request"])
        retained = source.select(sample_positions(len(source), size, self.config.seed))
        reference = reference_size(self.model, retained)
        seconds = {}
        for name, steps in {"multi_step": USUAL_STEPS, "multi_step_at_most": MOST_STEPS}.items():
            work = MultiStepWork.of(
                steps, forget=rows["request"], held_out=rows["held_out"], retained=len(retained), reference=reference
            )
            seconds[name] = (
                self.gradient * work.gradients + self.forward * work.forwards + self.curvature.solve * work.solves
            )
        return seconds


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
