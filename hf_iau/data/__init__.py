"""What a row is, what its loss is, and how a model is asked for it without being disturbed."""

from hf_iau.data.model_mode import evaluation_mode
from hf_iau.data.predictions import RowPredictions, predict_rows
from hf_iau.data.row_loss import (
    ModelRowLoss,
    OutputRowLoss,
    RowLoss,
    SmoothedRowLoss,
    UserRowLoss,
)
from hf_iau.data.rows import RowSource
from hf_iau.data.targets import Targets, TaskKind, labels_of, predicted_targets, read_targets
from hf_iau.data.validation import probe_additivity, probe_targets

__all__ = [
    "ModelRowLoss",
    "OutputRowLoss",
    "RowLoss",
    "RowPredictions",
    "RowSource",
    "SmoothedRowLoss",
    "Targets",
    "TaskKind",
    "UserRowLoss",
    "evaluation_mode",
    "labels_of",
    "predict_rows",
    "predicted_targets",
    "probe_additivity",
    "probe_targets",
    "read_targets",
]
