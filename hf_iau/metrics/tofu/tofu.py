"""TOFU's forget quality and model utility as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_iau.errors import RequestError
from hf_iau.metrics.inputs import matrix
from hf_iau.metrics.question_answers import forget_quality, model_utility, truth_ratio

_DESCRIPTION = """
For language models that answer questions: are the unlearned model's truth ratios on the forget rows distributed like a
retrained model's (forget quality), and how well does it still answer the retained questions (model utility)?
"""

_KWARGS_DESCRIPTION = """
Args:
    losses: for each row the unlearned model's loss of the answer as trained on, in nats, mean over its tokens.
    paraphrased_losses: of the right answer in other words.
    perturbed_losses: of the wrong answers, `(rows, answers)`.
    retrained_paraphrased_losses, retrained_perturbed_losses: the same of a model trained without the forget rows.
    splits: what each row is: "forget" or "retain".
    rouge_l_recall: for each row the ROUGE-L recall of the model's greedy answer, 0 to 1; default: left out.
Returns:
    `forget_quality`, the p value of a Kolmogorov-Smirnov test (0 to 1, below 0.05 the models are told apart), its
    logarithm and the test's statistic; `model_utility` and its parts on the retained rows, 0 to 1, higher is better.
"""

_CITATION = """\
@inproceedings{maini2024tofu,
  title = {TOFU: A Task of Fictitious Unlearning for LLMs},
  author = {Maini, Pratyush and Feng, Zhili and Schwarzschild, Avi and Lipton, Zachary C. and Kolter, J. Zico},
  booktitle = {COLM}, year = {2024}
}
"""

_LOSSES = ("losses", "paraphrased_losses", "retrained_paraphrased_losses")
_LISTS = ("perturbed_losses", "retrained_perturbed_losses")


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TOFU(evaluate.Metric):
    """Forget quality and model utility; see `hf_iau.metrics.question_answers`."""

    def _info(self) -> evaluate.MetricInfo:
        numbers = {name: datasets.Value("float64") for name in _LOSSES}
        lists = {name: datasets.Sequence(datasets.Value("float64")) for name in _LISTS}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({**numbers, **lists, "splits": datasets.Value("string")}),
        )

    def _compute(
        self,
        losses: Any,
        paraphrased_losses: Any,
        perturbed_losses: Any,
        retrained_paraphrased_losses: Any,
        retrained_perturbed_losses: Any,
        splits: list[str],
        rouge_l_recall: Any = None,
    ) -> dict[str, Any]:
        words = np.asarray(splits)
        forget, retain = words == "forget", words == "retain"
        unknown = sorted(set(words[~(forget | retain)].tolist()))
        if unknown or not forget.any() or not retain.any():
            raise RequestError(
                f"splits holds {', '.join(map(repr, sorted(set(words.tolist()))))}: each row is 'forget' or 'retain', "
                "and there is at least one of each."
            )
        ours = truth_ratio(paraphrased_losses, matrix("perturbed_losses", perturbed_losses))
        theirs = truth_ratio(
            retrained_paraphrased_losses, matrix("retrained_perturbed_losses", retrained_perturbed_losses)
        )
        rouge = None if rouge_l_recall is None else np.asarray(rouge_l_recall, dtype=np.float64)
        if rouge is not None and rouge.shape != words.shape:
            raise RequestError(
                f"rouge_l_recall has shape {rouge.shape}: give one number for each of the {len(words)} rows."
            )
        quality = forget_quality(ours[forget], theirs[forget])
        utility = model_utility(np.asarray(losses)[retain], ours[retain], None if rouge is None else rouge[retain])
        return {
            "forget_quality": quality.p_value,
            "log10_forget_quality": quality.log10_p_value,
            "ks_statistic": quality.statistic,
            "model_utility": utility.utility,
            "probability": utility.probability,
            "truth_ratio": utility.truth_ratio,
            "rouge_l_recall": utility.rouge_l_recall,
            "forget_rows": quality.rows,
            "retain_rows": utility.rows,
        }
