"""All or nothing: weights are changed wholly, or not at all, and can be changed back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from hf_iau.distributed import to_local
from hf_iau.errors import RequestError
from hf_iau.memory.fingerprints import weights_fingerprint
from hf_iau.methods.weights import WeightSnapshot, model_state
from hf_iau.utils.interrupts import interrupts_deferred
from hf_iau.utils.vectors import pieces


class WeightTransaction:
    """Keeps a copy of a model's parameters and buffers while something changes them.

    Used as a context manager: an exception inside puts every bit back, and so does `rollback()`. Afterwards `revert()`
    undoes the change, as long as nothing else has moved the weights.

    Args:
        model: the bare model.
        device: where the copy is kept; default: beside each tensor.
        only_trained: leave out frozen parameters, which may then not be changed.
    """

    def __init__(
        self, model: nn.Module, device: torch.device | str | None = None, *, only_trained: bool = False
    ) -> None:
        self.model = model
        self._copies = {
            name: tensor.detach().to(device or tensor.device, copy=True)
            for name, tensor in model_state(model).items()
            if not only_trained or tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        }
        self._after: str | None = None

    def __enter__(self) -> WeightTransaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.rollback()

    @property
    def copies(self) -> Mapping[str, Tensor]:
        """The values at the start, by name."""
        return self._copies

    def before(self, name: str) -> Tensor:
        """The value that parameter or buffer `name` had at the start."""
        return self._copies[name] if name in self._copies else model_state(self.model)[name].detach()

    def moved(self, names: list[str]) -> Mapping[str, Tensor]:
        """Present minus former value of each named parameter, float64, beside the copies; made when asked for."""
        return _Moved(dict(self.model.named_parameters()), {name: self._copies[name] for name in names})

    def rollback(self) -> None:
        """Put every parameter and buffer back, bit for bit; Ctrl-C meanwhile waits until all are."""
        with interrupts_deferred():
            WeightSnapshot(self.model, self._copies).restore()

    def commit(self) -> Callable[[], None]:
        """Keep the change. Returns the function that undoes it."""
        self._after = weights_fingerprint(self.model)
        return self.revert

    def revert(self) -> None:
        """Undo the change, bit for bit.

        Raises:
            RequestError: the weights have moved since, by training or another request.
        """
        if self._after is None or not self._copies:
            raise RequestError("revert() was called twice, or before the update was applied.")
        if weights_fingerprint(self.model) != self._after:
            raise RequestError(
                "revert() would overwrite weights that have moved since this request (more training, or a later "
                "request). Revert later requests first, or load a checkpoint."
            )
        self.rollback()
        self._copies = {}


class _Moved(Mapping[str, Tensor]):
    def __init__(self, now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
        self._now, self._before = now, before

    def __getitem__(self, name: str) -> Tensor:
        before = self._before[name]
        moved = torch.empty_like(before, dtype=torch.float64)
        there = to_local(before)
        for difference, new, old in pieces(to_local(moved), to_local(self._now[name]).to(there.device), there):
            torch.sub(new.double(), old.double(), out=difference)
        return moved

    def __iter__(self) -> Iterator[str]:
        return iter(self._before)

    def __len__(self) -> int:
        return len(self._before)
