"""Trained models, each made once and kept as safetensors; every method of a cell starts from the same files."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, TrainingArguments, set_seed

from benchmarks.data import Split, Splits, folder_of, load_splits, stack_rows
from benchmarks.hardware import hardware
from benchmarks.models import make_model, make_tokenizer
from benchmarks.question_answers import TOFU, load_tofu, train_tokenizer
from benchmarks.scenarios import Scenario
from benchmarks.suites import Work
from hf_iau import GradientMemory, RestrictionConfig, UnlearningTrainer
from hf_iau.methods.baselines.retrain import RetrainConfig

logger = logging.getLogger(__name__)

SECOND_SEED = 1000
"""Retrained models that must not share a seed with the original have seeds from the case's plus this on."""


@dataclass
class TrainedModel:
    """A model with what its training cost.

    Attributes:
        model: with the trained weights, in evaluation mode.
        record: seconds (wall and CPU), seed, rows, hardware.
        moments: the optimizer's state by parameter name, where it was kept.
    """

    model: nn.Module
    record: dict[str, Any]
    moments: dict[str, dict[str, torch.Tensor]] | None = None


@dataclass
class Case:
    """One work, scenario and seed, with its rows."""

    work: Work
    scenario: Scenario
    seed: int
    splits: Splits
    forget_rows: np.ndarray

    @property
    def requests(self) -> list[np.ndarray]:
        """The forget rows by request; mostly one."""
        return self.scenario.split(self.forget_rows, self.seed)

    @property
    def train(self) -> Split:
        """The training rows with the labels that are trained on."""
        labels = self.splits.train.labels
        return self.splits.train.with_labels(self.scenario.training_labels(labels, self.seed, self.splits.n_classes))


class ModelStore:
    """Trains models or reads them back.

    Args:
        folder: where models are kept.
        data: folder with the data sets.
        weights: folder with pretrained weights; default: the installed package's.
    """

    def __init__(self, folder: Path, data: Path | None, weights: Path | None = None) -> None:
        self.folder = folder
        self.data = data
        self.weights = weights
        self._splits: dict[tuple[str, int, int, int], Splits] = {}
        self._tokenizer: Any = None

    def case(self, work: Work, scenario: Scenario, seed: int) -> Case:
        """The rows of one work, scenario and seed."""
        sizes = (work.train_rows, work.held_out_rows, work.test_rows)
        key = (work.data, *sizes)
        if key not in self._splits:
            names = ("train_rows", "held_out_rows", "test_rows")
            rows = dict(zip(names, sizes, strict=True))
            if work.data == TOFU:
                splits = load_tofu(folder_of(TOFU, self.data), **rows)
            else:
                splits = load_splits(work.data, self.data, **rows)
            self._splits = {key: splits}
        splits = self._splits[key]
        return Case(work, scenario, seed, splits, scenario.forget_rows(splits.train.labels, seed))

    def original(self, case: Case, seed: int | None = None) -> TrainedModel:
        """The model trained on all rows, from the case's seed or another one."""
        everything = np.arange(len(case.train))
        seed = case.seed if seed is None else seed
        return self._model(case, "original", seed, everything, keep_optimizer=case.work.keep_optimizer)

    def retrained(self, case: Case, seed: int | None = None) -> TrainedModel:
        """The model trained without the forget rows, from the case's seed or another one."""
        return self._model(case, "retrained", case.seed if seed is None else seed, _kept(case))

    def retrained_again(self, case: Case) -> TrainedModel:
        """The same from another seed."""
        return self.retrained(case, case.seed + SECOND_SEED)

    def retrain_config(self, case: Case) -> RetrainConfig:
        """For `method="retrain"`: training starts from a new model."""
        return RetrainConfig(model_init=lambda: make_model(case.work.model, case.splits.n_classes, self.weights))

    def tokenizer(self, work: Work) -> Any:
        """The model's tokenizer, or None."""
        if work.data == TOFU:
            if self._tokenizer is None:
                self._tokenizer = train_tokenizer(folder_of(TOFU, self.data))
            return self._tokenizer
        return make_tokenizer(work.model, self.weights)

    def collator(self, work: Work) -> Any:
        """What turns rows into a batch."""
        tokenizer = self.tokenizer(work)
        if tokenizer is None:
            return stack_rows
        return (DataCollatorForTokenClassification if work.data == TOFU else DataCollatorWithPadding)(tokenizer)

    def trainer(
        self,
        work: Work,
        model: nn.Module,
        train: Any,
        *,
        seed: int,
        held_out: Any = None,
        for_request: bool = False,
        memory: GradientMemory | None = None,
    ) -> UnlearningTrainer:
        """A trainer for training or for requests; both read the rows through the same collator."""
        training = work.training
        arguments = TrainingArguments(
            output_dir=str(self.folder / "runs"),
            per_device_train_batch_size=work.request_batch_size if for_request else training.batch_size,
            per_device_eval_batch_size=work.eval_batch_size,
            num_train_epochs=training.epochs,
            learning_rate=training.learning_rate,
            lr_scheduler_type=training.schedule,
            optim="adamw_torch",
            weight_decay=training.weight_decay,
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="epoch",
            disable_tqdm=True,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
        )
        restriction = None
        if training.restriction != "none":
            restriction = RestrictionConfig(mode=training.restriction, alpha=training.alpha)  # type: ignore[arg-type]
        return UnlearningTrainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=self.collator(work),
            restriction=restriction,
            memory=memory,
        )

    def _model(
        self, case: Case, role: str, seed: int, rows: np.ndarray, *, keep_optimizer: bool = False
    ) -> TrainedModel:
        work, train = case.work, case.train
        key = _key(work, role, seed, rows, train.labels)
        weights, header = self.folder / f"{key}.safetensors", self.folder / f"{key}.json"
        moments = self.folder / f"{key}.optimizer.safetensors"
        set_seed(seed)
        model = make_model(work.model, case.splits.n_classes, self.weights)
        if not (header.is_file() and weights.is_file() and (moments.is_file() or not keep_optimizer)):
            logger.info("training %s", key)
            dataset = train.select(rows).dataset(self.tokenizer(work), augmented=work.training.augmented)
            trainer = self.trainer(work, model, dataset, seed=seed)
            started, cpu_started = time.perf_counter(), time.process_time()
            result = trainer.train()
            record = {
                "key": key,
                "role": role,
                "seed": seed,
                "rows": len(rows),
                "settings": work.settings(),
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu_started,
                "training_loss": result.training_loss,
                "last_epoch_loss": _last_loss(trainer),
                "hardware": hardware(),
            }
            self.folder.mkdir(parents=True, exist_ok=True)
            if keep_optimizer:
                _write_tensors(_moments(trainer), moments)
            _write_tensors({name: t.contiguous().cpu() for name, t in model.state_dict().items()}, weights)
            header.write_text(json.dumps(record, indent=1))
            logger.info("trained %s in %.1f s", key, record["seconds"])
        model.load_state_dict(load_file(weights))
        model.eval()
        kept = _by_parameter(load_file(moments)) if keep_optimizer else None
        return TrainedModel(model, json.loads(header.read_text()), kept)


