"""Which weights lie in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import transformers
from safetensors import safe_open
from transformers import AutoConfig

from hf_iau.memory.fingerprints import tensors_fingerprint, weights_fingerprint
from hf_iau.utils.atomic_files import file_digest


def saved_weights_fingerprint(root: Path, expected: str) -> str | None:
    """Fingerprint of the weights saved in `root`, or None where it cannot be known.

    The tensors of a safetensors file are the model's own unless some are tied; then the model is built to know.
    """
    files = sorted(root.glob("model*.safetensors"))
    try:
        names = {}
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                names.update(dict.fromkeys(tensors.keys(), file))

        def in_order() -> Iterator[tuple[str, Any]]:
            for name in sorted(names):
                with safe_open(names[name], framework="pt") as tensors:
                    yield name, tensors.get_tensor(name)

        if names and tensors_fingerprint(in_order()) == expected:
            return expected
        config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
        model_class = getattr(transformers, config.architectures[0])
        return weights_fingerprint(model_class.from_pretrained(root, local_files_only=True, dtype="auto"))
    except (OSError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, safetensors.SafetensorError):
        return None


def weights_are(root: Path, expected: str, files: Mapping[str, str]) -> bool | None:
    """Whether the weights in `root` are those with the fingerprint `expected`; None where that cannot be known.

    Args:
        root: the model's folder.
        expected: fingerprint of the weights.
        files: the files that they were written to, with digests; {} where that is not known.
    """
    try:
        if files and all(file_digest(root / name) == digest for name, digest in files.items()):
            return True
    except OSError:
        pass
    now = saved_weights_fingerprint(root, expected)
    if now is None:
        return False if files and any((root / name).is_file() for name in files) else None
    return now == expected


def weights_of_last_request(ledger: Path) -> bool | None:
    """`weights_are` those that the last request in a ledger left, which is read without being checked."""
    try:
        last = json.loads(ledger.read_text(encoding="utf-8").splitlines()[-1])
        return weights_are(ledger.parent.parent, str(last["weights_after"]), dict(last["files"]))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
