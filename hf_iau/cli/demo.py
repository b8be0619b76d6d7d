"""A small vision model learns wrong labels by heart, then forgets 80 of them without being retrained.

Runs offline in less than three minutes on two CPU cores: `hf-iau demo`, or `python examples/demo.py`.

The data are scikit-learn's handwritten digits. A fifth of the labels that were collected for training is wrong, as a
careless annotator would leave them; the test labels are right. The model is trained until it knows the wrong labels by
heart. Then 80 wrong ones are found out, and the model has to lose them, which retraining without them would do. The
setting is chosen so that forgetting visibly matters: the model knows every wrong label before, a retrained one none.
Two models are retrained, for comparison only: the second has another seed and shows how far apart two retrained models
are anyhow.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from hf_iau.report.report import UnlearningReport
from hf_iau.trainer.callback import IAUCallback
from hf_iau.trainer.unlearning_trainer import UnlearningTrainer
from hf_iau.utils.optional import require


@dataclass(frozen=True)
class Setting:
    """Sizes of the demonstration."""

    train_rows: int = 1000
    held_out_rows: int = 400
    wrong_share: float = 0.2
    forget_rows: int = 80
    hidden_size: int = 64
    layers: int = 2
    initializer_range: float = 0.1
    epochs: int = 40
    batch_size: int = 50
    learning_rate: float = 2e-3


QUICK = Setting(train_rows=600, forget_rows=25, hidden_size=16, layers=1, epochs=3)


def load_rows(setting: Setting, seed: int) -> tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset, np.ndarray]:
    """Training, held-out and test rows, and which training rows have a wrong label.

    Held-out rows were collected like the training rows, wrong labels included: calibration needs rows that differ from
    training rows in one thing only, that the model never saw them.
    """
    require("sklearn", "The demonstration")
    from sklearn.datasets import load_digits

    random = np.random.default_rng(seed)
    digits = load_digits()
    order = random.permutation(len(digits.target))
    images = (digits.images[order, None] / 16.0).astype(np.float32)  # (rows, 1, 8, 8), 0 to 1
    labels = digits.target[order].astype(np.int64)
    collected = setting.train_rows + setting.held_out_rows
    wrong = np.zeros(len(labels), dtype=bool)
    for start, size in ((0, setting.train_rows), (setting.train_rows, setting.held_out_rows)):
        wrong[start + random.choice(size, size=int(setting.wrong_share * size), replace=False)] = True
    labels[wrong] = (labels[wrong] + random.integers(1, 10, size=int(wrong.sum()))) % 10

    def rows(part: slice) -> datasets.Dataset:
        features = datasets.Features(
            {"pixel_values": datasets.Array3D((1, 8, 8), "float32"), "labels": datasets.Value("int64")}
        )
        columns = {"pixel_values": images[part], "labels": labels[part]}
        return datasets.Dataset.from_dict(columns, features=features).with_format("torch")

    train, held_out = slice(0, setting.train_rows), slice(setting.train_rows, collected)
    return rows(train), rows(held_out), rows(slice(collected, None)), wrong[train]


def build_model(setting: Setting, seed: int) -> ViTForImageClassification:
    """A small vision transformer with fresh weights."""
    set_seed(seed)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,  # type: ignore[call-arg]  # an argument of the base class
            hidden_size=setting.hidden_size,
            num_hidden_layers=setting.layers,
            num_attention_heads=4,
            intermediate_size=2 * setting.hidden_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=setting.initializer_range,
        )
    )


def train_model(
    setting: Setting, seed: int, train: datasets.Dataset, held_out: datasets.Dataset, output_dir: Path, remember: bool
) -> UnlearningTrainer:
    """Train a fresh model on `train`; with `remember`, gather what a later request needs."""
    trainer = UnlearningTrainer(
        model=build_model(setting, seed),
        args=TrainingArguments(
            output_dir=str(output_dir),
            num_train_epochs=setting.epochs,
            learning_rate=setting.learning_rate,
            per_device_train_batch_size=setting.batch_size,
            per_device_eval_batch_size=200,
            save_strategy="no",
            logging_strategy="no",
            dataloader_pin_memory=False,
            seed=seed,
            use_cpu=True,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[IAUCallback()] if remember else None,
    )
    trainer.train()
    return trainer


@torch.no_grad()
def confidence_in_labels(model: Any, rows: datasets.Dataset) -> np.ndarray:
    """The probability that the model gives to each row's (right or wrong) label."""
    batch = rows[:]
    probabilities = model.eval()(pixel_values=torch.as_tensor(batch["pixel_values"])).logits.softmax(dim=1)
    return probabilities.gather(1, torch.as_tensor(batch["labels"])[:, None])[:, 0].numpy()


