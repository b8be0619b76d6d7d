"""The suites: what is trained, what is forgotten, and by which methods. Nothing here was tuned on a retrained model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from benchmarks.scenarios import (
    FIVE_AUTHORS,
    FLIPPED_10_PERCENT,
    RANDOM_5_PERCENT,
    RANDOM_10_PERCENT,
    RANDOM_20_PERCENT,
    SIZES,
    TWENTY_REQUESTS,
    WHOLE_CLASS,
    Scenario,
)
from benchmarks.variants import (
    BASELINE_VARIANTS,
    CURVATURES,
    FINE_TUNE,
    GRADIENT_ASCENT,
    IAU,
    IAU_GATHERED_ANEW,
    IAU_ON_PROXIES,
    IAU_WITH_SUM,
    NEGGRAD_PLUS,
    NPO,
    PAPER,
    RELEASED,
    RELEASED_TUNED,
    RETRAINED,
    SCRUB,
    SSD,
    Variant,
)


@dataclass(frozen=True)
class Training:
    """How a model is trained: AdamW, a fixed number of epochs, no clipping.

    Attributes:
        epochs, learning_rate, batch_size: as named.
        restriction: mode of gradient restriction, `none`, `exact` or `finite-difference`.
        alpha: its weight.
        schedule: of the learning rate, as in `TrainingArguments`.
        weight_decay: decoupled.
        augmented: shift and mirror images at random.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    restriction: str = "none"
    alpha: float = 0.0
    schedule: str = "constant"
    weight_decay: float = 0.0
    augmented: bool = False

    def settings(self) -> dict[str, Any]:
        """What trained weights depend on. What was added later counts only where it is used: older keys stay valid."""
        later = {"schedule", "weight_decay", "augmented"}
        unused = {f.name for f in fields(self) if f.name in later and getattr(self, f.name) == f.default}
        return {name: value for name, value in asdict(self).items() if name not in unused}


@dataclass(frozen=True)
class Work:
    """A model on a data set.

    Attributes:
        name: in file names and tables.
        data, model: see `benchmarks.data` and `benchmarks.models`.
        training: how it is trained.
        train_rows, held_out_rows, test_rows: rows of each split.
        request_batch_size, eval_batch_size: rows a batch of a request's gradients and of forward passes.
        baseline_epochs: passes over the retained rows that a baseline may spend on one request.
        keep_optimizer: keep the optimizer's second moment with the model, for `curvature="adam"`.
    """

    name: str
    data: str
    model: str
    training: Training
    train_rows: int
    held_out_rows: int
    test_rows: int
    request_batch_size: int = 250
    eval_batch_size: int = 500
    baseline_epochs: int = 5
    keep_optimizer: bool = False

    def settings(self) -> dict[str, Any]:
        """Everything that the trained weights depend on, beside the seed and the rows."""
        names = ("data", "model", "train_rows", "held_out_rows")
        return {**{name: getattr(self, name) for name in names}, "training": self.training.settings()}


@dataclass(frozen=True)
class Suite:
    """Works × scenarios × seeds × variants.

    Attributes:
        name: on the command line.
        works, scenarios, variants: as named.
        seeds: how many, by default; a seed is that of the training and of the forget set.
        ablation: variants added by `--ablation`.
        floor: train a second retrained model of another seed, for the noise floor.
    """

    name: str
    works: tuple[Work, ...]
    scenarios: tuple[Scenario, ...]
    variants: tuple[Variant, ...]
    seeds: int
    ablation: tuple[Variant, ...] = ()
    floor: bool = True

    @property
    def every_variant(self) -> tuple[Variant, ...]:
        """All methods, ablation included, in the order of the table."""
        return (*self.variants, *self.ablation)


PUBLISHED_METHODS = (PAPER, RELEASED, RELEASED_TUNED)
STANDARD = (*BASELINE_VARIANTS, *PUBLISHED_METHODS, IAU, IAU_ON_PROXIES, IAU_WITH_SUM)
SHORT = (*BASELINE_VARIANTS, *PUBLISHED_METHODS, IAU)

