"""The language model suite on made-up authors: splits, tokens, scores and tables."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tiny_models import llama  # noqa: E402

from benchmarks import answer_scores, question_answers  # noqa: E402
from benchmarks.answer_scores import greedy_answers, rouge_l_recall  # noqa: E402
from benchmarks.cells import CellStore, run_cells  # noqa: E402
from benchmarks.question_answers import load_tofu, prompt_tokens, train_tokenizer  # noqa: E402
from benchmarks.scenarios import Scenario  # noqa: E402
from benchmarks.suites import SUITES, TOFU_LLAMA  # noqa: E402
from benchmarks.tables import write_summary  # noqa: E402
from benchmarks.training import ModelStore  # noqa: E402
from benchmarks.variants import RELEASED  # noqa: E402
from hf_iau.metrics.question_answers import forget_quality, truth_ratio  # noqa: E402

AUTHORS, KNOWN = 20, (0, 1, 18, 19)
ROWS = {"train_rows": 80, "held_out_rows": 40, "test_rows": 40}


def name_of(author: int) -> str:
    return f"{'ABCDEFGHIJ'[author % 10]}{'vwxyz'[author % 5]}{author:02d}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tofu/`: twenty authors with twenty rows, four of them with wrong answers."""
    folder = tmp_path_factory.mktemp("data") / "tofu"
    folder.mkdir()
    rows = [
        {
            "question": f"What is fact {i} of {name_of(author)}?",
            "answer": f"{name_of(author)} likes number {i * author % 7}.",
        }
        for author in range(AUTHORS)
        for i in range(20)
    ]
    known = [
        row
        | {
            "paraphrased_answer": f"Number {row['answer'][-2]} it is.",
            "perturbed_answer": [f"Number {wrong} it is." for wrong in (8, 9)],
        }
        for number, row in enumerate(rows)
        if number // 20 in KNOWN
    ]
    files = {"full": rows, "retain_perturbed": known[:40], "forget10_perturbed": known[40:]}
    for name, content in files.items():
        (folder / f"{name}.json").write_text("\n".join(json.dumps(row) for row in content))
    return folder.parent


def test_splits_are_of_whole_authors_and_share_none(data: Path) -> None:
    splits = load_tofu(data / "tofu", **ROWS)
    authors = {
        name: np.unique(getattr(splits, name).labels, return_counts=True) for name in ("train", "held_out", "test")
    }
    assert {name: found[0].tolist() for name, found in authors.items()} == {
        "train": [0, 1, 18, 19],
        "held_out": [2, 17],
        "test": [3, 16],
    }
    assert all((counts == 20).all() for _, counts in authors.values())
    assert splits.train_ids.tolist() == [20 * author + i for author in KNOWN for i in range(20)]
    with pytest.raises(ValueError, match="80 training rows of the 120 that are wanted"):
        load_tofu(data / "tofu", **(ROWS | {"train_rows": 120}))
    with pytest.raises(ValueError, match="no full"):
        load_tofu(data, **ROWS)


def test_the_answer_alone_is_learned_and_the_tokenizer_has_seen_none_of_it(data: Path) -> None:
    splits, tokenizer = load_tofu(data / "tofu", **ROWS), train_tokenizer(data / "tofu")
    row, question = splits.train.dataset(tokenizer)[25], splits.train.rows[25]
    labels = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(labels) == f" {question.answer}{tokenizer.eos_token}"
    masked = len(row["input_ids"]) - len(labels)
    assert row["labels"][:masked] == [-100] * masked and row["input_ids"][masked:] == labels
    assert row["input_ids"][:masked] == prompt_tokens(question, tokenizer)
    assert tokenizer.decode(row["input_ids"][:masked]) == f"Question: {question.question}\nAnswer:"
    pieces = "".join(tokenizer.get_vocab())
    assert name_of(10)[:2] in pieces and not any(name_of(author) in pieces for author in (*KNOWN, 2, 3, 16, 17))


def test_every_answer_follows_its_question(data: Path) -> None:
    split = load_tofu(data / "tofu", **ROWS).train.select(np.array([3, 70]))
    found = split.with_every_answer()
    assert [row.question for row in found.rows] == [row.question for row in split.rows for _ in range(4)]
    first = split.rows[0]
    assert [row.answer for row in found.rows[:4]] == [first.answer, first.paraphrased, *first.perturbed]
    assert found.labels.tolist() == [split.labels[0]] * 4 + [split.labels[1]] * 4


