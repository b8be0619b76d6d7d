"""A trained model with its tokenizer or image processor, and rows prepared for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
)
from transformers.utils.peft_utils import find_adapter_config_file

from hf_iau.cli.options import Kind
from hf_iau.cli.task_rows import brief, rows_of_labels
from hf_iau.data.targets import IGNORED_LABEL
from hf_iau.errors import RequestError, UnsupportedModelError

logger = logging.getLogger(__name__)

_ARCHITECTURES: dict[str, Kind] = {
    "ForSequenceClassification": "text",
    "ForImageClassification": "image",
    "ForCausalLM": "language",
    "LMHeadModel": "language",
}
_ADAPTER_TASKS: dict[str, Kind] = {"SEQ_CLS": "text", "CAUSAL_LM": "language"}
_MODELS = {
    "text": AutoModelForSequenceClassification,
    "image": AutoModelForImageClassification,
    "language": AutoModelForCausalLM,
}
# Names that Transformers gives to the layer of a classifier that ends in its classes.
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
_LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError)


@dataclass(frozen=True)
class Reader:
    """Makes a model's inputs of a batch of texts or images.

    It holds no model: data sets pickle and hash all that a function holds which they are given.
    """

    processor: Any
    input_columns: tuple[str, ...]
    max_length: int | None

    def tokens(self, batch: dict[str, list[Any]]) -> Any:
        """Texts in tokens."""
        texts = [batch[column] for column in self.input_columns]
        return self.processor(*texts, truncation=True, max_length=self.max_length)

    def tokens_with_labels(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        """The same, each token to be predicted."""
        tokens = self.tokens(batch)
        return {**tokens, "labels": [list(row) for row in tokens["input_ids"]]}

    def images(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        """Images in pixels, with their labels."""
        images = [image.convert("RGB") for image in batch[self.input_columns[0]]]
        return {**self.processor(images, return_tensors="pt"), "labels": batch["labels"]}


@dataclass(frozen=True)
class Task:
    """A model and what its rows need.

    Attributes:
        name: folder or name on the Hub that it was loaded from.
        kind: "text" or "image" for a classifier of these, "language" for a causal language model.
        model: the model, in evaluation mode; a `PeftModel` whose adapter can be moved where `name` is an adapter's.
        processor: its tokenizer or image processor.
        input_columns: column of the texts (or two, for pairs of texts), or of the images.
        label_column: column of a classifier's labels.
        max_length: longest text in tokens, or None for the tokenizer's own limit.
    """

    name: str
    kind: Kind
    model: nn.Module
    processor: Any
    input_columns: tuple[str, ...]
    label_column: str
    max_length: int | None = None

    @property
    def collator(self) -> Callable[[list[Any]], Mapping[str, Any]] | None:
        """What makes batches of the rows; None for the Trainer's own choice."""
        if self.kind != "language":
            return None
        return DataCollatorForSeq2Seq(self.processor, label_pad_token_id=IGNORED_LABEL)

    def prepare(self, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows as the model takes them, in the same order; their other columns stay (the Trainer leaves them out).

        Images are read each time they are asked for, texts are tokenized once. A language model is to predict every
        token of its text.

        Raises:
            RequestError: a column is missing, or a label is not one of the model's.
        """
        for column in self.input_columns:
            if column not in rows.column_names:
                raise RequestError(
                    f"There is no column {column!r} to read the {'image' if self.kind == 'image' else 'text'}s from: "
                    f"the rows have {', '.join(rows.column_names)}."
                )
        _refuse_empty(rows, self.input_columns)
        reader = Reader(self.processor, self.input_columns, self.max_length)
        if self.kind == "language":
            # Columns that the Trainer would take for labels, beside those made here.
            others = [column for column in ("label", "label_ids") if column in rows.column_names]
            return rows.remove_columns(others).map(reader.tokens_with_labels, batched=True, desc="Tokenizing")
        config: Any = self.model.config
        kind = config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")
        rows = rows_of_labels(rows, self.label_column, config.label2id, kind)
        if self.kind == "image":
            return rows.with_transform(reader.images)
        return rows.map(reader.tokens, batched=True, desc="Tokenizing")


def _refuse_empty(rows: datasets.Dataset, columns: Sequence[str]) -> None:
    """Raise `RequestError` for a row without a value in one of the `columns`."""
    for column in columns:
        values = rows.with_format("arrow")[column]  # images are not decoded
        if values.null_count:
            empty = values.is_null().to_numpy().nonzero()[0]
            raise RequestError(
                f"{len(empty)} rows have nothing in the column {column!r}, e.g. row {int(empty[0])}: leave them out, "
                "or fill them in."
            )


def load_task(
    name: str,
    *,
    kind: Kind | None = None,
    input_columns: tuple[str, ...] = (),
    label_column: str = "label",
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Task:
    """Load a text or image classifier or a causal language model, and its tokenizer or image processor.

    A PEFT adapter is loaded on the base model that it names, so that it can be moved.

    Args:
        name: a folder, or a model of the Hub.
        kind: "text", "image" or "language"; default: what its configuration says.
        input_columns: default: `text` or `image`.
        label_column, max_length: see `Task`.
        trust_remote_code: run code that comes with a model of the Hub. Off unless you trust it.

    Raises:
        RequestError: it cannot be loaded, or has another number of columns than it reads.
        UnsupportedModelError: it is of another kind.
    """
    trusted = {"trust_remote_code": trust_remote_code}
    adapter = _adapter_of(name)
    base = name if adapter is None else str(adapter.base_model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(base, **trusted)
    except _LOADING_ERRORS as error:
        raise _not_loaded(
            "model" if adapter is None else f"base model of the adapter {name!r},", base, error
        ) from error
    architecture = (config.architectures or [""])[0]
    known = next((kind for suffix, kind in _ARCHITECTURES.items() if architecture.endswith(suffix)), None)
    if adapter is not None:
        known = _ADAPTER_TASKS.get(str(getattr(adapter.task_type, "value", adapter.task_type)), known)
    chosen = kind or known
    if chosen is None:
        raise UnsupportedModelError(
            f"{name!r} is a {architecture or config.model_type}: the command line serves text and image classifiers "
            "and causal language models. Use hf_iau.UnlearningTrainer in Python for other models, or say by --task "
            "what it is."
        )
    if chosen == "language" and len(input_columns) > 1:
        raise RequestError(
            f"A language model reads one column of texts, and {len(input_columns)} were named: name one."
        )
    if known is None:
        logger.warning("%s is a %s: its head for classes may be freshly made.", name, architecture)
    try:
        if adapter is None:
            model = _MODELS[chosen].from_pretrained(name, dtype="auto", **trusted)
        else:
            model = _with_adapter(name, base, chosen, config, trusted)
        processor = _load_processor(name, base, chosen, trusted)
    except _LOADING_ERRORS as error:
        raise _not_loaded("model, tokenizer or image processor", name, error) from error
    if chosen == "language":
        processor.padding_side = "right"  # absolute positions are counted from the left
        if processor.pad_token is None:
            processor.pad_token = processor.eos_token
    if max_length is None and chosen != "image":
        max_length = min(processor.model_max_length, getattr(config, "max_position_embeddings", None) or 512)
    return Task(
        name=name,
        kind=chosen,
        model=model.eval(),
        processor=processor,
        input_columns=input_columns or ("image" if chosen == "image" else "text",),
        label_column=label_column,
        max_length=max_length,
    )


def _adapter_of(name: str) -> PeftConfig | None:
    """The configuration of the PEFT adapter that `name` is, or None where it is a whole model.

    Raises:
        RequestError: it is an adapter without a base model, or damaged.
    """
    if (Path(name) / "config.json").is_file() or find_adapter_config_file(name) is None:
        return None
    try:
        config = PeftConfig.from_pretrained(name)
    except _LOADING_ERRORS as error:
        raise _not_loaded("adapter", name, error) from error
    if not config.base_model_name_or_path:
        raise RequestError(
            f"The adapter {name!r} names no base model: write base_model_name_or_path into its adapter_config.json."
        )
    return config


def _with_adapter(name: str, base: str, kind: Kind, config: Any, trusted: Mapping[str, bool]) -> PeftModel:
    """The base model with the adapter on it, ready to be moved."""
    other_head = False
    if kind != "language":
        # A base that was only pretrained knows nothing of the classes; the head is saved with the adapter.
        heads = [tensor for key, tensor in _weights_of(name).items() if key.endswith(_HEADS) and tensor.dim() == 2]
        other_head = bool(heads) and heads[-1].shape[0] != config.num_labels
        if other_head:
            config.num_labels = int(heads[-1].shape[0])
    model = _MODELS[kind].from_pretrained(
        base, config=config, dtype="auto", ignore_mismatched_sizes=other_head, **trusted
    )
    return PeftModel.from_pretrained(model, name, is_trainable=True)


def _weights_of(name: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_peft_weights(name, device="cpu")
    return weights


def _load_processor(name: str, base: str, kind: Kind, trusted: Mapping[str, bool]) -> Any:
    """The tokenizer or image processor that was saved with a model or adapter, else the base model's."""
    processor_class = AutoImageProcessor if kind == "image" else AutoTokenizer
    try:
        return processor_class.from_pretrained(name, **trusted)
    except _LOADING_ERRORS:
        if base == name:
            raise
        return processor_class.from_pretrained(base, **trusted)


def _not_loaded(what: str, name: str, error: Exception) -> RequestError:
    return RequestError(
        f"The {what} {name!r} cannot be loaded ({brief(error)}). Give a folder written by save_model(), "
        "or a name on the Hub."
    )
