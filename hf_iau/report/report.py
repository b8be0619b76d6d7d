"""The report on one unlearning request: what was done, what it cost, and what it changed."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, TemplateError

from hf_iau.errors import RequestError
from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES
from hf_iau.evaluation.intervals import RESAMPLES
from hf_iau.evaluation.measurement import Measurement, rows_with_targets
from hf_iau.evaluation.model_agreement import agreement
from hf_iau.evaluation.retraining_gap import gap
from hf_iau.report import tables
from hf_iau.report.histograms import loss_histograms
from hf_iau.utils.atomic_files import write_public_atomically
from hf_iau.utils.jsonable import json_text, jsonable

SCHEMA = 2

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"
HISTOGRAM_NAME = "loss_histograms.png"

_PACKAGES = ("hf-iau", "torch", "transformers", "accelerate", "peft", "datasets", "numpy", "scipy", "scikit-learn")
_PER_ROW_PREFIX = "per_row"
_MAX_BYTES = 256 * 2**20


@dataclass
class UnlearningReport:
    """What one request did. Made by `build`, once everything is measured.

    All figures are fractions of 1, losses in nats (or the task's unit), seconds and bytes; None stands for what was
    not measured or is not finite. With fewer than `MINIMUM_ROWS_FOR_PER_ROW_FIGURES` forget rows only means over them
    are held: no histogram, no operating points of attacks, and no diagnostics whose name starts with `per_row`.

    Attributes:
        method: name of the unlearning method.
        config: its settings.
        seed: the request's seed.
        counts: `forget_rows`, `forget_targets`, `retain_rows_measured`, `held_out_rows`, `test_rows` and whatever
            else was counted.
        before: the model's figures before the request; the keys are the fields of `hf_iau.evaluation.Figures`.
        after: the same after the request.
        retrained: the same of a model retrained without the forget rows, if there is one.
        gap: distance of `after` from `retrained`; the keys are the fields of `hf_iau.evaluation.Gap`.
        gap_before: distance of `before` from `retrained`.
        noise_floor: `{"figures": ..., "gap": ...}` of a second retrained model of another seed against `retrained`:
            the distance below which nothing can be told apart.
        agreement: per set of rows, likeness of the predictions after the request with the retrained model's, when
            probabilities were kept.
        seconds: wall seconds by phase.
        peak_memory_bytes: peak memory by phase; see `hf_iau.report.PhaseTimer` for what it means per device.
        diagnostics: the method's own figures: step norm, calibrated values, calibration curve; a list of sentences
            under `reasons` is printed below the verdict. Figures of single forget rows must go under a name that
            starts with `per_row`.
        warnings: sentences for the user.
        versions: of Python and of the packages that made the numbers.
        verdict: one sentence on the result, or None.
        calibrated: whether the step's size was calibrated on held-out rows; None when the method has nothing to
            calibrate.
    """

    method: str
    config: dict[str, Any]
    seed: int
    counts: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]
    retrained: dict[str, Any] | None = None
    gap: dict[str, Any] | None = None
    gap_before: dict[str, Any] | None = None
    noise_floor: dict[str, Any] | None = None
    agreement: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    verdict: str | None = None
    calibrated: bool | None = None
    # Row losses by model and set of rows, for the histograms alone: never written out as numbers.
    _losses: dict[str, dict[str, np.ndarray]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        method: str,
        before: Measurement,
        after: Measurement,
        *,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        retrained: Measurement | None = None,
        second_retrained: Measurement | None = None,
        counts: Mapping[str, Any] | None = None,
        seconds: Mapping[str, float] | None = None,
        peak_memory_bytes: Mapping[str, int] | None = None,
        diagnostics: Mapping[str, Any] | None = None,
        warnings: Iterable[str] = (),
        verdict: str | None = None,
        calibrated: bool | None = None,
        versions: Mapping[str, str] | None = None,
        bootstrap: int = RESAMPLES,
    ) -> UnlearningReport:
        """The report from the model measured before and after the request, on the same rows.

        Args:
            method, config, seed, seconds, peak_memory_bytes, diagnostics, verdict, calibrated: see the class.
            before: the model before the request.
            after: the model after it.
            retrained: a model trained without the forget rows.
            second_retrained: another one with another seed, for the noise floor.
            counts: added to, and put before, what is counted from `before`.
            warnings: put before the report's own.
            versions: default: those installed.
            bootstrap: resamples of each interval, drawn with `seed`; 0 for no intervals.

        Raises:
            RequestError: for a second retrained model without a first, or measurements of different forget rows.
        """
        if second_retrained is not None and retrained is None:
            raise RequestError("second_retrained was given without retrained: the noise floor lies between the two.")
        models = {"before": before, "after": after, "retrained": retrained, "second_retrained": second_retrained}
        given = {name: model for name, model in models.items() if model is not None}
        for name, model in given.items():
            if len(model.forget) != len(before.forget):
                raise RequestError(
                    f"{name} was measured on {len(model.forget)} forget rows, before on {len(before.forget)}: measure "
                    "every model on the same rows."
                )
        figures = {name: model.figures(bootstrap=bootstrap, seed=seed) for name, model in given.items()}
        reference = figures.get("retrained")
        floor = None
        if reference is not None and "second_retrained" in figures:
            second = figures["second_retrained"]
            floor = {"figures": second.to_dict(), "gap": gap(second, reference).to_dict()}
        report = cls(
            method=method,
            config=jsonable(config or {}),
            seed=seed,
            counts=jsonable(_counts(before) | dict(counts or {})),
            before=jsonable(figures["before"].to_dict()),
            after=jsonable(figures["after"].to_dict()),
            retrained=None if reference is None else jsonable(reference.to_dict()),
            gap=None if reference is None else jsonable(gap(figures["after"], reference).to_dict()),
            gap_before=None if reference is None else jsonable(gap(figures["before"], reference).to_dict()),
            noise_floor=jsonable(floor),
            agreement=None if retrained is None else jsonable(_agreement(after, retrained, bootstrap, seed)),
            seconds=jsonable(seconds or {}),
            peak_memory_bytes=jsonable(peak_memory_bytes or {}),
            diagnostics=jsonable(diagnostics or {}),
            warnings=[*warnings, *_own_warnings(before, after, calibrated, diverged=figures["after"].to_dict())],
            versions=dict(versions) if versions is not None else installed_versions(),
            verdict=verdict,
            calibrated=calibrated,
        )
        if not report.per_row_suppressed:
            report._losses = {
                name: _histogram_losses(model) for name, model in given.items() if name != "second_retrained"
            }
        return report

    @property
    def per_row_suppressed(self) -> bool:
        """Whether there were too few forget rows for anything but means over them."""
        return bool(self.before.get("per_row_suppressed") or self.after.get("per_row_suppressed"))

    def to_dict(self) -> dict[str, Any]:
        """The report in the types of strict JSON, with `schema`; what describes single rows is left out."""
        values = {f.name: jsonable(getattr(self, f.name)) for f in fields(self) if not f.name.startswith("_")}
        if self.per_row_suppressed:
            values["diagnostics"] = _without_per_row(values["diagnostics"])
        return {"schema": SCHEMA, "per_row_suppressed": self.per_row_suppressed, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UnlearningReport:
        """The report of a dictionary made by `to_dict`. It has no row losses, so `save` draws no histograms.

        Raises:
            RequestError: for another schema, unknown or missing entries.
        """
        schema = values.get("schema")
        if schema != SCHEMA:
            raise RequestError(
                f"The report has schema {schema!r}, this version of hf-iau reads {SCHEMA}: read it with the version it "
                "was written by (see its `versions`)."
            )
        known = {f.name for f in fields(cls) if f.init}
        entries = {name: value for name, value in values.items() if name not in ("schema", "per_row_suppressed")}
        unknown = sorted(entries.keys() - known)
        if unknown:
            raise RequestError(f"The report has unknown entries: {', '.join(unknown)}.")
        missing = sorted({"method", "config", "seed", "counts", "before", "after"} - entries.keys())
        if missing:
            raise RequestError(f"The report lacks the entries: {', '.join(missing)}.")
        return cls(**jsonable(entries))

    @classmethod
    def load(cls, path: str | Path) -> UnlearningReport:
        """The report saved as the file `path`, or as `report.json` in the folder `path`.

        Raises:
            RequestError: there is none, or it is damaged: it cannot be read, or what it holds cannot be shown.
        """
        path = Path(path)
        file = path / JSON_NAME if path.is_dir() else path
        try:
            if file.stat().st_size > _MAX_BYTES:
                raise RequestError(f"{file} is {file.stat().st_size} bytes, too large for a report.")
            report = cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
            (str(report) + report.to_markdown() + json_text(report.to_dict())).encode()  # it can be shown, and saved
        except RequestError:
            raise
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise RequestError(f"{file} is no report, or damaged ({type(error).__name__}: {error}).") from error
        except (RecursionError, TemplateError) as error:
            raise RequestError(f"{file} is damaged: what it holds cannot be shown ({error}).") from error
        return report

    def save(self, directory: str | Path) -> list[Path]:
        """Write `report.json`, `report.md` and, when there are row losses to draw, `loss_histograms.png`.

        Each file is written whole or not at all. A histogram left in `directory` by an earlier report is removed when
        this one has too few forget rows for one.

        Returns:
            The paths written.
        """
        directory = Path(directory)
        histograms = self._histograms()
        stale = directory / HISTOGRAM_NAME
        if histograms is None and self.per_row_suppressed:
            stale.unlink(missing_ok=True)
        written = []
        if histograms is not None:
            written.append(write_public_atomically(stale, histograms))
        image = HISTOGRAM_NAME if stale.exists() else None
        written.append(write_public_atomically(directory / MARKDOWN_NAME, self.to_markdown(image).encode()))
        written.append(write_public_atomically(directory / JSON_NAME, json_text(self.to_dict()).encode()))
        return written[::-1]

    def table(self) -> str:
        """The figures before, after and of the retrained models as an aligned plain-text table."""
        return tables.text(self._comparison())

    def to_markdown(self, histogram: str | None = None) -> str:
        """The report for people, in Markdown.

        Args:
            histogram: file name of the histograms to show, if any.
        """
        environment = Environment(
            loader=PackageLoader("hf_iau.report", "templates"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            autoescape=False,
        )
        values = self.to_dict()
        diagnostics = dict(values["diagnostics"])
        reasons = diagnostics.pop("reasons", None) or []
        attacks = tables.attacks(self.before.get("attacks"), self.after.get("attacks"))
        single_values = tables.values(diagnostics)
        intervals = tables.intervals(self._columns())
        total = sum(value for value in self.seconds.values() if value is not None)
        return environment.get_template("report.md.jinja").render(
            report=values,
            comparison=tables.markdown(self._comparison()),
            intervals=tables.markdown(intervals) if len(intervals) > 1 else None,
            differences=tables.markdown(tables.differences(self.gap)),
            attacks=tables.markdown(attacks) if len(attacks) > 1 else None,
            costs=tables.markdown(tables.costs(self.seconds, self.peak_memory_bytes)) if self.seconds else None,
            diagnostics=tables.markdown([["value", ""], *single_values]) if single_values else None,
            curves={name: tables.markdown(table) for name, table in tables.curves(diagnostics).items()},
            reasons=[reasons] if isinstance(reasons, str) else reasons,
            mia_rows={"test": "test", "held_out": "held-out", None: None}[self._compared_with()],
            standard_error=self._standard_error(),
            total_seconds=total,
            total_memory=tables.size(max(self.peak_memory_bytes.values(), default=None)),
            minimum_rows=MINIMUM_ROWS_FOR_PER_ROW_FIGURES,
            histogram=histogram,
            number=tables.number,
        )

    def __str__(self) -> str:
        calibration = {True: ", calibrated", False: ", uncalibrated", None: ""}[self.calibrated]
        rows = self.counts.get("forget_rows")
        lines = [
            f"Unlearning report: {self.method}{calibration}, {rows if rows is None else format(rows, ',')} forget rows, "
            f"seed {self.seed}",
            "",
            self.table(),
        ]
        if self.verdict:
            lines += ["", f"Verdict: {self.verdict}"]
        if self.seconds:
            lines += ["", f"{sum(self.seconds.values()):.1f} seconds in all"]
        lines += [f"Warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _columns(self) -> dict[str, dict[str, Any]]:
        """The figures of each model that was measured, by its column's title."""
        columns = {"before": self.before, "after": self.after}
        if self.retrained is not None:
            columns["retrained"] = self.retrained
        if self.noise_floor is not None:
            columns["retrained again"] = self.noise_floor["figures"]
        return columns

    def _comparison(self) -> tables.Table:
        gaps = {"before": self.gap_before, "after": self.gap}
        if self.noise_floor is not None:
            gaps["retrained again"] = self.noise_floor["gap"]
        return tables.comparison(self._columns(), gaps)

    def _compared_with(self) -> str | None:
        if self.after.get("mia_auc_test") is not None:
            return "test"
        return "held_out" if self.after.get("mia_auc") is not None else None

    def _standard_error(self) -> float | None:
        """Standard error of the AUC at 50 %, in points: √((m + n + 1)/(12 m n)) × 100, about 29/√m for large n."""
        split = self._compared_with()
        m = self.counts.get("forget_rows")
        n = self.counts.get(f"{split}_rows") if split else None
        return 100 * float(np.sqrt((m + n + 1) / (12 * m * n))) if m and n else None

    def _histograms(self) -> bytes | None:
        if not self._losses or self.per_row_suppressed:
            return None
        return loss_histograms(self._losses)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a report's numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _counts(measurement: Measurement) -> dict[str, int | None]:
    def rows(split: str) -> int | None:
        predictions = getattr(measurement, split)
        return None if predictions is None else len(predictions)

    return {
        "forget_rows": len(measurement.forget),
        "forget_targets": int(measurement.forget.targets.sum()),
        "retain_rows_measured": rows("retain"),
        "held_out_rows": rows("held_out"),
        "test_rows": rows("test"),
    }


def _agreement(after: Measurement, retrained: Measurement, bootstrap: int, seed: int) -> dict[str, Any] | None:
    found = {}
    for split in ("forget", "retain", "held_out", "test"):
        a, b = getattr(after, split), getattr(retrained, split)
        if a is None or b is None or a.probabilities is None or b.probabilities is None or not len(a):
            continue
        few = split == "forget" and after.per_row_suppressed  # a bootstrap of a few rows gives single rows away
        found[split] = agreement(a, b, 0 if few else bootstrap, seed).to_dict()
    return found or None


def _own_warnings(
    before: Measurement, after: Measurement, calibrated: bool | None, diverged: Mapping[str, Any]
) -> list[str]:
    found = []
    rows = rows_with_targets(after.forget)
    without = len(before.forget) - rows_with_targets(before.forget)
    if without:
        found.append(f"{without:,} of {len(before.forget):,} forget rows have no target and count in no figure.")
    if after.per_row_suppressed:
        found.append(
            f"Few forget rows ({rows}): figures are given as means alone, and the membership AUC is good to about "
            f"±{29 / max(rows, 1) ** 0.5:.0f} points (one standard error)."
        )
    if after.unseen is None:
        found.append("Neither test nor held-out rows were given: membership could not be measured.")
    elif calibrated and after.test is None:
        found.append(
            "No test rows were given: membership was measured against the held-out rows that the calibration looked at."
        )
    if after.retain is None:
        found.append("No retained rows were measured: damage to them does not show here.")
    broken = [name for name, value in diverged.items() if name.endswith("_loss") and _is_not_finite(value)]
    if broken:
        found.append(f"The model has diverged: {', '.join(broken)} after the request is not finite.")
    return found


def _is_not_finite(value: float | None) -> bool:
    return value is not None and not bool(np.isfinite(value))


def _histogram_losses(measurement: Measurement) -> dict[str, np.ndarray]:
    losses = {"forget rows": measurement.forget.loss}
    unseen = measurement.unseen
    if unseen is not None and rows_with_targets(unseen) >= MINIMUM_ROWS_FOR_PER_ROW_FIGURES:
        losses["test rows" if measurement.unseen_split == "test" else "held-out rows"] = unseen.loss
    return losses


def _without_per_row(diagnostics: Any) -> Any:
    if isinstance(diagnostics, Mapping):
        return {
            name: _without_per_row(value)
            for name, value in diagnostics.items()
            if not str(name).startswith(_PER_ROW_PREFIX)
        }
    if isinstance(diagnostics, list):
        return [_without_per_row(item) for item in diagnostics]
    return diagnostics
