"""float32 is not rounded to TF32 while sums are made, however that was allowed; the settings are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import build
from transformers.utils.import_utils import enable_tf32

from hf_iau.curvature import Curvature
from hf_iau.curvature.blocks import IdentityBlock
from hf_iau.data import evaluation_mode
from hf_iau.data.precision import full_float32

BACKENDS: Any = torch.backends
OPERATIONS = [
    BACKENDS.cuda.matmul,
    BACKENDS.cudnn.conv,
    BACKENDS.cudnn.rnn,
    BACKENDS.mkldnn.matmul,
    BACKENDS.mkldnn.conv,
]

pytestmark = pytest.mark.skipif(not hasattr(BACKENDS, "fp32_precision"), reason="settings of PyTorch 2.9 are read")


def set_to(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


WAYS: dict[str, Callable[[], None]] = {
    "default": lambda: None,
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: set_to(BACKENDS.cuda.matmul, "allow_tf32", True),
    "not in cudnn": lambda: set_to(BACKENDS.cudnn, "allow_tf32", False),
    "TrainingArguments(tf32=True)": lambda: enable_tf32(True),
    "TrainingArguments(tf32=False)": lambda: enable_tf32(False),
    "fp32_precision of products": lambda: set_to(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
    "fp32_precision of convolutions": lambda: set_to(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
}


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> Iterator[None]:
    yield
    BACKENDS.fp32_precision = "none"
    for operation in OPERATIONS:
        operation.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True


def settings() -> list[Any]:
    """All of them, in both of PyTorch's interfaces, of which the older may refuse to be read."""
    found: list[Any] = [BACKENDS.fp32_precision, *(operation.fp32_precision for operation in OPERATIONS)]
    for read in (
        lambda: BACKENDS.cuda.matmul.allow_tf32,
        lambda: BACKENDS.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append("mixed")
    return found


def rounded() -> set[str]:
    return {operation.fp32_precision for operation in OPERATIONS} - {"none", "ieee"}


@pytest.mark.parametrize("way", WAYS)
def test_full_precision_inside_and_the_old_settings_outside(way: str) -> None:
    WAYS[way]()
    before = settings()
    with full_float32():
        assert not rounded() and not BACKENDS.cuda.matmul.allow_tf32
        with full_float32():
            assert not rounded()
        assert not rounded()
    assert settings() == before
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert settings() == before


def test_where_sums_are_made_and_where_the_curvature_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    enable_tf32(True)
    with evaluation_mode(build("plain")):
        assert not rounded()
    assert rounded()
    seen: list[set[str]] = []
    apply = IdentityBlock.apply
    monkeypatch.setattr(IdentityBlock, "apply", lambda *args: seen.append(rounded()) or apply(*args))
    curvature = Curvature("identity", [IdentityBlock("layer", {"layer.weight": (2,)})])
    curvature.multiply({"layer.weight": torch.ones(2)})
    assert seen == [set()]