def explain(report: UnlearningReport, setting: Setting) -> str:
    """What happened, in plain words and with this run's numbers."""
    before, after, retrained = report.before, report.after, report.retrained
    assert retrained is not None and report.noise_floor is not None
    assert report.gap is not None and report.gap_before is not None

    def percent(figures: dict, name: str) -> str:
        return f"{100 * figures[name]:.0f} %"

    return "\n".join(
        [
            f"Before: the model gives the wrong label on {percent(before, 'forget_accuracy')} of the "
            f"{setting.forget_rows} rows to forget; it knows them by heart.",
            f"After unlearning: {percent(after, 'forget_accuracy')}. A model that was retrained without "
            f"those rows, which is the aim: {percent(retrained, 'forget_accuracy')}.",
            f"Correct on the test rows: {percent(before, 'test_accuracy')} before, {percent(after, 'test_accuracy')} "
            f"after, {percent(retrained, 'test_accuracy')} retrained. The labels that stay, wrong ones among them: "
            f"{percent(before, 'retain_accuracy')}, {percent(after, 'retain_accuracy')}, "
            f"{percent(retrained, 'retain_accuracy')}.",
            "An attacker who looks at losses tells forget rows from test rows with an AUC of "
            f"{percent(before, 'mia_auc')} before, {percent(after, 'mia_auc')} after, {percent(retrained, 'mia_auc')} "
            "retrained (a wrong label surprises a model that never saw it, so 50 % is not the aim here).",
            f"Mean distance of the four figures from the retrained model: {report.gap_before['mean_absolute']:.1f} "
            f"points before, {report.gap['mean_absolute']:.1f} after; two retrained models differ by "
            f"{report.noise_floor['gap']['mean_absolute']:.1f}.",
        ]
    )


def run_demo(output_dir: str | Path, *, seed: int = 0, quick: bool = False) -> UnlearningReport:
    """Train, forget, compare, report; prints what it does.

    Args:
        output_dir: where the report is written.
        seed: of the split, the wrong labels, training and calibration.
        quick: a few seconds of training, to test the demonstration and not to look at it.
    """
    started = time.perf_counter()
    torch.set_num_threads(1)  # the model is too small to gain from more, and a busy machine would slow them down
    setting = QUICK if quick else Setting()
    output_dir = Path(output_dir)
    train, held_out, test, wrong = load_rows(setting, seed)
    print(
        f"{len(train)} training rows, {int(wrong.sum())} of them with a wrong label; {len(held_out)} held-out rows "
        f"collected alike; {len(test)} test rows with right labels."
    )

    print("\n1. Training on all rows, wrong labels included")
    trainer = train_model(setting, seed, train, held_out, output_dir, remember=True)

    # The worst wrong labels are those learned most firmly: the highest probability for the wrong label. Only training
    # rows are looked at.
    confidence = confidence_in_labels(trainer.model, train)
    candidates = np.flatnonzero(wrong)
    forget = candidates[np.argsort(-confidence[candidates], kind="stable")[: setting.forget_rows]]
    retained = np.setdiff1d(np.arange(len(train)), forget)
    print(
        f"\nTo forget: the {len(forget)} wrong labels that the model has learned most firmly (probability of the wrong "
        f"label at least {confidence[forget].min():.3f})."
    )

    print("\n2. Retraining without these rows, for comparison: the same seed, then another")
    again: list[Any] = [
        train_model(setting, other, train.select(retained), held_out, output_dir, remember=False).model
        for other in (seed, seed + 1)
    ]

    print("\n3. Forgetting them without retraining")
    result = trainer.unlearn(forget_indices=forget, test_dataset=test, retrained_model=again)

    report = result.report
    report.save(output_dir)
    print(f"\n{report}\n\n{explain(report, setting)}")
    print(f"\nWritten to {output_dir}: report.html, report.json, report.md, loss_histograms.png")
    print(f"{time.perf_counter() - started:.0f} seconds in all")
    return report
