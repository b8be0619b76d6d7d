"""The suites: what is trained, what is forgotten, and by which methods. Nothing here was tuned on a retrained model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.scenarios import RANDOM_5_PERCENT, SIZES, Scenario


@dataclass(frozen=True)
class Training:
    """How a model is trained: constant learning rate, a fixed number of epochs, no clipping, no weight decay.

    Attributes:
        epochs, learning_rate, batch_size: as named.
        restriction: mode of gradient restriction, `none`, `exact` or `finite-difference`.
        alpha: its weight.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    restriction: str = "none"
    alpha: float = 0.0


@dataclass(frozen=True)
class Work:
    """A model on a data set.

    Attributes:
        name: in file names and tables.
        data, model: see `benchmarks.data` and `benchmarks.models`.
        training: how it is trained.
        train_rows, held_out_rows, test_rows: rows of each split.
        request_batch_size, eval_batch_size: rows a batch of a request's gradients and of forward passes.
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
    keep_optimizer: bool = False

    def settings(self) -> dict[str, Any]:
        """Everything that the trained weights depend on, beside the seed and the rows."""
        names = ("data", "model", "train_rows", "held_out_rows")
        return {**{name: getattr(self, name) for name in names}, "training": asdict(self.training)}


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        name: in file names and tables.
        method: as for `trainer.unlearn(method=…)`.
        gather, config: what differs from the package's defaults in `GatherConfig` and in the method's configuration.
        tune: an option without a default that is chosen among `tuned_over` by held-out rows.
    """

    name: str
    method: str
    gather: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tune: str | None = None
    tuned_over: tuple[float, ...] = ()


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


_EXACT = {"gradient_sum": "exact"}
RELEASED = Variant("iau-released", "iau-released", gather=_EXACT)
PAPER = Variant("iau-paper", "iau-paper", gather=_EXACT, tune="eta", tuned_over=(1e-8, 1e-7, 1e-6, 1e-5, 1e-4))
IAU = Variant("iau", "iau")
IAU_ON_PROXIES = Variant("iau, proxies", "iau", config={"calibrate_on": "proxies"})
IAU_WITH_SUM = Variant("iau, exact sum", "iau", gather=_EXACT)
CURVATURES = tuple(
    Variant(f"iau, {curvature}", "iau", gather={"curvature": curvature})
    for curvature in ("diagonal", "identity", "adam")
)
STANDARD = (RELEASED, IAU, IAU_ON_PROXIES, IAU_WITH_SUM)

LENET = Work(
    "lenet",
    data="cifar10",
    model="lenet",
    training=Training(epochs=12, learning_rate=1e-3, batch_size=64),
    train_rows=40_000,
    held_out_rows=10_000,
    test_rows=10_000,
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
BANKING77_MINILM = Work(
    "banking77_minilm",
    data="banking77",
    model="minilm",
    training=Training(epochs=8, learning_rate=5e-4, batch_size=32),
    train_rows=1_500,
    held_out_rows=1_000,
    test_rows=1_500,
    request_batch_size=25,
    eval_batch_size=100,
)
BANKING77_MINILM_LORA = replace(
    BANKING77_MINILM,
    name="banking77_minilm_lora",
    model="minilm_lora",
    training=Training(epochs=10, learning_rate=1e-3, batch_size=32),
    train_rows=1_000,
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
        Suite("cifar10_lenet", (LENET,), (RANDOM_5_PERCENT,), STANDARD, seeds=5, ablation=CURVATURES),
        Suite("fashion_mnist_resnet", (FASHION_RESNET,), (RANDOM_5_PERCENT,), STANDARD, seeds=3),
        Suite("fashion_mnist_vit", (FASHION_VIT,), (RANDOM_5_PERCENT,), STANDARD, seeds=3),
        Suite(
            "banking77_minilm",
            (BANKING77_MINILM,),
            (Scenario("random-100-rows", rows=100),),
            (RELEASED, IAU, IAU_WITH_SUM),
            seeds=2,
        ),
        Suite(
            "banking77_minilm_lora",
            (BANKING77_MINILM_LORA,),
            (Scenario("random-100-rows", rows=100),),
            (RELEASED, IAU, IAU_WITH_SUM),
            seeds=1,
            floor=False,
        ),
        Suite("sizes", (LENET,), SIZES, (RELEASED, IAU), seeds=1),
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
                Scenario("random-20-percent", share=0.20),
                Scenario("whole-class", label=3),
                Scenario("flipped-10-percent", share=0.10, flipped=True),
            ),
            (RELEASED, IAU),
            seeds=3,
        ),
        Suite("synthetic", (SYNTHETIC,), (RANDOM_5_PERCENT,), (RELEASED, IAU), seeds=1),
    )
}
