"""The process that trained and a fresh one, with a saved model and memory, forget alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, bert, build
from torch import Tensor, nn
from unlearning_trainers import (
    EXACT,
    FORGET,
    WITH_CURVATURE,
    make_trainer,
    parameters_of,
    relative_distance,
)

from hf_iau import GradientMemory, IAUCallback, IAUConfig, IAUPaperConfig, UnlearningTrainer

# What is trained, with what, and the request made of it.
CASES: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert", "method": "iau-paper"},
    "bert under bf16 autocast": {"family": "bert", "method": "iau-paper", "bf16": True},
    "resnet": {"family": "resnet", "method": "iau-released"},
    "gpt2 under bf16 autocast": {"family": "gpt2", "method": "iau", "bf16": True},
    "lora": {"family": "lora", "method": "iau-released"},
    "bert after a request": {"family": "bert", "method": "iau", "earlier": [2, 5]},
}
_CONFIGS: dict[str, Any] = {
    "iau-paper": IAUPaperConfig(eta=1e-3),
    "iau-released": None,
    "iau": IAUConfig(scale=0.1, damping=0.05, retain_weight=0.01),
}


def request(trainer: UnlearningTrainer, method: str, rows: list[int]) -> None:
    trainer.unlearn(forget_indices=rows, method=method, config=_CONFIGS[method])


def fine_tune(folder: Path, case: dict[str, Any]) -> UnlearningTrainer:
    config = WITH_CURVATURE if case["method"] == "iau" else EXACT
    trainer = make_trainer(
        folder,
        case["family"],
        model_settings={} if case["family"] == "resnet" else {"dropout": 0.1},
        settings={"bf16": case.get("bf16", False)},
        callbacks=[IAUCallback(config)],
    )
    trainer.train()
    if "earlier" in case:
        request(trainer, case["method"], case["earlier"])
    trainer.save_model()
    return trainer


def load_model(folder: Path, family: str) -> nn.Module:
    if family == "lora":
        from peft import PeftModel

        # The base as it was before adapters were put in, with the seed of `tiny_models.lora`.
        model = PeftModel.from_pretrained(bert(CLASSES, dropout=0.1), folder, is_trainable=True)
        assert isinstance(model, nn.Module)
        return model
    loaded: nn.Module = type(build(family)).from_pretrained(folder)
    return loaded


def fresh_process(folder: Path) -> None:
    """The program of the fresh process: no training, only what was saved."""
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        output = folder / name
        trainer = make_trainer(
            folder / "nothing here",
            case["family"],
            model=load_model(output, case["family"]),
            memory=GradientMemory.load(output),
        )
        request(trainer, case["method"], FORGET)
        save_file({k: v.contiguous() for k, v in parameters_of(trainer.model).items()}, output / "after.safetensors")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Tensor], ...]]:
    """Case → weights before the request, after it in this process, after it in a fresh one."""
    folder = tmp_path_factory.mktemp("processes")
    here = {}
    for name, case in CASES.items():
        trainer = fine_tune(folder / name, case)
        before = parameters_of(trainer.model)
        request(trainer, case["method"], FORGET)
        here[name] = before, parameters_of(trainer.model)
    (folder / "cases.json").write_text(json.dumps(CASES))
    tests = Path(__file__).parents[1]
    program = (
        f"import sys; sys.path[:0] = [{str(tests)!r}, {str(Path(__file__).parent)!r}]\n"
        f"from pathlib import Path; import {Path(__file__).stem} as program\n"
        f"program.fresh_process(Path({str(folder)!r}))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: (*here[name], load_file(folder / name / "after.safetensors")) for name in CASES}


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_forgets_as_the_training_process(
    case: str, both: dict[str, tuple[dict[str, Tensor], ...]]
) -> None:
    before, here, there = both[case]
    assert here.keys() == there.keys()
    assert any(not torch.equal(here[name], before[name]) for name in here)
    assert relative_distance(there, here, before) < 1e-6
