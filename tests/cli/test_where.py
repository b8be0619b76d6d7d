"""Conditions on columns: what is read, against a plain loop; what is refused; and that nothing is ever run."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_iau import RequestError
from hf_iau.cli.where import rows_where

NAMES = ["cat", "dog", "eel"]


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    columns = {
        "label": [0, 1, 2, 1, 0],
        "score": [0.5, -1.0, None, 2.0, 0.0],
        "text": ["a", "b", None, "d d", "É"],
        "good": [True, False, None, True, False],
        "other": [1, 1, 1, 2, 0],
    }
    features = datasets.Features(
        {
            "label": datasets.ClassLabel(names=NAMES),
            "score": datasets.Value("float64"),
            "text": datasets.Value("string"),
            "good": datasets.Value("bool"),
            "other": datasets.Value("int32"),
        }
    )
    return datasets.Dataset.from_dict(columns, features=features)


Row = dict[str, Any]
CONDITIONS: dict[str, Callable[[Row], bool]] = {
    "label == 1": lambda r: r["label"] == 1,
    "label == 'dog'": lambda r: r["label"] == 1,
    "label != 'dog'": lambda r: r["label"] != 1,
    "label in ['dog', 'eel']": lambda r: r["label"] in (1, 2),
    "label not in (0,)": lambda r: r["label"] != 0,
    "score > -1 and score < 2.0": lambda r: r["score"] is not None and -1 < r["score"] < 2,
    "-1 < score <= 2": lambda r: r["score"] is not None and -1 < r["score"] <= 2,
    "score == -1.0": lambda r: r["score"] == -1.0,
    "not score > 0": lambda r: r["score"] is not None and not r["score"] > 0,
    "score not in [0.5]": lambda r: r["score"] is not None and r["score"] != 0.5,
    "text is None": lambda r: r["text"] is None,
    "text is not None": lambda r: r["text"] is not None,
    "text == 'É' or text == 'd d'": lambda r: r["text"] in ("É", "d d"),
    "good": lambda r: r["good"] is True,
    "not good and other == 1": lambda r: r["good"] is False and r["other"] == 1,
    "good == True": lambda r: r["good"] is True,
    "label == other": lambda r: r["label"] == r["other"],
    "3 > other and (label == 0 or score >= 2)": lambda r: (
        r["other"] < 3 and (r["label"] == 0 or (r["score"] is not None and r["score"] >= 2))
    ),
    "other == 99999999999": lambda r: False,
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_against_a_loop(rows: datasets.Dataset, condition: str) -> None:
    expected = [number for number, row in enumerate(rows) if CONDITIONS[condition](row)]
    assert rows_where(rows, condition).tolist() == expected


def test_of_selected_rows(rows: datasets.Dataset) -> None:
    """Numbers are those of the rows given, whatever they were selected from."""
    assert rows_where(rows.select([4, 3, 1]), "label == 'dog'").tolist() == [1, 2]


@pytest.mark.parametrize(
    "condition",
    ["", "  ", "label ==", "1 == 1", "True", "label", "text", "score + 1 == 2", "label == 1; other == 2", "label = 1"]
    + ["__import__('os').system('x')", "label.real == 1", "text[0] == 'a'", "len(text) == 1", "lambda: 1"]
    + ["(x := 3) == 3", "f'{label}' == '1'", "label == [1]", "label in text", "label in []", "label is 1"]
    + ["colour == 1", "label == 'bird'", "label in ['bird']", "text > 3", "score == 'x'", "label in [1, 'x']"]
    + ["label in [x for x in [1]]", "label == -'x'"]
    + ["label == 1 if good else 2", "*label == 1", "label == b'x'", "label == 1j", "label == ...", "label == None"]
    + ["other == 10000000000000000000000000000000", "not " * 60 + "good", "(" * 500 + "good" + ")" * 500, "x" * 100_001]
    + ["a" + ".b" * 3000 + " == 1", "1" + "+1" * 3000 + " == other", "\x00", "label == 1\nor 2", "await good", "yield"],
)  # fmt: skip
def test_refused(rows: datasets.Dataset, condition: str) -> None:
    with pytest.raises(RequestError):
        rows_where(rows, condition)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="labelscortxgd 0123456789=<>!()[]'\"andornotis,.+-*:\\\n{}", max_size=60))
def test_any_text_is_read_or_refused(rows: datasets.Dataset, condition: str) -> None:
    try:
        found = rows_where(rows, condition)
    except RequestError:
        return
    assert all(0 <= number < len(rows) for number in found)
    ast.parse(condition.strip(), mode="eval")
