"""TOFU's questions and answers (Maini et al. 2024, arXiv 2401.06121) as rows of a small language model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from benchmarks.data import Split, Splits
from hf_iau.cli.task_rows import load_rows
from hf_iau.data.targets import IGNORED_LABEL

TOFU = "tofu"
VOCABULARY = 2048
ROWS_AN_AUTHOR = 20
HUB_NAME = "locuslab/TOFU"
_PROMPT = "Question: {question}\nAnswer:"
_END = "<|end|>"


@dataclass(frozen=True)
class QuestionAnswer:
    """One row.

    Attributes:
        question, answer: as trained on.
        paraphrased: the answer in other words.
        perturbed: answers of the same form that are wrong; none for rows that were not given any.
    """

    question: str
    answer: str
    paraphrased: str = ""
    perturbed: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionAnswers(Split):
    """Questions with answers; the labels are the authors' numbers.

    Attributes:
        rows: questions and answers.
    """

    rows: tuple[QuestionAnswer, ...] = ()

    def select(self, rows: np.ndarray) -> QuestionAnswers:
        """The rows at these positions, in this order."""
        return QuestionAnswers(self.labels[rows], rows=tuple(self.rows[i] for i in rows))

    def with_every_answer(self) -> QuestionAnswers:
        """Each question as often as it has answers: with its own, the paraphrased one, and the wrong ones."""
        rows = tuple(
            replace(row, answer=answer) for row in self.rows for answer in (row.answer, row.paraphrased, *row.perturbed)
        )
        return QuestionAnswers(np.repeat(self.labels, len(rows) // len(self.rows)), rows=rows)

    def dataset(
        self, tokenizer: PreTrainedTokenizerBase | None = None, *, table: bool = False, augmented: bool = False
    ) -> datasets.Dataset:
        """Tokens, with the answer's and the end's as labels and the question's masked."""
        if tokenizer is None:
            raise ValueError("dataset(tokenizer=None): text needs a tokenizer.")
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in self.rows:
            question = prompt_tokens(row, tokenizer)
            answer = [*tokenizer.encode(" " + row.answer, add_special_tokens=False), tokenizer.eos_token_id]
            columns["input_ids"].append(question + answer)
            columns["attention_mask"].append([1] * len(question + answer))
            columns["labels"].append([IGNORED_LABEL] * len(question) + answer)
        return datasets.Dataset.from_dict(columns)


def prompt_tokens(row: QuestionAnswer, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What stands before the answer."""
    tokens: list[int] = tokenizer.encode(_PROMPT.format(question=row.question), add_special_tokens=False)
    return tokens


def load_tofu(data: Path | None, *, train_rows: int, held_out_rows: int, test_rows: int) -> Splits:
    """Whole authors: those with wrong answers to compare with are trained on, others are never seen.

    TOFU's own unseen authors (`holdout10`) are not used: their answers are a fifth longer, so they are not like the
    forget rows of a model that was never trained on either. Unseen authors come from the same file as the others.

    Args:
        data: a folder with `full`, `retain_perturbed` and `forget10_perturbed`, each as `.parquet` or `.json`; default:
            the data set `locuslab/TOFU` of the Hub.
        train_rows, held_out_rows, test_rows: how many; multiples of 40, so that authors stay whole.

    Raises:
        ValueError: too few rows.
        RequestError: they cannot be loaded.
    """
    everyone, known = _everyone(data)
    training = _from_both_ends(known, train_rows)
    taken = {*known, *_middle(everyone)}
    unseen = [number for number in range(len(everyone)) if number not in taken]
    held_out = _from_both_ends(unseen, held_out_rows)
    test = _from_both_ends([number for number in unseen if number not in set(held_out)], test_rows)
    for name, found, wanted in (
        ("training", training, train_rows),
        ("held-out", held_out, held_out_rows),
        ("test", test, test_rows),
    ):
        if len(found) != wanted:
            raise ValueError(f"tofu has {len(found)} {name} rows of the {wanted} that are wanted.")
    authors = np.arange(len(everyone)) // ROWS_AN_AUTHOR
    train, hidden, last = (
        QuestionAnswers(authors[numbers], rows=tuple(everyone[number] for number in numbers))
        for numbers in (training, held_out, test)
    )
    return Splits(train=train, held_out=hidden, test=last, n_classes=VOCABULARY, train_ids=np.asarray(training))


def train_tokenizer(data: Path | None) -> PreTrainedTokenizerBase:
    """A byte-level BPE from the text of the authors in the middle of the file, that nothing else is done with.

    Were it made from the training rows, the names of the forget rows would be tokens of their own and those of held-out
    rows would not: the two would differ for a model that knows neither. It would also be a trace of the forget rows
    that no unlearning of weights removes.
    """
    everyone, _ = _everyone(data)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    middle = [everyone[number] for number in _middle(everyone)]
    texts = [f"{_PROMPT.format(question=row.question)} {row.answer}" for row in middle]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def _everyone(data: Path | None) -> tuple[list[QuestionAnswer], list[int]]:
    """All rows in the order of `full`, and the numbers of those with paraphrased and wrong answers."""
    rows = _questions("full", data)
    numbers = {(row.question, row.answer): number for number, row in enumerate(rows)}
    known = [row for name in ("retain_perturbed", "forget10_perturbed") for row in _questions(name, data)]
    for row in known:
        rows[numbers[row.question, row.answer]] = row
    return rows, sorted(numbers[row.question, row.answer] for row in known)


def _middle(rows: list[QuestionAnswer]) -> range:
    """The numbers of the middle two fifths of the rows."""
    return range(len(rows) * 3 // 10, len(rows) * 7 // 10)


def _from_both_ends(numbers: list[int], count: int) -> list[int]:
    """Half of `count` from the start and half from the end: answers grow longer along the file."""
    half = count // 2
    return numbers if count >= len(numbers) else [*numbers[:half], *numbers[len(numbers) - (count - half) :]]


def _questions(name: str, data: Path | None) -> list[QuestionAnswer]:
    if data is None:
        table = load_rows(HUB_NAME, configuration=name)
    else:
        found = [path for suffix in ("parquet", "json") if (path := data / f"{name}.{suffix}").is_file()]
        if not found:
            raise ValueError(f"--data {data}: no {name}.parquet or {name}.json in it; see benchmarks/README.md.")
        table = load_rows(str(found[0]))
    return [
        QuestionAnswer(
            row["question"], row["answer"], row.get("paraphrased_answer", ""), tuple(row.get("perturbed_answer", ()))
        )
        for row in table
    ]
