"""Forgetting: the step that is taken, and the transaction around it."""

from hf_iau.forget.gradients import add_weight_decay, finish_sum, has_finish_sum, objective_sum
from hf_iau.forget.renewal import with_near_curvature
from hf_iau.forget.request import ForgetContext, MethodOutcome
from hf_iau.forget.settle import agree_on_request, non_finite_parameter, settle_weights
from hf_iau.forget.step import (
    Step,
    apply_step,
    finish_forgetting_step,
    first_order_rise,
    moved_gradient_sum,
    step_norm,
    weights_norm,
)
from hf_iau.forget.transaction import WeightTransaction

__all__ = [
    "ForgetContext",
    "MethodOutcome",
    "Step",
    "WeightTransaction",
    "add_weight_decay",
    "agree_on_request",
    "apply_step",
    "finish_forgetting_step",
    "finish_sum",
    "first_order_rise",
    "has_finish_sum",
    "moved_gradient_sum",
    "non_finite_parameter",
    "objective_sum",
    "settle_weights",
    "step_norm",
    "weights_norm",
    "with_near_curvature",
]
