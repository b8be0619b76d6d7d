"""Tiny models and rows, built in code: nothing is downloaded, everything follows from a seed.

Models are in `eval()`-independent form (no dropout unless asked for), with weights wide enough for every layer to have
a gradient that matters. Rows come as a list of dicts; `as_dataset` and `RowList` turn them into a `datasets.Dataset` or
a torch `Dataset`, `pad_right` and `pad_left` collate them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 24
CLASSES = 3
PAD = 0
IMAGE_SIZE = 8
FEATURES = 6

Row = dict[str, Any]
Collator = Callable[[list[Row]], dict[str, Tensor]]

# --- models -----------------------------------------------------------------------------------------------------------


def bert(classes: int = CLASSES, *, dropout: float = 0.0, seed: int = 0, **config: Any) -> nn.Module:
    """BERT-style sequence classifier; `problem_type=` makes it multi-label or a regression."""
    return _seeded(seed, lambda: BertForSequenceClassification(_bert_config(classes, dropout, **config)))


def bert_tokens(classes: int = CLASSES, *, dropout: float = 0.0, seed: int = 0, **config: Any) -> nn.Module:
    """BERT-style token classifier."""
    return _seeded(seed, lambda: BertForTokenClassification(_bert_config(classes, dropout, **config)))


def roberta(classes: int = CLASSES, *, dropout: float = 0.0, seed: int = 0, **config: Any) -> nn.Module:
    """RoBERTa-style sequence classifier (positions counted from the padding token's number)."""
    settings = _encoder_settings(dropout) | {"max_position_embeddings": 40, "type_vocab_size": 1, "pad_token_id": PAD}
    return _seeded(
        seed, lambda: RobertaForSequenceClassification(RobertaConfig(**(settings | {"num_labels": classes} | config)))
    )


def gpt2(*, dropout: float = 0.0, seed: int = 0, **config: Any) -> nn.Module:
    """GPT-2-style language model; its output layer is tied to the embeddings."""
    return _seeded(seed, lambda: GPT2LMHeadModel(GPT2Config(**(_gpt2_settings(dropout) | config))))


def gpt2_classifier(classes: int = CLASSES, *, dropout: float = 0.0, seed: int = 0, **config: Any) -> nn.Module:
    """GPT-2-style sequence classifier (reads the last token that is no padding)."""
    settings = _gpt2_settings(dropout) | {"num_labels": classes} | config
    return _seeded(seed, lambda: GPT2ForSequenceClassification(GPT2Config(**settings)))


def llama(*, dropout: float = 0.0, seed: int = 0, **config: Any) -> nn.Module:
    """Llama-style language model with grouped key-value heads and sdpa attention."""
    return _seeded(seed, lambda: LlamaForCausalLM(LlamaConfig(**(_llama_settings(dropout) | config))))


def llama_classifier(classes: int = CLASSES, *, dropout: float = 0.0, seed: int = 0, **config: Any) -> nn.Module:
    """Llama-style sequence classifier."""
    settings = _llama_settings(dropout) | {"num_labels": classes} | config
    return _seeded(seed, lambda: LlamaForSequenceClassification(LlamaConfig(**settings)))


def vit(classes: int = CLASSES, *, dropout: float = 0.0, seed: int = 0, **config: Any) -> nn.Module:
    """ViT-style image classifier for 8×8 images with three channels."""
    settings = {
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "initializer_range": 0.2,
        "num_labels": classes,
    }
    return _seeded(seed, lambda: ViTForImageClassification(ViTConfig(**(settings | config))))


def resnet(classes: int = CLASSES, *, seed: int = 0, **config: Any) -> nn.Module:
    """ResNet image classifier whose BatchNorm layers have running statistics of their own."""
    settings = {
        "embedding_size": 8,
        "hidden_sizes": [8, 12],
        "depths": [1, 1],
        "layer_type": "basic",
        "num_labels": classes,
    }

    def build() -> nn.Module:
        model = ResNetForImageClassification(ResNetConfig(**(settings | config)))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.5, 2.0)
        return model

    return _seeded(seed, build)


