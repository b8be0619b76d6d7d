"""`npo` against a plain restatement, and its two limits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from baselines import KEPT, assert_close, copy_in_training, exact_trainer, loss_of, row_batches
from torch import Tensor, nn
from unlearning_trainers import FORGET, make_trainer

from hf_iau import UnlearningTrainer
from hf_iau.errors import RequestError
from hf_iau.methods.baselines.npo import NPOConfig

SEED = 3  # of `arguments`


def log_p(trainer: UnlearningTrainer, model: nn.Module, rows: list) -> Tensor:
    """Log-probability of each row's labels, row by row and token by token."""
    found = []
    for row in rows:
        batch = trainer.data_collator([dict(row)])
        log_probabilities = model(**batch).logits[0].log_softmax(-1)
        labels = batch["labels"][0]
        predicted = [log_probabilities[i - 1, labels[i]] for i in range(1, len(labels)) if labels[i] != -100]
        found.append(torch.stack(predicted).sum())
    return torch.stack(found)


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_npo_is_the_papers_loss(alpha: float, tmp_path: Path) -> None:
    """-(2/β)·log σ(−β·log(P/P_old)) by row, with a batch of retained rows beside each of forget rows."""
    trainer = exact_trainer(tmp_path, "llama")
    old, student = copy.deepcopy(trainer.model).eval(), copy_in_training(trainer)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0.0)
    beta, steps = 0.5, 3
    retained = [rows for epoch in range(2) for rows in row_batches(KEPT, 3, SEED, epoch, "llama")][:steps]
    for epoch in range(steps):
        (rows,) = row_batches(FORGET, 3, SEED, epoch, "llama")
        with torch.no_grad():
            before = log_p(trainer, old, rows)
        ratio = (log_p(trainer, student, rows) - before).exp()
        loss = 2 / beta * (1 + ratio**beta).log().mean()
        if alpha:
            loss = loss + alpha * loss_of(trainer, student, retained[epoch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    config = NPOConfig(epochs=steps, lr=0.01, weight_decay=0.0, beta=beta, alpha=alpha, batch_size=3)
    report = trainer.unlearn(forget_indices=FORGET, method="npo", config=config).report
    assert_close(trainer.model, student, 1e-9)
    assert report.after["forget_loss"] > report.before["forget_loss"]
    assert report.diagnostics["retained_rows"] == (len(KEPT) if alpha else 0)


def test_npo_starts_as_gradient_ascent(tmp_path: Path) -> None:
    """At P = P_old the gradient of the loss is that of the rows' summed log-probability, whatever β."""
    trainer = exact_trainer(tmp_path, "gpt2")
    student = copy_in_training(trainer)
    (rows,) = row_batches(FORGET, 3, SEED, 0, "gpt2")
    log_p(trainer, student, rows).mean().backward()
    expected = copy.deepcopy(student)
    with torch.no_grad():
        for moved, p in zip(expected.parameters(), student.parameters(), strict=True):
            moved.sub_(0.1 * p.grad)
    config = NPOConfig(
        epochs=1, lr=0.1, optimizer="sgd", momentum=0.0, weight_decay=0.0, beta=3.0, alpha=0.0, batch_size=3
    )
    trainer.unlearn(forget_indices=FORGET, method="npo", config=config)
    assert_close(trainer.model, expected, 1e-9)


def test_npo_without_its_retain_term_needs_the_forget_rows_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "gpt2")
    rows = trainer.train_dataset.select(FORGET)
    trainer.train_dataset = None
    with pytest.raises(RequestError, match="retain"):
        trainer.unlearn(rows, method="npo", dry_run=True)
    trainer.unlearn(rows, method="npo", config=NPOConfig(alpha=0.0, epochs=1), dry_run=True)
