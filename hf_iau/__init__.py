"""hf_iau: machine unlearning for `transformers.Trainer`.

Data flows one way: gather → remember → forget → calibrate → measure → report.
"""

from importlib.metadata import PackageNotFoundError, version

from hf_iau.errors import (
    AlreadyForgottenError,
    CalibrationError,
    ConfigError,
    CoupledRowsError,
    IAUError,
    LedgerError,
    MemoryFileError,
    MemoryMismatchError,
    MissingMemoryError,
    NonFiniteGradientError,
    PublishError,
    RequestError,
    StaleMemoryError,
    StorageError,
    UnknownRowsError,
    UnsupportedModelError,
)
from hf_iau.forecast import Estimate, estimate
from hf_iau.gather import GatherConfig, IAUCallback, gather
from hf_iau.gather.checker import GradientCheck, check_row_gradients
from hf_iau.methods import (
    IAUConfig,
    IAUPaperConfig,
    IAUReleasedConfig,
    UnlearningMethod,
    available_methods,
    register_method,
)
from hf_iau.publish import AuditReport, audit
from hf_iau.remember import GradientMemory
from hf_iau.report import UnlearningReport
from hf_iau.requests import Ledger, LedgerEntry
from hf_iau.train import RestrictionConfig, UnlearningTrainer, UnlearnOutput

try:
    __version__ = version("hf-iau")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "AlreadyForgottenError",
    "AuditReport",
    "CalibrationError",
    "ConfigError",
    "CoupledRowsError",
    "Estimate",
    "GatherConfig",
    "GradientCheck",
    "GradientMemory",
    "IAUCallback",
    "IAUConfig",
    "IAUError",
    "IAUPaperConfig",
    "IAUReleasedConfig",
    "Ledger",
    "LedgerEntry",
    "LedgerError",
    "MemoryFileError",
    "MemoryMismatchError",
    "MissingMemoryError",
    "NonFiniteGradientError",
    "PublishError",
    "RequestError",
    "RestrictionConfig",
    "StaleMemoryError",
    "StorageError",
    "UnknownRowsError",
    "UnlearnOutput",
    "UnlearningMethod",
    "UnlearningReport",
    "UnlearningTrainer",
    "UnsupportedModelError",
    "audit",
    "available_methods",
    "check_row_gradients",
    "estimate",
    "gather",
    "register_method",
]
