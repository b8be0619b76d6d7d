"""How alike two models are: in what they predict for the same rows, and in their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import rel_entr
from torch import Tensor

from hf_iau.data.predictions import RowPredictions
from hf_iau.errors import RequestError
from hf_iau.evaluation.intervals import MISSING, RESAMPLES, proportion_interval, ratio_interval


@dataclass(frozen=True)
class Agreement:
    """Likeness of two models' predictions on the same rows.

    Attributes:
        agreement: share of the rows for which both predict the same class, 0 to 1; higher is closer.
        jensen_shannon: mean Jensen-Shannon divergence of the predicted distributions in nats, 0 to ln 2 = 0.693; lower
            is closer, 0 is equal.
        rows: rows compared.
        agreement_low: lower end of the 95 % interval of `agreement` (Wilson's).
        agreement_high: its upper end.
        jensen_shannon_low: lower end of the 95 % interval of `jensen_shannon` (bootstrap over rows); NaN without one.
        jensen_shannon_high: its upper end.
    """

    agreement: float
    jensen_shannon: float
    rows: int
    agreement_low: float = MISSING[0]
    agreement_high: float = MISSING[1]
    jensen_shannon_low: float = MISSING[0]
    jensen_shannon_high: float = MISSING[1]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers."""
        return asdict(self)


@dataclass(frozen=True)
class ParameterDistance:
    """Distance of two models' weights.

    Attributes:
        absolute: ‖a − b‖₂ over all parameters together, in the weights' own unit.
        relative: `absolute` / ‖b‖₂, with b the reference model; NaN when all of its parameters are 0.
    """

    absolute: float
    relative: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain numbers."""
        return asdict(self)


def agreement(a: RowPredictions, b: RowPredictions, bootstrap: int = RESAMPLES, seed: int = 0) -> Agreement:
    """Compare two models, e.g. an unlearned and a retrained one, on the same single-label rows.

    Args:
        a, b: predictions of the two models for the same rows in the same order, made with `keep_probabilities=True`.
        bootstrap: resamples for the divergence's interval; 0 for no intervals at all.
        seed: of the resampling.

    The Jensen-Shannon divergence is that of Lin (1991) with natural logarithms, as used for unlearning by Chundawat et
    al. (2023, arXiv 2205.08096). Rows without a label are compared as well: no label is needed.

    Raises:
        RequestError: for different numbers of rows or classes, no rows, or predictions without probabilities.
    """
    if len(a) != len(b) or not len(a):
        raise RequestError(f"a has {len(a)} and b {len(b)} rows: give both models' predictions of the same rows.")
    p, q = a.probabilities, b.probabilities
    if p is None or q is None:
        raise RequestError(
            f"{'a' if p is None else 'b'} holds no probabilities: call predict_rows(..., keep_probabilities=True). "
            "They exist for single-label rows only."
        )
    if p.shape != q.shape:
        raise RequestError(f"a has {p.shape[1]} and b {q.shape[1]} classes: compare models with the same classes.")
    p, q = (values.astype(np.float64) / values.sum(axis=1, keepdims=True, dtype=np.float64) for values in (p, q))
    middle = (p + q) / 2
    # Not `scipy.spatial.distance.jensenshannon`: it takes a root first, which is NaN where rounding goes below 0.
    divergence = np.maximum((rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=1) / 2, 0)
    same = p.argmax(axis=1) == q.argmax(axis=1)
    share, mean = MISSING, ratio_interval(divergence, np.ones(len(a)), bootstrap, seed)
    if bootstrap:
        share = proportion_interval(int(same.sum()), len(a))
    return Agreement(
        agreement=float(same.mean()),
        jensen_shannon=float(divergence.mean()),
        rows=len(a),
        agreement_low=share[0],
        agreement_high=share[1],
        jensen_shannon_low=mean[0],
        jensen_shannon_high=mean[1],
    )


def parameter_distance(model_a_params: Mapping[str, Tensor], model_b_params: Mapping[str, Tensor]) -> ParameterDistance:
    """L2 distance of two models' parameters, summed in float64.

    Args:
        model_a_params: name to tensor, e.g. `dict(model.named_parameters())`, of the model in question.
        model_b_params: the same of the reference model.

    A small distance to a retrained model is neither necessary nor sufficient for having forgotten: retrained models of
    two seeds are far apart. It says how far a step went from the weights it started from.

    Returns:
        The distance, and its share of the reference model's norm.

    Raises:
        RequestError: for different names or shapes.
    """
    if model_a_params.keys() != model_b_params.keys():
        odd = sorted(model_a_params.keys() ^ model_b_params.keys())
        raise RequestError(
            f"The models differ in {len(odd)} parameter names ({', '.join(odd[:5])}): compare like with like."
        )
    squared = reference = 0.0
    for name, a in model_a_params.items():
        b = model_b_params[name]
        if a.shape != b.shape:
            raise RequestError(
                f"Parameter {name!r} has shape {tuple(a.shape)} in one model, {tuple(b.shape)} in the other."
            )
        x, y = a.detach().double().cpu(), b.detach().double().cpu()
        squared += float((x - y).pow(2).sum())
        reference += float(y.pow(2).sum())
    absolute = squared**0.5
    return ParameterDistance(absolute=absolute, relative=absolute / reference**0.5 if reference else float("nan"))
