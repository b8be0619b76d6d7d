"""The scripts in `examples/`, run as a user runs them, on tiny data and without network."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from hf_iau import GradientMemory

EXAMPLES = Path(__file__).parents[2] / "examples"
FIGURES = {"forget_accuracy", "retain_accuracy", "test_accuracy", "mia_auc"}


def run_script(name: str, *arguments: object, folder: Path) -> str:
    """Run one example in this process, which has imported the libraries already; returns what it printed."""
    printed, threads = io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        patched.setattr(sys, "argv", [name, *map(str, arguments)])
        patched.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        try:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
    return printed.getvalue()


def load_script(name: str) -> ModuleType:
    """An example as a module, without running it."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


def read_report(folder: Path, models: tuple[str, ...]) -> dict:
    """The report in `folder`, after a look at what every report must hold."""
    report = json.loads((folder / "report.json").read_text())
    for model in models:
        assert set(report[model]) >= FIGURES
        assert all(0.0 <= report[model][figure] <= 1.0 for figure in FIGURES)
    assert sum(report["seconds"].values()) > 0
    assert report["config"]["max_relative_step"] > 0
    assert report["diagnostics"]["step_norm"] > 0
    assert "before" in (folder / "report.md").read_text()
    assert (folder / "loss_histograms.png").read_bytes().startswith(b"\x89PNG")
    return report


def test_demo_writes_a_complete_report(tmp_path: Path) -> None:
    printed = run_script("demo.py", "--quick", "--output_dir", tmp_path / "demo", folder=tmp_path)
    report = read_report(tmp_path / "demo", ("before", "after", "retrained"))
    assert report["method"] == "iau" and report["calibrated"] is True
    assert report["counts"]["forget_rows"] == 25
    assert report["noise_floor"]["gap"]["mean_absolute"] >= 0.0
    for word in ("before", "after", "retrained", "retrained again", "mean gap to retrained"):
        assert word in printed


@pytest.fixture(scope="module")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and test texts of three classes, each with words of its own."""
    folder = tmp_path_factory.mktemp("texts")
    random = np.random.default_rng(0)
    words = np.array([f"{kind}{number}" for kind in ("red", "green", "blue") for number in range(8)])
    paths = []
    for name, size in (("train", 260), ("test", 60)):
        labels = random.integers(0, 3, size)
        texts = [
            " ".join([*words[8 * label + random.integers(0, 8, 4)], *words[random.integers(0, 24, 2)]])
            for label in labels
        ]
        names = [("r", "g", "b")[label] for label in labels]
        paths.append(folder / f"{name}.parquet")
        datasets.Dataset.from_dict({"text": texts, "label": names}).to_parquet(paths[-1])
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def image_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Training and test images of three classes: where the bright patch is."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    paths = []
    for name, size in (("train", 260), ("test", 60)):
        labels = random.integers(0, 3, size)
        pixels = random.integers(0, 120, (size, 12, 12)).astype(np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[:, 4 * label : 4 * label + 4] += 100
        rows = {"image": [Image.fromarray(image) for image in pixels], "label": labels}
        paths.append(folder / f"{name}.parquet")
        datasets.Dataset.from_dict(rows, features=features).to_parquet(paths[-1])
    return paths[0], paths[1]


COMMON = ("--held_out_rows", 100, "--save_strategy", "no", "--num_train_epochs", 2, "--disable_tqdm", "true")
COMMON += ("--per_device_train_batch_size", 32)


def test_text_classification_on_local_files(tmp_path: Path, text_files: tuple[Path, Path]) -> None:
    ids = tmp_path / "forget.json"
    train = ["--train_file", text_files[0], "--test_file", text_files[1], "--from_config", "bert", *COMMON]
    small = '{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}'
    train += ["--config_overrides", small, "--output_dir", tmp_path / "out", "--seed", 0]
    held_out = set(np.sort(np.random.default_rng(0).permutation(260)[:100]).tolist())
    ids.write_text(json.dumps([row for row in range(260) if row not in held_out][::6]))
    run_script(
        "text_classification.py",
        *train,
        *("--forget_ids_file", ids, "--retrain", "--gradient_sum", "full"),
        folder=tmp_path,
    )
    report = read_report(tmp_path / "out", ("before", "after", "retrained"))
    assert report["counts"]["forget_rows"] == 27 and report["noise_floor"] is None

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {0: "b", 1: "g", 2: "r"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("red1 blue2")["input_ids"]
    memory = GradientMemory.load(tmp_path / "out" / "_iau")
    memory.check_model(model)
    assert memory.n_rows == 160 - 27 and memory.gradient_sum is not None


def test_image_classification_on_local_files(tmp_path: Path, image_files: tuple[Path, Path]) -> None:
    arguments = ["--train_file", image_files[0], "--test_file", image_files[1], "--from_config", "resnet", *COMMON]
    overrides = '{"embedding_size": 8, "depths": [1], "hidden_sizes": [8]}'
    arguments += ["--config_overrides", overrides, "--output_dir", tmp_path / "out", "--noise_floor"]
    run_script("image_classification.py", *arguments, "--forget_fraction", 0.2, folder=tmp_path)
    report = read_report(tmp_path / "out", ("before", "after", "retrained"))
    assert report["counts"]["forget_rows"] == 32
    assert report["noise_floor"]["gap"]["mean_absolute"] >= 0.0

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_channels == 1
    GradientMemory.load(tmp_path / "out" / "_iau").check_model(model)


@pytest.mark.parametrize("name", ["text_classification", "image_classification"])
def test_rows_to_forget_are_checked(tmp_path: Path, name: str) -> None:
    script = load_script(name)
    train_ids, file = np.array([2, 3, 5, 8]), tmp_path / "ids.txt"
    file.write_text("8\n3\n")
    request = script.UnlearnArguments(forget_ids_file=str(file))
    assert script.choose_forget_rows(request, train_ids).tolist() == [3, 1]
    file.write_text("[3, 4]")
    with pytest.raises(ValueError, match=r"--forget_ids_file were not trained on, e\.g\. row 4"):
        script.choose_forget_rows(request, train_ids)
    with pytest.raises(ValueError, match="--forget_ids_file or --forget_fraction"):
        script.choose_forget_rows(script.UnlearnArguments(), train_ids)
    drawn = script.choose_forget_rows(script.UnlearnArguments(forget_fraction=0.5), train_ids)
    assert len(drawn) == 2 and set(drawn) <= set(range(4))
