"""Every error that the package raises on purpose.

Each message names the argument, the value it had and the way out. All inherit from `IAUError`; those caused by an
argument's value are `ValueError`s as well, so that plain `except ValueError` keeps working.
"""

from __future__ import annotations


class IAUError(Exception):
    """Base class of all errors raised by `hf_iau`."""


class RequestError(IAUError, ValueError):
    """The forget request, or an argument that goes with it, cannot be served as it is."""


class UnknownRowsError(RequestError):
    """Rows of the request were never trained on, so there is nothing to forget of them."""


class AlreadyForgottenError(RequestError):
    """Rows of the request were forgotten by an earlier one."""


class ConfigError(IAUError, ValueError):
    """A configuration value is out of range or contradicts another one."""


class MemoryMismatchError(IAUError, ValueError):
    """The gradient memory belongs to another model, other data, another loss or another schema."""


class MemoryFileError(IAUError, ValueError):
    """A saved gradient memory is missing, truncated, corrupt or malformed."""


class StaleMemoryError(MemoryMismatchError):
    """The weights have moved since the memory was gathered."""


class MissingMemoryError(IAUError, ValueError):
    """The method asked for needs something that the memory does not hold."""


class UnsupportedModelError(IAUError, ValueError):
    """The model, wrapper or data set is of a kind that is refused rather than served wrongly."""


class CoupledRowsError(UnsupportedModelError):
    """The loss of one row depends on the other rows of its batch, so a row has no gradient of its own."""


class NonFiniteGradientError(IAUError, FloatingPointError):
    """A row's loss or gradient is NaN or infinite."""


class CalibrationError(IAUError, ValueError):
    """The step cannot be calibrated with the rows at hand."""


class LedgerError(IAUError, ValueError):
    """The ledger was edited, reordered or cut, has a gap, is malformed, or was made with another key."""


class StorageError(IAUError, OSError):
    """A request could not be written to disk; weights, memory and ledger are as they were before it."""


class PublishError(IAUError):
    """A model could not be published, or what is to be published or removed is not fit for it."""


class ParallelError(IAUError, RuntimeError):
    """The processes of a run have come apart, or one of them failed or is gone."""


class MissingPackageError(IAUError, ImportError):
    """A package that only some users need is not installed; the message names the extra that brings it."""
