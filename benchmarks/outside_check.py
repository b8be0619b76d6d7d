"""Our baselines beside those of torchunlearn: same model, same rows, same batches, same optimizer.

    python -m benchmarks.outside_check [--source FOLDER] [--out FILE]

torchunlearn (Kim et al., PyPI `torchunlearn`, and Harry24k/machine-unlearning-pytorch) is no dependency: install it,
with torchvision, into an environment of its own. Its wheel 0.1.0 lacks the folder with its methods; `--source` names a
checkout.
"""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import TrainingArguments

from hf_iau import UnlearningTrainer
from hf_iau.data.trainer_rows import trainer_rows
from hf_iau.methods.baselines.bad_teacher import BadTeacherConfig
from hf_iau.methods.baselines.fine_tune import FineTuneConfig
from hf_iau.methods.baselines.gradient_ascent import GradientAscentConfig
from hf_iau.methods.baselines.l1_sparse import L1SparseConfig
from hf_iau.methods.baselines.neggrad_plus import NegGradPlusConfig
from hf_iau.methods.baselines.salun import SalUnConfig
from hf_iau.methods.baselines.scrub import SCRUBConfig
from hf_iau.methods.baselines.training_loop import endless, shuffled

CLASSES, ROWS, FORGOTTEN, BATCH, SEED = 10, 900, 90, 30, 0
Pair = tuple[Tensor, Tensor]


class Digits(Dataset):  # type: ignore[type-arg]
    """scikit-learn's digits, float64."""

    def __init__(self, start: int, stop: int) -> None:
        digits = load_digits()
        self.inputs = torch.from_numpy(digits.data[start:stop] / 16.0)
        self.labels = torch.from_numpy(digits.target[start:stop])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[number], "labels": self.labels[number]}


