"""The simulation itself raises where a GPU would, and nowhere else."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from simulated_device import MODULE, simulated_device
from torch import Tensor, nn

from hf_iau.data.model_mode import evaluation_mode
from hf_iau.utils.devices import memory_counters
from hf_iau.utils.timing import PhaseTimer, peak_allocated_bytes


@pytest.fixture
def device() -> Iterator[torch.device]:
    with simulated_device() as found:
        yield found


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "sum": lambda there, here: there + here,
    "reflected sum": lambda there, here: here + there,
    "product": lambda there, here: there @ here.T,
    "in place": lambda there, here: here.add_(there),
    "number in place": lambda there, here: here.sum().add_(there.sum()),
    "concatenation": lambda there, here: torch.cat([there, here]),
    "stack of numbers": lambda there, here: torch.stack([there.sum(), here.sum()]),
    "index": lambda there, here: here[torch.tensor([0, 1]).to(there.device)],
    "gather": lambda there, here: there.gather(1, torch.zeros(2, 1, dtype=torch.long)),
    "mask": lambda there, here: torch.where(here > 0, there, there),
    "equality": lambda there, here: torch.equal(there, here),
    "embedding": lambda there, here: nn.functional.embedding(torch.tensor([0]), there),
    "loss": lambda there, here: nn.functional.cross_entropy(there, torch.tensor([0, 1])),
}


@pytest.mark.parametrize("operation", MIXED)
def test_tensors_of_two_devices_do_not_mix(operation: str, device: torch.device) -> None:
    there, here = torch.randn(2, 3, device=device), torch.randn(2, 3)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        MIXED[operation](there, here)


def test_what_cuda_takes_from_the_cpu(device: torch.device) -> None:
    there, here = torch.randn(2, 3, device=device), torch.randn(2, 3)
    assert torch.equal((there * torch.tensor(2.0)).cpu(), there.cpu() * 2.0)
    assert torch.equal(there[torch.tensor([1])].cpu(), there.cpu()[[1]])
    assert torch.equal(here.copy_(there), there.cpu()) and torch.equal(there.to("cpu"), here)
    assert there.sum().item() == pytest.approx(float(here.sum())) and there.tolist() == here.tolist()


def test_numpy_and_generators_are_refused(device: torch.device) -> None:
    there = torch.randn(3, device=device)
    for convert in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match=r"can't convert simulated:0 device type tensor to numpy"):
            convert()
    for draw in (
        lambda: torch.randn(3, device=device, generator=torch.Generator()),
        lambda: there.normal_(generator=torch.Generator()),
    ):
        with pytest.raises(RuntimeError, match="device type for generator"):
            draw()


def test_modules_and_gradients(device: torch.device) -> None:
    here = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    expected = torch.autograd.grad(here(torch.ones(5, 3)).square().sum(), list(here.parameters()))
    before = list(here.parameters())
    there = here.to(device)
    assert all(new is old for new, old in zip(there.parameters(), before, strict=True))  # as on CUDA
    seen: list[Tensor] = []
    output = there(torch.ones(5, 3, device=device))
    output.register_hook(seen.append)
    output.square().sum().backward()
    assert [gradient.device for gradient in seen] == [device]
    for parameter, gradient in zip(there.parameters(), expected, strict=True):
        assert parameter.device == device and parameter.grad is not None
        torch.testing.assert_close(parameter.grad.cpu(), gradient)


def test_bytes_are_counted(device: torch.device) -> None:
    gc.collect()
    before = MODULE.memory_allocated()
    held = torch.zeros(1000, device=device)
    view = held[:10]
    assert MODULE.memory_allocated() - before == 4000
    del held
    assert MODULE.memory_allocated() - before == 4000
    del view
    assert MODULE.memory_allocated() == before
    assert memory_counters(device) is MODULE and memory_counters("cpu") is None
    assert peak_allocated_bytes(lambda: torch.zeros(500, device=device) + 1, device) == before + 4000
    timer = PhaseTimer(device)
    with timer.phase("a"):
        torch.zeros(250, device=device)
    assert timer.peak_memory_bytes == {"a": before + 1000}


def test_the_devices_random_numbers_are_put_back(device: torch.device) -> None:
    model = nn.Linear(2, 2).to(device)
    torch.manual_seed(0)
    first = torch.randn(3, device=device)
    torch.manual_seed(0)
    with evaluation_mode(model):
        torch.randn(7, device=device)
    assert torch.equal(torch.randn(3, device=device), first)
