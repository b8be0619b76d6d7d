"""The secret that row fingerprints and the ledger are made with, and the keys derived from it."""

from __future__ import annotations

import functools
import hmac
import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from hf_iau.errors import ConfigError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "HF_IAU_KEY"
KEY_FILE_VARIABLE = "HF_IAU_KEY_FILE"
_SHORTEST = 32
_LONGEST = 4096
# 32 random hexadecimal digits have fewer different ones once in a million times.
_FEWEST_DIFFERENT = 8
_REMEDY = "make one with `python -c 'import secrets; print(secrets.token_hex(32))'`"


@dataclass(frozen=True, repr=False)
class Key:
    """Keys for different uses, derived from one secret with HMAC-SHA256 and a label each, so that none tells another.

    Attributes:
        rows: for fingerprints of rows.
        requests: for the names of requests.
        ledger: for the chain of the ledger.
        check: 16 hexadecimal digits that tell whether two keys are the same, and nothing else.
    """

    rows: bytes
    requests: bytes
    ledger: bytes
    check: str

    @classmethod
    def from_secret(cls, secret: str | bytes, source: str = "the key") -> Key:
        """The keys derived from a secret of at least 32 characters.

        Raises:
            ConfigError: the secret is too short, too long, or of too few different characters.
        """
        material = (secret.encode() if isinstance(secret, str) else bytes(secret)).strip()
        if not _SHORTEST <= len(material) <= _LONGEST:
            raise ConfigError(
                f"{source} is {len(material)} bytes long: give {_SHORTEST} to {_LONGEST} random ones; {_REMEDY}."
            )

        if len(set(material)) < _FEWEST_DIFFERENT:
            raise ConfigError(
                f"{source} has {len(set(material))} different characters, so it can be guessed: give random ones; "
                f"{_REMEDY}."
            )

        def derived(label: str) -> bytes:
            return hmac.digest(material, f"hf-iau 1 {label}".encode(), "sha256")

        return cls(derived("rows"), derived("requests"), derived("ledger"), derived("check").hex()[:16])

    def __repr__(self) -> str:
        return f"Key(check={self.check!r})"

    def fingerprint(self, digest: bytes) -> bytes:
        """The keyed fingerprint of a row, 16 bytes, from the digest of its content (`row_bytes`)."""
        return hmac.digest(self.rows, digest, "sha256")[:16]


@functools.cache
def process_key() -> Key:
    """A key that nobody knows and that ends with this process, for rows to be recognised where there is no other."""
    return Key.from_secret(secrets.token_hex(32))


def find_key(output_dir: str | Path | None = None) -> Key | None:
    """The key of the environment: `HF_IAU_KEY` itself, or the file that `HF_IAU_KEY_FILE` names; None without either.

    Args:
        output_dir: where the memory lies; the key file must not lie below it, for who has both can try out rows.

    Raises:
        ConfigError: both variables are set, the file lies below `output_dir` or cannot be read, or the key is too
            short.
    """
    secret, name = os.environ.get(KEY_VARIABLE), os.environ.get(KEY_FILE_VARIABLE)
    if secret and name:
        raise ConfigError(f"{KEY_VARIABLE} and {KEY_FILE_VARIABLE} are both set: unset one of them.")
    if secret:
        return Key.from_secret(secret, KEY_VARIABLE)
    if not name:
        return None
    path = Path(name)
    if output_dir is not None and path.resolve().is_relative_to(Path(output_dir).resolve()):
        raise ConfigError(
            f"{KEY_FILE_VARIABLE}={name} lies below output_dir={output_dir}, beside the memory that it protects: who "
            "copies one has the other. Keep the key elsewhere."
        )
    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST + 2)
    except OSError as error:
        raise ConfigError(f"{KEY_FILE_VARIABLE}={name} cannot be read ({error}): give a readable file.") from error
    if path.stat().st_mode & 0o077:
        logger.warning("%s=%s is readable by others: chmod 600 it.", KEY_FILE_VARIABLE, name)
    return Key.from_secret(content, f"{KEY_FILE_VARIABLE}={name}")


def require_key(purpose: str, output_dir: str | Path | None = None) -> Key:
    """The key of the environment, or a `ConfigError` that says what needs one and how to make it."""
    key = find_key(output_dir)
    if key is None:
        raise ConfigError(
            f"{purpose} needs a key: set {KEY_VARIABLE}, or {KEY_FILE_VARIABLE} to a file outside the output directory "
            f"({_REMEDY}), and keep it as long as the memory."
        )
    return key


@functools.cache
def warn_without_key() -> None:
    """Once a process: what is not kept without a key."""
    logger.warning(
        "%s is not set, so no row fingerprints are kept with the memory: a later process cannot tell which rows were "
        "trained on or forgotten, and there is no ledger. See docs/deletion.md.",
        KEY_VARIABLE,
    )
