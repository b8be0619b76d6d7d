"""The gradient sums that a step is made of: of the rows' losses, with their share of a coupled L2 term."""

from __future__ import annotations

from torch import Tensor

from hf_iau.data import RowSource
from hf_iau.memory.gradient_sum import GradientSum, sum_row_gradients
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ForgetContext

# A sampled Σ_D whose standard error is a larger share of its norm is of no use.
_NOISIEST = 0.5


def objective_sum(context: ForgetContext, rows: RowSource) -> GradientSum:
    """Σ over `rows` of the gradient of what was trained, for the parameters of the memory; one pass."""
    memory = context.memory
    names = None if memory is None else list(memory.parameters)
    total = sum_row_gradients(context.model, context.row_loss, rows, names=names, progress=context.progress)
    add_weight_decay(context, total)
    return total


def add_weight_decay(context: ForgetContext, gradient_sum: GradientSum) -> None:
    """Add the rows' share of a coupled L2 term, n·decay·θ, in place."""
    decay = context.memory.weight_decay if context.memory is not None else {}
    parameters = dict(context.model.named_parameters())
    for parameter_name, coefficient in decay.items():
        if parameter_name in gradient_sum.tensors:
            total = gradient_sum.tensors[parameter_name]
            value = parameters[parameter_name].detach()
            value = value.to(total.device, total.dtype)
            gradient_sum.tensors[parameter_name] += gradient_sum.n_targets * coefficient * value


def has_correction_sum(memory: GradientMemory) -> bool:
    """Whether Σ_D is there, exact or sampled with a standard error that is small beside it."""
    if memory.gradient_sum is None:
        return False
    norm = GradientSum(dict(memory.gradient_sum), memory.n_rows, memory.n_targets).norm()
    return memory.gradient_sum_error <= _NOISIEST * norm


def correction_sum(context: ForgetContext, memory: GradientMemory) -> dict[str, Tensor] | None:
    """Σ_D for c, where it may be used."""
    if memory.gradient_sum is None or not has_correction_sum(memory):
        return None
    changed = memory.weight_decay.keys()
    tensors = {name: tensor.clone() if name in changed else tensor for name, tensor in memory.gradient_sum.items()}
    total = GradientSum(tensors, memory.n_rows, memory.n_targets)
    add_weight_decay(context, total)
    return total.tensors
