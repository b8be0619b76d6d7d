"""Membership inference as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hf_iau.data import RowPredictions
from hf_iau.evaluation.attacks import all_attacks, attack, svc_confidence_attack
from hf_iau.evaluation.intervals import RESAMPLES, proportion_interval
from hf_iau.metrics.inputs import matrix, measurement, unseen_of

_DESCRIPTION = """
Can an attacker tell the forget rows from rows never trained on, by what one model makes of them? Threshold attacks on
loss, confidence, entropy, modified entropy and correctness, each with its AUC, best balanced accuracy and true positive
rates at 1 % and 0.1 % false positives, and, if retained rows are given, the SVC confidence attack of SalUn's tables.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: each row's predicted probabilities (after the softmax), `(rows, classes)`; with the configuration
        "losses" each row's loss, `(rows,)`.
    references: each row's class, `(rows,)`; not with the configuration "losses".
    splits: what each row is: "forget", "test" or "held_out" (never trained on), or "retain".
    bootstrap: resamples for the AUCs' intervals; 0 for no intervals.
    seed: of the resampling.
Returns:
    For each attack a dictionary with `auc`, `ci_low`, `ci_high`, `balanced_accuracy`, `tpr_at_1_percent_fpr`,
    `tpr_at_0_1_percent_fpr`, each with `…_low` and `…_high`, and row counts. 0.5 is chance for AUC and balanced
    accuracy; good is a retrained model's value. `svc_confidence`: share of the forget rows called unseen.
"""

_CITATION = """\
@inproceedings{yeom2018privacy,
  title = {Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting},
  author = {Yeom, Samuel and Giacomelli, Irene and Fredrikson, Matt and Jha, Somesh},
  booktitle = {IEEE Computer Security Foundations Symposium}, year = {2018}
}
@inproceedings{song2021systematic,
  title = {Systematic Evaluation of Privacy Risks of Machine Learning Models},
  author = {Song, Liwei and Mittal, Prateek}, booktitle = {USENIX Security}, year = {2021}
}
@inproceedings{fan2024salun,
  title = {SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency},
  author = {Fan, Chongyu and Liu, Jiancheng and Zhang, Yihua and Wong, Eric and Wei, Dennis and Liu, Sijia},
  booktitle = {ICLR}, year = {2024}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MembershipInference(evaluate.Metric):
    """Attacks on the forget rows by what one model makes of them; see `hf_iau.evaluation.attacks`."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "splits": datasets.Value("string")}
        if self.config_name != "losses":
            features |= {
                "predictions": datasets.Sequence(datasets.Value("float64")),
                "references": datasets.Value("int64"),
            }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(features),
        )

    def _compute(
        self,
        predictions: Any,
        splits: list[str],
        references: Any = None,
        bootstrap: int = RESAMPLES,
        seed: int = 0,
    ) -> dict[str, Any]:
        if self.config_name == "losses":
            measured = measurement(RowPredictions.from_losses(predictions), splits)
            found = {"loss": attack(measured.forget, unseen_of(measured), "loss", bootstrap, seed)}
            return {score: result.to_dict() for score, result in found.items()}
        rows = RowPredictions.from_probabilities(matrix("predictions", predictions), references)
        measured = measurement(rows, splits)
        unseen = unseen_of(measured)
        results = all_attacks(measured.forget, unseen, bootstrap, seed)
        values: dict[str, Any] = {score: result.to_dict() for score, result in results.items()}
        if measured.retain is not None:
            share = svc_confidence_attack(
                measured.retain.confidence, unseen.confidence, measured.forget.confidence, seed
            )
            rows_judged = len(measured.forget)
            low, high = proportion_interval(share * rows_judged, rows_judged)
            values["svc_confidence"] = {"share": share, "share_low": low, "share_high": high}
        return values
