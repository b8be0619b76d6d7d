"""The command line on PEFT adapters and on causal language models."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from command_runner import ROWS, run, run_json
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import bert, llama
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_iau import GradientMemory
from hf_iau.cli.task import load_task
from hf_iau.memory.fingerprints import weights_fingerprint

STEP = ("--config", '{"scale": 0.1, "damping": 0.1}')
TEXT_LORA = LoraConfig(
    task_type="SEQ_CLS", r=2, lora_alpha=4, target_modules=["query", "value"], modules_to_save=["classifier"]
)


def save_adapter(base: nn.Module, config: LoraConfig, folder: Path) -> Path:
    """An adapter whose every weight matters (PEFT starts some at zero)."""
    model = get_peft_model(base, copy.deepcopy(config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(text_model: Path, tmp_path: Path) -> Path:
    """LoRA and a head on the text model, saved with nothing but what PEFT saves."""
    base = AutoModelForSequenceClassification.from_pretrained(text_model)
    return save_adapter(base, TEXT_LORA, tmp_path / "adapter")


def test_an_adapter_is_gathered_unlearned_and_saved_by_plain_peft(
    adapter: Path, text_model: Path, text_rows_files: dict[str, str], tmp_path: Path
) -> None:
    files = ("--train", text_rows_files["train"], "--held-out", text_rows_files["held_out"], "--cpu")
    base = {path: path.read_bytes() for path in text_model.rglob("*") if path.is_file()}
    values = run_json("gather", adapter, "--train", text_rows_files["train"], "--cpu")
    memory = GradientMemory.load(adapter)
    assert values["rows"] == ROWS and all("lora_" in name or "classifier" in name for name in memory.parameters)
    assert run_json("estimate", adapter, *files[:2], "--cpu")["bytes"]["memory"] == pytest.approx(
        memory.nbytes(), rel=0.2
    )
    request = ("--where", "number < 120")
    values = run_json("unlearn", adapter, *files, *request, "--output", tmp_path / "new", *STEP)
    assert values["applied"] and values["report"]["counts"]["forget_rows"] == 20
    assert {path.name for path in (tmp_path / "new").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "report.json", "_iau", "tokenizer.json",
    }  # fmt: skip
    assert not (tmp_path / "new" / "model.safetensors").exists()
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "new"))
    assert old.keys() == new.keys() and not any(torch.equal(old[name], new[name]) for name in old)
    assert {path: path.read_bytes() for path in text_model.rglob("*") if path.is_file()} == base

    # Plain PEFT reads it, and the next commands go on from it.
    plain = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(text_model), tmp_path / "new")
    GradientMemory.load(tmp_path / "new").check_model(plain)
    figures = run_json("evaluate", tmp_path / "new", *files, *request, "--retrained", adapter)["figures"]
    assert figures["model"]["forget_loss"] == pytest.approx(values["report"]["after"]["forget_loss"])
    assert figures["retrained"]["forget_loss"] == pytest.approx(values["report"]["before"]["forget_loss"])
    assert run("report", tmp_path / "new").stdout.startswith("Unlearning report: iau")
    assert "20 training rows were removed" in (tmp_path / "new" / "README.md").read_text()
    found = run_json("audit", tmp_path / "new", code=6)["findings"]
    assert [(finding["kind"], finding["removable"]) for finding in found] == [("memory", False)]
    assert run_json("unlearn", tmp_path / "new", *files, "--where", "number > 155", "--dry-run", *STEP)


def test_an_adapter_changed_in_place(
    adapter: Path, text_rows_files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_IAU_KEY", "k0123456789" * 4)
    files = ("--train", text_rows_files["train"], "--held-out", text_rows_files["held_out"], "--cpu")
    run("gather", adapter, "--train", text_rows_files["train"], "--cpu")
    before = load_file(adapter / "adapter_model.safetensors")
    arguments = ("unlearn", adapter, *files, "--where", "number < 120", "--in-place", *STEP)
    first, again = run_json(*arguments), run_json(*arguments)
    assert (first["applied"], again["applied"]) == (True, False)
    after = load_file(adapter / "adapter_model.safetensors")
    assert not any(torch.equal(after[name], before[name]) for name in before)
    assert run_json("ledger", adapter)["entries"][0]["rows"] == 20


def test_a_base_that_was_only_pretrained_gets_the_head_of_the_adapter(
    text_model: Path, text_rows_files: dict[str, str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(text_model, base, ignore=shutil.ignore_patterns("_iau"))
    bert(2).save_pretrained(base)  # Transformers' default for a model without classes of its own
    adapter = save_adapter(bert(3), TEXT_LORA, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    task = load_task(str(adapter))
    head = load_file(adapter / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(task.model.state_dict()["base_model.model.classifier.modules_to_save.default.weight"], head)
    assert (task.kind, task.model.config.num_labels) == ("text", 3)
    assert task.prepare(datasets.Dataset.from_dict({"text": ["w1"], "label": [2]}))["labels"][:] == [2]


def test_adapters_of_images(image_model: tuple[Path, str], tmp_path: Path) -> None:
    model, photos = image_model
    base = AutoModelForImageClassification.from_pretrained(model)
    adapter = save_adapter(
        base, LoraConfig(r=2, target_modules=["convolution"], modules_to_save=["classifier"]), tmp_path / "adapter"
    )
    run("gather", adapter, "--train", photos, "--cpu")
    values = run_json("unlearn", adapter, "--train", photos, "--where", "label == 'red'", "--dry-run", "--cpu", *STEP)
    assert values["report"]["counts"]["forget_rows"] == 8


def test_adapters_that_cannot_be_loaded(adapter: Path, text_rows_files: dict[str, str]) -> None:
    train = ("--train", text_rows_files["train"], "--cpu")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for changes, message in (
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/absent"}, "base model of the adapter"),
        ({"peft_type": "MAGIC"}, "adapter"),
        ({"r": 3}, "cannot be loaded"),
    ):
        path.write_text(json.dumps(config | changes))
        assert message in run_json("gather", adapter, *train, code=3)["message"], changes
    path.write_text("{")
    assert "cannot be loaded" in run_json("gather", adapter, *train, code=3)["message"]


# Language models


@pytest.fixture
def language_model(text_model: Path, tmp_path: Path) -> Path:
    """A Llama-style language model; its tokenizer has no padding token."""
    folder = tmp_path / "language"
    llama().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(text_model)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return folder


def test_a_language_model(language_model: Path, text_rows_files: dict[str, str], tmp_path: Path) -> None:
    files = ("--train", text_rows_files["train"], "--held-out", text_rows_files["held_out"], "--cpu")
    run("gather", language_model, *files[:2], "--cpu")
    memory = GradientMemory.load(language_model)
    assert memory.n_rows == ROWS and memory.n_targets == ROWS * 6  # five words between two marks; the first is given
    request = ("--where", "number < 120")
    values = run_json("unlearn", language_model, *files, *request, "--output", tmp_path / "new", *STEP)
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    GradientMemory.load(tmp_path / "new").check_model(new)
    assert weights_fingerprint(new) != weights_fingerprint(AutoModelForCausalLM.from_pretrained(language_model))
    figures = run_json("evaluate", tmp_path / "new", *files, *request)["figures"]["model"]
    assert figures["forget_loss"] == pytest.approx(values["report"]["after"]["forget_loss"])
    # The loss is that of a plain loop over single texts.
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    losses = []
    for text in datasets.Dataset.from_parquet(text_rows_files["train"])["text"][:20]:
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            losses.append(float(new(input_ids=tokens, labels=tokens)["loss"]))
    assert figures["forget_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert run("report", tmp_path / "new").stdout.startswith("Unlearning report: iau")


def test_an_adapter_of_a_language_model(language_model: Path, text_rows_files: dict[str, str], tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(language_model)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    adapter = save_adapter(base, config, tmp_path / "adapter")
    files: tuple[Any, ...] = ("--train", text_rows_files["train"], "--cpu")
    run("gather", adapter, *files)
    values = run_json("unlearn", adapter, *files, "--where", "number < 120", "--output", tmp_path / "new", *STEP)
    assert values["applied"] and (tmp_path / "new" / "adapter_model.safetensors").is_file()
    two = ("--input-column", "text", "--input-column", "label")
    assert "name one" in run_json("gather", adapter, *files, *two, code=3)["message"]
