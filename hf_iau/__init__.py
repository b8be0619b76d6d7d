"""hf_iau: machine unlearning for `transformers.Trainer`.

The trainer forgets, the service records, calibration is the inside of one method.

Names are imported when they are first used (PEP 562), so that `import hf_iau` costs next to nothing: the errors are
there at once, the rest loads PyTorch and Transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from hf_iau.cost_estimate import Estimate, estimate
    from hf_iau.deletion.artefacts import AuditReport, audit
    from hf_iau.deletion.ledger import Ledger, LedgerEntry
    from hf_iau.deletion.service import DeletionOutput, DeletionService
    from hf_iau.memory.checker import GradientCheck, check_row_gradients
    from hf_iau.memory.config import GatherConfig
    from hf_iau.memory.gathering import gather
    from hf_iau.memory.memory import GradientMemory
    from hf_iau.methods.base import UnlearningMethod, available_methods, register_method
    from hf_iau.methods.iau.config import IAUConfig
    from hf_iau.methods.iau_paper import IAUPaperConfig
    from hf_iau.methods.iau_released import IAUReleasedConfig
    from hf_iau.report.report import UnlearningReport
    from hf_iau.trainer.callback import IAUCallback
    from hf_iau.trainer.restriction import RestrictionConfig
    from hf_iau.trainer.unlearning_trainer import UnlearningTrainer
    from hf_iau.unlearn.output import UnlearnOutput

    __version__: str

_MODULES = {
    "Estimate": "hf_iau.cost_estimate",
    "estimate": "hf_iau.cost_estimate",
    "AuditReport": "hf_iau.deletion.artefacts",
    "audit": "hf_iau.deletion.artefacts",
    "Ledger": "hf_iau.deletion.ledger",
    "LedgerEntry": "hf_iau.deletion.ledger",
    "DeletionOutput": "hf_iau.deletion.service",
    "DeletionService": "hf_iau.deletion.service",
    "GradientCheck": "hf_iau.memory.checker",
    "check_row_gradients": "hf_iau.memory.checker",
    "GatherConfig": "hf_iau.memory.config",
    "gather": "hf_iau.memory.gathering",
    "GradientMemory": "hf_iau.memory.memory",
    "UnlearningMethod": "hf_iau.methods.base",
    "available_methods": "hf_iau.methods.base",
    "register_method": "hf_iau.methods.base",
    "IAUConfig": "hf_iau.methods.iau.config",
    "IAUPaperConfig": "hf_iau.methods.iau_paper",
    "IAUReleasedConfig": "hf_iau.methods.iau_released",
    "UnlearningReport": "hf_iau.report.report",
    "IAUCallback": "hf_iau.trainer.callback",
    "RestrictionConfig": "hf_iau.trainer.restriction",
    "UnlearnOutput": "hf_iau.unlearn.output",
    "UnlearningTrainer": "hf_iau.trainer.unlearning_trainer",
}
"""Where each name that is imported on first use comes from; the imports above say the same to type checkers."""

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


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("hf-iau")
    except PackageNotFoundError:  # a source tree that was not installed
        return "0+unknown"
