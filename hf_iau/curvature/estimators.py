"""`fit_curvature`: the kinds of curvature, and how each is estimated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_iau.curvature.blocks import Block, DiagonalBlock, IdentityBlock
from hf_iau.curvature.call_cache import usual_cache_bytes
from hf_iau.curvature.curvature import KINDS, Curvature, CurvatureKind
from hf_iau.curvature.factor_sums import Placement
from hf_iau.curvature.fit import Fit, Reduce
from hf_iau.curvature.fit_rows import FitRows
from hf_iau.curvature.layers import LayerPlan, plan_layers
from hf_iau.curvature.row_loop import looped_positions
from hf_iau.curvature.sharded_fit import ShardedFit, ShardedFitRows
from hf_iau.data import RowLoss, RowSource, evaluation_mode
from hf_iau.distributed import all_reduce_, get_world_size, is_main_process, is_sharded, sync_errors
from hf_iau.errors import ConfigError, MissingMemoryError, RequestError

FisherKind = Literal["true", "empirical"]

SHARE_OF_TEMPORARIES = 8
"""By how much temporary tensors are smaller where factors are kept on another device than the model's.

Then passes are of half a batch. Beside the weights and whatever else training keeps, training needs room for gradients
or a batch's activations, whichever are larger, and such a pass half of the latter: half the gradients' bytes are free
at least.
"""


def fit_curvature(
    model: nn.Module,
    source: RowSource,
    *,
    kind: CurvatureKind = "ekfac",
    row_ids: np.ndarray | None = None,
    seed: int = 0,
    fisher: FisherKind = "true",
    row_loss: RowLoss | None = None,
    max_factor_size: int = 4096,
    factor_device: torch.device | str | None = None,
    cache_bytes: int | None = None,
    optimizer: Any = None,
    weight_decay: float = 0.0,
    progress: bool = False,
    reduce: Reduce | None = None,
) -> Curvature:
    """Fit C = (1 / targets) Σ_rows E[g gᵀ] to the rows of `source`, in evaluation mode.

    * `"ekfac"`: eigenvalue-corrected Kronecker factors (George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv
      2308.03296) for `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` and Transformers' `Conv1D`, and so for attention projections
      and LoRA matrices. With inputs a (extended by a 1 where the bias is trainable) and output gradients g, the bases
      are those of A = Σ a aᵀ and S = Σ g gᵀ, summed over rows, positions and calls (the *expand* setting), and the
      eigenvalues Λ = (1 / targets) Σ_rows (Q_Sᵀ G Q_A)² with G = Σ_positions g aᵀ of a row. Each group of a grouped
      convolution has factors of its own. Positions whose output gradient is zero (but for rounding) are left out of A
      too, so padding and unused positions drop out and the factors do not depend on the padding length. Where a
      convolution has very many positions, evenly spaced rows make the bases (see `factor_sums.BASIS_POSITIONS`), and
      all rows Λ.
    * `"diagonal"`: the same without rotation, Λ = (1 / targets) Σ_rows g².
    * `"adam"`: the optimizer's bias-corrected second moment. It belongs to the last step, is clipped, and is at the
      scale of a batch's mean gradient rather than of a row's. The rows are not read.
    * `"identity"`: 1 everywhere. The rows are not read.

    With `"ekfac"`, all other parameters are diagonal: embeddings and normalisation layers in closed form over all rows;
    tied weights, raw parameters and unknown modules over at most 128 evenly spaced rows, one at a time. `layers()` of
    the result says which and why. Every closed form is first compared with rows taken one by one on three rows; a layer
    that disagrees (its module is bypassed, or mixes rows) is measured by the loop, and says so.

    The two statistics (bases, then Λ) need two passes over the rows. The second leaves out the batches of which what it
    needs fits in `cache_bytes`.

    Of several processes, each takes its share of the rows; all get the same factors, and all raise if one has to. Of a
    model sharded by `fully_shard`, each layer's factors are held by one process (`Block.owner`).

    Args:
        model: the bare model (no DDP or FSDP1 wrapper).
        source: the rows, with labels.
        kind: see above.
        row_ids: `(rows,)` int, the rows' numbers in the training data, which seed their draws; positions in `source`
            if None.
        seed: the seed of the label draws.
        fisher: "true" draws labels from the model, "empirical" uses `row_loss`.
        row_loss: the summed loss; for "empirical" only.
        max_factor_size: largest side of a Kronecker factor; larger layers are diagonal.
        factor_device: where statistics are kept; each layer's own device if None. If it is not the model's, passes are
            of half a batch and temporary tensors smaller, so that training's memory on the model's device is enough.
        cache_bytes: memory for sparing the second pass; 0 forces it. None: as much as the trained weights' gradients
            take (which training holds and a fit does not), at least 24 MiB, less what finding eigenvectors takes.
        optimizer: for "adam".
        weight_decay: coefficient of a coupled L2 regulariser on the mean loss, added to every eigenvalue of "ekfac" and
            "diagonal".
        progress: show a progress bar.
        reduce: where `source` holds one part of the rows: applied to every summed statistic, to make it that of all
            parts. It is called the same number of times, on the same shapes, in each of them. None: `source` holds
            all rows, which the processes share out among them.

    Returns:
        The curvature, in float32 (float64 for float64 parameters), on `factor_device`.

    Raises:
        ConfigError: for arguments out of range.
        RequestError: when there are no rows or no targets, or `row_ids` has another length.
        MissingMemoryError: for "adam" without an optimizer that keeps second moments.
        NonFiniteGradientError: naming the layer and the row.
        UnsupportedModelError: when the model's outputs cannot be read.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r}: give one of {', '.join(KINDS)}.")
    if kind in ("identity", "adam"):
        fitted = _identity(model) if kind == "identity" else _from_adam(model, optimizer)
        return fitted if factor_device is None else fitted.to(factor_device)
    if fisher not in ("true", "empirical"):
        raise ConfigError(f"fisher={fisher!r}: give 'true' or 'empirical'.")
    if fisher == "empirical" and row_loss is None:
        raise ConfigError("fisher='empirical' needs row_loss=, the summed loss whose gradients are squared.")
    if max_factor_size < 1 or (cache_bytes is not None and cache_bytes < 0) or not weight_decay >= 0:
        raise ConfigError(
            f"max_factor_size={max_factor_size}, cache_bytes={cache_bytes}, weight_decay={weight_decay}: give a size "
            "of at least 1 and non-negative numbers."
        )
    ids = np.arange(len(source)) if row_ids is None else np.asarray(row_ids)
    if len(ids) != len(source):
        raise RequestError(f"row_ids has {len(ids)} numbers for {len(source)} {source.name}: give one a row.")
    if len(source) == 0 and reduce is None:
        raise RequestError(f"There are no {source.name} to fit the curvature to: give at least one row.")
    fit = _prepare_fit(
        model,
        source,
        ids,
        plan=plan_layers(model, kronecker=kind == "ekfac", max_factor_size=max_factor_size),
        seed=seed,
        row_loss=row_loss if fisher == "empirical" else None,
        factor_device=None if factor_device is None else torch.device(factor_device),
        cache_bytes=cache_bytes,
        progress=progress,
        reduce=reduce,
    )
    with sync_errors("the curvature"), evaluation_mode(model), torch.enable_grad():
        blocks = fit.run(weight_decay)
    order = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    blocks.sort(key=lambda block: min(order[name] for name in block.shapes))
    details = {
        "fisher": fisher,
        "seed": int(seed),
        "max_factor_size": int(max_factor_size),
        "weight_decay": float(weight_decay),
        "passes": fit.passes,
    }
    return Curvature(kind, blocks, n_rows=fit.n_rows, n_targets=fit.n_targets, details=details)


