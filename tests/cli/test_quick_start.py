"""What answers at once: importing the package, `--help`, and every refusal of an argument."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hf_iau
from hf_iau import GatherConfig, available_methods
from hf_iau.cli.options import METHODS, GatherOptions

HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate", "scipy", "sklearn", "matplotlib")
WATCHED = f"""
import json, sys
def loaded():
    return sorted(set({HEAVY!r}) & set(sys.modules))
"""


def in_a_fresh_process(script: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", WATCHED + script, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = """
import hf_iau
from hf_iau import IAUError, MemoryFileError
from hf_iau.errors import ConfigError
print(json.dumps(loaded()))
"""
    assert in_a_fresh_process(script) == []


def test_every_public_name_is_there() -> None:
    assert all(getattr(hf_iau, name).__name__ for name in hf_iau.__all__)
    assert {*hf_iau.__all__, "__version__"} <= set(dir(hf_iau)) and hf_iau.__version__
    with pytest.raises(AttributeError, match="has no attribute 'magic'"):
        _ = hf_iau.magic
    names: dict[str, Any] = {}
    exec("from hf_iau import *", names)
    assert set(hf_iau.__all__) <= set(names)


def test_type_checkers_see_what_is_imported() -> None:
    """The imports under TYPE_CHECKING, and the table that imports on first use, name the same things."""
    tree = ast.parse(Path(hf_iau.__file__).read_text(encoding="utf-8"))
    seen = {
        alias.name: str(node.module)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == hf_iau._MODULES
    errors = {node.names[0].name for node in tree.body if isinstance(node, ast.ImportFrom)} - {"TYPE_CHECKING"}
    assert errors and set(seen) < set(hf_iau.__all__)


def test_the_lists_of_the_command_line_are_those_of_the_package() -> None:
    assert list(METHODS) == available_methods()
    ours, theirs = GatherOptions(), GatherConfig()
    for name in ("gradient_sum", "curvature", "curvature_rows"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_arguments_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    model, ids, text = tmp_path / "model", tmp_path / "ids.txt", tmp_path / "rows.txt"
    for folder in (model, tmp_path / "empty"):
        folder.mkdir()
    (model / "config.json").write_text("{}")
    (tmp_path / "rows.csv").write_text("text,label\na,0\n")
    text.write_text("a\n")
    ids.write_text("u1\n")
    given = ["unlearn", str(model), "--train", str(tmp_path / "rows.csv")]
    asked = [*given, "--where", "label == 0"]
    cases: list[tuple[list[str], int, str]] = [
        (["--help"], 0, "Usage"),
        *(([name, "--help"], 0, "Usage") for name in ("gather", "estimate", "unlearn", "evaluate", "ledger", "demo")),
        (["magic"], 2, "No such command"),
        ([*asked, "--magic"], 2, "No such option"),
        (["unlearn", str(model)], 2, "Missing option"),
        ([*asked, "--batch-size", "many"], 2, "Invalid value for '--batch-size'"),
        ([*asked, "--max-length", "0"], 2, "Invalid value for '--max-length'"),
        (["gather", str(tmp_path / "absent"), *given[2:]], 3, "does not exist"),
        (["gather", str(tmp_path / "empty"), *given[2:]], 3, "has no config.json"),
        (["gather", str(text), *given[2:]], 3, "is a file"),
        (["gather", "org/name", *given[2:]], 3, "say by --output"),
        (["gather", *given[1:], "--gradient-sum", "all"], 3, "choose full, sampled or none"),
        (["gather", *given[1:], "--curvature", "all"], 3, "choose ekfac"),
        ([*given[:3], "absent.csv", "--where", "label == 0"], 3, "there is no such file"),
        ([*given[:3], "data/absent.parquet:train[:9]", "--where", "label == 0"], 3, "there is no such file"),
        ([*given[:3], str(text), "--where", "label == 0"], 3, "its suffix is not known"),
        ([*asked, "--held-out", "./absent", "--dry-run"], 3, "there is no such file"),
        ([*asked, "--retrained", "./absent", "--dry-run"], 3, "does not exist"),
        ([*given, "--dry-run"], 3, "either --ids-file or --where"),
        ([*asked, "--ids-file", str(ids), "--dry-run"], 3, "either --ids-file or --where"),
        ([*asked, "--id-column", "user", "--dry-run"], 3, "--id-column goes with --ids-file"),
        ([*given, "--ids-file", str(tmp_path / "absent"), "--dry-run"], 3, "cannot be read"),
        ([*given, "--ids-file", str(ids), "--dry-run"], 3, "no whole number"),
        ([*given, "--where", "label ==", "--dry-run"], 3, "cannot be read"),
        ([*given, "--where", "open('x')", "--dry-run"], 3, "not allowed in a condition"),
        ([*asked, "--dry-run", "--method", "magic"], 3, "choose one of bad-teacher"),
        ([*asked, "--dry-run", "--config", "{"], 3, "is no JSON"),
        ([*asked, "--dry-run", "--config", "3"], 3, "give a JSON object"),
        ([*asked, "--dry-run", "--task", "audio"], 3, "choose text, image or language"),
        ([*asked, "--dry-run", "--memory", str(tmp_path / "absent")], 5, "No gradient memory"),
        (asked, 3, "--output FOLDER, --in-place, or --dry-run"),
        ([*asked, "--output", str(model)], 3, "is not empty"),
        ([*asked, "--dry-run", "--in-place"], 3, "--in-place changes the model's own folder"),
        ([*asked, "--dry-run", "--request-id", "mine"], 3, "it needs --in-place"),
        (["report", str(tmp_path / "absent")], 3, "There is no report"),
        (["audit", str(tmp_path / "absent")], 3, "no folder"),
        (["audit", str(model), "--purge", "--json"], 3, "add --yes"),
        (["ledger", str(tmp_path / "absent")], 3, "no folder"),
    ]
    script = """
from typer.testing import CliRunner
from hf_iau.cli.commands import app
answers = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    answers.append([result.exit_code, result.stdout + result.stderr, loaded()])
print(json.dumps(answers))
"""
    answers = in_a_fresh_process(script, json.dumps([arguments for arguments, _, _ in cases]))
    for (arguments, code, words), (got, printed, loaded) in zip(cases, answers, strict=True):
        assert (got, loaded) == (code, []), (arguments, printed)
        assert words in printed, (arguments, printed)


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_the_command_line_says_what_to_install(missing: str) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; from hf_iau.cli import main; main()"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 1 and finished.stdout == ""
    assert finished.stderr == (
        f'Error: The command line needs {missing}, which is not installed: pip install "hf-iau[cli]".\n'
    )