class Network(nn.Module):
    """A small classifier as a Trainer likes it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, CLASSES)).double()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(inputs)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class Batches:
    """Batches of retained and forget rows in the order in which ours come, epoch by epoch."""

    def __init__(self, trainer: UnlearningTrainer, forget: np.ndarray) -> None:
        kept = np.setdiff1d(np.arange(ROWS), forget)
        rows = trainer_rows(trainer, trainer.train_dataset, "training rows", BATCH)
        self.retain, self.forget = rows.select(kept), rows.select(forget)
        self.epoch = 0
        self.endless = endless(self.forget, None, SEED)

    def __len__(self) -> int:
        return -(-len(self.retain) // BATCH)

    def __iter__(self) -> Iterator[dict[str, Pair]]:
        self.epoch += 1  # first, for a reader may leave after the last batch
        for inputs in shuffled(self.retain, None, SEED, self.epoch - 1):
            forget = next(self.endless)
            yield {
                "Retain": (inputs["inputs"], inputs["labels"]),
                "Forget": (forget["inputs"], forget["labels"]),
            }


class ForgetOnly(Batches):
    """Passes over the forget rows."""

    def __len__(self) -> int:
        return -(-len(self.forget) // BATCH)

    def __iter__(self) -> Iterator[dict[str, Pair]]:
        self.epoch += 1
        for inputs in shuffled(self.forget, None, SEED, self.epoch - 1):
            yield {"Forget": (inputs["inputs"], inputs["labels"])}


def main(
    source: Annotated[Path | None, typer.Option(help="A checkout of torchunlearn's repository.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table here, as JSON.")] = None,
) -> None:
    """Compare and print a table."""
    peer = import_peer(source)
    torch.manual_seed(SEED)
    forget = np.sort(np.random.default_rng(SEED).choice(ROWS, FORGOTTEN, replace=False))
    start = trained_network()
    table = []
    for name, config, theirs, settings, steps in cases():
        trainer = make_trainer(copy.deepcopy(start))
        trainer.unlearn(forget_indices=forget, method=name, config=config)
        module = importlib.import_module(f"torchunlearn.unlearn.trainers.{theirs[0]}")
        network = copy.deepcopy(start)
        wrapped = peer.RobModel(network.net, n_classes=CLASSES)
        other = getattr(module, theirs[1])(wrapped, **settings)
        batches = steps(make_trainer(start), forget)
        if hasattr(other, "compute_saliency_mask"):
            other.compute_saliency_mask([(batches.forget.dataset[:]["inputs"], batches.forget.dataset[:]["labels"])])
        torch.manual_seed(SEED)
        other.setup(
            optimizer=torch.optim.SGD(
                wrapped.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
            )
        )
        other.fit(batches, n_epochs=config.epochs, record_type=None)
        ours = trainer.model
        assert ours is not None
        table.append(
            {"method": name, "theirs": theirs[1], **compare(ours, network, start), **accuracies(ours, network, forget)}
        )
    print(f"torchunlearn {peer.__version__}, {ROWS} rows, {FORGOTTEN} forgotten, seed {SEED}")
    for row in table:
        print(
            f"{row['method']:16} {row['theirs']:12} distance {row['distance']:.1e}   accuracy ours/theirs: forget "
            f"{row['forget'][0]:.1f}/{row['forget'][1]:.1f}, test {row['test'][0]:.1f}/{row['test'][1]:.1f}"
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"torchunlearn": peer.__version__, "table": table}, indent=1))


def cases() -> list[tuple[str, Any, tuple[str, str], dict[str, Any], Callable[..., Batches]]]:
    """Our method and settings, their class and settings, and what one epoch of theirs goes over."""
    plain = {"momentum": 0.9, "weight_decay": 5e-4}
    return [
        ("fine-tune", FineTuneConfig(epochs=3, lr=0.05), ("finetune", "Finetune"), {}, Batches),
        ("gradient-ascent", GradientAscentConfig(epochs=5, lr=0.01), ("neggrad", "NegGrad"), {}, ForgetOnly),
        (
            "neggrad-plus",
            NegGradPlusConfig(epochs=3, lr=0.02, alpha=0.9, **plain),
            ("neggrad", "NegGrad"),
            {"retain_lambda": 0.9},
            Batches,
        ),
        (
            "l1-sparse",
            L1SparseConfig(epochs=1, lr=0.05, gamma=1e-3),
            ("l1sparse", "L1Sparse"),
            {"gamma": 1e-3},
            Batches,
        ),
        (
            "l1-sparse",
            L1SparseConfig(epochs=3, lr=0.05, gamma=1e-3),
            ("l1sparse", "L1Sparse"),
            {"gamma": 1e-3},
            Batches,
        ),
        ("salun", SalUnConfig(epochs=3, lr=0.02), ("salun", "SalUn"), {}, Batches),
        (
            "scrub",
            SCRUBConfig(epochs=3, lr=0.02, max_epochs=3, alpha=1.0, temperature=1.0, decay_epochs=()),
            ("scrub", "SCRUB"),
            {},
            Batches,
        ),
        (
            "bad-teacher",
            BadTeacherConfig(epochs=3, lr=0.02, optimizer="sgd", retain_share=1.0),
            ("badteacher", "BadTeacher"),
            {},
            Batches,
        ),
    ]


def import_peer(source: Path | None) -> Any:
    """torchunlearn, from `source` where given."""
    if source is not None:
        sys.path.insert(0, str(source))
    peer = importlib.import_module("torchunlearn")
    return peer


def make_trainer(model: nn.Module, steps: int = 0) -> UnlearningTrainer:
    """A trainer of the digits."""
    args = TrainingArguments(
        output_dir="outputs/outside_check",
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        max_steps=steps or -1,
        seed=SEED,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
    )
    return UnlearningTrainer(
        model=model, args=args, train_dataset=Digits(0, ROWS), eval_dataset=Digits(ROWS, ROWS + 200)
    )


def trained_network() -> Network:
    """A network that knows its rows."""
    trainer = make_trainer(Network(), steps=300)
    trainer.train()
    model = trainer.model
    assert isinstance(model, Network)
    return model


def compare(ours: nn.Module, theirs: nn.Module, start: nn.Module) -> dict[str, float]:
    """Distance of the two sets of weights, relative to the way that theirs went."""

    def away(a: nn.Module, b: nn.Module) -> float:
        pairs = zip(a.parameters(), b.parameters(), strict=True)
        return float(sum(float((p.detach() - q.detach()).square().sum()) for p, q in pairs)) ** 0.5

    return {"distance": away(ours, theirs) / away(theirs, start), "way": away(theirs, start)}


def accuracies(ours: nn.Module, theirs: nn.Module, forget: np.ndarray) -> dict[str, tuple[float, float]]:
    """Percent correct of both on the forget rows and on rows never trained on."""
    train, test = Digits(0, ROWS), Digits(ROWS + 200, 1797)
    found = {}
    for name, inputs, labels in (
        ("forget", train.inputs[forget], train.labels[forget]),
        ("test", test.inputs, test.labels),
    ):
        with torch.no_grad():
            a, b = (
                100 * float((m.eval()(inputs)["logits"].argmax(1) == labels).double().mean()) for m in (ours, theirs)
            )
        found[name] = (a, b)
    return found


if __name__ == "__main__":
    typer.run(main)
