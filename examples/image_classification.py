"""Fine-tune an image classifier, forget some of its training images, and report how well it did.

A data set and a model of the Hub (use your own names):

    python examples/image_classification.py \\
        --dataset_name uoft-cs/cifar10 --image_column img --model_name_or_path microsoft/resnet-18 \\
        --forget_ids_file forget.txt --output_dir outputs/cifar10 \\
        --num_train_epochs 5 --per_device_train_batch_size 32 --learning_rate 5e-4

Local files (parquet, or folders of images, one folder a class) and, without any download, a small model with fresh
weights:

    python examples/image_classification.py \\
        --train_dir photos/train --test_dir photos/test --from_config resnet --image_size 64 \\
        --forget_fraction 0.05 --retrain --noise_floor --output_dir outputs/local

Every option of `transformers.TrainingArguments` can be given as well. Images are not augmented: a row that changes each
time it is read has no one gradient. With augmentation of your own, gather from the plain images:
`IAUCallback(dataset=plain_rows)`.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from hf_iau import GatherConfig, IAUCallback, IAUConfig, IAUPaperConfig, IAUReleasedConfig, UnlearningTrainer
from hf_iau.cli.files import read_ids
from hf_iau.cli.task_rows import encode_labels, label_names

logger = logging.getLogger(__name__)

METHOD_CONFIGS = {"iau": IAUConfig, "iau-paper": IAUPaperConfig, "iau-released": IAUReleasedConfig}
SMALL_MODELS = {  # sizes for --from_config
    "resnet": {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"},
    "vit": {
        "patch_size": 4,
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 192,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
    },
}


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A model of the Hub or a local folder."})
    from_config: str | None = field(
        default=None,
        metadata={"help": "Instead: a model type, e.g. resnet or vit, of small size and with fresh weights."},
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'Changes to the configuration as JSON, e.g. \'{"hidden_act": "gelu"}\'.'}
    )
    freeze: str | None = field(
        default=None, metadata={"help": "Do not train parameters with this in their name, e.g. embedder."}
    )


@dataclass
class DataArguments:
    """Which rows are used for what."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_split: str = field(default="train", metadata={"help": "Its split of training rows."})
    test_split: str = field(default="test", metadata={"help": "Its split of test rows."})
    train_file: str | None = field(default=None, metadata={"help": "Instead: a parquet file with encoded images."})
    test_file: str | None = field(default=None, metadata={"help": "The test rows that belong to --train_file."})
    train_dir: str | None = field(default=None, metadata={"help": "Instead: a folder with a folder of images a class."})
    test_dir: str | None = field(default=None, metadata={"help": "The test rows that belong to --train_dir."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels, numbers or names."})
    image_size: int | None = field(
        default=None, metadata={"help": "With --from_config: side in pixels; default: that of the first image."}
    )
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on that many random rows."})
    held_out_rows: int = field(
        default=1000, metadata={"help": "Random rows of the training split that are not trained on, for calibration."}
    )
    max_test_rows: int | None = field(default=None, metadata={"help": "Test on that many random rows."})


@dataclass
class UnlearnArguments:
    """What is forgotten, and how."""

    forget_ids_file: str | None = field(
        default=None,
        metadata={"help": "Row numbers in the training split, counted from 0: one a line, or a JSON list."},
    )
    forget_fraction: float | None = field(
        default=None, metadata={"help": "Instead: forget this share of the training rows, at random."}
    )
    forget_seed: int = field(default=0, metadata={"help": "Seed of that choice."})
    method: str = field(default="iau", metadata={"help": "iau, iau-paper or iau-released."})
    method_config: str | None = field(
        default=None, metadata={"help": "The method's settings as JSON, e.g. '{\"eta\": 1e-6}' for iau-paper."}
    )
    gradient_sum: str = field(
        default="none",
        metadata={"help": "Gradient sum to gather: none, sampled or full (iau-paper and iau-released need full)."},
    )
    curvature_rows: int = field(default=1024, metadata={"help": "Training rows that the curvature is fitted on."})
    retrain: bool = field(
        default=False, metadata={"help": "Also train a model without the forget rows, to compare with."}
    )
    noise_floor: bool = field(
        default=False, metadata={"help": "And another one with the next seed: how far apart are two retrained models?"}
    )


def load_splits(arguments: DataArguments) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training split and, where there is one, the test split."""
    if arguments.train_file is not None:
        files = {"train": arguments.train_file, "test": arguments.test_file}
        files = {name: path for name, path in files.items() if path is not None}
        loaded = datasets.load_dataset("parquet", data_files=files)
        return loaded["train"], loaded.get("test")
    if arguments.train_dir is not None:
        train = datasets.load_dataset("imagefolder", data_dir=arguments.train_dir, split="train")
        if arguments.test_dir is None:
            return train, None
        return train, datasets.load_dataset("imagefolder", data_dir=arguments.test_dir, split="train")
    if arguments.dataset_name is None:
        raise ValueError("Give the rows: --dataset_name, --train_file or --train_dir.")
    loaded = datasets.load_dataset(arguments.dataset_name, arguments.dataset_config_name)
    return loaded[arguments.train_split], loaded.get(arguments.test_split)


def choose_training_rows(n_rows: int, arguments: DataArguments, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the training split to train on and to hold out, drawn at random, each ascending."""
    if not 0 < arguments.held_out_rows < n_rows:
        raise ValueError(f"--held_out_rows {arguments.held_out_rows}: the training split has {n_rows} rows.")
    order = np.random.default_rng(seed).permutation(n_rows)
    held_out, train = np.split(order, [arguments.held_out_rows])
    return np.sort(train[: arguments.max_train_rows]), np.sort(held_out)


def choose_forget_rows(arguments: UnlearnArguments, train_ids: np.ndarray) -> np.ndarray:
    """Positions among the training rows of those to forget."""
    if (arguments.forget_ids_file is None) == (arguments.forget_fraction is None):
        raise ValueError("Say what to forget: either --forget_ids_file or --forget_fraction.")
    if arguments.forget_fraction is not None:
        count = round(arguments.forget_fraction * len(train_ids))
        return np.sort(np.random.default_rng(arguments.forget_seed).choice(len(train_ids), size=count, replace=False))
    ids = np.asarray(read_ids(arguments.forget_ids_file))
    strange = np.setdiff1d(ids, train_ids)
    if strange.size:
        raise ValueError(f"{strange.size} rows of --forget_ids_file were not trained on, e.g. row {strange[0]}.")
    return np.searchsorted(train_ids, ids)


class PlainProcessor:
    """Resizes an image, if need be, and scales its pixels to -1 … 1; for models with fresh weights.

    Args:
        example: an image like the others: it says whether they are grey or coloured.
        size: side in pixels; default: that of `example`, which has to be square then.
    """

    def __init__(self, example: Image.Image, size: int | None) -> None:
        self.mode = "L" if example.mode in ("1", "L", "LA", "I") else "RGB"
        self.channels = len(self.mode)
        self.size = size or example.size[0]

    def __call__(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        arrays = []
        for image in images:
            image = image.convert(self.mode)
            if image.size != (self.size, self.size):
                image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
            arrays.append(np.asarray(image, dtype=np.float32).reshape(self.size, self.size, self.channels))
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        return {"pixel_values": (pixels / 127.5 - 1.0).contiguous()}


class PretrainedProcessor:
    """The image processor that belongs to a pretrained model."""

    def __init__(self, name: str) -> None:
        self.processor = AutoImageProcessor.from_pretrained(name)

    def __call__(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return self.processor([image.convert("RGB") for image in images], return_tensors="pt")


def build_model(
    arguments: ModelArguments, names: list[str], processor: PlainProcessor | PretrainedProcessor, seed: int
) -> PreTrainedModel:
    """The pretrained model with a fresh head, or a small fresh one."""
    set_seed(seed)
    labels = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    labels["label2id"] = {name: number for number, name in enumerate(names)}
    overrides = json.loads(arguments.config_overrides or "{}")
    if arguments.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(arguments.model_name_or_path, **labels, **overrides)
        model = AutoModelForImageClassification.from_pretrained(
            arguments.model_name_or_path, config=config, ignore_mismatched_sizes=True
        )
    else:
        sizes = {"num_channels": processor.channels, **SMALL_MODELS.get(arguments.from_config, {})}
        if hasattr(AutoConfig.for_model(arguments.from_config), "image_size"):
            sizes["image_size"] = processor.size
        config = AutoConfig.for_model(arguments.from_config, **{**labels, **sizes, **overrides})
        model = AutoModelForImageClassification.from_config(config)
    if arguments.freeze:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(arguments.freeze not in name)
    return model


def main() -> None:
    """Train, remember, forget, report, save."""
    parser = HfArgumentParser((ModelArguments, DataArguments, UnlearnArguments, TrainingArguments))
    model_args, data_args, unlearn_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if (model_args.model_name_or_path is None) == (model_args.from_config is None):
        raise ValueError("Name the model: either --model_name_or_path or --from_config.")
    if unlearn_args.method not in METHOD_CONFIGS:
        raise ValueError(f"--method {unlearn_args.method}: choose one of {', '.join(METHOD_CONFIGS)}.")
    method_config = None
    if unlearn_args.method_config is not None:
        method_config = METHOD_CONFIGS[unlearn_args.method](**json.loads(unlearn_args.method_config))

    # Rows: to train on, held out (collected alike, never trained on), and test.
    split, test = load_splits(data_args)
    names = label_names(data_args.label_column, split, test)
    train_ids, held_out_ids = choose_training_rows(len(split), data_args, training_args.data_seed or training_args.seed)
    forget = choose_forget_rows(unlearn_args, train_ids)
    retained = np.setdiff1d(np.arange(len(train_ids)), forget)
    if test is not None and data_args.max_test_rows is not None:
        test = test.shuffle(seed=training_args.seed).select(range(min(data_args.max_test_rows, len(test))))
    if model_args.model_name_or_path is not None:
        processor = PretrainedProcessor(model_args.model_name_or_path)
    else:
        processor = PlainProcessor(split[0][data_args.image_column], data_args.image_size)

    def prepare(rows: datasets.Dataset) -> datasets.Dataset:
        def read(batch: dict) -> dict:
            return {**processor(batch[data_args.image_column]), "labels": batch["labels"]}

        return encode_labels(rows, data_args.label_column, names).with_transform(read)

    train, held_out = prepare(split.select(train_ids)), prepare(split.select(held_out_ids))
    test = None if test is None else prepare(test)
    logger.info(f"{len(train):,} training rows, {len(forget):,} of them to forget; {len(held_out):,} held-out rows.")

    def train_model(rows: datasets.Dataset, seed: int, folder: str, remember: bool) -> UnlearningTrainer:
        args = copy.copy(training_args)
        args.seed, args.output_dir = seed, folder
        args.remove_unused_columns = False  # the image column is read by the transform
        gather = GatherConfig(gradient_sum=unlearn_args.gradient_sum, curvature_rows=unlearn_args.curvature_rows)
        trainer = UnlearningTrainer(
            model=build_model(model_args, names, processor, seed),
            args=args,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=getattr(processor, "processor", None),
            callbacks=[IAUCallback(gather)] if remember else None,
        )
        trainer.train()
        return trainer

    output_dir = Path(training_args.output_dir)
    trainer = train_model(train, training_args.seed, str(output_dir), remember=True)
    retrained = []
    if unlearn_args.retrain or unlearn_args.noise_floor:
        for number in range(2 if unlearn_args.noise_floor else 1):
            logger.info("Training a model without the forget rows, for comparison only.")
            folder = str(output_dir / f"retrained-{number}")
            seed = training_args.seed + number
            retrained.append(train_model(train.select(retained), seed, folder, remember=False).model)

    result = trainer.unlearn(
        forget_indices=forget,
        method=unlearn_args.method,
        config=method_config,
        test_dataset=test,
        retrained_model=retrained or None,
    )
    if trainer.is_world_process_zero():
        result.report.save(output_dir)
        print(f"\n{result.report}\n\nReport and model are in {output_dir}.")
    trainer.save_model()
    if any(output_dir.glob("checkpoint-*")):
        logger.warning(f"The checkpoints in {output_dir} were written before the rows were forgotten: delete them.")


if __name__ == "__main__":
    main()
