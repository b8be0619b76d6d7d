"""A report as pages for people: Markdown, and one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import functools
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from hf_iau.report import charts, content, explanations, tables
from hf_iau.report.histograms import Panels


@functools.cache
def markdown_environment(package: str = "hf_iau.report") -> Environment:
    """Templates of `package` for Markdown."""
    return Environment(
        loader=PackageLoader(package, "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


@functools.cache
def html_environment(package: str = "hf_iau.report") -> Environment:
    """Templates of `package`, and the base page and its parts, for HTML: every text that is put in is escaped."""
    return Environment(
        loader=ChoiceLoader([PackageLoader(name, "templates") for name in dict.fromkeys((package, "hf_iau.report"))]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=True,
    )


def markdown_page(report: content.Values, histogram: str | None = None, missing: str | None = None) -> str:
    """The report in Markdown.

    Args:
        report: what `UnlearningReport.to_dict` gives.
        histogram: file name of the histograms to show, if any.
        missing: a sentence in their place.
    """
    values = content.shared(report)
    for name in ("comparison", "intervals", "differences", "attacks", "costs", "diagnostics"):
        if values[name] is not None:
            values[name] = tables.markdown(values[name]) if name != "intervals" or len(values[name]) > 1 else None
    values["curves"] = {name: tables.markdown(table) for name, table in values["curves"].items()}
    figures = [["", "figure", "what it says", "where it should be"], *map(list, values["four_figures"])]
    values["four_figures"] = tables.markdown(figures, words=True) if len(figures) > 1 else None
    return _template_text("report.md.jinja", values | {"histogram": histogram, "missing": missing})


def _template_text(name: str, values: dict[str, Any]) -> str:
    return markdown_environment().get_template(name).render(values)


def html_page(report: content.Values, losses: Panels | None = None, image: bytes | None = None) -> str:
    """The report as one HTML file.

    Args:
        report: what `UnlearningReport.to_dict` gives.
        losses: row losses of at least as many rows as may be shown, see `hf_iau.report.histograms.loss_histograms`.
        image: a PNG of the histograms, for a report whose row losses are gone.
    """
    columns = content.columns(report)
    names = {key: f"{short}, {name}, %" for key, (short, name, *_) in explanations.FOUR_FIGURES.items()}
    values = content.shared(report)
    values["intervals"] = {title: spans for title, *spans in values["intervals"][1:]}
    config = tables.values(report["config"])
    return (
        html_environment()
        .get_template("report.html.jinja")
        .render(
            values,
            strips=charts.strips(columns, names),
            panels=charts.histogram_panels(losses) if losses else [],
            image=None if image is None else base64.b64encode(image).decode(),
            config=[["setting", "value"], *config] if config else None,
        )
    )
