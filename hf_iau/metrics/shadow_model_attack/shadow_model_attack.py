"""The shadow-model attack as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from hf_iau.data import RowPredictions
from hf_iau.errors import RequestError
from hf_iau.evaluation.intervals import RESAMPLES
from hf_iau.metrics.inputs import matrix, measurement, unseen_of
from hf_iau.metrics.shadow_models import ShadowPredictions, shadow_model_attack

_DESCRIPTION = """
An attacker is trained on shadow models, whose members are known, and then says of each forget row whether the model in
question was trained on it. It sees [softmax − one-hot, one-hot]. The "attack accuracy" of the IAU paper is
`member_share`: the share of the forget rows called members.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the model's predicted probabilities for each row, `(rows, classes)`.
    references: each row's class, `(rows,)`.
    splits: what each row is: "forget", or "test" or "held_out" (never trained on, by no shadow model either).
    shadow_predictions: for each shadow model its predicted probabilities, `(its rows, classes)`.
    shadow_references: for each shadow model its rows' classes.
    shadow_members: for each shadow model, whether it was trained on each of its rows.
    bootstrap: resamples for the AUC's interval; 0 for none.
    seed: of the attacker's training and of the resampling.
Returns:
    `member_share` and `unseen_member_share` with intervals, `balanced_accuracy` (0.5 is chance), and `ranking`: AUC and
    operating points of the attacker's probability. Good is a retrained model's value.
"""

_CITATION = """\
@article{liu2025iau,
  title = {Efficient Machine Unlearning via Influence Approximation},
  author = {Liu, Jiawei and Wu, Chenwang and Lian, Defu and Chen, Enhong},
  journal = {arXiv preprint arXiv:2507.23257}, year = {2025}
}
@inproceedings{shokri2017membership,
  title = {Membership Inference Attacks Against Machine Learning Models},
  author = {Shokri, Reza and Stronati, Marco and Song, Congzheng and Shmatikov, Vitaly},
  booktitle = {IEEE Symposium on Security and Privacy}, year = {2017}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ShadowModelAttack(evaluate.Metric):
    """An attacker trained on shadow models judges the forget rows; see `hf_iau.metrics.shadow_models`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                    "splits": datasets.Value("string"),
                }
            ),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        splits: list[str],
        shadow_predictions: Any = (),
        shadow_references: Any = (),
        shadow_members: Any = (),
        bootstrap: int = RESAMPLES,
        seed: int = 0,
    ) -> dict[str, Any]:
        if not len(shadow_predictions) == len(shadow_references) == len(shadow_members):
            raise RequestError(
                f"shadow_predictions, shadow_references and shadow_members are of {len(shadow_predictions)}, "
                f"{len(shadow_references)} and {len(shadow_members)} models: give all three of each shadow model."
            )
        shadows = []
        for p, labels, members in zip(shadow_predictions, shadow_references, shadow_members, strict=True):
            rows = RowPredictions.from_probabilities(matrix("shadow_predictions", p), labels)
            trained_on = np.asarray(members, dtype=bool)
            if trained_on.shape != (len(rows),):
                raise RequestError(
                    f"shadow_members holds {trained_on.shape} flags for {len(rows)} rows: give one for each row."
                )
            shadows.append(ShadowPredictions(rows.select(trained_on), rows.select(~trained_on)))
        victim = RowPredictions.from_probabilities(matrix("predictions", predictions), references)
        measured = measurement(victim, splits)
        return shadow_model_attack(measured.forget, unseen_of(measured), shadows, bootstrap, seed).to_dict()
