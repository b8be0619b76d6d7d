"""The report on one unlearning request: what was done, what it cost, and what it changed."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from hf_iau.errors import RequestError
from hf_iau.evaluation.intervals import RESAMPLES
from hf_iau.evaluation.measurement import Measurement
from hf_iau.memory.fingerprints import installed_version
from hf_iau.report import content, pages, tables
from hf_iau.report.histograms import loss_histograms
from hf_iau.report.measured import (
    check_same_rows,
    compared,
    losses_to_draw,
    measurement_warnings,
    row_counts,
)
from hf_iau.utils.atomic_files import write_public_atomically
from hf_iau.utils.jsonable import json_text, jsonable
from hf_iau.utils.optional import is_installed

SCHEMA = 2

JSON_NAME = "report.json"
MARKDOWN_NAME = "report.md"
HTML_NAME = "report.html"
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
        peak_memory_bytes: peak memory by phase; see `hf_iau.utils.timing.PhaseTimer` for what it means per device.
        diagnostics: the method's own figures: step norm, calibrated values, calibration curve; a list of sentences
            under `reasons` is printed below the verdict. Figures of single forget rows must go under a name that
            starts with `per_row`.
        warnings: sentences for the user.
        versions: of Python and of the packages that made the numbers.
        verdict: "ok", "check" or "retrain", or None where the method does not assess its result.
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
        models = {"before": before, "after": after, "retrained": retrained, "second_retrained": second_retrained}
        given = {name: model for name, model in models.items() if model is not None}
        check_same_rows(given)
        figures = {name: model.figures(bootstrap=bootstrap, seed=seed) for name, model in given.items()}
        report = cls(
            method=method,
            config=jsonable(config or {}),
            seed=seed,
            counts=jsonable(row_counts(before) | dict(counts or {})),
            before=jsonable(figures["before"].to_dict()),
            after=jsonable(figures["after"].to_dict()),
            **jsonable(compared(given, figures, bootstrap, seed)),
            seconds=jsonable(seconds or {}),
            peak_memory_bytes=jsonable(peak_memory_bytes or {}),
            diagnostics=jsonable(diagnostics or {}),
            warnings=[*warnings, *measurement_warnings(before, after, calibrated, figures["after"].to_dict())],
            versions=dict(versions) if versions is not None else installed_versions(),
            verdict=verdict,
            calibrated=calibrated,
        )
        if not report.per_row_suppressed:
            report._losses = losses_to_draw(given)
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
            pages_of_it = str(report) + report.to_markdown() + report.to_html()  # it can be shown, and saved
            (pages_of_it + json_text(report.to_dict())).encode()
        except RequestError:
            raise
        except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise RequestError(f"{file} is no report, or damaged ({type(error).__name__}: {error}).") from error
        except (RecursionError, TemplateError) as error:
            raise RequestError(f"{file} is damaged: what it holds cannot be shown ({error}).") from error
        return report

    def save(self, directory: str | Path) -> list[Path]:
        """Write `report.json`, `report.md`, `report.html` and, when there are row losses, `loss_histograms.png`.

        The HTML page needs no other file, no network and no script. Each file is written whole or not at all. A
        histogram left in `directory` by an earlier report is removed when this one has too few forget rows for one.
        Without matplotlib the histograms are on the HTML page alone.

        Returns:
            The paths written.
        """
        directory = Path(directory)
        image = directory / HISTOGRAM_NAME
        drawn = bool(self._losses) and not self.per_row_suppressed
        written = []
        if drawn and is_installed("matplotlib"):
            written.append(write_public_atomically(image, loss_histograms(self._losses)))
        elif drawn or self.per_row_suppressed:
            image.unlink(missing_ok=True)
        shown = image.exists()
        missing = f"Row losses are drawn in `{HTML_NAME}`; to draw them here too, install matplotlib (hf-iau[plots])."
        markdown = pages.markdown_page(
            self.to_dict(), HISTOGRAM_NAME if shown else None, missing if drawn and not shown else None
        )
        html = self.to_html(image.read_bytes() if shown and not drawn else None)
        written.append(write_public_atomically(directory / HTML_NAME, html.encode()))
        written.append(write_public_atomically(directory / MARKDOWN_NAME, markdown.encode()))
        written.append(write_public_atomically(directory / JSON_NAME, json_text(self.to_dict()).encode()))
        return written[::-1]

    def table(self) -> str:
        """The figures before, after and of the retrained models as an aligned plain-text table."""
        return tables.text(content.comparison(self.to_dict()))

    def to_markdown(self, histogram: str | None = None) -> str:
        """The report for people, in Markdown.

        Args:
            histogram: file name of the histograms to show, if any.
        """
        return pages.markdown_page(self.to_dict(), histogram)

    def to_html(self, image: bytes | None = None) -> str:
        """The report for people as one HTML page, histograms included, that needs no other file, network or script.

        Args:
            image: the histograms as a PNG, to show where the report holds no row losses any more.
        """
        losses = {} if self.per_row_suppressed else self._losses
        return pages.html_page(self.to_dict(), losses, None if self.per_row_suppressed else image)

    def __str__(self) -> str:
        calibration = {True: ", calibrated", False: ", uncalibrated", None: ""}[self.calibrated]
        rows = self.counts.get("forget_rows")
        lines = [
            f"Unlearning report: {self.method}{calibration}, {rows if rows is None else format(rows, ',')} forget "
            f"rows, seed {self.seed}",
            "",
            self.table(),
        ]
        if self.verdict:
            lines += ["", f"Verdict: {self.verdict}", *(f"- {reason}" for reason in content.reasons(self.to_dict()))]
        if self.seconds:
            lines += ["", f"{sum(self.seconds.values()):.1f} seconds in all"]
        lines += [f"Warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a report's numbers depend on."""
    found = {name: installed_version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


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
