"""Small models of many kinds, with random weights, and rows that fit them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as t
from torch import Tensor, nn

WORDS, CLASSES, LENGTH = 40, 3, 8
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {"num_key_value_heads": 1, "head_dim": 8}
BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 16, "num_labels": CLASSES}
SEQUENCES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
NO_DROPOUT = dict.fromkeys(
    (
        *("dropout", "attention_dropout", "activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"),
        *("hidden_dropout", "attn_dropout", "drop_path_rate", "dropout_rate", "feat_proj_dropout", "layerdrop"),
    ),
    0.0,
)

Row = dict[str, Any]
Draws = np.random.Generator


def words(rng: Draws, *shape: int) -> list[Any]:
    found: list[Any] = rng.integers(3, WORDS, shape or LENGTH).tolist()
    return found


def a_class(rng: Draws) -> int:
    return int(rng.integers(0, CLASSES))


def text(rng: Draws) -> Row:
    return {"input_ids": words(rng), "attention_mask": [1] * LENGTH}


def labelled_text(rng: Draws) -> Row:
    return text(rng) | {"labels": a_class(rng)}


def language(rng: Draws) -> Row:
    row = text(rng)
    return row | {"labels": row["input_ids"]}


def image(rng: Draws, size: int = 16) -> Row:
    return {"pixel_values": rng.normal(size=(3, size, size)), "labels": a_class(rng)}


def translation(rng: Draws) -> Row:
    return text(rng) | {"labels": words(rng, 6)}


def masked(rng: Draws) -> Row:
    row = text(rng)
    return row | {"labels": [-100, -100, row["input_ids"][2], -100, row["input_ids"][4], *[-100] * (LENGTH - 5)]}


def span(rng: Draws) -> Row:
    start = int(rng.integers(0, LENGTH - 2))
    return text(rng) | {"start_positions": start, "end_positions": start + 1}


def choices(rng: Draws) -> Row:
    return {
        "input_ids": words(rng, CLASSES, LENGTH),
        "attention_mask": [[1] * LENGTH] * CLASSES,
        "labels": a_class(rng),
    }


def spectrum(rng: Draws) -> Row:
    return {"input_features": rng.normal(size=(8, 24)), "labels": words(rng, 5)}


def sound(rng: Draws) -> Row:
    return {"input_values": rng.normal(size=200), "labels": a_class(rng)}


def captioned(rng: Draws) -> Row:
    ids = [5] * 4 + [word for word in words(rng) if word != 5]
    ids = ids[:10] + [6] * (10 - len(ids))
    return {
        "input_ids": ids,
        "attention_mask": [1] * 10,
        "labels": [-100] * 4 + ids[4:],
        "pixel_values": rng.normal(size=(3, 16, 16)),
    }


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        make: builds one.
        row: draws a row for it.
        targets: of each row.
        tolerance: of gradients, relative, where part of a float64 model computes in float32.
    """

    make: Callable[[], nn.Module]
    row: Callable[[Draws], Row]
    targets: int = 1
    tolerance: float = 1e-9

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(dtype)

    def rows(self, n: int, seed: int = 0) -> list[Row]:
        rng = np.random.default_rng(seed)
        return [self.row(rng) for _ in range(n)]


def collate(rows: list[Row], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Stack rows, whose tensors are all of one shape."""
    batch = {key: torch.as_tensor(np.asarray([row[key] for row in rows])) for key in rows[0]}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def _of(model: Any, config: Any, **settings: Any) -> Callable[[], nn.Module]:
    """Builds `model` from `config(**settings)`, with what the configuration knows of `NO_DROPOUT`."""

    def make() -> nn.Module:
        known = config()
        return model(config(**{name: value for name, value in NO_DROPOUT.items() if hasattr(known, name)} | settings))

    return make


ARCHITECTURES = {
    "t5": Architecture(
        _of(
            *(t.T5ForConditionalGeneration, t.T5Config),
            **{"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
            **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
        ),
        translation,
        targets=6,
    ),
    "bart": Architecture(
        _of(
            *(t.BartForConditionalGeneration, t.BartConfig),
            **SEQUENCES,
            **{"vocab_size": WORDS, "max_position_embeddings": 32},
        ),
        translation,
        targets=6,
    ),
    "whisper": Architecture(
        _of(
            *(t.WhisperForConditionalGeneration, t.WhisperConfig),
            **SEQUENCES,
            **{"vocab_size": WORDS, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 12},
        ),
        spectrum,
        targets=5,
    ),
    "masked language": Architecture(_of(t.BertForMaskedLM, t.BertConfig, **TEXT), masked, targets=2),
    "question answering": Architecture(_of(t.BertForQuestionAnswering, t.BertConfig, **TEXT), span, targets=2),
    "question answering by a decoder": Architecture(
        _of(t.LlamaForQuestionAnswering, t.LlamaConfig, **TEXT, num_key_value_heads=1), span, targets=2, tolerance=1e-5
    ),
    "multiple choice": Architecture(_of(t.BertForMultipleChoice, t.BertConfig, **TEXT), choices),
    "albert": Architecture(
        _of(t.AlbertForSequenceClassification, t.AlbertConfig, **TEXT, embedding_size=8, num_labels=CLASSES),
        labelled_text,
    ),
    "opt": Architecture(
        _of(t.OPTForCausalLM, t.OPTConfig, **TEXT, ffn_dim=32, word_embed_proj_dim=16), language, LENGTH - 1, 1e-5
    ),
    "qwen3": Architecture(_of(t.Qwen3ForCausalLM, t.Qwen3Config, **TEXT, **DECODER), language, LENGTH - 1, 1e-5),
    "gemma3": Architecture(_of(t.Gemma3ForCausalLM, t.Gemma3TextConfig, **TEXT, **DECODER), language, LENGTH - 1, 1e-5),
    "mixture of experts": Architecture(
        _of(
            t.MixtralForCausalLM,
            t.MixtralConfig,
            **TEXT,
            num_key_value_heads=1,
            num_local_experts=2,
            experts_implementation="eager",
        ),
        *(language, LENGTH - 1, 1e-5),
    ),
    "mamba": Architecture(
        _of(
            *(t.MambaForCausalLM, t.MambaConfig),
            **{"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "pad_token_id": 0},
            **{"bos_token_id": 1, "eos_token_id": 2},
        ),
        *(language, LENGTH - 1, 1e-5),
    ),
    "image and text": Architecture(
        _of(
            *(t.LlavaForConditionalGeneration, t.LlavaConfig),
            vision_config=t.CLIPVisionConfig(**BLOCKS, image_size=16, patch_size=8),
            text_config=t.LlamaConfig(**TEXT, num_key_value_heads=1),
            image_token_index=5,
        ),
        *(captioned, 6, 1e-5),
    ),
    "convnext": Architecture(
        _of(
            *(t.ConvNextForImageClassification, t.ConvNextConfig),
            **{"num_labels": CLASSES, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        ),
        partial(image, size=32),
    ),
    "swin": Architecture(
        _of(
            *(t.SwinForImageClassification, t.SwinConfig),
            **IMAGES,
            **{"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        ),
        image,
    ),
    "mobilenet": Architecture(
        _of(t.MobileNetV1ForImageClassification, t.MobileNetV1Config, **IMAGES, depth_multiplier=0.02), image
    ),
    "sound": Architecture(
        _of(
            *(t.Wav2Vec2ForSequenceClassification, t.Wav2Vec2Config),
            **TEXT,
            **{"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2},
            **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_labels": CLASSES},
            **{"classifier_proj_size": 8, "final_dropout": 0.0},
        ),
        sound,
    ),
}
