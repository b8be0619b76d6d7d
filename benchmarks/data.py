"""Data sets as training, held-out and test splits in memory."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_CIFAR10_MEAN, _CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
_CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_LONGEST_TEXT = 64
_SHIFT = 4


class TensorRows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images and labels in memory, one dictionary a row."""

    def __init__(self, pixel_values: Tensor, labels: Tensor) -> None:
        self.pixel_values = pixel_values
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixel_values[row], "labels": self.labels[row]}


class AugmentedRows(TensorRows):
    """Images shifted by up to four pixels and mirrored at random, each time anew: the usual augmentation of CIFAR."""

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        values = super().__getitem__(row)
        image = values["pixel_values"]
        height, width = image.shape[1:]
        padded = torch.nn.functional.pad(image, (_SHIFT, _SHIFT, _SHIFT, _SHIFT))
        top, left = torch.randint(0, 2 * _SHIFT + 1, (2,)).tolist()
        image = padded[:, top : top + height, left : left + width]
        return values | {"pixel_values": image.flip(2) if torch.rand(()) < 0.5 else image}


def stack_rows(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Collator of `TensorRows`."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


@dataclass(frozen=True)
class Split:
    """Rows of one split.

    Attributes:
        labels: int64, one class a row.
        pixel_values: float32, (rows, channels, height, width), or (rows, columns) of a table; None for text.
        texts: strings, or None for images.
    """

    labels: np.ndarray
    pixel_values: Tensor | None = None
    texts: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> Split:
        """The rows at these positions, in this order."""
        return Split(
            self.labels[rows],
            None if self.pixel_values is None else self.pixel_values[torch.from_numpy(rows)],
            None if self.texts is None else tuple(self.texts[i] for i in rows),
        )

    def with_labels(self, labels: np.ndarray) -> Split:
        """The same rows with other labels."""
        return replace(self, labels=labels)

    def dataset(
        self, tokenizer: PreTrainedTokenizerBase | None = None, *, table: bool = False, augmented: bool = False
    ) -> Any:
        """What a Trainer takes: tensors in memory for images, a tokenized `datasets.Dataset` for text.

        Args:
            tokenizer: for text.
            table: a `datasets.Dataset` for images too, which knows its label counts (slower to read).
            augmented: images that are shifted and mirrored at random, for training alone.
        """
        if self.texts is not None:
            if tokenizer is None:
                raise ValueError("dataset(tokenizer=None): text needs a tokenizer.")
            tokens = tokenizer(list(self.texts), truncation=True, max_length=_LONGEST_TEXT)
            columns = {name: tokens[name] for name in ("input_ids", "attention_mask")}
            return datasets.Dataset.from_dict({**columns, "labels": self.labels.tolist()})
        assert self.pixel_values is not None
        if not table:
            rows = AugmentedRows if augmented else TensorRows
            return rows(self.pixel_values, torch.from_numpy(self.labels))
        shape = tuple(self.pixel_values.shape[1:])
        features = datasets.Features(
            {"pixel_values": datasets.Array3D(shape, "float32"), "labels": datasets.Value("int64")}
        )
        columns = {"pixel_values": self.pixel_values.numpy(), "labels": self.labels}
        return datasets.Dataset.from_dict(columns, features=features).with_format("torch")


@dataclass(frozen=True)
class Splits:
    """What a benchmark trains on, calibrates with and scores on; no row is in two of them.

    Attributes:
        train, held_out, test: the rows.
        n_classes: of all of them.
        train_ids: of each training row, its number in the data set's own training split.
    """

    train: Split
    held_out: Split
    test: Split
    n_classes: int
    train_ids: np.ndarray


def load_splits(name: str, data: Path | None, *, train_rows: int, held_out_rows: int, test_rows: int) -> Splits:
    """The first rows of a fixed permutation of the training pool, then held-out rows of it, and test rows.

    Args:
        name: `cifar10`, `fashion_mnist`, `banking77`, `digits`, `breast_cancer` or `synthetic` (the last three need no
            data); for `tofu` see `benchmarks.question_answers`.
        data: the folder or file with the data, or a folder that has it under `name`.
        train_rows, held_out_rows, test_rows: how many of each.

    Raises:
        ValueError: unknown name, no data, or too few rows.
    """
    if name not in _LOADERS:
        raise ValueError(f"data {name!r} is unknown: choose one of {', '.join(_LOADERS)}.")
    pool, test = _LOADERS[name](folder_of(name, data))
    n_classes = int(pool.labels.max()) + 1
    if len(pool) < train_rows + held_out_rows or len(test) < test_rows:
        raise ValueError(
            f"{name} has {len(pool)} training and {len(test)} test rows, too few for {train_rows} training, "
            f"{held_out_rows} held-out and {test_rows} test rows."
        )
    order = np.random.default_rng(0).permutation(len(pool))
    test_order = np.random.default_rng(1).permutation(len(test))[:test_rows]
    return Splits(
        train=pool.select(order[:train_rows]),
        held_out=pool.select(order[train_rows : train_rows + held_out_rows]),
        test=test.select(test_order),
        n_classes=n_classes,
        train_ids=order[:train_rows],
    )


def folder_of(name: str, data: Path | None) -> Path | None:
    """The folder of a data set in the folder of all, where there is one."""
    return data / name if data is not None and (data / name).is_dir() else data


def _required(name: str, data: Path | None) -> Path:
    if data is None or not data.exists():
        raise ValueError(f"--data {data}: pass the folder (or file) with {name}; see benchmarks/README.md.")
    return data


def _cifar10(data: Path | None) -> tuple[Split, Split]:
    data = _required("cifar10", data)
    if data.is_file():
        arrays = np.load(data)
        parts = [(arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])]
    elif (data / "train.parquet").is_file():
        parts = [_parquet_images(data / f"{part}.parquet") for part in ("train", "test")]
    else:
        parts = [_png_images(data / part) for part in ("train", "test")]
    pool, test = (Split(y.astype(np.int64), _normalised(x, _CIFAR10_MEAN, _CIFAR10_STD)) for x, y in parts)
    return pool, test


