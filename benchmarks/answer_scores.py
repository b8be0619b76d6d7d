"""TOFU's figures of a language model on forget and retained rows: right and wrong answers, and its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from benchmarks.question_answers import QuestionAnswers, prompt_tokens
from hf_iau.data import RowSource, evaluation_mode, predict_rows
from hf_iau.data.digests import sample_positions
from hf_iau.errors import RequestError
from hf_iau.metrics.question_answers import ModelUtility, forget_quality, model_utility, truth_ratio
from hf_iau.utils.jsonable import jsonable

if TYPE_CHECKING:
    from benchmarks.training import Case, ModelStore

SCORED_RETAINED_ROWS = 200
LONGEST_ANSWER = 160


@dataclass(frozen=True)
class AnswerScores:
    """What a model makes of the questions.

    Attributes:
        forget_truth_ratios: `(forget rows,)`, see `hf_iau.metrics.question_answers.truth_ratio`.
        forget_probability: mean over the forget rows of P(answer)^(1/tokens).
        forget_rouge_l_recall: mean ROUGE-L recall of greedy answers; None where `rouge_score` is not installed.
        utility: on (a sample of) the retained rows.
    """

    forget_truth_ratios: np.ndarray
    forget_probability: float
    forget_rouge_l_recall: float | None
    utility: ModelUtility

    def to_dict(self) -> dict[str, Any]:
        """The figures in the types of strict JSON, the ratios by their median."""
        values: dict[str, Any] = jsonable(
            {
                "forget_truth_ratio": float(np.median(self.forget_truth_ratios)),
                "forget_probability": self.forget_probability,
                "forget_rouge_l_recall": self.forget_rouge_l_recall,
                "utility": self.utility.to_dict(),
            }
        )
        return values


class AnswerScorer:
    """Scores models on the same questions.

    Args:
        models: knows tokenizer and collator.
        case: which rows are forgotten.
        train: the training rows.
        device: where the models are.
    """

    def __init__(self, models: ModelStore, case: Case, train: QuestionAnswers, device: Any) -> None:
        kept = np.setdiff1d(np.arange(len(train)), case.forget_rows)
        kept = kept[sample_positions(len(kept), SCORED_RETAINED_ROWS, case.seed)]
        self._tokenizer = models.tokenizer(case.work)
        self._questions = {"forget": train.select(case.forget_rows), "retain": train.select(kept)}
        self._batch_size = case.work.eval_batch_size
        self._sources = {
            name: RowSource(
                questions.with_every_answer().dataset(self._tokenizer),
                models.collator(case.work),
                batch_size=self._batch_size,
                device=device,
                name=f"answers to the {name} questions",
            )
            for name, questions in self._questions.items()
        }

    def scores(self, model: nn.Module) -> AnswerScores:
        """The figures of one model."""
        losses = {
            name: predict_rows(model, source).loss.reshape(len(self._questions[name]), -1)
            for name, source in self._sources.items()
        }
        ratios = {name: truth_ratio(loss[:, 1], loss[:, 2:]) for name, loss in losses.items()}
        rouge = {name: self._rouge(model, questions) for name, questions in self._questions.items()}
        return AnswerScores(
            forget_truth_ratios=ratios["forget"],
            forget_probability=float(np.exp(-losses["forget"][:, 0]).mean()),
            forget_rouge_l_recall=None if rouge["forget"] is None else float(np.mean(rouge["forget"])),
            utility=model_utility(losses["retain"][:, 0], ratios["retain"], rouge["retain"]),
        )

    def _rouge(self, model: Any, questions: QuestionAnswers) -> list[float] | None:
        if importlib.util.find_spec("rouge_score") is None:
            return None
        written: list[str] = []
        for start in range(0, len(questions.rows), self._batch_size):
            rows = questions.rows[start : start + self._batch_size]
            written += greedy_answers(model, [prompt_tokens(row, self._tokenizer) for row in rows], self._tokenizer)
        return rouge_l_recall(written, [row.answer for row in questions.rows])


def greedy_answers(model: Any, prompts: Sequence[list[int]], tokenizer: Any) -> list[str]:
    """What the model writes after each prompt, taking the likeliest token each time."""
    batch = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt").to(model.device)
    with evaluation_mode(model), torch.no_grad():
        tokens = model.generate(
            **batch,
            max_new_tokens=LONGEST_ANSWER,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def rouge_l_recall(written: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Share of each answer's words that come in the same order in what was written, stemmed, as TOFU computes it.

    Needs the package `rouge_score`.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [scorer.score(answer, text)["rougeL"].recall for answer, text in zip(answers, written, strict=True)]


def quality(scores: AnswerScores | None, retrained: AnswerScores | None) -> dict[str, Any] | None:
    """Forget quality against a retrained model as it stands in a cell; None for a model that has diverged."""
    if scores is None or retrained is None:
        return None
    try:
        found = forget_quality(scores.forget_truth_ratios, retrained.forget_truth_ratios)
    except RequestError:
        return None
    values: dict[str, Any] = jsonable(found.to_dict())
    return values
