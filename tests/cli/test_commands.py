"""The command line on tiny local models: what each command does, prints and ends with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command, launch_command_parser
from command_runner import HELD_OUT, ROWS, run, run_json
from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_iau import GradientMemory, UnlearningReport
from hf_iau.cli.task import load_task
from hf_iau.cli.task_rows import load_rows
from hf_iau.deletion.ledger import Ledger
from hf_iau.memory.fingerprints import weights_fingerprint

STEP = ("--config", '{"scale": 0.1, "damping": 0.1}')


@pytest.fixture(scope="session")
def gathered(text_model: Path, text_rows_files: dict[str, str]) -> Path:
    """The text model's folder, with its memory."""
    run("gather", text_model, "--train", text_rows_files["train"], "--cpu")
    return text_model


def others(files: dict[str, str]) -> tuple[str, ...]:
    return ("--train", files["train"], "--held-out", files["held_out"], "--test", files["test"], "--cpu")


def test_preparing_rows_does_not_pickle_the_model(
    text_model: Path, text_rows_files: dict[str, str], image_model: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data sets hash what they are mapped with: a model would be written out anew for each of them."""

    pickled = []
    reduce = nn.Module.__reduce_ex__

    def watched(module: nn.Module, protocol: Any) -> Any:
        pickled.append(type(module).__name__)
        return reduce(module, protocol)

    monkeypatch.setattr(nn.Module, "__reduce_ex__", watched)
    for model, rows, column in (
        (text_model, text_rows_files["train"], "text"),
        (image_model[0], image_model[1], "image"),
    ):
        task = load_task(str(model), input_columns=(column,))
        prepared = task.prepare(load_rows(rows))
        first = prepared[0]
        assert {"input_ids", "labels"} <= first.keys() or tuple(first["pixel_values"].shape) == (3, 8, 8)
    assert not pickled


def test_gather_writes_the_memory(text_model: Path, text_rows_files: dict[str, str], tmp_path: Path) -> None:
    values = run_json(
        "gather", text_model, "--train", text_rows_files["train"], "--output", tmp_path / "memory", "--cpu",
        "--gradient-sum", "full", "--curvature", "diagonal",
    )  # fmt: skip
    memory = GradientMemory.load(tmp_path / "memory")
    memory.check_model(AutoModelForSequenceClassification.from_pretrained(text_model))
    assert (memory.n_rows, memory.gradient_sum_kind) == (ROWS, "full")
    assert (values["rows"], values["curvature"]) == (ROWS, "diagonal")


def test_estimate_of_what_gathering_will_cost(
    text_model: Path, text_rows_files: dict[str, str], tmp_path: Path
) -> None:
    train = ("--train", text_rows_files["train"], "--cpu", "--gradient-sum", "full")
    expected = run_json("estimate", text_model, *train, "--request-rows", 5)
    run("gather", text_model, *train, "--output", tmp_path / "memory")
    assert expected["bytes"]["memory"] == pytest.approx(GradientMemory.load(tmp_path / "memory").nbytes(), rel=0.2)
    assert expected["rows"]["training"] == ROWS and expected["seconds"]["gather"] > 0
    assert "MiB" in run("estimate", text_model, *train).stdout
    run_json("estimate", text_model, *train, "--request-rows", ROWS, code=3)


def test_unlearn_writes_a_new_model(gathered: Path, text_rows_files: dict[str, str], tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in gathered.rglob("*") if path.is_file()}
    ids = tmp_path / "ids.txt"
    ids.write_text("".join(f"{number}\n" for number in range(24)))
    values = run_json(
        "unlearn", gathered, *others(text_rows_files), "--ids-file", ids, "--output", tmp_path / "new", *STEP
    )
    assert values["applied"] is True and values["report"]["counts"]["forget_rows"] == 24
    assert values["report"]["counts"]["test_rows"] == HELD_OUT
    assert {path: path.read_bytes() for path in gathered.rglob("*") if path.is_file()} == before

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")
    memory = GradientMemory.load(tmp_path / "new")
    memory.check_model(model)
    assert memory.n_rows == ROWS - 24
    old = AutoModelForSequenceClassification.from_pretrained(gathered)
    assert weights_fingerprint(model) != weights_fingerprint(old)
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("w1")["input_ids"]
    assert UnlearningReport.load(tmp_path / "new").to_dict() == values["report"]
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert card.data.base_model == "org/base" and "machine-unlearning" in card.data.tags
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "ids.txt", "new"]

    # A second request goes on from there, with its card; the same rows again are no request.
    run_json("unlearn", tmp_path / "new", *others(text_rows_files), "--where", "number >= 155", "--output",
             tmp_path / "newer", *STEP)  # fmt: skip
    assert "29 training rows were removed from this model's weights in 2 requests" in (
        (tmp_path / "newer" / "README.md").read_text()
    )
    assert run("report", tmp_path / "newer").stdout.startswith("Unlearning report: iau")
    assert run("report", tmp_path / "newer" / "report.json", "--markdown").stdout.startswith("# Unlearning report")
    assert run_json("report", tmp_path / "newer")["counts"]["forget_rows"] == 5


def test_rows_by_the_ids_of_people(gathered: Path, text_rows_files: dict[str, str], tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    for content, column in (('["u3", "u7"]', "user_id"), ("106\n107\n114\n115\n", "number")):
        ids.write_text(content)
        values = run_json("unlearn", gathered, *others(text_rows_files), "--ids-file", ids, "--id-column", column,
                          "--dry-run", *STEP)  # fmt: skip
        assert values["applied"] is False and values["report"]["counts"]["forget_rows"] == 4
    ids.write_text("u3\nnobody\n")
    refused = run_json("unlearn", gathered, *others(text_rows_files), "--ids-file", ids, "--id-column", "user_id",
                       "--dry-run", *STEP, code=3)  # fmt: skip
    assert "at position 1" in refused["message"] and "nobody" not in refused["message"] and refused["exit_code"] == 3


def test_in_place_is_served_once(
    text_model: Path, text_rows_files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(text_model, tmp_path / "model", ignore=shutil.ignore_patterns("_iau")))
    monkeypatch.setenv("HF_IAU_KEY", "k0123456789" * 4)
    run("gather", folder, "--train", text_rows_files["train"], "--cpu")
    old = weights_fingerprint(AutoModelForSequenceClassification.from_pretrained(folder))
    arguments = ("unlearn", folder, *others(text_rows_files), "--where", "number < 120", "--in-place", *STEP)
    first, again = run_json(*arguments), run_json(*arguments)
    assert (first["applied"], again["applied"]) == (True, False)
    assert first["ledger_entry"] == again["ledger_entry"] and first["ledger_entry"]["number"] == 1
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert weights_fingerprint(model) != old
    GradientMemory.load(folder).check_model(model)
    listed = run_json("ledger", folder, "--head", first["ledger_entry"]["mac"], "--count", 1)
    assert listed["entries"][0]["rows"] == 20
    assert (folder / "README.md").read_text().count("20 training rows were removed") == 1
    assert {finding["kind"] for finding in run_json("audit", folder, code=6)["findings"]} == {"ledger", "memory"}


def test_dry_run_writes_the_report_alone(gathered: Path, text_rows_files: dict[str, str], tmp_path: Path) -> None:
    run("unlearn", gathered, *others(text_rows_files), "--where", 'label == "red"', "--dry-run", "--output",
        tmp_path / "new", *STEP)  # fmt: skip
    assert (
        sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json", "report.md"]
        or (tmp_path / "new" / "loss_histograms.png").is_file()
    )
    assert not list((tmp_path / "new").glob("*.safetensors"))


def test_strict_writes_no_model_to_be_retrained(
    gathered: Path, text_rows_files: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("unlearn", gathered, *others(text_rows_files), "--where", "number < 150")
    step = ("--config", '{"scale": 50.0, "damping": 0.001, "max_relative_step": 0.9}')
    values = run_json(*arguments, *step, "--strict", "--output", tmp_path / "new", code=4)
    assert values["applied"] is False and values["report"]["verdict"] == "retrain"
    assert not list((tmp_path / "new").glob("*.safetensors")) and (tmp_path / "new" / "report.json").is_file()
    assert run_json(*arguments, *step, "--output", tmp_path / "other")["applied"] is True


def test_evaluate_measures_and_compares(gathered: Path, text_rows_files: dict[str, str], tmp_path: Path) -> None:
    arguments = ("evaluate", gathered, *others(text_rows_files), "--where", "number < 125")
    values = run_json(*arguments, "--retrained", gathered)
    assert values["figures"]["model"]["forget_loss"] == values["figures"]["retrained"]["forget_loss"] > 0
    assert values["gaps"]["model"]["mean_absolute"] == 0.0 and values["gaps"]["retrained"] is None
    assert "accuracy, forget rows" in run(*arguments).stdout


def test_images(image_model: tuple[Path, str], tmp_path: Path) -> None:
    model, photos = image_model
    run("gather", model, "--train", photos, "--output", tmp_path / "memory", "--cpu")
    ids = tmp_path / "ids.json"
    ids.write_text("[0, 5, 9]")
    arguments = ("unlearn", model, "--train", photos, "--memory", tmp_path / "memory", "--cpu", *STEP)
    values = run_json(*arguments, "--ids-file", ids, "--output", tmp_path / "new")
    assert values["report"]["counts"]["forget_rows"] == 3 and (tmp_path / "new" / "preprocessor_config.json").is_file()
    assert run_json(*arguments, "--where", "label == 'red'", "--dry-run")["report"]["counts"]["forget_rows"] == 8


# --- audit, ledger, demo ----------------------------------------------------------------------------------------------


def test_audit_lists_asks_and_purges(text_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(text_model, tmp_path / "model", ignore=shutil.ignore_patterns("_iau")))
    assert "Nothing found" in run("audit", folder).stdout
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"x" * 2000)
    values = run_json("audit", folder, code=6)
    assert [(Path(f["path"]).name, f["bytes"]) for f in values["findings"]] == [("checkpoint-5", 2000)]
    assert "checkpoint-5" in run("audit", folder, code=6).stdout
    run("audit", folder, "--purge", stdin="n\n", code=6)
    assert (folder / "checkpoint-5").is_dir()
    assert "add --yes" in run_json("audit", folder, "--purge", code=3)["message"]
    run("audit", folder, "--purge", stdin="y\n")
    assert not (folder / "checkpoint-5").exists() and (folder / "model.safetensors").is_file()
    (folder / "optimizer.pt").write_bytes(b"x")
    assert run_json("audit", folder, "--purge", "--yes")["bytes_freed"] == 1


def test_ledger_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "HF_IAU_KEY" in run_json("ledger", tmp_path, code=3)["message"]
    monkeypatch.setenv("HF_IAU_KEY", "k0123456789" * 4)
    assert run_json("ledger", tmp_path, code=6)["count"] == 0
    assert "There is no ledger in" in run("ledger", tmp_path, code=6).stderr
    entries = [
        Ledger.of(tmp_path).append(
            request=f"{number:032x}",
            training_run="",
            rows=3,
            row_ids=["0" * 32] * 3,
            method="iau",
            config={},
            calibration=None,
            weights_before="0" * 32,
            weights_after="1" * 32,
            outcome={"verdict": "ok"},
            versions={},
            files={},
        )
        for number in range(3)
    ]
    values = run_json("ledger", tmp_path, "--head", entries[1].mac, "--count", 2)
    assert values["head"] == entries[2].mac and [entry["verdict"] for entry in values["entries"]] == ["ok"] * 3
    assert "Verified" in run("ledger", tmp_path).stdout
    path = tmp_path / "_iau" / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1]))
    assert run_json("ledger", tmp_path)["count"] == 1
    assert "cut" in run_json("ledger", tmp_path, "--head", entries[1].mac, code=8)["message"]
    path.write_text(lines[0].replace('"rows":3', '"rows":2'))
    assert "edited" in run_json("ledger", tmp_path, code=8)["message"]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--where", "number < 110"), 3, "--output FOLDER, --in-place, or --dry-run"),
        (("--dry-run", "--in-place", "--where", "number < 110"), 3, "--in-place changes the model's own folder"),
        (("--dry-run",), 3, "either --ids-file or --where"),
        (("--dry-run", "--where", "a", "--ids-file", "b"), 3, "either --ids-file or --where"),
        (("--dry-run", "--where", "number < 110", "--id-column", "user_id"), 3, "--id-column goes with"),
        (("--dry-run", "--where", "number < 0"), 3, "No training row meets"),
        (("--dry-run", "--where", "colour == 3"), 3, "names a column 'colour'"),
        (("--dry-run", "--where", "__import__('os').system('x')"), 3, "not allowed in a condition"),
        (("--dry-run", "--ids-file", "/absent"), 3, "cannot be read"),
        (("--dry-run", "--where", "number < 110", "--method", "magic"), 3, "is unknown"),
        (("--dry-run", "--where", "number < 110", "--config", "{"), 3, "is no JSON"),
        (("--dry-run", "--where", "number < 110", "--config", "[]"), 3, "give a JSON object"),
        (("--dry-run", "--where", "number < 110", "--config", '{"magic": 1}'), 3, "do not fit"),
        (("--dry-run", "--where", "number < 110", "--memory", "/absent"), 5, "No gradient memory"),
        (("--dry-run", "--where", "number < 110", "--label-column", "colour"), 3, "no column 'colour'"),
        (("--dry-run", "--where", "number < 110", "--label-column", "user_id"), 3, "does not know"),
        (("--dry-run", "--where", "number < 110", "--input-column", "body"), 3, "no column 'body'"),
        (("--dry-run", "--where", "number < 110", "--task", "audio"), 3, "choose text, image or language"),
        (("--dry-run", "--where", "number < 110", "--held-out", "/absent.csv"), 3, "cannot be loaded"),
        (("--dry-run", "--where", "number < 110", "--max-length", "3", *STEP), 5, "gathered from"),
        (("--dry-run", "--where", "number < 110", "--max-length", "0"), 2, None),
        (("--magic",), 2, None),
    ],
)
def test_refusals(
    gathered: Path, text_rows_files: dict[str, str], arguments: tuple[str, ...], code: int, message: str | None
) -> None:
    given = ("unlearn", gathered, "--train", text_rows_files["train"], "--cpu", *arguments)
    if message is None:
        run(*given, code=code)
    else:
        values = run_json(*given, code=code)
        assert message in values["message"] and values["exit_code"] == code


def test_more_refusals(gathered: Path, text_rows_files: dict[str, str], tmp_path: Path) -> None:
    train = ("--train", text_rows_files["train"], "--cpu")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    taken = ("unlearn", gathered, *train, "--where", "number < 110", "--output", tmp_path / "full")
    assert "not empty" in run_json(*taken, code=3)["message"]
    assert "cannot be loaded" in run_json("gather", tmp_path / "full", *train, code=3)["message"]
    assert "cannot be loaded" in run_json("gather", gathered, "--train", tmp_path / "absent.parquet", code=3)["message"]
    assert "say by --output" in run_json("gather", "org/absent", *train, code=3)["message"]
    ids = tmp_path / "ids"
    for content, message in (("u1", "no whole number"), ("", "empty"), ("[1.5]", "no id"), ("[", "cannot be read")):
        ids.write_text(content)
        assert message in run_json("evaluate", gathered, *train, "--ids-file", ids, code=3)["message"]
    ids.write_text("[3, 60]")
    assert "Row 60" in run_json("evaluate", gathered, *train, "--ids-file", ids, code=3)["message"]
    assert "no folder" in run_json("audit", tmp_path / "absent", code=3)["message"]
    run_json("report", tmp_path / "absent", code=3)
    unmemorable = Path(shutil.copytree(gathered, tmp_path / "bare", ignore=shutil.ignore_patterns("_iau")))
    run_json("unlearn", unmemorable, *train, "--where", "number < 110", "--dry-run", code=5)


def test_code_of_a_model_is_not_run(text_model: Path, text_rows_files: dict[str, str], tmp_path: Path) -> None:
    """A folder whose configuration names code of its own: refused unless `--trust-remote-code` is given."""
    folder = Path(shutil.copytree(text_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused = run_json("gather", folder, "--train", text_rows_files["train"], "--cpu", code=3)
    assert "custom code" in refused["message"] and not (tmp_path / "ran").exists()


def test_an_unexpected_error_is_told(gathered: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("hf_iau.cli.records.audit", fail)
    values = run_json("audit", tmp_path, code=1)
    assert values == {
        "error": "ZeroDivisionError",
        "message": "ZeroDivisionError: oh (--debug shows where)",
        "exit_code": 1,
    }
    assert "Traceback" in run("audit", tmp_path, "--debug", code=1).stderr


def test_as_a_module_and_under_accelerate(
    gathered: Path,
    text_rows_files: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Accelerate's launcher is called here; the process that it starts is a new one."""
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    launcher = ["--cpu", "--num_processes", "1", "-m", "hf_iau"]
    arguments = ["evaluate", str(gathered), *others(text_rows_files), "--where", "number < 130", "--json"]
    launch_command(launch_command_parser().parse_args([*launcher, *arguments]))  # raises unless it ends with 0
    assert json.loads(capfd.readouterr().out)["figures"]["model"]["forget_loss"] > 0
