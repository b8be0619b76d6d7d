"""Distance of two models' weights as an `evaluate` metric."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import torch

from hf_iau.evaluation.model_agreement import parameter_distance

_DESCRIPTION = """
Euclidean distance of two models' weights, alone and relative to the norm of the second.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: the weights of the model in question, one flat list.
    references: those of the model it is compared with, in the same order.
Returns:
    `absolute` and `relative`, 0 for equal weights.
"""

_CITATION = """\
@inproceedings{golatkar2020eternal,
  title = {Eternal Sunshine of the Spotless Net: Selective Forgetting in Deep Networks},
  author = {Golatkar, Aditya and Achille, Alessandro and Soatto, Stefano}, booktitle = {CVPR}, year = {2020}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ParameterDistance(evaluate.Metric):
    """Distance of two models' weights; see `hf_iau.evaluation.model_agreement`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        ours, theirs = (
            {"weights": torch.as_tensor(weights, dtype=torch.float64)} for weights in (predictions, references)
        )
        return parameter_distance(ours, theirs).to_dict()
