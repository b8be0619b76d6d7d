"""Near-duplicates of forget rows among the rows that stay: a retrained model would still know those."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_iau.data import RowSource
from hf_iau.data.rows import Batch

_NEAR = 0.15
_WIDTH = 256
_FORGET_ROWS = 500


@dataclass(frozen=True)
class DuplicateSearch:
    """What was looked at, and found.

    Attributes:
        forget_rows, retained_rows: rows compared.
        similar: forget rows whose nearest retained row is closer than 0.15 times the median distance between two
            rows (inputs alone, not labels).
    """

    forget_rows: int
    retained_rows: int
    similar: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @property
    def warnings(self) -> list[str]:
        """Sentences for people."""
        if not self.similar:
            return []
        return [
            f"{self.similar} of {self.forget_rows} forget rows looked at have near-duplicates among "
            f"{self.retained_rows} retained rows looked at. A retrained model would still know those: forget the "
            "duplicates too, if they are to go."
        ]


def find_near_duplicates(forget: RowSource, retained: RowSource, seed: int = 0) -> DuplicateSearch | None:
    """Compare up to 500 forget rows with `retained`, a sample of the rows that stay.

    A row is described by a random projection of its pixel values (or other float inputs), or by its counts of tokens,
    hashed. None where the rows have neither.
    """
    ours = _describe(forget.sample(_FORGET_ROWS, seed))
    theirs = _describe(retained)
    if ours is None or theirs is None or ours.shape[1] != theirs.shape[1]:
        return None
    distances = torch.cdist(ours, theirs)
    near = distances.amin(dim=1) < _NEAR * distances.median()
    return DuplicateSearch(len(ours), len(theirs), int(near.sum()))


def _describe(source: RowSource) -> Tensor | None:
    """`(rows, features)` float32."""
    parts: list[Tensor] = []
    for _, inputs in source.by_length():  # in any order
        described = _describe_batch(inputs)
        if described is None:
            return None
        parts.append(described.cpu())
    return torch.cat(parts) if parts else None


def _describe_batch(inputs: Batch) -> Tensor | None:
    tokens = inputs.get("input_ids")
    if isinstance(tokens, Tensor):
        mask = inputs.get("attention_mask")
        kept = mask if isinstance(mask, Tensor) and mask.shape == tokens.shape else torch.ones_like(tokens)
        # Rows of several texts, as of multiple choice, are one text here.
        tokens, kept = tokens.reshape(len(tokens), -1), kept.reshape(len(tokens), -1).float()
        # A fixed multiplicative hash: the same token falls into the same of many buckets in every batch.
        buckets = (tokens.long() * 2654435761 % 2**32) % (16 * _WIDTH)
        counts = torch.zeros(len(tokens), 16 * _WIDTH, device=tokens.device)
        return counts.scatter_add_(1, buckets, kept)
    values = next(
        (v for k, v in inputs.items() if k != "labels" and isinstance(v, Tensor) and v.is_floating_point()), None
    )
    if values is None or values.dim() < 2:
        return None
    flat = values.reshape(len(values), -1).float()
    if flat.shape[1] <= _WIDTH:
        return F.pad(flat, (0, _WIDTH - flat.shape[1]))
    # The first columns do not depend on how many there are: a sound is described alike however far it is padded.
    projection = np.random.default_rng(0).standard_normal((flat.shape[1], _WIDTH), dtype=np.float32)
    return flat @ torch.from_numpy(projection).to(flat.device)
