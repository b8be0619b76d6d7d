"""Tiny classifiers on disk, with files of rows, for the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from command_runner import HELD_OUT, ROWS
from PIL import Image
from tiny_models import bert, resnet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViTImageProcessor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{number}" for number in range(20))]
NAMES = ["red", "green", "blue"]


def text_columns(n: int, seed: int) -> dict[str, list[Any]]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, n)
    texts = [" ".join(f"w{word}" for word in [6 * label, *random.integers(0, 20, 4)]) for label in labels]
    return {
        "text": texts,
        "label": [NAMES[label] for label in labels],
        "user_id": [f"u{number // 2}" for number in range(n)],
        "number": list(range(100, 100 + n)),
    }


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT-style classifier and its tokenizer."""
    folder = tmp_path_factory.mktemp("text") / "model"
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **special).save_pretrained(folder)
    bert(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)}).save_pretrained(folder)
    (folder / "README.md").write_text("---\nbase_model: org/base\n---\n# Mine\n")
    return folder


@pytest.fixture(scope="session")
def text_rows_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Training rows in parquet, held-out rows in csv, test rows in jsonl."""
    folder = tmp_path_factory.mktemp("rows")
    paths = {"train": folder / "train.parquet", "held_out": folder / "held_out.csv", "test": folder / "test.jsonl"}
    datasets.Dataset.from_dict(text_columns(ROWS, 0)).to_parquet(paths["train"])
    datasets.Dataset.from_dict(text_columns(HELD_OUT, 1)).to_csv(paths["held_out"])
    datasets.Dataset.from_dict(text_columns(HELD_OUT, 2)).to_json(paths["test"])
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A ResNet-style classifier with its image processor, and a folder of images, a folder a class."""
    folder = tmp_path_factory.mktemp("images")
    model = folder / "model"
    resnet(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)}).save_pretrained(model)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(model)
    random = np.random.default_rng(0)
    for number in range(24):
        path = folder / "photos" / NAMES[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (8, 8, 3)).astype(np.uint8)).save(path)
    return model, str(folder / "photos")


@pytest.fixture(autouse=True)
def _caches_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
