"""Steps, files, messages and manners of the curvature."""

from __future__ import annotations

import json

import pytest
import torch
from curvature_loop import Net, build, make_source, random_vector, relative, trainable
from torch import Tensor, nn

from hf_iau.curvature import Curvature, DiagonalBlock, fit_curvature
from hf_iau.errors import (
    ConfigError,
    MemoryFileError,
    MemoryMismatchError,
    MissingMemoryError,
    NonFiniteGradientError,
    RequestError,
    UnsupportedModelError,
)


@pytest.fixture(scope="module")
def fitted() -> tuple[nn.Module, Curvature]:
    model, rows = build("bert")
    return model, fit_curvature(model, make_source(rows))


def test_multiply_and_solve_are_inverse(fitted: tuple[nn.Module, Curvature]) -> None:
    model, curvature = fitted
    vector = random_vector(model)
    product = curvature.multiply(vector)
    for damping in (1e-3, 10.0):
        for block in curvature.blocks.values():
            for name in block.shapes:
                product[name] = curvature.multiply(vector)[name] + damping * block.damping_unit * vector[name]
                if isinstance(block, DiagonalBlock):  # what no row moved counts as an average of what some did
                    unseen = block.values[name] == 0
                    product[name][unseen] = (1 + damping) * block.damping_unit * vector[name][unseen]
        assert relative(curvature.solve(product, damping), vector) < 1e-9


def test_unseen_tokens_do_not_take_unbounded_steps(fitted: tuple[nn.Module, Curvature]) -> None:
    _, curvature = fitted
    name = "bert.embeddings.word_embeddings.weight"
    block = next(b for b in curvature.blocks.values() if name in b.shapes)
    assert isinstance(block, DiagonalBlock)
    unseen = block.values[name] == 0
    assert unseen.any() and not unseen.all()
    step = curvature.solve({name: torch.ones_like(block.values[name])}, 1e-6)[name]
    positive = block.values[name][~unseen]
    assert torch.allclose(step[unseen], 1 / positive.mean().expand_as(step[unseen]), rtol=1e-4)


def test_zero_damping(fitted: tuple[nn.Module, Curvature]) -> None:
    model, rows = build("mlp", n=60)
    curvature = fit_curvature(model, make_source(rows))
    vector = random_vector(model)
    first = {name: tensor for name, tensor in vector.items() if "body.0" in name}
    assert relative(curvature.multiply(curvature.solve(first, 0)), first) < 1e-8
    with pytest.raises(ConfigError, match=r"damping=0 with layer 'body\.2'"):  # a softmax: singular but for rounding
        curvature.solve(vector, 0)
    embeddings = {name: tensor for name, tensor in random_vector(fitted[0]).items() if "word_embeddings" in name}
    with pytest.raises(ConfigError, match=r"damping=0 with layer 'bert\.embeddings\.word_embeddings'"):
        fitted[1].solve(embeddings, 0)
    for damping in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="damping="):
            curvature.solve(vector, damping)


def test_partial_vectors_and_their_types(fitted: tuple[nn.Module, Curvature]) -> None:
    model, curvature = fitted
    vector = random_vector(model)
    whole = curvature.solve({**vector, "classifier.bias": torch.zeros_like(vector["classifier.bias"])}, 0.1)
    part = curvature.solve({"classifier.weight": vector["classifier.weight"]}, 0.1)
    assert list(part) == ["classifier.weight"]
    torch.testing.assert_close(part["classifier.weight"], whole["classifier.weight"])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert (
            curvature.solve({"classifier.bias": vector["classifier.bias"].to(dtype)}, 1.0)["classifier.bias"].dtype
            == dtype
        )
    before = {name: tensor.clone() for name, tensor in vector.items()}
    curvature.solve(vector, 0.1)
    curvature.multiply(vector)
    assert all(torch.equal(before[name], vector[name]) for name in vector)
    with pytest.raises(MemoryMismatchError, match="'nonsense'"):
        curvature.solve({"nonsense": torch.zeros(1)}, 0.1)
    with pytest.raises(MemoryMismatchError, match="shape"):
        curvature.multiply({"classifier.bias": torch.zeros(7)})


