"""The curvature depends on the rows and the weights, not on how the rows were batched or padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from curvature_loop import Net, build, make_source, padded_collate, random_vector, relative
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_iau.curvature import Curvature, fit_curvature


class TokenTagger(nn.Module):
    """Labels of tokens from linear layers; padding has the label -100."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4, padding_idx=0)
        self.hidden = nn.Linear(4, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.head(torch.tanh(self.hidden(self.embed(input_ids))))}


def tagger(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    rows = []
    for _ in range(24):
        ids = torch.randint(1, 9, (int(torch.randint(2, 6, ())),))
        rows.append({"input_ids": ids, "labels": ids % 3})
    return TokenTagger().to(dtype), rows


def steps(curvature: Curvature, model: nn.Module, damping: float) -> dict[str, Tensor]:
    return curvature.solve(random_vector(model), damping)


@pytest.mark.parametrize(("dtype", "damping", "tolerance"), [(torch.float64, 0.01, 1e-10), (torch.float32, 0.1, 1e-3)])
def test_batch_size_order_of_padding_and_length(dtype: torch.dtype, damping: float, tolerance: float) -> None:
    model, rows = tagger(dtype)
    expected = fit_curvature(model, make_source(rows, 24))
    assert all(tensor.dtype == dtype for tensor in expected.tensors().values())
    for batch_size, extra in ((1, 0), (5, 0), (24, 7), (5, 3)):
        found = fit_curvature(model, make_source(rows, batch_size, padded_collate(extra)))
        assert (found.n_rows, found.n_targets) == (expected.n_rows, expected.n_targets)
        assert relative(steps(found, model, damping), steps(expected, model, damping)) < tolerance
        assert relative(found.multiply(random_vector(model)), expected.multiply(random_vector(model))) < tolerance
        if dtype == torch.float64:
            for key, tensor in expected.tensors().items():
                if key.endswith(("eigenvalues", "diagonal")):
                    torch.testing.assert_close(found.tensors()[key], tensor, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "vit", "cnn"])
def test_transformers_and_convolutions(name: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-3)):
        model, rows = build(name, n=12, dtype=dtype)
        expected = steps(fit_curvature(model, make_source(rows, 12)), model, 1.0)
        for batch_size, extra in ((1, 0), (5, 2)):
            source = make_source(rows, batch_size, padded_collate(0 if name in ("cnn", "vit") else extra))
            found = steps(fit_curvature(model, source), model, 1.0)
            norm = sum(float(tensor.norm() ** 2) for tensor in expected.values()) ** 0.5
            error = sum(float((found[key] - expected[key]).norm() ** 2) for key in expected) ** 0.5
            assert error < tolerance * norm


def test_the_same_twice_is_the_same_to_the_bit() -> None:
    model, rows = build("bert", dtype=torch.float32)
    first, second = (fit_curvature(model, make_source(rows)).tensors() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_draws_follow_row_ids_and_seed() -> None:
    model, rows = build("mlp", n=12)
    whole = fit_curvature(model, make_source(rows))
    order = np.random.default_rng(0).permutation(12)
    shuffled = fit_curvature(model, make_source([rows[i] for i in order]), row_ids=order)
    other = fit_curvature(model, make_source(rows), seed=1)
    vector = random_vector(model)
    assert relative(shuffled.multiply(vector), whole.multiply(vector)) < 1e-10
    assert relative(other.multiply(vector), whole.multiply(vector)) > 1e-3


def test_half_precision_weights_accumulate_in_single() -> None:
    model, rows = build("mlp", n=32, dtype=torch.float32)
    expected = fit_curvature(model, make_source(rows))
    half = fit_curvature(model.to(torch.bfloat16), make_source([{**row, "x": row["x"].bfloat16()} for row in rows]))
    assert all(tensor.dtype == torch.float32 for tensor in half.tensors().values())
    assert half.coverage() == expected.coverage()
    vector = random_vector(model)
    assert all(tensor.dtype == torch.bfloat16 for tensor in half.solve(vector, 0.1).values())
    for name, block in half.blocks.items():
        assert block.mean_eigenvalue == pytest.approx(expected.blocks[name].mean_eigenvalue, rel=0.2)


def test_kronecker_structured_fisher_is_inverted_exactly() -> None:
    """Softmax regression with inputs of constant logits: the Fisher is exactly a ⊗ s, so EK-FAC is exact."""
    torch.manual_seed(0)
    model = Net(nn.Linear(3, 4, bias=False)).double()
    nn.init.zeros_(model.body.weight)  # the same distribution over classes for every input
    x = torch.randn(20000, 3).double() @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 0.3], [0.0, 0.0, 0.4]]).double()
    rows = [{"x": value, "labels": torch.tensor(0)} for value in x]
    curvature = fit_curvature(model, make_source(rows, 5000))
    p = torch.full((4,), 0.25).double()
    fisher = torch.kron(torch.diag(p) - torch.outer(p, p), x.T @ x / len(x))
    vector = random_vector(model)
    vector["body.weight"] -= vector["body.weight"].mean(dim=0)  # the softmax ignores a shift of all classes
    damping = 0.1
    shift = damping * fisher.diagonal().mean()
    exact = torch.linalg.solve(fisher + shift * torch.eye(12).double(), vector["body.weight"].reshape(-1))
    found = curvature.solve(vector, damping)["body.weight"].reshape(-1)
    assert float((found - exact).norm() / exact.norm()) < 0.05
    product = curvature.multiply(vector)["body.weight"].reshape(-1)
    assert float((product - fisher @ vector["body.weight"].reshape(-1)).norm() / product.norm()) < 0.05


def test_padding_token_of_an_embedding_has_no_curvature() -> None:
    model, rows = tagger()
    curvature = fit_curvature(model, make_source(rows, 24))
    weight = curvature.blocks["embed"].eigenvalues[0]
    assert not weight[0].any() and weight[1:].any(dim=1).all()
    assert next(layer["reason"] for layer in curvature.layers() if layer["name"] == "embed") == "embedding"


def test_parametrised_weights_are_measured_row_by_row() -> None:
    model, rows = build("mlp")

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(model.body[2], "weight", Doubled())
    curvature = fit_curvature(model, make_source(rows))
    lines = {layer["name"]: layer for layer in curvature.layers()}
    assert lines["body.2.parametrizations.weight.original"]["kind"] == "diagonal"
    assert sum(curvature.coverage().values()) == sum(p.numel() for p in model.parameters())


def test_merged_rows_and_positions_are_told_apart_only_where_verified() -> None:
    class Merged(nn.Module):
        """Flattens rows and positions, in the usual or in the wrong order."""

        def __init__(self, rows_first: bool) -> None:
            super().__init__()
            self.rows_first = rows_first
            self.inner = nn.Linear(4, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x if self.rows_first else x.transpose(0, 1)
            hidden = torch.tanh(self.inner(x.reshape(-1, 4))).reshape(*x.shape[:2], 5)
            return self.head(hidden if self.rows_first else hidden.transpose(0, 1)).mean(dim=1)

    _, rows = build("positions", n=9)
    results = {}
    for rows_first in (True, False):
        torch.manual_seed(0)
        model = Net(Merged(rows_first)).double()
        results[rows_first] = fit_curvature(model, make_source(rows))
    assert [layer["kind"] for layer in results[True].layers()] == ["kronecker", "kronecker"]
    assert results[True].coverage() == {"kronecker": 43}
    assert results[False].coverage() == {"diagonal": 25, "kronecker": 18}
    reasons = [layer["reason"] for layer in results[False].layers() if layer["reason"]]
    assert all("differ from those of rows taken one by one" in reason for reason in reasons)
