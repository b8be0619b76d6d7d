"""A trained classifier with its tokenizer or image processor, and rows prepared for it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_iau.errors import RequestError, UnsupportedModelError
from hf_iau.tasks.rows import brief, rows_of_labels

logger = logging.getLogger(__name__)

Kind = Literal["text", "image"]
_KINDS: dict[str, Kind] = {"ForSequenceClassification": "text", "ForImageClassification": "image"}
_MODELS = {"text": AutoModelForSequenceClassification, "image": AutoModelForImageClassification}


@dataclass(frozen=True)
class Task:
    """A classifier and what its rows need.

    Attributes:
        name: folder or name on the Hub that it was loaded from.
        kind: "text" or "image".
        model: the model, in evaluation mode.
        processor: its tokenizer or image processor.
        input_columns: column of the texts (or two, for pairs of texts), or of the images.
        label_column: column of the labels.
        max_length: longest text in tokens, or None for the tokenizer's own limit.
    """

    name: str
    kind: Kind
    model: nn.Module
    processor: Any
    input_columns: tuple[str, ...]
    label_column: str
    max_length: int | None = None

    def prepare(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows as the model takes them, in the same order; their other columns stay, and are left out by the Trainer.

        Images are read each time they are asked for, texts are tokenized once.

        Raises:
            RequestError: a column is missing, or a label is not one of the model's.
        """
        for column in self.input_columns:
            if column not in rows.column_names:
                raise RequestError(
                    f"There is no column {column!r} to read the {self.kind}s from: the rows have "
                    f"{', '.join(rows.column_names)}."
                )
        config: Any = self.model.config
        kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
        rows = rows_of_labels(rows, self.label_column, config.label2id, kind)
        if self.kind == "image":
            return rows.with_transform(self._read_images)
        return rows.map(self._tokenize, batched=True, desc="Tokenizing")

    def _tokenize(self, batch: dict[str, list[Any]]) -> Any:
        texts = [batch[column] for column in self.input_columns]
        return self.processor(*texts, truncation=True, max_length=self.max_length)

    def _read_images(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[self.input_columns[0]]]
        return {**self.processor(images, return_tensors="pt"), "labels": batch["labels"]}


def load_task(
    name: str,
    *,
    kind: Kind | None = None,
    input_columns: tuple[str, ...] = (),
    label_column: str = "label",
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Task:
    """Load a text or image classifier and its tokenizer or image processor.

    Args:
        name: a folder, or a model of the Hub.
        kind: "text" or "image"; default: what its configuration says.
        input_columns: default: `text` or `image`.
        label_column, max_length: see `Task`.
        trust_remote_code: run code that comes with a model of the Hub. Off unless you trust it.

    Raises:
        RequestError: it cannot be loaded.
        UnsupportedModelError: it is no classifier of texts or images.
    """
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _not_loaded("model", name, error) from error
    architectures = config.architectures or [""]
    known = next((kind for suffix, kind in _KINDS.items() if architectures[0].endswith(suffix)), None)
    chosen = kind or known
    if chosen is None:
        raise UnsupportedModelError(
            f"{name!r} is a {architectures[0] or config.model_type}: the command line serves text and image classifiers. "
            "Use hf_iau.UnlearningTrainer in Python for other models."
        )
    if known is None:
        logger.warning("%s is a %s: its head for classes may be freshly made.", name, architectures[0])
    try:
        model = _MODELS[chosen].from_pretrained(name, dtype="auto", trust_remote_code=trust_remote_code)
        load_processor = AutoTokenizer if chosen == "text" else AutoImageProcessor
        processor = load_processor.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _not_loaded("model, tokenizer or image processor", name, error) from error
    if max_length is None and chosen == "text":
        max_length = min(processor.model_max_length, getattr(config, "max_position_embeddings", None) or 512)
    return Task(
        name=name,
        kind=chosen,
        model=model.eval(),
        processor=processor,
        input_columns=input_columns or (chosen,),
        label_column=label_column,
        max_length=max_length,
    )


def local_folder(name: str) -> Path | None:
    """The folder that a model's name is, or None for a model of the Hub."""
    path = Path(name)
    return path if path.is_dir() else None


def _not_loaded(what: str, name: str, error: Exception) -> RequestError:
    return RequestError(
        f"The {what} {name!r} cannot be loaded ({brief(error)}). Give a folder written by save_model(), "
        "or a name on the Hub."
    )
