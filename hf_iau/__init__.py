"""hf_iau: machine unlearning for `transformers.Trainer`.

Data flows one way: gather → remember → forget → calibrate → measure → report.
"""

from importlib.metadata import PackageNotFoundError, version

from hf_iau.cost_estimate import Estimate, estimate
from hf_iau.deletion.artefacts import AuditReport, audit
from hf_iau.deletion.ledger import Ledger, LedgerEntry
from hf_iau.deletion.service import DeletionOutput, DeletionService
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
from hf_iau.memory.checker import GradientCheck, check_row_gradients
from hf_iau.memory.config import GatherConfig
from hf_iau.memory.fit import gather
from hf_iau.memory.memory import GradientMemory
from hf_iau.methods.base import UnlearningMethod, available_methods, register_method
from hf_iau.methods.iau.config import IAUConfig
from hf_iau.methods.iau_paper import IAUPaperConfig
from hf_iau.methods.iau_released import IAUReleasedConfig
from hf_iau.report.report import UnlearningReport
from hf_iau.trainer.callback import IAUCallback
from hf_iau.trainer.restriction import RestrictionConfig
from hf_iau.trainer.unlearning_trainer import UnlearningTrainer, UnlearnOutput

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
    "DeletionOutput",
    "DeletionService",
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
