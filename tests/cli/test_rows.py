"""Rows and labels by name, and lists of ids."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from hf_iau import RequestError
from hf_iau.cli.files import read_ids
from hf_iau.cli.task_rows import load_rows, rows_of_labels

LABELS = {"cat": 0, "dog": 1}


@pytest.fixture(autouse=True)
def _caches_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_files_folders_and_splits(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_csv(tmp_path / "rows.tsv", sep="\t")
    rows.to_json(tmp_path / "rows.jsonl")
    rows.save_to_disk(tmp_path / "saved")
    for name in ("rows.parquet", "rows.csv", "rows.tsv", "rows.jsonl", "saved"):
        assert load_rows(str(tmp_path / name))["text"][:] == ["a", "b", "c"]
    assert load_rows(f"{tmp_path / 'rows.parquet'}:train[1:]")["text"][:] == ["b", "c"]
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    assert load_rows(f"{tmp_path / 'splits'}:train[1:]")["text"][:] == ["b", "c"]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    assert len(load_rows(str(tmp_path / "splits"))) == len(load_rows(str(tmp_path / "splits" / "train"))) == 3
    for name in ("splits:test", "absent.csv", "broken.parquet", "rows.parquet:test", "absent"):
        with pytest.raises(RequestError):
            load_rows(str(tmp_path / name))


def test_labels_as_the_model_numbers_them() -> None:
    kind = "single_label_classification"
    numbers = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]})
    names = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["dog", "cat"]})
    turned = numbers.cast_column("label", datasets.ClassLabel(names=["dog", "cat"]))
    unknown = numbers.cast_column("label", datasets.ClassLabel(names=["x", "y"]))
    assert rows_of_labels(numbers, "label", LABELS, kind)["labels"][:] == [1, 0]
    assert rows_of_labels(names, "label", LABELS, kind)["labels"][:] == [1, 0]
    assert rows_of_labels(turned, "label", LABELS, kind)["labels"][:] == [0, 1]
    assert rows_of_labels(unknown, "label", LABELS, kind)["labels"][:] == [1, 0]
    # Digits are names where the model says so, whatever their numbers are.
    assert rows_of_labels(numbers, "label", {"1": 0, "0": 1}, kind)["labels"][:] == [0, 1]
    floats = datasets.Dataset.from_dict({"score": [0.5, 1.5]})
    assert rows_of_labels(floats, "score", {"LABEL_0": 0}, "regression")["labels"][:] == [0.5, 1.5]
    for bad in (["cat", "bird"], ["cat", None], [0, 2], [0, -100], [0.5, 1.0]):
        with pytest.raises(RequestError, match=r"Row \d has the label"):
            rows_of_labels(datasets.Dataset.from_dict({"text": ["a", "b"], "label": bad}), "label", LABELS, kind)
    with pytest.raises(RequestError, match="beside 'label'"):
        rows_of_labels(names.add_column("labels", [0, 1]), "label", LABELS, kind)
    with pytest.raises(RequestError, match="no column 'x'"):
        rows_of_labels(names, "x", LABELS, kind)


def test_numbers_are_written_plainly(tmp_path: Path) -> None:
    for text in ("1_0", "１０", "0x1"):
        (tmp_path / "ids.txt").write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match="which is no whole number"):
            read_ids(tmp_path / "ids.txt")


def test_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    for content in ("3\n 17\n\n5", "[3, 17, 5]", '["3", "17", "5"]', "\ufeff3\r\n17\r\n5\r\n"):
        path.write_text(content, encoding="utf-8", newline="")
        assert read_ids(path) == [3, 17, 5] and read_ids(path, str) == ["3", "17", "5"]
    for content in (b"", b"\n\n", b"[]", b"[", b"[[1]]", b"[null]", b"[true]", b"[1.5]", b"x", b"1.5", b"\xff", b"{}"):
        path.write_bytes(content)
        with pytest.raises(RequestError):
            read_ids(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_ids(tmp_path)