def _prepare_fit(
    model: nn.Module,
    source: RowSource,
    ids: np.ndarray,
    *,
    plan: LayerPlan,
    seed: int,
    row_loss: RowLoss | None,
    factor_device: torch.device | None,
    cache_bytes: int | None,
    progress: bool,
    reduce: Reduce | None,
) -> Fit:
    """A fit of this process's share of the rows; arguments as in `fit_curvature`."""
    sharded = is_sharded(model)
    if sharded and reduce is not None:
        raise ConfigError("reduce= is for one part of the rows in one process, and the model is sharded over several.")
    total, start, looped = len(source), 0, looped_positions(len(source))
    if reduce is None and not sharded:
        source, start = source.share()
        ids = ids[start : start + len(source)]
        looped = looped[(looped >= start) & (looped < start + len(source))] - start
    if sharded:
        cache_bytes = 0
    elif cache_bytes is None:
        cache_bytes = usual_cache_bytes(model, plan)
    placement = Placement.beside(model, factor_device)
    if placement.is_apart:
        source = source.resized(max(1, source.batch_size // 2))
        for layer in plan.layers:
            layer.temporary_bytes //= SHARE_OF_TEMPORARIES
    rows = (ShardedFitRows if sharded else FitRows)(
        model,
        source,
        row_ids=ids,
        seed=seed,
        row_loss=row_loss,
        start=start,
        total=total,
        progress=progress and is_main_process(),
    )
    return (ShardedFit if sharded else Fit)(
        rows,
        plan,
        placement=placement,
        cache_bytes=cache_bytes,
        looped=looped,
        owners=get_world_size() if reduce is None else 1,
        reduce=reduce or _over_processes,
    )


def _identity(model: nn.Module) -> Curvature:
    owners: dict[str, dict[str, tuple[int, ...]]] = {}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owners.setdefault(name.rpartition(".")[0] or name, {})[name] = tuple(parameter.shape)
    return Curvature("identity", [IdentityBlock(name, shapes).to(device) for name, shapes in owners.items()])


def _from_adam(model: nn.Module, optimizer: Any) -> Curvature:
    while (
        optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "optimizer")
    ):
        optimizer = optimizer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)  # AcceleratedOptimizer is itself a torch Optimizer
    state: Mapping[Any, Mapping[str, Any]] = getattr(optimizer, "state", {})
    groups = {id(p): group for group in getattr(optimizer, "param_groups", []) for p in group["params"]}
    blocks: list[Block] = []
    found = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = state.get(parameter, {})
        moment = own.get("exp_avg_sq")
        reason: str = "Adam's second moment"
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        if isinstance(moment, Tensor) and moment.shape == parameter.shape:
            beta = groups.get(id(parameter), {}).get("betas", (0.0, 0.0))[1]
            step = float(own.get("step", 0))
            values = moment.detach().to(dtype) / (1.0 - beta**step if step > 0 else 1.0)
            found += 1
        else:
            values = torch.zeros_like(parameter, dtype=dtype)
            reason = "the optimizer holds no second moment for it"
        blocks.append(DiagonalBlock(name, {name: values.contiguous()}, reason))
    if not found:
        held = "no optimizer" if optimizer is None else type(optimizer).__name__
        raise MissingMemoryError(
            f"kind='adam' reads the second moments (`exp_avg_sq`) of the optimizer's state, and {held} has none for "
            "this model's parameters. Train with Adam or AdamW and pass its optimizer after training, or use "
            "kind='ekfac' or 'diagonal'."
        )
    details = {"adam": "second moment of the optimizer's last step: of clipped, batch-mean gradients"}
    return Curvature("adam", blocks, details=details)


def _over_processes(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()
    all_reduce_([tensor], "the curvature")
    return tensor
