"""Targets a few at a time: what takes several tensors as large as the logits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_iau.data import Targets, TaskKind
from hf_iau.data import targets as targets_module
from hf_iau.data.predictions import _figures_of_part, _target_figures

CLASSES = 11


def targets_of(kind: TaskKind, n: int) -> Targets:
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(n, CLASSES, generator=generator)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    if kind is TaskKind.MULTI_LABEL:
        labels = torch.randint(0, 2, (n, CLASSES), generator=generator).float()
    elif kind is TaskKind.REGRESSION:
        labels = torch.randn(n, CLASSES, generator=generator)
    rows = torch.arange(n) // 3 if kind is TaskKind.TOKENS else torch.arange(n)
    order = torch.arange(n) % 3 if kind is TaskKind.TOKENS else torch.zeros(n, dtype=torch.long)
    return Targets(kind, logits, labels, rows, int(rows[-1]) + 1 if n else 0, order)


@pytest.fixture
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets_module, "_PART_BYTES", dict.fromkeys((True, False), 4 * CLASSES * 4))


@pytest.mark.usefixtures("few_at_a_time")
@pytest.mark.parametrize("n", [0, 1, 4, 10])
@pytest.mark.parametrize("kind", TaskKind)
def test_parts_are_all_targets_in_their_order(kind: TaskKind, n: int) -> None:
    whole = targets_of(kind, n)
    parts = list(whole.parts())
    assert [len(part) for part in parts] == {0: [0], 1: [1], 4: [4], 10: [4, 4, 2]}[n]
    for name in ("logits", "labels", "rows", "order"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    expected = _figures_of_part(kind, whole.logits, whole.labels, whole.losses())
    found = _target_figures(whole)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name].nan_to_num(-1.0), values.nan_to_num(-1.0)), name


@pytest.mark.parametrize("kind", [TaskKind.SINGLE_LABEL, TaskKind.TOKENS])
def test_draws_do_not_depend_on_the_parts(kind: TaskKind, request: pytest.FixtureRequest) -> None:
    targets = targets_of(kind, 10)
    logits = targets.logits.requires_grad_()
    losses = []
    for _ in range(2):
        loss = replace(targets, logits=logits).fisher_loss(np.arange(targets.n_rows), 5)
        (gradient,) = torch.autograd.grad(loss, logits)
        losses.append((loss.detach(), gradient))
        request.getfixturevalue("few_at_a_time")
    assert all(torch.equal(one, other) for one, other in zip(*losses, strict=True))
