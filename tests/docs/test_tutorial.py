"""The tutorial notebook and the code of the recipe pages run as they are printed."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tiny_models import bert
from transformers import TrainingArguments

from hf_iau import UnlearningTrainer
from hf_iau.methods import base

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))


def run_cell(source: str, names: dict[str, Any], name: str) -> Any:
    """Run a cell's code in `names` and return the value of its last line, as a notebook would show it."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), names)


@pytest.mark.slow
def test_every_cell_of_the_tutorial_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_IAU_KEY", "to be replaced by the notebook's own")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names: dict[str, Any] = {}
    shown = [
        run_cell("".join(cell["source"]), names, f"cell {number}")
        for number, cell in enumerate(NOTEBOOK["cells"])
        if cell["cell_type"] == "code"
    ]
    report = names["result"].report
    assert report.counts["forget_rows"] == 10
    assert report.after["forget_accuracy"] < report.before["forget_accuracy"]
    assert report.gap["mean_absolute"] < report.gap_before["mean_absolute"]
    assert (True, False) in shown, "the service answers a request that is made again, and does not run it twice"
    assert (True, 2) in shown, "the queued rows are forgotten, and the ledger has two entries"
    printed = capsys.readouterr().out
    assert "Unlearning report: iau" in printed and "ledger.jsonl" in printed


def test_the_tutorial_is_kept_without_outputs_that_could_grow_stale() -> None:
    assert all(not cell["outputs"] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")


def test_the_method_on_the_recipe_page_is_found_and_takes_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    (tmp_path / "recipe_page.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    recipe = importlib.import_module("recipe_page")

    model = bert(classes=2)
    rows = [{"input_ids": [1 + i % 5, 2 + i % 7], "attention_mask": [1, 1], "labels": i % 2} for i in range(40)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: torch.zeros_like(parameter) for name, parameter in before.items()}
    for number in (3, 8):
        model.zero_grad()
        model.eval()(**{name: torch.tensor([value]) for name, value in rows[number].items()}).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] += parameter.grad
    model.zero_grad()
    trainer = UnlearningTrainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    trainer.unlearn(forget_indices=[3, 8], method="ascent-step")
    eta = recipe.AscentStepConfig().eta
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name] + eta * gradients[name], rtol=1e-5, atol=1e-7)