LENET = Work(
    "lenet",
    data="cifar10",
    model="lenet",
    training=Training(epochs=12, learning_rate=1e-3, batch_size=64),
    train_rows=40_000,
    held_out_rows=10_000,
    test_rows=10_000,
    baseline_epochs=2,
    keep_optimizer=True,
)
FASHION_RESNET = Work(
    "fashion_mnist_resnet",
    data="fashion_mnist",
    model="small_resnet",
    training=Training(epochs=20, learning_rate=1e-3, batch_size=32),
    train_rows=5_000,
    held_out_rows=2_500,
    test_rows=2_500,
)
FASHION_VIT = replace(
    FASHION_RESNET,
    name="fashion_mnist_vit",
    model="small_vit",
    training=Training(epochs=40, learning_rate=1e-3, batch_size=32),
)
# The setting of SalUn's tables (arXiv 2310.12508), but for the optimizer and fewer epochs: 45,000 training rows,
# augmentation, until nearly every row is known.
CIFAR10_RESNET18 = Work(
    "cifar10_resnet18",
    data="cifar10",
    model="resnet18",
    training=Training(
        epochs=40, learning_rate=1e-3, batch_size=128, schedule="cosine", weight_decay=0.05, augmented=True
    ),
    train_rows=45_000,
    held_out_rows=5_000,
    test_rows=10_000,
    request_batch_size=250,
    eval_batch_size=1_000,
)
BANKING77_MINILM = Work(
    "banking77_minilm",
    data="banking77",
    model="minilm",
    training=Training(epochs=8, learning_rate=5e-4, batch_size=32),
    train_rows=1_500,
    held_out_rows=1_000,
    test_rows=1_500,
    request_batch_size=25,
    eval_batch_size=32,
)
BANKING77_MINILM_LORA = replace(
    BANKING77_MINILM,
    name="banking77_minilm_lora",
    model="minilm_lora",
    training=Training(epochs=10, learning_rate=1e-3, batch_size=32),
    train_rows=1_000,
)
# Whole authors of TOFU, and a language model of its own that knows their answers nearly by heart.
TOFU_LLAMA = Work(
    "tofu_llama",
    data="tofu",
    model="small_llama",
    training=Training(epochs=32, learning_rate=2e-3, batch_size=16, schedule="linear"),
    train_rows=800,
    held_out_rows=400,
    test_rows=400,
    request_batch_size=16,
    eval_batch_size=50,
    # 700 retained rows; TOFU's own budget is 5 passes over the forget rows with as many retained ones
    baseline_epochs=1,
)
DIGITS = Work(
    "digits_cnn",
    data="digits",
    model="small_cnn",
    training=Training(epochs=80, learning_rate=1e-3, batch_size=32),
    train_rows=1_000,
    held_out_rows=397,
    test_rows=400,
    request_batch_size=50,
)
# The only table at hand that ships with a dependency and has enough rows to calibrate with, and small at that.
BREAST_CANCER_MLP = Work(
    "breast_cancer_mlp",
    data="breast_cancer",
    model="mlp",
    training=Training(epochs=60, learning_rate=1e-3, batch_size=16),
    train_rows=300,
    held_out_rows=119,
    test_rows=150,
    request_batch_size=30,
)
SYNTHETIC = Work(
    "synthetic",
    data="synthetic",
    model="small_cnn",
    training=Training(epochs=1, learning_rate=1e-3, batch_size=32),
    train_rows=400,
    held_out_rows=200,
    test_rows=200,
    request_batch_size=50,
)


def _restricted(mode: str, alpha: float) -> Work:
    training = Training(epochs=4, learning_rate=1e-3, batch_size=64, restriction=mode, alpha=alpha)
    name = "lenet, no restriction" if mode == "none" else f"lenet, {mode}, alpha {alpha:g}"
    return replace(LENET, name=name, training=training, keep_optimizer=False)


SUITES = {
    suite.name: suite
    for suite in (
        Suite("cifar10_lenet", (LENET,), (RANDOM_5_PERCENT,), (*STANDARD, RETRAINED), seeds=5, ablation=CURVATURES),
        Suite("fashion_mnist_resnet", (FASHION_RESNET,), (RANDOM_5_PERCENT,), STANDARD, seeds=3),
        Suite("fashion_mnist_vit", (FASHION_VIT,), (RANDOM_5_PERCENT,), STANDARD, seeds=3),
        Suite(
            "banking77_minilm",
            (BANKING77_MINILM,),
            (Scenario("random-100-rows", rows=100),),
            (*SHORT, IAU_WITH_SUM),
            seeds=2,
        ),
        Suite("sizes", (LENET,), SIZES, SHORT, seeds=1),
        Suite(
            "consecutive",
            (replace(LENET, baseline_epochs=1),),  # a pass over all rows for each 200 that go
            (RANDOM_10_PERCENT, TWENTY_REQUESTS),
            (*SHORT, IAU_GATHERED_ANEW),
            seeds=1,
        ),
        Suite("cifar10_resnet18", (CIFAR10_RESNET18,), (RANDOM_10_PERCENT,), SHORT, seeds=1),
        Suite(
            "banking77_minilm_lora",
            (BANKING77_MINILM_LORA,),
            (Scenario("random-100-rows", rows=100),),
            (*SHORT, IAU_WITH_SUM),
            seeds=1,
            floor=False,
        ),
        Suite(
            "tofu",
            (TOFU_LLAMA,),
            (FIVE_AUTHORS,),
            (FINE_TUNE, GRADIENT_ASCENT, NEGGRAD_PLUS, NPO, SCRUB, SSD, RELEASED, IAU),
            seeds=1,
        ),
        Suite(
            "gradient_restriction",
            (
                _restricted("none", 0.0),
                *(_restricted(mode, alpha) for mode in ("exact", "finite-difference") for alpha in (0.005, 0.05)),
            ),
            (RANDOM_5_PERCENT,),
            (PAPER, RELEASED, IAU),
            seeds=1,
        ),
        Suite(
            "cpu",
            (DIGITS,),
            (
                RANDOM_5_PERCENT,
                RANDOM_20_PERCENT,
                WHOLE_CLASS,
                FLIPPED_10_PERCENT,
            ),
            (*SHORT, RETRAINED),
            seeds=3,
        ),
        Suite(
            "tabular_mlp", (BREAST_CANCER_MLP,), (RANDOM_20_PERCENT, FLIPPED_10_PERCENT), (*SHORT, RETRAINED), seeds=3
        ),
        Suite(
            "synthetic",
            (SYNTHETIC,),
            (RANDOM_5_PERCENT, Scenario("4-requests", rows=80, requests=4)),
            (RELEASED, RELEASED_TUNED, IAU),
            seeds=1,
        ),
    )
}
