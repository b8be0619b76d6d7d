"""`GatherConfig`: what is gathered from a fine-tuning run, and how much of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch

from hf_iau.data.precision import PassPrecision, Precision, resolve_precision
from hf_iau.utils.config_checks import check_choice, check_device, check_number

GradientSumKind = Literal["full", "sampled", "none"]
CurvatureName = Literal["ekfac", "diagonal", "adam", "identity", "none"]
FisherKind = Literal["true", "empirical"]


@dataclass(frozen=True)
class GatherConfig:
    """Configuration of what is gathered.

    Parameters that control the gradient sum:
        gradient_sum, sample_rows.
    Parameters that control the curvature:
        curvature, curvature_rows, fisher, max_factor_size, factor_device.
    Parameters that control the passes:
        precision, memory_device, batch_size, seed, progress.

    Raises:
        ConfigError: a value is out of range.
    """

    gradient_sum: GradientSumKind = field(
        default="sampled",
        metadata={
            "help": "Σ_D, the gradient sum over all training rows: 'full' (one pass over them), 'sampled' (a bounded "
            "seeded sample with its standard error; exact where the sample is all rows) or 'none'. `iau-paper` and "
            "`iau-released` need 'full'; `iau` uses it to repair what forgetting costs the other rows."
        },
    )
    sample_rows: int = field(default=4096, metadata={"help": "Rows of a sampled gradient sum."})
    curvature: CurvatureName = field(
        default="ekfac",
        metadata={"help": "Kind of curvature: 'ekfac', 'diagonal', 'adam', 'identity' or 'none'."},
    )
    curvature_rows: int = field(
        default=1024, metadata={"help": "Training rows that the curvature is fitted on; its cost does not grow with n."}
    )
    fisher: FisherKind = field(
        default="true", metadata={"help": "Labels drawn from the model ('true') or the training labels ('empirical')."}
    )
    max_factor_size: int = field(
        default=4096, metadata={"help": "Widest Kronecker factor; a wider layer falls back to a diagonal (reported)."}
    )
    factor_device: str | None = field(
        default=None, metadata={"help": "Device that factors are kept on, e.g. 'cpu'; default: memory_device."}
    )
    precision: Precision = field(
        default="auto",
        metadata={
            "help": "Of passes over rows, gathering and at requests: 'float32' (without autocast, in the weights' own "
            "type), 'bfloat16' (bf16 autocast; what is added up stays float32 and float64; gradients good to about a "
            "percent), or 'auto': 'bfloat16' where the Trainer trains under bf16, fp16 or fp8 autocast, else "
            "'float32'. What was used is recorded, and requests use it too."
        },
    )
    memory_device: str | None = field(
        default=None,
        metadata={
            "help": "Device of all that is as large as the trained weights: gradient sums, factors, directions and the "
            "copy of the weights that a request keeps. 'cpu' keeps it off the accelerator; default: the parameters' "
            "own."
        },
    )
    batch_size: int | None = field(
        default=None, metadata={"help": "Rows a batch; default: the Trainer's per-device training batch size."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of samples and drawn labels."})
    progress: bool = field(default=True, metadata={"help": "Show progress bars."})

    @property
    def reads_targets(self) -> bool:
        """Whether gathering needs to know what a model predicts, and not only its loss."""
        return self.curvature in ("ekfac", "diagonal") and self.fisher == "true"

    def __post_init__(self) -> None:
        check_choice(self, "gradient_sum", get_args(GradientSumKind))
        check_number(self, "sample_rows", at_least=2, whole=True)
        check_choice(self, "curvature", get_args(CurvatureName))
        check_number(self, "curvature_rows", at_least=1, whole=True)
        check_choice(self, "fisher", get_args(FisherKind))
        check_number(self, "max_factor_size", at_least=1, whole=True)
        check_device(self, "factor_device")
        check_choice(self, "precision", get_args(Precision))
        check_device(self, "memory_device")
        check_number(self, "batch_size", at_least=1, whole=True, optional=True)
        check_number(self, "seed", at_least=0, whole=True)

    def resolved(self, mixed_precision: str | None = None, device: torch.device | None = None) -> GatherConfig:
        """The same with the precision that `precision="auto"` stands for.

        Args:
            mixed_precision: of training, as Accelerate names it; None where nothing is known of it.
            device: of the model.
        """
        return replace(self, precision=resolve_precision(self.precision, mixed_precision, device))

    @property
    def pass_precision(self) -> PassPrecision:
        """The precision of passes; of "auto" that is not resolved the one without autocast."""
        return resolve_precision(self.precision, None, None)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON."""
        return asdict(self)
