"""The methods that are compared, and the settings that a baseline may choose among."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hf_iau import IAUConfig, IAUPaperConfig, IAUReleasedConfig

if TYPE_CHECKING:
    from benchmarks.suites import Work

SETTINGS_A_METHOD = 5
"""Every method that is tuned chooses among as many settings, so that none has more attempts than another."""

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
    return {} if config is None else asdict(config)


BASELINE_VARIANTS: tuple[Variant, ...] = ()

_SUM = {"gradient_sum": "exact", "curvature": "none"}
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
IAU_WITH_SUM = Variant("iau, exact sum", "iau", OURS, gather={"gradient_sum": "exact"})
CURVATURES = tuple(
    Variant(f"iau, {curvature}", "iau", ABLATION, gather={"curvature": curvature})
    for curvature in ("diagonal", "identity", "adam")
)
