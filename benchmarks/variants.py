"""The methods that are compared, and the settings that a baseline may choose among."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hf_iau.methods.baselines.bad_teacher import BadTeacherConfig
from hf_iau.methods.baselines.fine_tune import FineTuneConfig
from hf_iau.methods.baselines.fisher_forgetting import FisherForgettingConfig
from hf_iau.methods.baselines.gradient_ascent import GradientAscentConfig
from hf_iau.methods.baselines.influence_cg import InfluenceCGConfig
from hf_iau.methods.baselines.l1_sparse import L1SparseConfig
from hf_iau.methods.baselines.neggrad_plus import NegGradPlusConfig
from hf_iau.methods.baselines.npo import NPOConfig
from hf_iau.methods.baselines.random_labels import RandomLabelsConfig
from hf_iau.methods.baselines.salun import SalUnConfig
from hf_iau.methods.baselines.scrub import SCRUBConfig
from hf_iau.methods.baselines.ssd import SSDConfig
from hf_iau.methods.iau.config import IAUConfig
from hf_iau.methods.iau_paper import IAUPaperConfig
from hf_iau.methods.iau_released import IAUReleasedConfig
from hf_iau.utils.jsonable import jsonable

if TYPE_CHECKING:
    from benchmarks.suites import Work

SETTINGS_A_METHOD = 5
"""Every method that is tuned chooses among as many settings, so that none has more attempts than another."""

RETRAIN = "retrain"
OURS, PUBLISHED, BASELINES, ABLATION = "ours", "published", "baselines", "ablation"
GROUPS = (OURS, PUBLISHED, BASELINES, ABLATION)


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes:
        name: in file names and tables.
        method: as for `trainer.unlearn(method=…)`.
        group: by which `--methods` can name several.
        gather: what differs from the package's defaults in `GatherConfig`; None where no memory is needed.
        gather_again: gather anew before each request after the first, for methods that cannot use a memory that moved;
            counted in the request's seconds.
        config: the method's configuration; None for its defaults.
        grid: work → `SETTINGS_A_METHOD` configurations to choose among by the rule of `benchmarks.tuning`, instead of
            `config`.

    Raises:
        ValueError: both `config` and `grid`.
    """

    name: str
    method: str
    group: str = BASELINES
    gather: dict[str, Any] | None = None
    gather_again: bool = False
    config: Any = None
    grid: Callable[[Work], tuple[Any, ...]] | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and self.config is not None:
            raise ValueError(f"Variant({self.name!r}): give config or grid, not both.")

    def settings(self, work: Work) -> tuple[Any, ...]:
        """The configurations that tuning may choose among; none where nothing is tuned.

        Raises:
            ValueError: they are not `SETTINGS_A_METHOD`.
        """
        if self.grid is None:
            return ()
        found = self.grid(work)
        if len(found) != SETTINGS_A_METHOD:
            raise ValueError(f"Variant({self.name!r}): {len(found)} settings, give {SETTINGS_A_METHOD}.")
        return found


def options(config: Any) -> dict[str, Any]:
    """A configuration as it stands in a cell's JSON; empty for the method's defaults."""
    values: dict[str, Any] = {} if config is None else jsonable(asdict(config))
    return values


def _trained(config: type, **options: Any) -> Callable[[Work], tuple[Any, ...]]:
    """A grid of passes over the retained rows with the optimizer, batch size and epochs that suit the work.

    Args:
        config: the method's configuration class.
        **options: name → one value, or five to choose among; `rates` are in units of the rate of training.
    """

    def grid(work: Work) -> tuple[Any, ...]:
        training = work.training
        common = {"optimizer": "adamw", "momentum": 0.9, "weight_decay": training.weight_decay}
        common |= {"batch_size": training.batch_size, "epochs": work.baseline_epochs}
        found = []
        for i in range(SETTINGS_A_METHOD):
            chosen = {name: value[i] if isinstance(value, tuple) else value for name, value in options.items()}
            rate = chosen.pop("rates") * training.learning_rate
            found.append(config(**{**common, **chosen, "lr": rate}))
        return tuple(found)

    return grid


