"""What is gathered from a fine-tuning run, and kept of it, so that a later request is cheap."""

from hf_iau.memory.checker import GradientCheck, check_row_gradients
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.fingerprints import data_fingerprint, model_fingerprint, weights_fingerprint
from hf_iau.memory.gathering import gather
from hf_iau.memory.gradient_sum import GradientSum, sum_row_gradients
from hf_iau.memory.keys import Key, find_key
from hf_iau.memory.memory import GradientMemory
from hf_iau.memory.memory_files import MEMORY_FOLDER, SCHEMA_VERSION
from hf_iau.memory.row_identity import RowIdentity, keyed_fingerprints

__all__ = [
    "MEMORY_FOLDER",
    "SCHEMA_VERSION",
    "GatherConfig",
    "GradientCheck",
    "GradientMemory",
    "GradientSum",
    "Key",
    "RowIdentity",
    "check_row_gradients",
    "data_fingerprint",
    "find_key",
    "gather",
    "keyed_fingerprints",
    "model_fingerprint",
    "sum_row_gradients",
    "weights_fingerprint",
]