def _fashion_mnist(data: Path | None) -> tuple[Split, Split]:
    data = _required("fashion_mnist", data)
    parts = [_parquet_images(data / f"{part}.parquet") for part in ("train", "test")]
    pool, test = (Split(y.astype(np.int64), _normalised(x, (0.2860,), (0.3530,))) for x, y in parts)
    return pool, test


def _banking77(data: Path | None) -> tuple[Split, Split]:
    import pyarrow.parquet

    data = _required("banking77", data)
    parts = []
    for part in ("train", "test"):
        table = pyarrow.parquet.read_table(data / f"{part}.parquet", columns=["text", "label"])
        labels = np.asarray(table["label"].to_pylist(), dtype=np.int64)
        parts.append(Split(labels, texts=tuple(table["text"].to_pylist())))
    return parts[0], parts[1]


def _digits(data: Path | None) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images[:, None].astype(np.float32) / 8.0 - 1.0)
    rows = Split(digits.target.astype(np.int64), images)
    order = np.random.default_rng(2).permutation(len(rows))
    return rows.select(order[:1397]), rows.select(order[1397:])


def _breast_cancer(data: Path | None) -> tuple[Split, Split]:
    """scikit-learn's Wisconsin table: 569 rows of 30 standardised columns, two classes."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.preprocessing import StandardScaler

    table = load_breast_cancer()
    order = np.random.default_rng(4).permutation(len(table.target))
    pool, test = order[:419], order[419:]
    scaler = StandardScaler().fit(table.data[pool])
    columns = torch.from_numpy(scaler.transform(table.data).astype(np.float32))
    rows = Split(table.target.astype(np.int64), columns)
    return rows.select(pool), rows.select(test)


def _synthetic(data: Path | None) -> tuple[Split, Split]:
    """Noise around one pattern a class: small, and hard enough to be memorised."""
    random = np.random.default_rng(3)
    patterns = random.normal(size=(4, 1, 8, 8))

    def rows(n: int) -> Split:
        labels = random.integers(0, 4, n)
        images = patterns[labels] + 2.0 * random.normal(size=(n, 1, 8, 8))
        return Split(labels.astype(np.int64), torch.from_numpy(images.astype(np.float32)))

    return rows(800), rows(200)


_LOADERS: dict[str, Callable[[Path | None], tuple[Split, Split]]] = {
    "cifar10": _cifar10,
    "fashion_mnist": _fashion_mnist,
    "banking77": _banking77,
    "digits": _digits,
    "breast_cancer": _breast_cancer,
    "synthetic": _synthetic,
}


def _normalised(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (rows, height, width[, channels]) → normalised float32, channels first."""
    if images.ndim == 3:
        images = images[..., None]
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float().div_(255.0)
    return pixels.sub_(torch.tensor(mean).view(1, -1, 1, 1)).div_(torch.tensor(std).view(1, -1, 1, 1))


def _parquet_images(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(path, columns=["image", "label"])
    images = [np.asarray(Image.open(io.BytesIO(entry["bytes"]))) for entry in table["image"].to_pylist()]
    return np.stack(images), np.asarray(table["label"].to_pylist())


def _png_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """PNG files named `<index>_<class>.png`, in the order of their index."""
    from PIL import Image

    paths = sorted(folder.glob("*.png"), key=lambda path: int(path.stem.split("_")[0]))
    if not paths:
        raise ValueError(f"No files <index>_<class>.png in {folder}: see benchmarks/README.md.")
    names = [path.stem.split("_", 1)[1] for path in paths]
    labels = [int(name) if name.isdigit() else _CIFAR10_CLASSES.index(name) for name in names]
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]), np.asarray(labels)
