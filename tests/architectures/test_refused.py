"""What is not served is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from architectures import ARCHITECTURES, TEXT, collate
from tiny_models import RowList
from torch import nn
from unlearning_trainers import arguments

from hf_iau import (
    CoupledRowsError,
    GatherConfig,
    IAUCallback,
    IAUError,
    UnlearningTrainer,
    UnsupportedModelError,
    gather,
)

RNG = np.random.default_rng(0)
SOUND = ARCHITECTURES["sound"].make().config.to_dict()


def refused(folder: Path, error: type[IAUError], match: str, *given: Any) -> None:
    steps: list[int] = []

    class Counts(t.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps.append(1)

    model, rows, *collator = given
    trainer = UnlearningTrainer(
        model=model,
        args=arguments(folder, remove_unused_columns=False),
        train_dataset=RowList(rows),
        data_collator=collator[0] if collator else collate,
        callbacks=[IAUCallback(), Counts()],
    )
    with pytest.raises(error, match=match):
        trainer.train()
    assert steps == []


def test_rows_that_a_collator_joins_to_one(tmp_path: Path) -> None:
    """Padding-free batches: the same loss, but no row to be seen in it."""
    qwen = ARCHITECTURES["qwen3"]
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in qwen.rows(12)]
    collator = t.DataCollatorWithFlattening()
    refused(
        tmp_path,
        UnsupportedModelError,
        "DataCollatorWithFlattening.*packs.*one that pads",
        qwen.model(),
        rows,
        collator,
    )


def test_collators_that_keep_rows_apart_in_another_way_are_served() -> None:
    """Nested inputs beside a constant; and two lines a row."""
    rows = RowList([{"features": RNG.normal(size=4), "labels": 0} for _ in range(8)])
    settings = GatherConfig(curvature="none", gradient_sum="full", batch_size=3, progress=False)

    def nested(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"batch": collate(rows), "constant": torch.eye(5)}

    def twice(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"features": collate(rows)["features"].repeat_interleave(2, dim=0)}

    for collator, read in (
        (nested, lambda inputs: inputs["batch"]["features"]),
        (twice, lambda inputs: inputs["features"]),
    ):

        def row_loss(model: nn.Module, inputs: dict[str, Any], read: Any = read) -> torch.Tensor:
            return model(read(inputs)).square().sum()

        memory = gather(nn.Linear(4, 2), rows, data_collator=collator, config=settings, row_loss=row_loss)
        assert memory.n_rows == 8


def test_rows_that_a_collator_drops(tmp_path: Path) -> None:
    qwen = ARCHITECTURES["qwen3"]
    refused(
        tmp_path,
        UnsupportedModelError,
        "drops rows",
        qwen.model(),
        qwen.rows(12),
        lambda rows: collate(rows[: max(len(rows) - 1, 1)]),
    )


def test_detection(tmp_path: Path) -> None:
    """Labels that are a list of boxes and classes."""
    model = ARCHITECTURES["swin"].model()
    rows = ARCHITECTURES["swin"].rows(12)

    def collator(rows: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = collate([{"pixel_values": row["pixel_values"]} for row in rows])
        return pixels | {"labels": [{"class_labels": row["labels"]} for row in rows]}

    refused(tmp_path, UnsupportedModelError, "`labels` are a list.*object detection", model, rows, collator)


def test_segmentation(tmp_path: Path) -> None:
    config = t.SegformerConfig(
        hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=3
    )
    rows = [{"pixel_values": RNG.normal(size=(3, 32, 32)), "labels": RNG.integers(0, 3, (32, 32))} for _ in range(12)]
    model = t.SegformerForSemanticSegmentation(config)
    refused(tmp_path, UnsupportedModelError, r"no supported task.*fisher='empirical'", model, rows)
    # Sums of gradients need no more than the loss.
    plain = GatherConfig(curvature="none", gradient_sum="full", progress=False)
    model = model.eval()
    assert gather(model, RowList(rows), data_collator=collate, config=plain).n_rows == 12


def test_speech_to_text_of_a_loss_that_couples_rows(tmp_path: Path) -> None:
    model = t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**SOUND | {"vocab_size": TEXT["vocab_size"]}))
    rows = [{"input_values": RNG.normal(size=200), "labels": RNG.integers(3, 40, 4)} for _ in range(12)]
    refused(tmp_path, CoupledRowsError, "add up to", model, rows)