class PlainClassifier(nn.Module):
    """A classifier that is no Transformers model: `forward(features, labels)` returns a dict."""

    def __init__(self, classes: int = CLASSES, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(FEATURES, 10)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(10, classes)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.output(self.dropout(torch.tanh(self.hidden(features.to(self.hidden.weight.dtype)))))
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def plain(classes: int = CLASSES, *, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """A plain `nn.Module` classifier."""
    return _seeded(seed, lambda: PlainClassifier(classes, dropout))


def lora(classes: int = CLASSES, *, dropout: float = 0.0, seed: int = 0, **config: Any) -> PeftModel:
    """LoRA adapters on the BERT-style classifier, both factors away from zero."""

    def build() -> PeftModel:
        adapters = LoraConfig(
            task_type="SEQ_CLS", r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["query", "value"]
        )
        model = get_peft_model(BertForSequenceClassification(_bert_config(classes, dropout, **config)), adapters)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        return model

    return _seeded(seed, build)


def _seeded(seed: int, build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _encoder_settings(dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "initializer_range": 0.2,
    }


def _bert_config(classes: int, dropout: float, **config: Any) -> BertConfig:
    return BertConfig(**(_encoder_settings(dropout) | {"num_labels": classes} | config))


def _gpt2_settings(dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "n_positions": 32,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def _llama_settings(dropout: float) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "attention_dropout": dropout,
        "initializer_range": 0.2,
        "attn_implementation": "sdpa",
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


# --- rows -------------------------------------------------------------------------------------------------------------


def text_rows(n: int = 12, *, classes: int = CLASSES, seed: int = 0, length: tuple[int, int] = (4, 9)) -> list[Row]:
    """Rows of one class each: token numbers of varying length whose first tokens lean towards the class."""
    rng = np.random.default_rng(seed)
    rows = []
    for label in _labels(rng, n, classes):
        tokens = rng.integers(2, VOCABULARY, size=int(rng.integers(*length)))
        tokens[:2] = 2 + label
        rows.append({"input_ids": tokens.tolist(), "attention_mask": [1] * len(tokens), "labels": label})
    return rows


def token_rows(n: int = 12, *, classes: int = CLASSES, seed: int = 0, ignored: float = 0.2) -> list[Row]:
    """Rows with one class a token; a share of the labels is -100."""
    rng = np.random.default_rng(seed)
    rows = text_rows(n, seed=seed)
    for row in rows:
        labels = np.asarray(row["input_ids"]) % classes
        labels[rng.random(len(labels)) < ignored] = -100
        row["labels"] = labels.tolist()
    return rows


def language_rows(n: int = 12, *, seed: int = 0) -> list[Row]:
    """Rows for a language model: the labels are the tokens, the first of some rows is a prompt that is not learned."""
    rows = text_rows(n, seed=seed)
    for number, row in enumerate(rows):
        row["labels"] = [-100] * (number % 3) + row["input_ids"][number % 3 :]
    return rows


def multi_label_rows(n: int = 12, *, classes: int = CLASSES, seed: int = 0) -> list[Row]:
    """Rows with any number of classes each, as floats."""
    rng = np.random.default_rng(seed)
    return [
        row | {"labels": rng.integers(0, 2, size=classes).astype(float).tolist()} for row in text_rows(n, seed=seed)
    ]


def regression_rows(n: int = 12, *, outputs: int = 1, seed: int = 0) -> list[Row]:
    """Rows with a number (or several) each."""
    rng = np.random.default_rng(seed)
    values = [rng.normal(size=outputs).tolist() for _ in range(n)]
    return [
        row | {"labels": value[0] if outputs == 1 else value}
        for row, value in zip(text_rows(n, seed=seed), values, strict=True)
    ]


def image_rows(n: int = 12, *, classes: int = CLASSES, seed: int = 0, size: int = IMAGE_SIZE) -> list[Row]:
    """Rows of one class each: `pixel_values` of shape `(3, size, size)`."""
    rng = np.random.default_rng(seed)
    return [
        {"pixel_values": (rng.normal(size=(3, size, size)) + label).astype(np.float32), "labels": label}
        for label in _labels(rng, n, classes)
    ]


def plain_rows(n: int = 12, *, classes: int = CLASSES, seed: int = 0) -> list[Row]:
    """Rows of one class each: `features` of shape `(6,)`."""
    rng = np.random.default_rng(seed)
    rows = []
    for label in _labels(rng, n, classes):
        features = rng.normal(size=FEATURES).astype(np.float32)
        features[label] += 2.0
        rows.append({"features": features, "labels": label})
    return rows


def _labels(rng: np.random.Generator, n: int, classes: int) -> list[int]:
    return rng.permutation(np.arange(n) % classes).tolist()


def as_dataset(rows: list[Row]) -> datasets.Dataset:
    """The rows as a `datasets.Dataset`."""
    plain_values = [
        {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in row.items()} for row in rows
    ]
    return datasets.Dataset.from_list(plain_values)


class RowList(Dataset):
    """The rows as a torch `Dataset` of tensors."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [{key: torch.as_tensor(value) for key, value in row.items()} for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        return dict(self.rows[position])


# --- collators --------------------------------------------------------------------------------------------------------


def pad_right(extra: int = 0) -> Collator:
    """Stack rows; sequences are padded on the right to the longest one and `extra` further."""
    return lambda rows: _collate(rows, extra, left=False)


def pad_left(extra: int = 0, *, position_ids: bool = True) -> Collator:
    """Stack rows; sequences are padded on the left, with `position_ids` that count the true tokens from zero."""

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        batch = _collate(rows, extra, left=True)
        if position_ids:
            batch["position_ids"] = (batch["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        return batch

    return collate


def _collate(rows: list[Row], extra: int, *, left: bool) -> dict[str, Tensor]:
    batch = {}
    for key in rows[0]:
        values = [torch.as_tensor(row[key]) for row in rows]
        values = [value.float() if value.is_floating_point() else value.long() for value in values]
        if values[0].dim() == 1 and not values[0].is_floating_point():
            length = max(len(value) for value in values) + extra
            fill = -100 if key == "labels" else PAD
            values = [
                F.pad(value, (length - len(value), 0) if left else (0, length - len(value)), value=fill)
                for value in values
            ]
        batch[key] = torch.stack(values)
    return batch


# --- all families -----------------------------------------------------------------------------------------------------

# Family → (model, rows). The rows of every family are collated by `pad_right()`.
FAMILIES: dict[str, tuple[Callable[..., nn.Module], Callable[..., list[Row]]]] = {
    "bert": (bert, text_rows),
    "bert-tokens": (bert_tokens, token_rows),
    "roberta": (roberta, text_rows),
    "gpt2": (gpt2, language_rows),
    "gpt2-classifier": (gpt2_classifier, text_rows),
    "llama": (llama, language_rows),
    "llama-classifier": (llama_classifier, text_rows),
    "vit": (vit, image_rows),
    "resnet": (resnet, image_rows),
    "plain": (plain, plain_rows),
    "lora": (lora, text_rows),
}


def build(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> nn.Module:
    """A model of a family in `FAMILIES`, in `dtype`; `settings` it does not know (dropout of a ResNet) are refused."""
    make = FAMILIES[family][0]
    unknown = [
        name
        for name in settings
        if name not in inspect.signature(make).parameters
        and not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(make).parameters.values())
    ]
    if unknown:
        raise TypeError(f"{family} takes no {unknown}")
    return make(seed=seed, **settings).to(dtype)


def rows_of(family: str, n: int = 12, *, seed: int = 0) -> list[Row]:
    """Rows that fit the models of a family in `FAMILIES`."""
    return FAMILIES[family][1](n, seed=seed)


class WrongBackward(torch.autograd.Function):
    """The identity, whose backward divides by the batch size: right for one row, wrong for a batch."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, rows: int) -> Tensor:
        ctx.rows = rows
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / ctx.rows, None
