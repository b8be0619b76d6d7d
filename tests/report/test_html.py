"""The HTML pages of a report and of a receipt: whole, self-contained, escaped, with the numbers of the JSON, and as a
browser shows them."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from hf_iau.data import TaskKind
from hf_iau.deletion.ledger import LedgerEntry
from hf_iau.deletion.receipt import render_receipt, render_receipt_html
from hf_iau.errors import MissingPackageError
from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES
from hf_iau.evaluation.measurement import Measurement
from hf_iau.methods import available_methods
from hf_iau.report import explanations
from hf_iau.report.charts import histogram_panels, strips
from hf_iau.report.histograms import loss_histograms
from hf_iau.report.report import UnlearningReport
from hf_iau.utils import optional

VOID = {"meta", "link", "img", "br", "wbr", "hr"}
EVIL = "<script>alert('x')</script>&amp;\"><img src=http://example.org/x.png onerror=alert(1)>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Page(HTMLParser):
    """A strict reader: every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.styles = self.text = ""
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
        if tag == "table":
            assert len({len(row) for row in self._rows}) == 1, f"ragged table {self._caption!r}"
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles += data
            return
        self.text += data
        if "small" in self.open:
            self._rows[-1][-1] += ("" if "|" in self._rows[-1][-1] else "|") + data.strip()
        elif {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data.strip()
        elif "caption" in self.open:
            self._caption += data

    def attributes(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture
def models(rows) -> dict[str, Measurement]:
    """Four models whose forget rows' losses differ in their mean logarithm."""

    def make(mean: float, seed: int, count: int = 60) -> Measurement:
        random = np.random.default_rng(seed)
        forget, retain, held_out, test = (
            rows(np.exp(random.normal(m, 1.0, n))) for m, n in ((mean, count), (-1.5, 200), (0.0, 90), (0.0, 120))
        )
        return Measurement(forget, retain, held_out, test)

    means = {"before": -1.5, "after": -0.2, "retrained": 0.0, "second_retrained": 0.1}
    return {name: make(mean, seed) for seed, (name, mean) in enumerate(means.items())}


def report_of(models: dict[str, Measurement], **options: Any) -> UnlearningReport:
    values: dict[str, Any] = {
        "counts": {"train_rows": 4000},
        "config": {"scale": None, "calibrate_on": "auto", "multi_step": False},
        "diagnostics": {
            "reasons": ["the step is 36% of the weights' norm"],
            "step_norm": 4.5,
            "relative_step_norm": 0.36,
            "calibration": {
                "scale": 0.56,
                "damping": 0.1,
                "retain_weight": 0.003,
                "source": "proxies",
                "curve": [{"scale": k / 10, "damping": 0.1, "retain_weight": 0.0, "criterion": 0.1} for k in range(14)],
            },
        },
        "seconds": {"gradient": 1.25, "step": 0.5},
        "peak_memory_bytes": {"gradient": 3 << 20},
        "warnings": ["Few rows were seen twice."],
        "verdict": "check",
        "calibrated": True,
        "bootstrap": 20,
    }
    return UnlearningReport.build("iau", **models, **(values | options))


@pytest.fixture
def report(models) -> UnlearningReport:
    return report_of(models)


def entry_of(rows: int = 80, **changes: Any) -> LedgerEntry:
    figures = {"forget_accuracy": 0.98765, "retain_accuracy": 0.9123, "test_accuracy": 0.8125, "mia_auc": 0.6271}
    values: dict[str, Any] = {
        "number": 2,
        "time": "2026-02-28T12:30:05+00:00",
        "request": "a" * 32,
        "training_run": "b" * 32,
        "rows": rows,
        "row_ids": ["c" * 32] * rows,
        "method": "iau",
        "config": {},
        "calibration": {"scale": 0.1968, "damping": 0.01, "retain_weight": 0.0},
        "weights_before": "9f" * 32,
        "weights_after": "1e" * 32,
        "outcome": {"before": figures, "after": {**figures, "forget_accuracy": 0.2251}, "verdict": "ok"},
        "versions": {"python": "3.11.7", "torch": "2.6.0"},
        "files": {},
        "previous": "0" * 64,
        "mac": "7c" * 32,
    }
    return LedgerEntry(**(values | changes))


# What both pages must hold


@pytest.fixture(params=["report", "receipt", "short report"])
def html(request: pytest.FixtureRequest, models) -> str:
    if request.param == "receipt":
        return render_receipt_html(entry_of())
    if request.param == "report":
        return report_of(models).to_html()
    return UnlearningReport("npo", {}, 0, {"forget_rows": 1}, {}, {}).to_html()


def test_the_page_needs_nothing_else(html: str) -> None:
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>") and page.elements[0] == ("html", {"lang": "en"})
    assert "script" not in {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
                assert str(value).startswith(("data:", "#")), f"<{tag} {name}={value!r}>"
            assert not name.startswith("on"), f"<{tag}> has a handler {name}"
    assert not re.search(r"url\(|@import|https?:", page.styles)
    policy = [meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_the_page_can_be_read_by_all(html: str) -> None:
    page = Page(html)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("h1") == 1 and tags.count("main") == 1 and tags.count("title") == 1
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.attributes("meta")
    assert all(attributes.get("scope") in ("col", "row") for attributes in page.attributes("th"))
    assert all(attributes.get("alt") for attributes in page.attributes("img"))
    assert all(a.get("role") == "img" and a.get("aria-label") for a in page.attributes("svg"))
    assert all(caption for caption in page.tables)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a} <= set(ids)


def test_the_colours_can_be_told_from_their_ground() -> None:
    def luminance(color: str) -> float:
        parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    schemes = re.findall(r":root \{(.*?)\}", Page(render_receipt_html(entry_of())).styles, re.DOTALL)
    assert len(schemes) == 3  # light, dark, print
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): (#\w{6});", scheme))
        for ground in ("page", "panel"):
            for name in ("text", "quiet", "ok", "check", "retrain", "none"):
                low, high = sorted(luminance(colors[c]) for c in (ground, name))
                assert (high + 0.05) / (low + 0.05) >= 4.5, f"{name} on {ground}"
        for name in ("before", "after", "retrained", "again", "forget", "unseen"):  # drawings: 3 suffices (WCAG 1.4.11)
            low, high = sorted(luminance(colors[c]) for c in ("page", name))
            assert (high + 0.05) / (low + 0.05) >= 3, name


# The report


def test_the_numbers_are_those_of_the_json(report: UnlearningReport) -> None:
    values, page = report.to_dict(), Page(report.to_html())
    caption = "Figures of each model; small print: 95 % interval"
    header, *lines = page.tables[caption]
    assert header == ["", "before", "after", "retrained", "retrained again"]
    shown = {name: cells for name, *cells in lines}
    columns = [values["before"], values["after"], values["retrained"], values["noise_floor"]["figures"]]

    def expected(figure: str) -> list[str]:
        cells = []
        for column in columns:
            low, high = column["intervals"][figure]
            cells.append(f"{100 * column[figure]:.1f}|{100 * low:.1f}–{100 * high:.1f}")
        return cells

    for title, figure in {
        "accuracy, forget rows (FA), %": "forget_accuracy",
        "accuracy, retained rows (RA), %": "retain_accuracy",
        "accuracy, test rows (TA), %": "test_accuracy",
        "membership AUC (MIA), %": "mia_auc",
    }.items():
        assert shown[title] == expected(figure)
    assert shown["loss, forget rows"] == [f"{column['forget_loss']:.3f}" for column in columns]
    gaps = [values["gap_before"], values["gap"], None, values["noise_floor"]["gap"]]
    assert shown["mean gap to retrained, points"] == ["–" if g is None else f"{g['mean_absolute']:.2f}" for g in gaps]
    differences = {row[0]: row[1] for row in page.tables["Unlearned minus retrained; 0 is the aim"][1:]}
    assert differences["FA"] == f"{values['gap']['forget_accuracy']:+.1f} points"
    attacks = page.tables["What an attacker can tell from one score of each row"][1:]
    assert [row[1] for row in attacks] == [f"{100 * a['auc']:.1f}" for a in values["before"]["attacks"].values()]


def test_what_was_asked_and_done(report: UnlearningReport) -> None:
    text = " ".join(Page(report.to_html()).text.split())
    for words in (
        "60 of 4,000 training rows were to be forgotten.",
        "Verdict: check",
        "the step is 36% of the weights' norm",
        "Few rows were seen twice.",
        "random training rows that stood in for the rows to forget",
        "4.5, 36 % of the norm of the weights",
        "took 1.8 seconds",
        "is the noise floor",
        "It should be near the retrained model, not the lowest",
        "This is approximate unlearning.",
        f"torch {report.versions['torch']}",
    ):
        assert words in text, words
    assert text.index("Verdict") < text.index("What was asked") < text.index("What was done") < text.index("Before and")
    assert "None" not in text and "nan" not in text.replace("finance", "")


def test_histograms_are_drawn_true_to_scale(models) -> None:
    losses = {name: {"forget rows": models[name].forget.loss, "test rows": models[name].test.loss} for name in models}
    panels = histogram_panels(losses)
    top = max(
        np.histogram(np.log(values), np.linspace(np.log(edges[0]), np.log(edges[1]), 41))[0].max() / len(values)
        for sets in losses.values()
        for values in sets.values()
        for edges in [_ends(losses)]
    )
    for panel, sets in zip(panels, losses.values(), strict=True):
        for drawn, (name, values) in zip(panel.histograms, sets.items(), strict=True):
            assert (drawn.name, drawn.rows) == (name, len(values))
            heights = [float(y) for y in re.findall(r"V([\d.]+)H", drawn.path)]
            shares = (panel.bottom - np.array(heights)) / (panel.bottom - panel.top) * top
            low, high = _ends(losses)
            found, _ = np.histogram(np.log(values), np.linspace(np.log(low), np.log(high), 41))
            assert shares == pytest.approx(found / len(values), abs=2e-3)
            place = (np.log(np.median(values)) - np.log(low)) / (np.log(high) - np.log(low))
            assert drawn.median[0] == pytest.approx(panel.left + place * (panel.right - panel.left), abs=0.06)


def _ends(losses: dict[str, dict[str, np.ndarray]]) -> tuple[float, float]:
    pooled = np.concatenate([values for sets in losses.values() for values in sets.values()])
    return 0.99 * pooled.min(), 1.01 * pooled.max()


def test_histograms_of_odd_losses() -> None:
    panels = histogram_panels(
        {
            "before": {"forget rows": np.zeros(30), "test rows": np.ones(50)},
            "after": {"forget rows": np.array([np.nan, np.inf, 1.0])},
            "retrained": {"forget rows": np.array([])},
        }
    )
    assert [[h.rows for h in panel.histograms] for panel in panels] == [[30, 50], [1], []]
    assert "no finite losses" in panels[2].description and "nan" not in repr(panels)
    assert histogram_panels({"before": {"forget rows": np.array([])}})[0].y_ticks


def test_strips_mark_the_values_on_one_scale() -> None:
    columns = {
        "before": {"mia_auc": 1.0, "intervals": {"mia_auc": (0.9, 1.0)}},
        "after": {"mia_auc": 0.5},
        "retrained": {"mia_auc": 0.0},
    }
    (strip,) = strips(columns, {"forget_accuracy": "FA", "mia_auc": "MIA"})
    places = [mark.x for mark in strip.marks]
    assert places == [strip.right, (strip.left + strip.right) / 2, strip.left] and strip.aim == strip.left
    assert strip.marks[0].low == pytest.approx(strip.left + 0.9 * (strip.right - strip.left), abs=0.06)
    assert strip.marks[1].low is None and strip.description == "MIA: before 100.0 %, after 50.0 %, retrained 0.0 %."


@pytest.mark.parametrize("count", [1, MINIMUM_ROWS_FOR_PER_ROW_FIGURES - 1])
def test_few_forget_rows_give_means_alone(models, rows, tmp_path: Path, count: int) -> None:
    losses = np.exp(np.random.default_rng(5).normal(0, 1, count))
    few = {name: replace(model, forget=rows(losses * (i + 1))) for i, (name, model) in enumerate(models.items())}
    report = report_of(few, diagnostics={"per_row_losses": list(losses), "proxies": [{"per_row": [1.5], "scale": 2.0}]})
    (tmp_path / "loss_histograms.png").write_bytes(b"of an earlier request")
    report.save(tmp_path)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "area" not in {a.get("class", "").split()[0] for a in page.attributes("path")} and not page.attributes("img")
    assert report.to_html(b"an image") == html
    assert "per_row" not in page.text and "are withheld" in page.text and "Attacks" not in page.text
    if count > 1:
        shown = set(re.findall(r"\d+\.\d{3,}", html))
        single = {f"{loss * factor:.3f}" for loss in losses for factor in (1, 2, 3, 4)}
        assert not shown & single


def test_enough_rows_are_drawn(report: UnlearningReport) -> None:
    page = Page(report.to_html())
    areas = [a for a in page.attributes("path") if (a.get("class") or "").startswith("area")]
    assert len(areas) == 6  # forget and test rows, before, after and retrained


def test_texts_are_escaped(report: UnlearningReport) -> None:
    values = report.to_dict()
    evil = UnlearningReport.from_dict(
        values
        | {
            "method": EVIL,
            "config": {EVIL: EVIL},
            "counts": values["counts"] | {EVIL: EVIL},
            "seconds": {EVIL: 1.0},
            "diagnostics": {"reasons": [EVIL], EVIL: EVIL, "curve": [{EVIL: EVIL}], "calibration": {"source": EVIL}},
            "warnings": [EVIL],
            "versions": {EVIL: EVIL},
            "verdict": EVIL,
            "agreement": {EVIL: {"agreement": 0.5, "jensen_shannon": 0.1}},
        }
    )
    page = Page(evil.to_html())
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert page.text.count(EVIL) >= 12
    receipt = Page(render_receipt_html(entry_of(method=EVIL, versions={EVIL: EVIL}, outcome={"verdict": EVIL})))
    assert not {"script", "img"} & {tag for tag, _ in receipt.elements}
    assert receipt.text.count(EVIL) == 4


def test_a_loaded_report_shows_the_image_that_lies_beside_it(report: UnlearningReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    assert "<img" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    UnlearningReport.load(tmp_path).save(tmp_path)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    (image,) = page.attributes("img")
    assert str(image["src"]).startswith("data:image/png;base64,iVBOR")


def test_without_matplotlib_the_page_has_the_histograms(
    report: UnlearningReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optional, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"hf-iau\[plots\]"):
        loss_histograms({"before": {"forget rows": np.ones(30)}})
    (tmp_path / "loss_histograms.png").write_bytes(b"of an earlier request")
    written = report.save(tmp_path)
    assert sorted(path.name for path in written) == ["report.html", "report.json", "report.md"]
    assert sorted(written) == sorted(tmp_path.iterdir())
    assert "Row losses are drawn in `report.html`" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert 'class="area' in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_request_of_no_rows_claims_nothing() -> None:
    report = UnlearningReport("iau", {}, 0, {"forget_rows": 0}, {}, {}, warnings=["The request names no rows."])
    text = Page(report.to_html()).text
    assert "No weight was changed." in text and "Nothing was measured." in text and "Verdict: none" in text
    assert "were changed" not in text and "calibrated" not in text and "What holds" not in text


def test_a_regression_has_losses_and_the_attack_alone(models, rows) -> None:
    regression = {
        name: Measurement(*(rows(getattr(model, s).loss, kind=TaskKind.REGRESSION) for s in ("forget", "retain")))
        for name, model in models.items()
    }
    text = Page(report_of(regression).to_html()).text
    assert (
        "FA: forget accuracy" not in text
        and "% of loss" in text
        and "averages the absolute differences of the losses" in text
    )


def test_methods_in_words_are_methods() -> None:
    assert set(explanations.METHODS) <= set(available_methods())


# The receipt


def test_the_receipt_in_both_forms() -> None:
    entry = entry_of()
    page, text = Page(render_receipt_html(entry)), render_receipt(entry)
    shown = {name: cells for name, *cells in page.tables["The model before and after"][1:]}
    assert shown["accuracy, forget rows (FA), %"] == ["98.8", "22.5"]
    assert shown["membership AUC (MIA), %"] == ["62.7", "62.7"]
    assert "| accuracy, forget rows (FA), % | 98.8 | 22.5 |" in text
    for words in (
        "80 training rows were removed",
        "2026-02-28 12:30:05 UTC",
        "0.1968",
        entry.mac,
        "entry 2",
        "2 entries",
    ):
        assert words in text and words in page.text, words
    for form in (text, page.text):
        assert "certificate" not in form.lower() and entry.weights_after in form
        assert not any(secret in form for secret in (entry.request, entry.training_run, *entry.row_ids))


def test_the_receipt_of_few_rows_tells_nothing_of_them() -> None:
    entry = entry_of(rows=1)
    page, text = Page(render_receipt_html(entry)), render_receipt(entry)
    for form in (text, page.text):
        assert "1 training row was removed" in form and "nothing about the forgotten rows" in form
        assert "forget rows" not in form and "MIA" not in form and "22.5" not in form and "62.7" not in form
        assert "91.2" in form


def test_the_receipt_of_many_steps_and_of_no_figures() -> None:
    entry = entry_of(calibration=None, outcome={"multi_step": True})
    page, text = Page(render_receipt_html(entry)), render_receipt(entry)
    assert "| method | `iau`, in many short steps |" in text and "iau, in many short steps" in page.text
    for form in (text, page.text):
        assert "scale k" not in form and "Nothing that can be given here was measured" in form


# In a browser


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["report", "receipt"])
def test_a_browser_shows_the_page(report: UnlearningReport, tmp_path: Path, name: str, width: int) -> None:
    html = report.to_html() if name == "report" else render_receipt_html(entry_of())
    # The page itself runs no script; this copy of it measures itself, in a frame: windows have a least width.
    html = re.sub(r"<meta http-equiv=[^>]*>", "", html).replace("<details>", "<details open>")
    measure = """<script>
    const wide = [...document.querySelectorAll("body *")].filter(
      (e) => !e.closest(".scroll") && e.getBoundingClientRect().right > window.innerWidth + 1);
    parent.document.documentElement.setAttribute("data-measured", [window.innerWidth,
      document.documentElement.scrollWidth, wide.length, document.documentElement.scrollHeight].join(" "));
    </script></body>"""
    copy = escape(html.replace("</body>", measure))
    frame = f'<iframe style="border: 0" scrolling="no" width="{width}" height="1600" srcdoc="{copy}"></iframe>'
    (tmp_path / "page.html").write_text(f'<!DOCTYPE html><body style="margin: 0">{frame}</body>', encoding="utf-8")
    shot = tmp_path / "shot.png"
    browser = subprocess.run(
        [
            str(BROWSER),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},1600",
            f"--screenshot={shot}",
            "--dump-dom",
            (tmp_path / "page.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'data-measured="(\d+) (\d+) (\d+) (\d+)"', browser.stdout)
    assert found, browser.stderr
    window, scroll, too_wide, height = map(int, found.groups())
    assert window == width and scroll <= width and too_wide == 0 and height > 800
    image = matplotlib.image.imread(shot)
    assert image.shape[:2] == (1600, width)
    written = (np.ptp(image[:, :, :3], axis=(1, 2)) > 0.5).mean()  # lines of the picture with something dark on them
    assert written > 0.2