def test_dead_layers_get_no_update() -> None:
    model, rows = build("lora")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)  # as PEFT starts: no gradient reaches A
    curvature = fit_curvature(model, make_source(rows))
    dead = [layer["name"] for layer in curvature.layers() if layer["dead"]]
    assert dead and all("lora_A" in name for name in dead)
    step = curvature.solve(random_vector(model), 0.1)
    for name, tensor in step.items():
        assert bool(tensor.isfinite().all())
        assert bool(tensor.any()) == ("lora_A" not in name)
    curvature.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curvature_that_is_rounding_only_is_dead(dtype: torch.dtype) -> None:
    model, rows = build("bert", dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    curvature = fit_curvature(model, make_source(rows))
    dead = [layer["name"] for layer in curvature.layers() if layer["dead"]]
    assert dead == ["bert.encoder.layer.0.attention.self.key"]  # attention does not depend on the bias of its keys


def test_unused_parameters_are_reported_and_get_no_update() -> None:
    model, rows = build("mlp")
    model.unused = nn.Linear(2, 2).double()
    model.raw = nn.Parameter(torch.ones(3).double())
    curvature = fit_curvature(model, make_source(rows))
    assert sum(curvature.coverage().values()) == sum(p.numel() for p in model.parameters())
    lines = {layer["name"]: layer for layer in curvature.layers()}
    assert lines["unused"]["dead"] and lines["raw"]["dead"]
    assert "no closed form for Net" in lines["raw"]["reason"]
    assert not curvature.solve({"raw": torch.ones(3)}, 0.1)["raw"].any()


@pytest.mark.parametrize("kind", ["ekfac", "diagonal", "identity"])
def test_save_and_load(kind: str) -> None:
    model, rows = build("cnn", dtype=torch.float32)
    curvature = fit_curvature(model, make_source(rows), kind=kind)
    tensors = curvature.tensors()
    assert all(key.startswith("curvature.") and tensor.is_contiguous() for key, tensor in tensors.items())
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(tensors)
    assert curvature.nbytes() == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    again = Curvature.from_tensors({**tensors, "other": torch.ones(1)}, json.loads(json.dumps(curvature.metadata())))
    assert again.layers() == curvature.layers() and again.metadata() == curvature.metadata()
    assert (again.kind, again.n_rows, again.n_targets) == (curvature.kind, curvature.n_rows, curvature.n_targets)
    vector = random_vector(model)
    assert relative(again.solve(vector, 0.1), curvature.solve(vector, 0.1)) == 0
    assert relative(curvature.to("cpu").solve(vector, 0.1), curvature.solve(vector, 0.1)) == 0


def test_corrupt_files_are_refused(fitted: tuple[nn.Module, Curvature]) -> None:
    curvature = fitted[1]
    tensors, metadata = curvature.tensors(), curvature.metadata()
    key = "curvature.classifier.eigenvalues"

    def refused(match: str, tensors: dict[str, Tensor] = tensors, metadata: dict = metadata) -> None:
        with pytest.raises(MemoryFileError, match=match):
            Curvature.from_tensors(tensors, metadata)

    refused("missing", {name: t for name, t in tensors.items() if name != key})
    refused("shape", {**tensors, key: tensors[key][:, :-1]})
    refused("type", {**tensors, key: tensors[key].long()})
    refused("NaN", {**tensors, key: tensors[key] * float("nan")})
    refused("negative", {**tensors, key: -tensors[key]})
    refused("does not name", {**tensors, "curvature.extra": torch.ones(1)})
    refused("malformed", metadata={})
    refused("schema", metadata={**metadata, "schema": 99})
    refused("kind", metadata={**metadata, "kind": "magic"})
    refused("malformed", metadata={**metadata, "blocks": [{"name": "classifier"}]})
    refused("malformed", metadata={**metadata, "blocks": [{"name": "x", "kind": "kronecker", "layout": {"weight": 1}}]})
    refused("malformed", metadata={**metadata, "blocks": ["x"]})
    turned = [dict(b, layout={**b["layout"], "transposed": True}) if "layout" in b else b for b in metadata["blocks"]]
    refused("outputs", metadata={**metadata, "blocks": turned})  # of a square weight nobody could tell
    refused("twice|missing", metadata={**metadata, "blocks": metadata["blocks"] + metadata["blocks"][:1]})
    refused("malformed", metadata={**metadata, "n_rows": "many"})


def test_check_names_the_layer(fitted: tuple[nn.Module, Curvature]) -> None:
    model, rows = build("mlp")
    curvature = fit_curvature(model, make_source(rows))
    curvature.check()
    curvature.blocks["body.0"].eigenvalues[0][0, 0, 0] = float("nan")
    with pytest.raises(MissingMemoryError, match=r"body\.0"):
        curvature.check()
    with pytest.raises(MissingMemoryError, match="singular"):
        Curvature("ekfac", []).check()


def test_adam_reads_the_second_moment() -> None:
    model, rows = build("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    with pytest.raises(MissingMemoryError, match="AdamW"):
        fit_curvature(model, make_source(rows), kind="adam", optimizer=optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(x=torch.stack([row["x"] for row in rows]))["logits"].square().mean().backward()
        optimizer.step()
    curvature = fit_curvature(model, make_source(rows), kind="adam", optimizer=optimizer)
    ones = {name: torch.ones_like(p) for name, p in trainable(model).items()}
    expected = {name: optimizer.state[p]["exp_avg_sq"] / (1 - 0.99**3) for name, p in trainable(model).items()}
    assert relative(curvature.multiply(ones), expected) < 1e-12
    assert (curvature.n_rows, curvature.n_targets) == (0, 0)
    assert "clipped" in curvature.metadata()["details"]["adam"]
    from accelerate import Accelerator

    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    again = fit_curvature(model, make_source(rows), kind="adam", optimizer=wrapped)
    assert relative(again.multiply(ones), expected) < 1e-12
    for missing in (None, torch.optim.SGD(model.parameters(), lr=0.1)):
        with pytest.raises(MissingMemoryError, match="ekfac"):
            fit_curvature(model, make_source(rows), kind="adam", optimizer=missing)


def test_identity() -> None:
    model, rows = build("bert-mlm")
    curvature = fit_curvature(model, make_source(rows), kind="identity")
    assert curvature.coverage() == {"identity": sum(p.numel() for p in model.parameters())}
    vector = random_vector(model)
    assert relative(curvature.multiply(vector), vector) == 0
    assert relative(curvature.solve(vector, 1.0), {name: tensor / 2 for name, tensor in vector.items()}) < 1e-12
    assert curvature.nbytes() == 0
    curvature.check()


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._backward_hooks) for module in model.modules())


def test_no_trace_is_left(fitted: tuple[nn.Module, Curvature]) -> None:
    model, rows = build("bert")
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        fit_curvature(model, make_source(rows), cache_bytes=0)
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert _hooks(model) == 0


def test_hooks_are_removed_after_an_exception() -> None:
    model, rows = build("mlp")
    calls = [0]

    def loss(model: nn.Module, inputs: dict) -> Tensor:
        calls[0] += 1
        if calls[0] == 8:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(model(inputs["x"])["logits"], inputs["labels"], reduction="sum")

    from hf_iau.data import UserRowLoss

    with pytest.raises(KeyboardInterrupt):
        fit_curvature(model, make_source(rows), fisher="empirical", row_loss=UserRowLoss(loss))
    assert _hooks(model) == 0


def test_non_finite_rows_are_named() -> None:
    import numpy as np

    model, rows = build("mlp", n=12)
    rows[6]["x"] = rows[6]["x"] * float("nan")
    with pytest.raises(NonFiniteGradientError, match=r"layer 'body\.\d'.* row 106 \(position 6"):
        fit_curvature(model, make_source(rows), row_ids=np.arange(100, 112))


def test_inputs_changed_in_place_afterwards_are_refused() -> None:
    class Spoiled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            out = self.inner(x)
            x.mul_(0.5)
            return out

    _, rows = build("mlp")
    with pytest.raises(UnsupportedModelError, match=r"body\.inner"):
        fit_curvature(Net(Spoiled()).double(), make_source(rows))


def test_arguments_are_checked() -> None:
    model, rows = build("mlp")
    source = make_source(rows)
    for wrong in (
        {"kind": "exact"},
        {"fisher": "exact"},
        {"fisher": "empirical"},
        {"max_factor_size": 0},
        {"cache_bytes": -1},
        {"weight_decay": float("nan")},
    ):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            fit_curvature(model, source, **wrong)
    with pytest.raises(RequestError, match="row_ids"):
        fit_curvature(model, source, row_ids=torch.arange(3).numpy())
    with pytest.raises(RequestError, match="no rows"):
        fit_curvature(model, make_source([]))
    unlabelled = [{**row, "labels": torch.tensor(-100)} for row in rows]
    with pytest.raises(RequestError, match="no targets"):
        fit_curvature(model, make_source(unlabelled))


def test_a_single_row_is_enough() -> None:
    for name in ("mlp", "bert", "cnn"):
        model, rows = build(name)
        curvature = fit_curvature(model, make_source(rows[:1]))
        curvature.check()
        assert all(bool(t.isfinite().all()) for t in curvature.solve(random_vector(model), 0.1).values())