def restore_moments(trainer: UnlearningTrainer, trained: TrainedModel) -> None:
    """Give a trainer the optimizer that its model was trained with."""
    if trained.moments is None:
        raise ValueError(f"{trained.record['key']}: the optimizer was not kept (Work.keep_optimizer).")
    optimizer = trainer.create_optimizer()
    for name, parameter in trained.model.named_parameters():
        optimizer.state[parameter] = {entry: tensor.clone() for entry, tensor in trained.moments[name].items()}


def _kept(case: Case) -> np.ndarray:
    return np.setdiff1d(np.arange(len(case.train)), case.forget_rows)


def _key(work: Work, role: str, seed: int, rows: np.ndarray, labels: np.ndarray) -> str:
    """A name that changes with everything the weights depend on."""
    digest = hashlib.sha256(json.dumps(work.settings(), sort_keys=True).encode())
    digest.update(rows.astype(np.int64).tobytes())
    digest.update(labels.astype(np.int64).tobytes())
    return f"{work.model}-{work.data}-{role}-seed{seed}-{digest.hexdigest()[:12]}"


def _moments(trainer: UnlearningTrainer) -> dict[str, torch.Tensor]:
    optimizer: Any = trainer.optimizer
    state = getattr(optimizer, "optimizer", optimizer).state
    named = trainer.model.named_parameters()  # type: ignore[union-attr]
    return {
        f"{name}|{entry}": tensor.detach().cpu().contiguous()
        for name, parameter in named
        for entry, tensor in state.get(parameter, {}).items()
    }


def _by_parameter(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    state: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, entry = key.split("|")
        state.setdefault(name, {})[entry] = tensor
    return state


def _last_loss(trainer: UnlearningTrainer) -> float | None:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[-1] if losses else None


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    staged = path.with_suffix(".staged")
    save_file(tensors, staged)
    staged.replace(path)
