"""`iau-paper` and `iau-released` against plain restatements of what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import rows_of
from torch import Tensor
from unlearning_trainers import EXACT, FORGET, ROWS, gradient_loop, make_trainer, parameters_of

from hf_iau import IAUPaperConfig, IAUReleasedConfig, UnlearningTrainer

FAMILIES = ["bert", "bert-tokens", "resnet", "vit", "gpt2", "llama", "lora", "plain"]
SOURCES = ["memory", "retain_dataset"]


def unlearn(trainer: UnlearningTrainer, source: str, **kwargs: Any) -> None:
    if source == "memory":
        trainer.gather(EXACT)
    else:
        kept = [i for i in range(ROWS) if i not in FORGET]
        kwargs["retain_dataset"] = trainer.train_dataset.select(kept)
    trainer.unlearn(forget_indices=FORGET, **kwargs)


def split(family: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = rows_of(family, ROWS)
    return [rows[i] for i in FORGET], [row for i, row in enumerate(rows) if i not in FORGET]


def largest(change: dict[str, Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in change.values())


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_iau_paper_is_the_published_step(family: str, source: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, family)
    before = parameters_of(trainer.model)
    forget, retain = split(family)
    eta, weight = 3e-3, 0.7
    of_forget, of_retain = gradient_loop(trainer.model, forget)[0], gradient_loop(trainer.model, retain)[0]
    expected = {name: eta * (of_forget[name] - weight * of_retain[name]) for name in of_forget}

    unlearn(trainer, source, method="iau-paper", config=IAUPaperConfig(eta=eta, retain_weight=weight))

    assert largest(expected) > 1e-3
    for name, value in trainer.model.named_parameters():
        change = expected.get(name, torch.zeros(()))
        torch.testing.assert_close(value.double(), before[name].double() + change, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_iau_released_is_one_step_of_a_fresh_adam(family: str, source: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, family)
    forget, retain = split(family)
    (of_forget, n_forget), (of_retain, n_retain) = (gradient_loop(trainer.model, rows) for rows in (forget, retain))
    restated = make_trainer(tmp_path, family).model
    trained = {name: p for name, p in restated.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.grad = (of_retain[name] / n_retain - of_forget[name] / n_forget).to(parameter.dtype)
    torch.optim.Adam(trained.values(), lr=1e-3).step()

    unlearn(trainer, source, method="iau-released", config=IAUReleasedConfig(lr=1e-3))

    compared = 0
    for name, value in trainer.model.named_parameters():
        if name not in trained:
            continue
        clear = trained[name].grad.abs() > 1e-7
        compared += int(clear.sum())
        torch.testing.assert_close(value[clear], trained[name][clear], rtol=0, atol=1e-6, msg=name)
    assert compared > 0.5 * sum(p.numel() for p in trained.values())


def test_a_language_model_counts_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "gpt2")
    memory = trainer.gather(EXACT)
    forget, retain = split("gpt2")
    tokens = [gradient_loop(trainer.model, rows)[1] for rows in (forget, retain)]
    assert memory.n_targets == sum(tokens) > ROWS
    result = trainer.unlearn(forget_indices=FORGET, method="iau-released")
    assert result.memory is not None
    assert (result.memory.n_rows, result.memory.n_targets) == (ROWS - len(FORGET), tokens[1])


@pytest.mark.parametrize("method", ["iau-paper", "iau-released"])
def test_coupled_weight_decay_is_part_of_the_objective(method: str, tmp_path: Path) -> None:
    """SGD's L2 term belongs to the loss: each row's share of it goes with the row."""
    decay = 0.1
    trainer = make_trainer(tmp_path, "plain", optimizers=(None, None))
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, weight_decay=decay)
    trainer.gather(EXACT)
    before = parameters_of(trainer.model)
    forget, retain = split("plain")
    sums = [gradient_loop(trainer.model, rows)[0] for rows in (forget, retain)]
    of_forget, of_retain = (
        {name: total + len(rows) * decay * before[name] for name, total in gradient.items()}
        for gradient, rows in zip(sums, (forget, retain), strict=True)
    )
    config = IAUPaperConfig(eta=1e-2) if method == "iau-paper" else IAUReleasedConfig()
    trainer.unlearn(forget_indices=FORGET, method=method, config=config)
    for name, value in trainer.model.named_parameters():
        if method == "iau-paper":
            change = 1e-2 * (of_forget[name] - of_retain[name])
        else:
            change = -1e-3 * (of_retain[name] / len(retain) - of_forget[name] / len(forget)).sign()
        torch.testing.assert_close(value.double(), before[name].double() + change, rtol=0, atol=1e-6, msg=name)


def test_rows_that_hold_no_target_change_nothing(tmp_path: Path) -> None:
    rows = rows_of("bert-tokens", ROWS)
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])
    trainer = make_trainer(tmp_path, "bert-tokens", rows=rows)
    trainer.gather(EXACT)
    before = parameters_of(trainer.model)
    with pytest.warns(UserWarning, match="1 of the 1 requested rows have no label that counts"):
        assert not trainer.unlearn(forget_indices=[2], method="iau-released").applied
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
