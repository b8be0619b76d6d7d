"""Forgetting: the step that is taken, and the transaction around it."""

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
    "agree_on_request",
    "apply_step",
    "finish_forgetting_step",
    "first_order_rise",
    "moved_gradient_sum",
    "non_finite_parameter",
    "settle_weights",
    "step_norm",
    "weights_norm",
]
