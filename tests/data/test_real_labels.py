"""Whether float labels are numbers or indicators is a matter of the data set, not of a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_models import FEATURES, RowList
from torch import Tensor, nn
from unlearning_trainers import WITH_CURVATURE, make_trainer

from hf_iau.data import RowSource, TaskKind, predict_rows
from hf_iau.data.targets import find_real_valued_labels


class TwoNumbers(nn.Module):
    """A regression of two numbers that says of itself neither that nor anything else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(FEATURES, 2)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layer(features)
        return {"logits": logits} if labels is None else {"logits": logits, "loss": F.mse_loss(logits, labels)}


def rows(real: bool, n: int = 40) -> list[dict[str, list[float]]]:
    """All labels are 0 or 1, but for those of every fourth row where they are `real`."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (n, 2)).astype(float)
    if real:
        labels[3::4] += 0.25
    return [{"features": rng.normal(size=FEATURES).tolist(), "labels": label.tolist()} for label in labels]


def collate(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in batch]).float() for name in batch[0]}


@pytest.mark.parametrize("batch_size", [1, 3, 40])
@pytest.mark.parametrize("real", [False, True])
def test_batches_without_a_number_are_read_like_the_others(real: bool, batch_size: int) -> None:
    model, data = TwoNumbers(), RowList(rows(real))
    find_real_valued_labels(model, data)
    found = predict_rows(model, RowSource(data, collate, batch_size=batch_size))
    assert found.kind is (TaskKind.REGRESSION if real else TaskKind.MULTI_LABEL)
    inputs = collate([data[i] for i in range(len(data))])
    logits = model(**inputs)["logits"].detach()
    loss = F.mse_loss if real else F.binary_cross_entropy_with_logits
    assert found.loss == pytest.approx(loss(logits, inputs["labels"], reduction="none").mean(dim=1).numpy(), rel=1e-6)


def test_once_it_is_known_no_batch_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = TwoNumbers(), RowList(rows(True))
    find_real_valued_labels(model, data)
    monkeypatch.setattr(Tensor, "any", lambda *args, **kwargs: pytest.fail("a batch was looked at"))
    predict_rows(model, RowSource(data, collate, batch_size=8))


def test_a_trainer_settles_it_before_it_measures(tmp_path: Path) -> None:
    """The forget rows alone, with labels of 0 and 1, would look like rows of several classes."""
    trainer = make_trainer(
        tmp_path, model=TwoNumbers(), rows=rows(True), kind="torch", eval_dataset=None, data_collator=collate
    )
    report = trainer.unlearn(forget_indices=[0, 1, 2], method="gradient-ascent").report
    inputs = collate([trainer.train_dataset[i] for i in range(3)])
    fresh = TwoNumbers()
    assert report.before["forget_loss"] == pytest.approx(fresh(**inputs)["loss"].item(), rel=1e-6)
    assert report.before["forget_accuracy"] is None
    assert trainer.gather(WITH_CURVATURE).curvature is not None
