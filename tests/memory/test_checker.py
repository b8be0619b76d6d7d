"""`check_row_gradients` on good models, on broken ones, and losses that couple the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import (
    FAMILIES,
    PlainClassifier,
    RowList,
    WrongBackward,
    as_dataset,
    bert,
    build,
    image_rows,
    pad_right,
    plain,
    plain_rows,
    rows_of,
    text_rows,
)
from torch import Tensor, nn

from hf_iau import CoupledRowsError, GatherConfig, IAUError, UnsupportedModelError, check_row_gradients, gather
from hf_iau.data import ModelRowLoss, OutputRowLoss, RowSource, UserRowLoss, probe_additivity

NO_CURVATURE = GatherConfig(gradient_sum="full", curvature="none", progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_good_models_pass(family: str) -> None:
    model = build(family).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check = check_row_gradients(model, as_dataset(rows_of(family)), data_collator=pad_right())
    assert check.passed and check.failing == ()
    assert check.rows == 8 and check.tolerance == 1e-5
    assert set(check.relative_error) == {2, 3, 8}
    assert all(0 <= error <= 1e-5 for error in check.relative_error.values())
    assert model.training
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_the_tolerance_follows_the_weights() -> None:
    rows = [{key: torch.as_tensor(value) for key, value in row.items()} for row in plain_rows()]
    for row in rows:
        row["features"] = row["features"].double()
    check = check_row_gradients(plain().double(), rows, rows=100)
    assert check.passed and check.tolerance == 1e-10 and check.rows == 12
    assert check_row_gradients(plain().bfloat16(), rows).tolerance == 2e-2
    strict = check_row_gradients(plain(), rows, tolerance=0.0, batch_sizes=(5,))
    assert not strict.passed and set(strict.relative_error) == {5}


class Broken(PlainClassifier):
    """Its losses are right and add up; the gradients of some parameters do not."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        weights = {
            name: WrongBackward.apply(p, len(features)) if name in self.names else p
            for name, p in self.named_parameters()
        }
        hidden = torch.tanh(F.linear(features, weights["hidden.weight"], weights["hidden.bias"]))
        logits = F.linear(hidden, weights["output.weight"], weights["output.bias"])
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("names", [("output.bias",), ("hidden.weight", "output.weight")])
def test_every_failing_parameter_is_listed(names: tuple[str, ...]) -> None:
    check = check_row_gradients(Broken(*names), RowList(plain_rows()))
    assert not check.passed
    assert check.failing == names
    assert all(error > 1e-3 for error in check.relative_error.values())
    assert check_row_gradients(Broken(), RowList(plain_rows())).passed
    # One row at a time there is nothing wrong with it.
    assert check_row_gradients(Broken(*names), RowList(plain_rows()), batch_sizes=(1,)).passed


def test_no_rows() -> None:
    with pytest.raises(IAUError, match="empty"):
        check_row_gradients(plain(), [])


# --- coupled rows -----------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([0.1, 1.0, 10.0])


def weighted_mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs["logits"], labels, weight=WEIGHT)


def contrastive(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Each row against the other rows of its batch."""
    vectors = F.normalize(model(inputs["features"])["logits"], dim=1)
    return F.cross_entropy(vectors @ vectors.T * 5.0, torch.arange(len(vectors)), reduction="sum")


class LoadBalanced(PlainClassifier):
    """Adds a mixture-of-experts load-balancing term: a product of batch means."""

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        outputs = super().forward(features, labels)
        if "loss" in outputs:
            routed = (outputs["logits"] * 3.0).softmax(dim=1)
            share = F.one_hot(routed.argmax(dim=1), routed.shape[1]).float().mean(dim=0)
            outputs["loss"] = outputs["loss"] + 0.1 * (share * routed.mean(dim=0)).sum() * routed.shape[1]
        return outputs


COUPLED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "class-weighted mean": (plain, {"compute_loss_func": weighted_mean}, "compute_loss_func"),
    "contrastive": (plain, {"row_loss": contrastive}, "row_loss"),
    "mixture-of-experts auxiliary": (LoadBalanced, {}, "model"),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_losses_are_refused_by_name(name: str) -> None:
    make, loss, kind = COUPLED[name]
    model = make()
    for refuse in (
        lambda: gather(model, RowList(plain_rows()), config=NO_CURVATURE, **loss),
        lambda: check_row_gradients(model, RowList(plain_rows()), **loss),
    ):
        with pytest.raises(CoupledRowsError, match="coupled") as caught:
            refuse()
        assert f"({kind})" in str(caught.value)
        assert isinstance(caught.value, UnsupportedModelError)


def test_coupling_of_a_few_rare_rows_is_found() -> None:
    """A class-weighted mean couples rows of different classes only, so the probe must look for those."""
    common = [row | {"labels": 0} for row in plain_rows(90)]
    common[1]["labels"] = 2
    for rows in (RowList(common), as_dataset(common)):
        with pytest.raises(CoupledRowsError):
            gather(plain(), rows, config=NO_CURVATURE, compute_loss_func=weighted_mean)


def test_probe_returns_the_rows_summed_losses() -> None:
    model, rows = bert(), text_rows(4)
    source = RowSource(rows, pad_right())
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            inputs = pad_right()([row])
            labels = inputs.pop("labels")
            expected += float(F.cross_entropy(model.eval()(**inputs).logits, labels))
    assert probe_additivity(ModelRowLoss(), model, source) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_separable_losses_pass_in_training_mode(family: str) -> None:
    source = RowSource(image_rows(), pad_right())
    assert probe_additivity(ModelRowLoss(), build(family).train(), source) > 0


def test_one_row_is_never_coupled() -> None:
    source = RowSource(plain_rows(1), pad_right())
    assert probe_additivity(OutputRowLoss(weighted_mean), plain(), source) > 0
    assert probe_additivity(UserRowLoss(contrastive), plain(), source) == pytest.approx(0.0, abs=1e-6)
