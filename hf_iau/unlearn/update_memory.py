"""The memory that belongs to the moved weights."""

from __future__ import annotations

from hf_iau.errors import RequestError
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.methods.step import first_order_rise, moved_gradient_sum, step_norm, weights_norm
from hf_iau.unlearn.record import StepEffect
from hf_iau.unlearn.sync import non_finite_parameter
from hf_iau.unlearn.transaction import WeightTransaction


def move_memory(
    context: ForgetContext, outcome: MethodOutcome, transaction: WeightTransaction
) -> tuple[GradientMemory | None, StepEffect]:
    """The memory that belongs to the moved weights, and how far they moved.

    Args:
        context: the request, with the memory of the weights before.
        outcome: what the method told; its gradient sum, as large as the weights, is dropped.
        transaction: that which knows the weights before.

    Raises:
        RequestError: a moved weight is not finite.
    """
    memory = outcome.memory or context.memory
    names = (
        list(memory.parameters)
        if memory is not None
        else [name for name, parameter in context.model.named_parameters() if parameter.requires_grad]
    )
    bad = non_finite_parameter(context.model)
    if bad is not None:
        raise RequestError(
            f"The update made {bad!r} non-finite, so it was not applied. Take a shorter step (smaller eta, lr or "
            "scale)."
        )
    move = transaction.moved(names)
    length = step_norm(move)
    relative = length / max(weights_norm(context.model, names), 1e-30)
    if memory is None or not outcome.keeps_memory:
        return None, StepEffect(length, relative)
    targets = outcome.forget_targets
    if targets is None:
        targets = context.count_forget_targets()
    moved_sum, rise = None, None
    if outcome.forget_sum is not None:
        rise = first_order_rise(outcome.forget_sum, move, targets)
        if memory.gradient_sum is not None and memory.curvature is not None:
            moved_sum = moved_gradient_sum(
                memory.gradient_sum, outcome.forget_sum, memory.curvature, move, memory.n_targets - targets
            )
    outcome.forget_sum = None
    newer = memory.after_step(
        context.model,
        rows=len(context.forget),
        targets=targets,
        relative_step=relative,
        gradient_sum=moved_sum,
        label_counts=context.label_counts,
    )
    if outcome.calibration is not None:
        newer.calibration = outcome.calibration
    if newer.row_identity is not None and context.fingerprints is not None:
        newer.row_identity = newer.row_identity.without(context.fingerprints, context.forget_positions)
    return newer, StepEffect(length, relative, rise)
