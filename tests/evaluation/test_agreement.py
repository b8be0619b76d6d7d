"""Agreement, Jensen-Shannon divergence and parameter distance against formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon

from hf_iau.errors import RequestError
from hf_iau.evaluation.model_agreement import agreement, parameter_distance


def with_probabilities(rows, p):
    return rows(np.ones(len(p)), probabilities=np.asarray(p, dtype=np.float64))


def test_divergence_is_the_formula(rows):
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(5), 30), random.dirichlet(np.ones(5), 30)
    m = (p + q) / 2
    expected = (0.5 * (p * np.log(p / m)).sum(1) + 0.5 * (q * np.log(q / m)).sum(1)).mean()
    found = agreement(with_probabilities(rows, p), with_probabilities(rows, q))
    assert found.jensen_shannon == pytest.approx(expected, rel=1e-9)
    assert found.agreement == (p.argmax(1) == q.argmax(1)).mean()
    assert found.rows == 30
    assert found.jensen_shannon == pytest.approx((jensenshannon(p, q, axis=1) ** 2).mean(), rel=1e-9)


def test_extremes(rows):
    p = with_probabilities(rows, [[1.0, 0.0], [0.0, 1.0]])
    q = with_probabilities(rows, [[0.0, 1.0], [1.0, 0.0]])
    opposite = agreement(p, q)
    assert opposite.agreement == 0
    assert opposite.jensen_shannon == pytest.approx(np.log(2))
    same = agreement(p, p)
    assert (same.agreement, same.jensen_shannon) == (1, 0)


def test_nearly_equal_distributions_give_no_nan(rows):
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(10), 2000).astype(np.float32).astype(np.float64)
    q = p * (1 + 1e-9 * random.normal(size=p.shape))
    found = agreement(with_probabilities(rows, p), with_probabilities(rows, q))
    assert 0 <= found.jensen_shannon < 1e-12


def test_what_cannot_be_compared(rows):
    p = with_probabilities(rows, [[0.5, 0.5]])
    with pytest.raises(RequestError, match="same rows"):
        agreement(p, with_probabilities(rows, [[0.5, 0.5]] * 2))
    with pytest.raises(RequestError, match="keep_probabilities"):
        agreement(p, rows([1.0]))
    with pytest.raises(RequestError, match="classes"):
        agreement(p, with_probabilities(rows, [[0.5, 0.3, 0.2]]))


def test_parameter_distance():
    b = {"w": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "b": torch.zeros(2)}
    a = {"w": b["w"] + 1, "b": torch.tensor([0.0, 2.0])}
    found = parameter_distance(a, b)
    assert found.absolute == pytest.approx(np.sqrt(8))
    assert found.relative == pytest.approx(np.sqrt(8) / 5)
    assert parameter_distance(b, b).absolute == 0
    zero = {"b": torch.zeros(2)}
    assert np.isnan(parameter_distance({"b": torch.ones(2)}, zero).relative)
    with pytest.raises(RequestError, match="extra"):
        parameter_distance({**a, "extra": torch.zeros(1)}, b)
    with pytest.raises(RequestError, match="shape"):
        parameter_distance({**a, "b": torch.zeros(3)}, b)


def test_parameter_distance_keeps_small_differences_of_half_precision():
    b = {"w": torch.full((1000,), 1.0, dtype=torch.bfloat16)}
    a = {"w": b["w"].clone()}
    a["w"][0] += 2**-7
    assert parameter_distance(a, b).absolute == pytest.approx(2**-7)
