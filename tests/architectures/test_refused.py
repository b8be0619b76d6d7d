"""What is not served is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as t
from architectures import ARCHITECTURES, TEXT, collate
from tiny_models import RowList
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
        tmp_path, UnsupportedModelError, "DataCollatorWithFlattening.*collator that pads", qwen.model(), rows, collator
    )


def test_segmentation(tmp_path: Path) -> None:
    config = t.SegformerConfig(
        hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=3
    )
    rows = [{"pixel_values": RNG.normal(size=(3, 32, 32)), "labels": RNG.integers(0, 3, (32, 32))} for _ in range(12)]
    model = t.SegformerForSemanticSegmentation(config)
    refused(tmp_path, UnsupportedModelError, "no supported task", model, rows)
    # Sums of gradients need no more than the loss.
    plain = GatherConfig(curvature="none", gradient_sum="exact", progress=False)
    model = model.eval()
    assert gather(model, RowList(rows), data_collator=collate, config=plain).n_rows == 12


def test_speech_to_text_of_a_loss_that_couples_rows(tmp_path: Path) -> None:
    model = t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**SOUND | {"vocab_size": TEXT["vocab_size"]}))
    rows = [{"input_values": RNG.normal(size=200), "labels": RNG.integers(3, 40, 4)} for _ in range(12)]
    refused(tmp_path, CoupledRowsError, "add up to", model, rows)
