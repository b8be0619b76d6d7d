"""What is kept of a fine-tuning run so that a later request is cheap."""

from hf_iau.remember.fingerprints import data_fingerprint, model_fingerprint, weights_fingerprint
from hf_iau.remember.memory import MEMORY_FOLDER, SCHEMA_VERSION, GradientMemory

__all__ = [
    "MEMORY_FOLDER",
    "SCHEMA_VERSION",
    "GradientMemory",
    "data_fingerprint",
    "model_fingerprint",
    "weights_fingerprint",
]
