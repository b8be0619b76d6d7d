"""Fine-tune a text classifier, forget some of its training rows, and report how well it did.

A data set and a model of the Hub (use your own names):

    python examples/text_classification.py \\
        --dataset_name PolyAI/banking77 --model_name_or_path distilbert-base-uncased \\
        --forget_ids_file forget.txt --output_dir outputs/banking77 \\
        --num_train_epochs 5 --per_device_train_batch_size 32 --learning_rate 5e-5

Local files (parquet, csv or json) and, without any download, a small model with fresh weights:

    python examples/text_classification.py \\
        --train_file train.parquet --test_file test.parquet --from_config bert \\
        --forget_fraction 0.05 --retrain --noise_floor --output_dir outputs/local

Every option of `transformers.TrainingArguments` can be given as well.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from accelerate.utils import broadcast_object_list
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)

from hf_iau import GatherConfig, IAUCallback, IAUConfig, IAUPaperConfig, IAUReleasedConfig, UnlearningTrainer
from hf_iau.cli.files import read_ids
from hf_iau.cli.task_rows import encode_labels, label_names, load_files

logger = logging.getLogger(__name__)

METHOD_CONFIGS = {"iau": IAUConfig, "iau-paper": IAUPaperConfig, "iau-released": IAUReleasedConfig}
SMALL_MODELS = {  # sizes for --from_config
    "bert": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
    "distilbert": {"dim": 128, "n_layers": 2, "n_heads": 4, "hidden_dim": 256},
    "roberta": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256},
}


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A model of the Hub or a local folder."})
    from_config: str | None = field(
        default=None, metadata={"help": "Instead: a model type, e.g. bert, of small size and with fresh weights."}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": "Changes to the configuration as JSON, e.g. '{\"num_hidden_layers\": 2}'."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Default: the model's own; with --from_config one is made from the training texts."},
    )
    freeze: str | None = field(
        default=None, metadata={"help": "Do not train parameters with this in their name, e.g. embeddings."}
    )


@dataclass
class DataArguments:
    """Which rows are used for what."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_split: str = field(default="train", metadata={"help": "Its split of training rows."})
    test_split: str = field(default="test", metadata={"help": "Its split of test rows."})
    train_file: str | None = field(default=None, metadata={"help": "Instead: a parquet, csv or json file."})
    test_file: str | None = field(default=None, metadata={"help": "The test rows that belong to --train_file."})
    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    label_column: str = field(default="label", metadata={"help": "Column of the labels, numbers or names."})
    max_length: int = field(default=128, metadata={"help": "Longest text in tokens; the rest is cut off."})
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
        loaded = load_files(files)
        return loaded["train"], loaded.get("test")
    if arguments.dataset_name is None:
        raise ValueError("Give the rows: --dataset_name or --train_file.")
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


def load_tokenizer(model: ModelArguments, data: DataArguments, texts: list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer named, the model's own, or a small one made from `texts`."""
    name = model.tokenizer_name or model.model_name_or_path
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=4000, special_tokens=list(special.values()), show_progress=False)
    )
    # Ties are broken at random in training, so all processes take the first one's.
    tokenizer = Tokenizer.from_str(broadcast_object_list([tokenizer.to_str()])[0])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=data.max_length, **special)


def build_model(
    arguments: ModelArguments, names: list[str], tokenizer: PreTrainedTokenizerBase, seed: int
) -> PreTrainedModel:
    """The pretrained model with a fresh head, or a small fresh one."""
    set_seed(seed)
    labels = {"num_labels": len(names), "id2label": dict(enumerate(names))}
    labels["label2id"] = {name: number for number, name in enumerate(names)}
    overrides = json.loads(arguments.config_overrides or "{}")
    if arguments.model_name_or_path is not None:
        config = AutoConfig.from_pretrained(arguments.model_name_or_path, **labels, **overrides)
        model = AutoModelForSequenceClassification.from_pretrained(arguments.model_name_or_path, config=config)
    else:
        sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        sizes |= SMALL_MODELS.get(arguments.from_config, {})
        config = AutoConfig.for_model(arguments.from_config, **{**labels, **sizes, **overrides})
        model = AutoModelForSequenceClassification.from_config(config)
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
    tokenizer = load_tokenizer(model_args, data_args, split.select(train_ids)[data_args.text_column])

    def prepare(rows: datasets.Dataset) -> datasets.Dataset:
        def tokenize(batch: dict) -> dict:
            return tokenizer(batch[data_args.text_column], truncation=True, max_length=data_args.max_length)

        rows = encode_labels(rows, data_args.label_column, names)
        return rows.map(tokenize, batched=True, remove_columns=[c for c in rows.column_names if c != "labels"])

    train, held_out = prepare(split.select(train_ids)), prepare(split.select(held_out_ids))
    test = None if test is None else prepare(test)
    logger.info(f"{len(train):,} training rows, {len(forget):,} of them to forget; {len(held_out):,} held-out rows.")

    def train_model(rows: datasets.Dataset, seed: int, folder: str, remember: bool) -> UnlearningTrainer:
        args = copy.copy(training_args)
        args.seed, args.output_dir = seed, folder
        gather = GatherConfig(gradient_sum=unlearn_args.gradient_sum, curvature_rows=unlearn_args.curvature_rows)
        trainer = UnlearningTrainer(
            model=build_model(model_args, names, tokenizer, seed),
            args=args,
            train_dataset=rows,
            eval_dataset=held_out,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
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
