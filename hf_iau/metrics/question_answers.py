"""TOFU's figures for language models that answer questions: truth ratio, forget quality and model utility.

Maini, Feng, Schwarzschild, Lipton and Kolter: TOFU, 2024 (arXiv 2401.06121). Where the paper's text and its public code
differ, the code is followed (as open-unlearning does), so that numbers can be compared.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from hf_iau.errors import RequestError


@dataclass(frozen=True)
class ForgetQuality:
    """Whether the forget rows' truth ratios come from the same distribution as a retrained model's.

    Attributes:
        p_value: of the two-sample Kolmogorov-Smirnov test, 0 to 1: TOFU's forget quality. A retrained model of another
            seed is anywhere between 0 and 1, for in truth there is no difference; below 0.05 the two can be told apart.
            That it is high does not show that they are alike: with few rows it is.
        log10_p_value: its logarithm; minus infinity for a p value of 0.
        statistic: largest distance of the two distribution functions, 0 to 1; lower is better.
        rows, retrained_rows: how many rows of each model were compared.
    """

    p_value: float
    log10_p_value: float
    statistic: float
    rows: int
    retrained_rows: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class ModelUtility:
    """How well a model still answers what it should; every figure 0 to 1, higher is better.

    Attributes:
        utility: harmonic mean of the others, 0 where one of them is.
        probability: mean over the rows of P(answer | question)^(1/tokens).
        rouge_l_recall: mean over the rows of the ROUGE-L recall of the greedy answer; None where it was not measured,
            and then not part of `utility`.
        truth_ratio: mean over the rows of max(0, 1 − truth ratio).
        rows: how many.
    """

    utility: float
    probability: float
    rouge_l_recall: float | None
    truth_ratio: float
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary."""
        return asdict(self)


def truth_ratio(paraphrased_loss: Any, perturbed_losses: Any) -> np.ndarray:
    """How probable a wrong answer is beside a right one that the model was not trained on in these words.

    R = exp(−mean of the losses of the wrong answers) / exp(−loss of the paraphrased right answer), all losses means
    over an answer's tokens. So the wrong answers' probabilities enter by their geometric mean, as in TOFU's public
    code; the paper's equation 1 has the arithmetic mean.

    Args:
        paraphrased_loss: `(rows,)`, nats a token, of the right answer in other words.
        perturbed_losses: `(rows, answers)`, of the wrong answers.

    Returns:
        `(rows,)` float64 from 0: below 1 the model prefers the right answer, about 1 it does not know.

    Raises:
        RequestError: shapes that do not fit.
    """
    right, wrong = (np.asarray(values, dtype=np.float64) for values in (paraphrased_loss, perturbed_losses))
    if right.ndim != 1 or wrong.ndim != 2 or len(right) != len(wrong) or not wrong.size:
        raise RequestError(
            f"paraphrased_loss has shape {right.shape} and perturbed_losses {wrong.shape}: give one loss a row, and "
            "for each of the same rows a list of losses, all of the same length."
        )
    with np.errstate(over="ignore"):
        ratios: np.ndarray = np.exp(right - wrong.mean(axis=1))
    return ratios


def forget_quality(truth_ratios: Any, retrained_truth_ratios: Any) -> ForgetQuality:
    """Compare the truth ratios of a model and of a retrained one on the forget rows (paper, section 2.2.2).

    Args:
        truth_ratios: `(rows,)` of the unlearned model, see `truth_ratio`.
        retrained_truth_ratios: the same of a model trained without the forget rows.

    Raises:
        RequestError: no rows, or a ratio that is NaN (the model has diverged).
    """
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (truth_ratios, retrained_truth_ratios))
    for name, values in (("truth_ratios", ours), ("retrained_truth_ratios", theirs)):
        if values.ndim != 1 or not values.size:
            raise RequestError(f"{name} has shape {values.shape}: give one number a forget row.")
        if np.isnan(values).any():
            raise RequestError(
                f"{name} has {int(np.isnan(values).sum())} NaN of {len(values)}: the model has diverged."
            )
    found = stats.ks_2samp(ours, theirs)
    p = float(found.pvalue)
    return ForgetQuality(
        p_value=p,
        log10_p_value=float(np.log10(p)) if p > 0 else -np.inf,
        statistic=float(found.statistic),
        rows=len(ours),
        retrained_rows=len(theirs),
    )


def model_utility(loss: Any, truth_ratios: Any, rouge_l_recall: Any = None) -> ModelUtility:
    """TOFU's model utility on one set of rows (paper, section 2.2.1).

    The paper takes the harmonic mean over three sets, retained rows, real authors and world facts; the two others are
    for models that were pretrained on the world's text.

    Args:
        loss: `(rows,)`, nats a token, of the answer as trained on.
        truth_ratios: `(rows,)`, see `truth_ratio`.
        rouge_l_recall: `(rows,)` ROUGE-L recall of greedy answers, 0 to 1; default: left out.

    Raises:
        RequestError: numbers of rows that differ, or none.
    """
    given = {"loss": loss, "truth_ratios": truth_ratios, "rouge_l_recall": rouge_l_recall}
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in given.items() if values is not None}
    shapes = {name: values.shape for name, values in arrays.items()}
    if len(set(shapes.values())) != 1 or arrays["loss"].ndim != 1 or not arrays["loss"].size:
        raise RequestError(
            f"{', '.join(f'{name} has shape {shape}' for name, shape in shapes.items())}: give one number a row."
        )
    probability = float(np.exp(-arrays["loss"]).mean())
    truth = float(np.maximum(0.0, 1.0 - arrays["truth_ratios"]).mean())
    rouge = float(arrays["rouge_l_recall"].mean()) if rouge_l_recall is not None else None
    parts = [value for value in (probability, truth, rouge) if value is not None]
    return ModelUtility(
        utility=float(stats.hmean(parts)),
        probability=probability,
        rouge_l_recall=rouge,
        truth_ratio=truth,
        rows=len(arrays["loss"]),
    )
