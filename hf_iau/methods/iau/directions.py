"""The directions in which a step may go, and the steps made of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hf_iau.curvature import Curvature
from hf_iau.distributed import inner_product
from hf_iau.memory.gradient_sum import GradientSum
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.step import Step, apply_step, corrected_step, step_norm


@dataclass
class Directions:
    """Preconditioned directions of one set of rows, made once a damping.

    Attributes:
        curvature: C.
        forget_sum: Σ of the rows' gradients.
        correction_sum: Σ_D, or None where c = 0.
        remaining: n_r, targets that stay.
        targets: those that Σ is over, tokens of a language model; None where that is one a row.
        retain_damping: the least λ of the retain correction.
    """

    curvature: Curvature
    forget_sum: Mapping[str, Tensor]
    correction_sum: Mapping[str, Tensor] | None
    remaining: int
    targets: int | None = None
    retain_damping: float = 0.0

    def __post_init__(self) -> None:
        self._made: dict[float, Step] = {}

    @classmethod
    def of(
        cls,
        memory: GradientMemory,
        gradient_sum: GradientSum,
        correction_sum: Mapping[str, Tensor] | None = None,
        retain_damping: float = 0.0,
    ) -> Directions:
        """Of the rows that `gradient_sum` is over, by the curvature of `memory`."""
        assert memory.curvature is not None
        remaining = max(memory.n_targets - gradient_sum.n_targets, 1)  # of tokens, n_targets is an estimate
        return cls(
            memory.curvature, gradient_sum.tensors, correction_sum, remaining, gradient_sum.n_targets, retain_damping
        )

    def at(self, damping: float) -> Step:
        """(C+λ)⁻¹Σ_f/n_r."""
        if damping not in self._made:
            self._made = {}  # one damping at a time is held
            self._made = {damping: self._solve(self.forget_sum, damping)}
        return self._made[damping]

    def parts(self, scale: float, damping: float, retain_weight: float) -> Iterator[Step]:
        """Δ = (C+λ)⁻¹(k·Σ_f − c·Σ_D)/n_r, a layer at a time.

        k·Σ_f − c·Σ_D is (k − c)·Σ_f − c·Σ_r, forgetting and the correction by the retained rows; the latter with λ of
        at least `retain_damping`.
        """
        forget = self.at(damping)
        apart = self.retain_damping > damping
        for block in self.curvature.blocks.values():
            names = [name for name in block.shapes if name in forget]
            if self.correction_sum is None or retain_weight == 0.0:
                yield corrected_step({name: forget[name] for name in names}, None, scale, 0.0)
                continue
            sums = {name: self.correction_sum[name] for name in names}
            if apart:
                sums = {
                    name: total - self.forget_sum[name].to(device=total.device, dtype=total.dtype)
                    for name, total in sums.items()
                }
            part = self._solve(sums, max(damping, self.retain_damping))
            for name, change in part.items():  # in its place
                own = scale - retain_weight if apart else scale
                change.mul_(-retain_weight).add_(forget[name].to(change.device), alpha=own)
            yield part

    def step(self, scale: float, damping: float, retain_weight: float) -> Step:
        """The same at once."""
        whole = {name: change for part in self.parts(scale, damping, retain_weight) for name, change in part.items()}
        return {name: whole[name] for name in self.forget_sum}

    def norm(self, scale: float, damping: float, retain_weight: float) -> float:
        """‖Δ‖."""
        return math.hypot(*(step_norm(part) for part in self.parts(scale, damping, retain_weight)))

    def apply(self, model: nn.Module, scale: float, damping: float, retain_weight: float) -> float:
        """θ ← θ + Δ; returns ‖Δ‖."""
        norms = [0.0]
        for part in self.parts(scale, damping, retain_weight):
            apply_step(model, part)
            norms.append(step_norm(part))
        return math.hypot(*norms)

    def slope(self, damping: float) -> float:
        """Σ_f·(C+λ)⁻¹Σ_f/n_r: what a unit of k adds to the summed loss of the forget rows, to first order."""
        return inner_product((change, self.forget_sum[name]) for name, change in self.at(damping).items())

    def clear(self) -> None:
        """Free the directions; they are made anew when asked for."""
        self._made = {}

    def _solve(self, vector: Mapping[str, Tensor], damping: float) -> Step:
        solved = self.curvature.solve(vector, damping)
        for change in solved.values():
            change.div_(self.remaining)
        return solved
