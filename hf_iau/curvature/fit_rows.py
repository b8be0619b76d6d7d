"""The rows of a fit: their batches and losses, their number, and which one is at fault if a number is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_iau.curvature.layer_hooks import LayerHooks, parameter_gradients
from hf_iau.curvature.layers import Call, Layer
from hf_iau.data import RowLoss, RowSource, predicted_targets
from hf_iau.errors import NonFiniteGradientError


class FitRows:
    """Passes rows through a model for a fit of its curvature.

    Args:
        model: the bare model.
        source: this process's rows.
        row_ids: `(rows,)` int, which seed the rows' label draws.
        seed: of those draws.
        row_loss: the summed loss to differentiate; None: labels are drawn from the model.
        start: the first row's position among those of all processes.
        total: rows of all processes.
        progress: show progress bars.

    Attributes:
        n_rows, n_targets: counted so far.
        n_targets_of_batch: of the batch that `calls` saw last.
        needs_backward: whether gradients have to go through `backward` (re-entrant checkpointing).
    """

    def __init__(
        self,
        model: nn.Module,
        source: RowSource,
        *,
        row_ids: np.ndarray,
        seed: int,
        row_loss: RowLoss | None,
        start: int,
        total: int,
        progress: bool,
    ) -> None:
        self.model = model
        self.source = source
        self.row_ids = row_ids
        self.seed = seed
        self.row_loss = row_loss
        self.start = start
        self.total = total
        self.progress = progress
        self.n_rows = 0
        self.n_targets = 0
        self.n_targets_of_batch = 0
        self.needs_backward = False

    # --- batches ------------------------------------------------------------------------------------------------------

    def batches(self, what: str, start: int = 0) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Batches of rows of similar length, without the first `start` rows.

        Args:
            what: for the progress bar.
            start: how many rows of `source.length_order()` to leave out.
        """
        total = -(-(len(self.source) - start) // self.source.batch_size)
        yield from tqdm(self.source.by_length(start), total=total, desc=what, disable=not self.progress)

    def one_by_one(self, positions: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor, int]]:
        """Position (an array of one), loss and number of targets of each of some rows."""
        rows = self.source.select(positions).resized(1).passes_of_all(self.model)
        bar = tqdm(rows, total=len(positions), desc="curvature: row by row", disable=not self.progress)
        for index, inputs in bar:
            position = positions[index]
            loss, n_targets = self.loss(position, inputs)
            yield position, loss, n_targets

    def count(self, positions: np.ndarray, n_targets: int) -> None:
        """Count a batch."""
        self.n_rows += len(positions)
        self.n_targets += n_targets

    # --- losses and gradients -----------------------------------------------------------------------------------------

    def loss(self, positions: np.ndarray, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        """The summed loss of some rows, to be differentiated, and their number of targets."""
        if self.row_loss is not None:
            return self.row_loss(self.model, inputs)
        targets = predicted_targets(self.model, inputs)
        return targets.fisher_loss(self.row_ids[positions], self.seed), len(targets)

    def calls(
        self,
        hooks: LayerHooks,
        positions: np.ndarray,
        inputs: dict[str, Any],
        use: Callable[[Layer, list[Call]], None] | None = None,
    ) -> dict[str, list[Call]]:
        """Differentiate the loss of a batch, and return its calls by layer name.

        Args:
            hooks: on the layers.
            positions: of the batch's rows.
            inputs: the batch.
            use: is given each layer's calls while the loss is differentiated; those are left out of the result.

        Raises:
            NonFiniteGradientError: naming the layer and the row.
        """
        losses: list[Tensor] = []
        sums: list[Tensor] = []

        def loss() -> Tensor:
            value, self.n_targets_of_batch = self.loss(positions, inputs)
            losses.append(value.detach())
            self.needs_backward |= hooks.needs_backward
            return value

        def take(layer: Layer, calls: list[Call]) -> None:
            assert use is not None
            sums.extend(tensor.sum(dtype=torch.float32) for call in calls for tensor in call)
            use(layer, calls)

        calls = hooks.run(loss, None if use is None else take)
        if sums and not bool(torch.stack([total.to(losses[0].device) for total in sums]).isfinite().all()):
            losses.clear()
            calls = hooks.run(loss)  # once more, to name the layer and the row
        self._refuse_non_finite(losses[0], calls, positions)
        return calls

    def gradients(self, loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """Gradients of a row's loss for some parameters."""
        return parameter_gradients(loss, parameters, backward=self.needs_backward)

    def own_part(self, layer: Layer, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `gradients` gives this process of a layer's parameters: all of each."""
        return sums

    def norm(self, layer: Layer, parts: dict[str, Tensor]) -> float:
        """Euclidean norm over a layer's parameters, given the part of each process."""
        return norm(parts)

    # --- rows at fault ------------------------------------------------------------------------------------------------

    def describe(self, position: int) -> str:
        """A row for messages, by its number in the training data and its position in the source."""
        return f"row {int(self.row_ids[position])} (position {self.start + position} of the {self.source.name})"

    def _refuse_non_finite(self, loss: Tensor, calls: dict[str, list[Call]], positions: np.ndarray) -> None:
        sums = [
            tensor.sum(dtype=torch.float32).to(loss.device)
            for pairs in calls.values()
            for pair in pairs
            for tensor in pair
        ]
        if bool(torch.stack([loss.float().to(loss.device), *sums]).isfinite().all()):
            return
        for name, pairs in calls.items():  # in the order of differentiation: the first is where it began
            for what, index in (("gradient", 1), ("input", 0)):
                for pair in pairs:
                    bad = ~pair[index].isfinite()
                    if bool(bad.any()):
                        raise NonFiniteGradientError(
                            f"The {what} of layer {name!r} is NaN or infinite{self._for_row(bad, positions)}. Remove "
                            "or repair such rows, or compute in a wider type (bfloat16 or float32 instead of float16)."
                        )
        if not bool(loss.isfinite()):
            places = ", ".join(str(self.start + position) for position in np.sort(positions))
            raise NonFiniteGradientError(
                f"The loss of the {self.source.name} at positions {places} is {float(loss)} in all. Remove or repair "
                "such rows."
            )

    def _for_row(self, bad: Tensor, positions: np.ndarray) -> str:
        """Which row the first bad value of a tensor belongs to, where its first dimension tells."""
        leading = bad.shape[0] if bad.dim() else 0
        if leading == 0 or leading % len(positions):
            return ""
        by_row = bad.reshape(len(positions), -1).any(dim=1).cpu().numpy()
        return f" for {self.describe(int(positions[int(by_row.argmax())]))}"


def norm(tensors: dict[str, Tensor]) -> float:
    """Euclidean norm over all tensors, in float64."""
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors.values())) ** 0.5
