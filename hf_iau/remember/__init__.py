"""What is kept of a fine-tuning run so that a later request is cheap."""

from hf_iau.remember.fingerprints import data_fingerprint, model_fingerprint, weights_fingerprint
from hf_iau.remember.keys import Key, find_key
from hf_iau.remember.memory import GradientMemory
from hf_iau.remember.memory_files import MEMORY_FOLDER, SCHEMA_VERSION
from hf_iau.remember.row_identity import RowIdentity, keyed_fingerprints

__all__ = [
    "MEMORY_FOLDER",
    "SCHEMA_VERSION",
    "GradientMemory",
    "Key",
    "RowIdentity",
    "data_fingerprint",
    "find_key",
    "keyed_fingerprints",
    "model_fingerprint",
    "weights_fingerprint",
]