FINE_TUNE = Variant("fine-tune", "fine-tune", grid=_trained(FineTuneConfig, rates=(0.1, 0.3, 1.0, 3.0, 10.0)))
GRADIENT_ASCENT = Variant(
    "gradient-ascent",
    "gradient-ascent",
    grid=_trained(GradientAscentConfig, rates=(0.0003, 0.001, 0.003, 0.006, 0.01), epochs=5),
)
NEGGRAD_PLUS = Variant(
    "neggrad-plus", "neggrad-plus", grid=_trained(NegGradPlusConfig, rates=1.0, alpha=(0.99, 0.97, 0.95, 0.9, 0.8))
)
NPO = Variant("npo", "npo", grid=_trained(NPOConfig, rates=(0.01, 0.03, 0.1, 0.3, 1.0), epochs=5))
RANDOM_LABELS = Variant(
    "random-labels", "random-labels", grid=_trained(RandomLabelsConfig, rates=(0.03, 0.1, 0.3, 1.0, 3.0))
)
SALUN = Variant("salun", "salun", grid=_trained(SalUnConfig, rates=(0.03, 0.1, 0.3, 1.0, 3.0)))
SSD = Variant(
    "ssd",
    "ssd",
    grid=lambda work: tuple(
        SSDConfig(selection=selection, dampening=dampening)
        for selection, dampening in ((10.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, 0.9), (1.0, 0.7))
    ),
)
SCRUB = Variant("scrub", "scrub", grid=_trained(SCRUBConfig, rates=(0.03, 0.1, 0.3, 1.0, 3.0), max_epochs=1))
INFLUENCE = Variant(
    "influence-cg",
    "influence-cg",
    grid=lambda work: tuple(
        InfluenceCGConfig(damping=damping, scale=scale, iterations=40)
        for damping, scale in ((0.1, 1.0), (0.01, 1.0), (0.001, 1.0), (0.01, 3.0), (0.001, 3.0))
    ),
)
BAD_TEACHER = Variant("bad-teacher", "bad-teacher", grid=_trained(BadTeacherConfig, rates=(0.03, 0.1, 0.3, 1.0, 3.0)))
L1_SPARSE = Variant(
    "l1-sparse", "l1-sparse", grid=_trained(L1SparseConfig, rates=1.0, gamma=(1e-6, 3e-6, 1e-5, 3e-5, 1e-4))
)
FISHER_FORGETTING = Variant(
    "fisher-forgetting",
    "fisher-forgetting",
    grid=lambda work: tuple(FisherForgettingConfig(alpha=alpha) for alpha in (1e-9, 1e-8, 1e-7, 1e-6, 1e-5)),
)
# Unrolling SGD is not among the methods: its formula has no meaning for the models here, which Adam trained.
# The configuration of `retrain` names where training starts, and is made for each work.
RETRAINED = Variant("retrain", RETRAIN)
BASELINE_VARIANTS = (
    FINE_TUNE,
    GRADIENT_ASCENT,
    NEGGRAD_PLUS,
    NPO,
    RANDOM_LABELS,
    SALUN,
    SCRUB,
    SSD,
    INFLUENCE,
    BAD_TEACHER,
    L1_SPARSE,
    FISHER_FORGETTING,
)

_SUM = {"gradient_sum": "full", "curvature": "none"}
RELEASED = Variant("iau-released", "iau-released", PUBLISHED, gather=_SUM, gather_again=True)
RELEASED_TUNED = Variant(
    "iau-released, tuned",
    "iau-released",
    PUBLISHED,
    gather=_SUM,
    gather_again=True,
    grid=lambda work: tuple(IAUReleasedConfig(lr=lr) for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
)
PAPER = Variant(
    "iau-paper",
    "iau-paper",
    PUBLISHED,
    gather=_SUM,
    gather_again=True,
    grid=lambda work: tuple(IAUPaperConfig(eta=eta) for eta in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)),
)
IAU = Variant("iau", "iau", OURS, gather={})
IAU_ON_PROXIES = Variant("iau, proxies", "iau", OURS, gather={}, config=IAUConfig(calibrate_on="proxies"))
IAU_GATHERED_ANEW = Variant("iau, gathered anew", "iau", OURS, gather={}, gather_again=True)
IAU_WITH_SUM = Variant("iau, full sum", "iau", OURS, gather={"gradient_sum": "full"})
CURVATURES = tuple(
    Variant(f"iau, {curvature}", "iau", ABLATION, gather={"curvature": curvature})
    for curvature in ("diagonal", "identity", "adam")
)
