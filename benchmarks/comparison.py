"""Models of one case measured on the same rows, and compared with the retrained one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.answer_scores import AnswerScorer, AnswerScores, quality
from benchmarks.files import write_arrays
from benchmarks.question_answers import QuestionAnswers
from benchmarks.training import Case, ModelStore, TrainedModel
from hf_iau.data import RowSource
from hf_iau.data.digests import sample_positions
from hf_iau.errors import IAUError
from hf_iau.evaluation.attacks import svc_confidence_attack
from hf_iau.evaluation.figures import Figures
from hf_iau.evaluation.measurement import Measurement, measure_model
from hf_iau.evaluation.model_agreement import agreement
from hf_iau.evaluation.retraining_gap import gap
from hf_iau.utils.jsonable import jsonable

MEASURED_RETAINED_ROWS = 10_000
MEASURED_HELD_OUT_ROWS = 4_000
SVC_ROWS = 2_000  # a side: training a support vector machine takes time quadratic in them


@dataclass(frozen=True)
class MeasuredModel:
    """A model's rows, and what they come to.

    Attributes:
        rows: predictions by set of rows.
        figures: see `hf_iau.evaluation.Figures`.
        svc_mia: share of forget rows that the SVC confidence attack of SalUn's tables calls unseen, 0 to 1; None for
            too few rows or a diverged model.
        answers: TOFU's figures, of question-answer rows alone.
    """

    rows: Measurement
    figures: Figures
    svc_mia: float | None
    answers: AnswerScores | None = None

    @classmethod
    def of(cls, rows: Measurement, seed: int, answers: AnswerScores | None = None) -> MeasuredModel:
        """Figures of what was measured; `seed` draws the rows of the attacks."""
        return cls(rows, rows.figures(seed=seed), _svc_mia(rows, seed), answers)

    def to_dict(self) -> dict[str, Any]:
        """All figures in the types of strict JSON."""
        answers = None if self.answers is None else self.answers.to_dict()
        values: dict[str, Any] = jsonable(self.figures.to_dict() | {"svc_mia": self.svc_mia, "answers": answers})
        return values

    def losses(self) -> dict[str, np.ndarray]:
        """Row losses for plots, float32: enough to draw with, and half the size; and truth ratios, if any."""
        sets = {"forget": self.rows.forget, "test": self.rows.unseen}
        losses = {name: rows.loss.astype(np.float32) for name, rows in sets.items() if rows is not None}
        if self.answers is not None:
            losses["truth_ratio"] = self.answers.forget_truth_ratios.astype(np.float32)
        return losses


class Comparison:
    """The case's reference models, measured once for all methods.

    Args:
        models: knows collator and tokenizer.
        case: which rows.
        original: the model before the request.
        references: the retrained model, and the second one where there is one.
        device: where the models are.
    """

    def __init__(
        self,
        models: ModelStore,
        case: Case,
        original: TrainedModel,
        references: list[TrainedModel],
        device: Any,
    ) -> None:
        self._device = device
        self._seed = case.seed
        self._sources = measured_rows(models, case, device)
        train = case.train
        self._answers = AnswerScorer(models, case, train, device) if isinstance(train, QuestionAnswers) else None
        self.counts = {
            name: len(rows)
            for name, rows in zip(
                ("forget_rows", "retained_rows", "held_out_rows", "test_rows"), self._sources, strict=True
            )
        }
        self.before = self.measured(original.model)
        self.retrained = self.measured(references[0].model)
        self.retrained_again = self.measured(references[1].model) if len(references) > 1 else None

    def measured(self, model: nn.Module) -> MeasuredModel:
        """Figures of a model on the case's rows."""
        rows = measure_model(model.to(self._device), *self._sources, keep_probabilities=True)
        return MeasuredModel.of(rows, self._seed, None if self._answers is None else self._answers.scores(model))

    def on(self, model: MeasuredModel, chosen: np.ndarray) -> MeasuredModel:
        """The same with some of the forget rows only (a mask over them)."""
        return MeasuredModel.of(replace(model.rows, forget=model.rows.forget.select(chosen)), self._seed)

    def against_retrained(self, after: MeasuredModel) -> dict[str, Any]:
        """What a cell says of the model after a request."""
        again = self.retrained_again
        return {
            "figures": {
                "before": self.before.to_dict(),
                "after": after.to_dict(),
                "retrained": self.retrained.to_dict(),
                "retrained_again": None if again is None else again.to_dict(),
            },
            "gap": self.gap(after, self.retrained),
            "gap_before": self.gap(self.before, self.retrained),
            "noise_floor": None if again is None else self.gap(again, self.retrained),
            "agreement": self._agreement(after),
            "forget_quality": None if after.answers is None else self._forget_quality(after),
            "counts": self.counts,
        }

    @staticmethod
    def gap(model: MeasuredModel, reference: MeasuredModel) -> dict[str, Any]:
        """Signed differences to the reference, in points."""
        values: dict[str, Any] = jsonable(gap(model.figures, reference.figures).to_dict())
        return values

    def write_losses(self, path: Path) -> None:
        """Row losses of the models that no method changes, for histograms and ROC curves."""
        named = {"before": self.before, "retrained": self.retrained}
        write_arrays(path, {f"{name}_{side}": a for name, m in named.items() for side, a in m.losses().items()})

    def _forget_quality(self, after: MeasuredModel) -> dict[str, Any]:
        models = {"before": self.before, "after": after, "retrained_again": self.retrained_again}
        return {
            name: None if model is None else quality(model.answers, self.retrained.answers)
            for name, model in models.items()
        }

    def _agreement(self, after: MeasuredModel) -> dict[str, Any]:
        found = {}
        for side in ("forget", "retain", "held_out", "test"):
            a, b = getattr(after.rows, side), getattr(self.retrained.rows, side)
            if a.probabilities is not None and np.isfinite(a.probabilities).all():
                found[side] = jsonable(agreement(a, b, bootstrap=0).to_dict())
        return found


def measured_rows(models: ModelStore, case: Case, device: Any) -> tuple[RowSource, RowSource, RowSource, RowSource]:
    """The case's forget rows, a sample of its retained and held-out rows, and its test rows."""
    tokenizer = models.tokenizer(case.work)
    collator = models.collator(case.work)
    train = case.train

    def source(split: Any, name: str) -> RowSource:
        return RowSource(
            split.dataset(tokenizer),
            collator,
            batch_size=case.work.eval_batch_size,
            device=device,
            name=name,
        ).keep_batches()

    kept = np.setdiff1d(np.arange(len(train)), case.forget_rows)
    retained = kept[sample_positions(len(kept), MEASURED_RETAINED_ROWS, case.seed)]
    held_out = sample_positions(len(case.splits.held_out), MEASURED_HELD_OUT_ROWS, case.seed)
    return (
        source(train.select(case.forget_rows), "forget rows"),
        source(train.select(retained), "retained rows"),
        source(case.splits.held_out.select(held_out), "held-out rows"),
        source(case.splits.test, "test rows"),
    )


def _svc_mia(rows: Measurement, seed: int) -> float | None:
    if rows.per_row_suppressed or rows.retain is None or rows.unseen is None:
        return None
    sides = [side.confidence[sample_positions(len(side), SVC_ROWS, seed)] for side in (rows.retain, rows.unseen)]
    try:
        return svc_confidence_attack(*sides, rows.forget.confidence, seed=seed)
    except IAUError:
        return None