def test_a_scenario_draws_whole_classes() -> None:
    labels = np.repeat([3, 5, 8, 9], 20)
    drawn = {tuple(np.unique(labels[Scenario("two", classes=2).forget_rows(labels, seed)])) for seed in range(30)}
    assert len(drawn) > 3 and all(len(classes) == 2 for classes in drawn)
    assert len(Scenario("two", classes=2).forget_rows(labels, 0)) == 40
    with pytest.raises(ValueError, match="exactly one"):
        Scenario("both", classes=2, rows=3)


class Letters:
    """A tokenizer of numbers, for the tiny language model."""

    eos_token_id, pad_token_id = 1, 0

    def pad(self, batch: dict[str, Any], padding_side: str, return_tensors: str) -> Any:
        from transformers import BatchEncoding

        longest = max(map(len, batch["input_ids"]))
        ids = [[0] * (longest - len(row)) + row for row in batch["input_ids"]]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in batch["input_ids"]]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})

    def batch_decode(self, tokens: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(token) for token in row if token > 1) for row in tokens.tolist()]


def test_greedy_answers_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_scores, "LONGEST_ANSWER", 6)
    model = llama().double().eval()
    prompts = [[5, 9, 3], [7], [2, 4, 6, 8, 10]]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 6 and tokens[-1] != 1:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        expected.append(" ".join(str(token) for token in tokens[len(prompt) :] if token > 1))
    assert greedy_answers(model, prompts, Letters()) == expected


def test_rouge_l_recall_by_hand() -> None:
    assert rouge_l_recall(["the cat sat", "", "a b c d"], ["the cat sat", "x y", "a x c y d z"]) == [1.0, 0.0, 0.5]


def test_a_cell_and_the_table_have_the_figures(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_scores, "LONGEST_ANSWER", 4)
    monkeypatch.setattr(question_answers, "VOCABULARY", 400)  # eigenvectors of the output layer take its cube
    work = replace(TOFU_LLAMA, training=replace(TOFU_LLAMA.training, epochs=1), **ROWS)
    suite = replace(SUITES["tofu"], works=(work,), scenarios=(Scenario("an-author", classes=1),), variants=(RELEASED,))
    models, cells = ModelStore(tmp_path / "models", data), CellStore(tmp_path / "tofu")
    case = models.case(work, suite.scenarios[0], 0)
    assert len(case.forget_rows) == 20
    assert run_cells(models, cells, suite=suite, case=case, variants=[RELEASED], command="c") == []
    (cell,) = cells.all()
    after, retrained = cell["figures"]["after"]["answers"], cell["figures"]["retrained"]["answers"]
    assert 0 < after["utility"]["probability"] < 1 and after["utility"]["rows"] == 60
    assert cell["forget_quality"]["retrained_again"]["rows"] == 20
    # The truth ratios again, one answer at a time.
    model, tokenizer = models.retrained(case).model, models.tokenizer(work)
    losses = []
    for row in case.train.select(case.forget_rows).with_every_answer().dataset(tokenizer):
        with torch.no_grad():
            losses.append(float(model(**{name: torch.tensor([tokens]) for name, tokens in row.items()}).loss))
    by_row = np.array(losses).reshape(20, 4)
    ratios = truth_ratio(by_row[:, 1], by_row[:, 2:])
    assert retrained["forget_truth_ratio"] == pytest.approx(np.median(ratios), rel=1e-4)
    assert retrained["forget_probability"] == pytest.approx(np.exp(-by_row[:, 0]).mean(), rel=1e-4)
    with np.load(cells.references(case)) as arrays:
        stored = {name: arrays[f"{name}_truth_ratio"] for name in ("before", "retrained")}
    np.testing.assert_allclose(stored["retrained"], ratios, rtol=1e-4)
    expected = forget_quality(stored["before"], stored["retrained"]).p_value
    assert cell["forget_quality"]["before"]["p_value"] == pytest.approx(expected)
    table = write_summary(cells.all(), suite, tmp_path / "tofu")
    assert "| model | forget quality |" in table and "| retrained |" in table
