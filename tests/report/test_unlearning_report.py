"""The report: its figures, what it withholds, and its files."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from importlib.metadata import version
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from hf_iau.data import TaskKind
from hf_iau.errors import RequestError
from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES
from hf_iau.evaluation.measurement import Measurement
from hf_iau.evaluation.retraining_gap import gap
from hf_iau.report.histograms import loss_histograms
from hf_iau.report.report import UnlearningReport, installed_versions
from hf_iau.utils.jsonable import jsonable

FIGURE_KEYS = {
    *(f"{split}_{kind}" for split in ("forget", "retain", "held_out", "test") for kind in ("accuracy", "loss")),
    "mia_auc",
    "mia_auc_held_out",
    "mia_auc_test",
    "attacks",
    "per_row_suppressed",
}


@pytest.fixture
def measurement(rows):
    """Makes a measurement whose forget rows have log-normal losses with the given mean of logarithms."""

    def make(forget: float, count: int = 60, seed: int = 0, **options) -> Measurement:
        random = np.random.default_rng(seed)
        draw = lambda mean, size: rows(np.exp(random.normal(mean, 1.0, size)), **options)  # noqa: E731
        return Measurement(draw(forget, count), draw(-1.5, 200), draw(0.0, 90), draw(0.0, 120))

    return make


@pytest.fixture
def report(measurement) -> UnlearningReport:
    return UnlearningReport.build(
        "curvature",
        measurement(-1.5),
        measurement(-0.2, seed=1),
        retrained=measurement(0.0, seed=2),
        second_retrained=measurement(0.1, seed=3),
        config={"damping": 1e-4},
        seed=7,
        counts={"retain_rows": 47_500},
        seconds={"gradient": 1.25, "step": 0.5},
        peak_memory_bytes={"gradient": 3 << 20, "step": 1 << 30},
        diagnostics={
            "step_norm": 4.5,
            "nan": float("nan"),
            "calibration": {"k": np.float64(0.56), "curve": [{"k": k / 10, "auc": 0.5} for k in range(14)]},
            "reasons": ["The proxies' AUC came to 50.2."],
            "per_row_losses": [1.0, 2.0],
        },
        warnings=["Look here."],
        verdict="check",
        calibrated=True,
        bootstrap=20,
    )


def strict(text: str):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_figures_and_gaps(report, measurement):
    for figures in (report.before, report.after, report.retrained, report.noise_floor["figures"]):
        assert figures.keys() >= FIGURE_KEYS
    expected = measurement(-0.2, seed=1).figures(bootstrap=20, seed=7)
    assert report.after == jsonable(expected.to_dict())
    assert report.gap == jsonable(gap(report.after, report.retrained).to_dict())
    assert report.gap["mean_absolute"] < report.gap_before["mean_absolute"]
    assert report.noise_floor["gap"] == jsonable(gap(report.noise_floor["figures"], report.retrained).to_dict())
    assert report.counts == {
        "forget_rows": 60,
        "forget_targets": 60,
        "retain_rows_measured": 200,
        "held_out_rows": 90,
        "test_rows": 120,
        "retain_rows": 47_500,
    }
    assert report.versions["torch"] == version("torch") and report.versions == installed_versions()
    assert report.warnings == ["Look here."]


def test_round_trip(report):
    values = report.to_dict()
    text = json.dumps(values, allow_nan=False)
    again = UnlearningReport.from_dict(strict(text))
    assert again == report
    assert again.to_dict() == values
    assert again.diagnostics["nan"] is None
    assert '"_losses"' not in text
    assert again.table() == report.table()
    assert str(again) == str(report)


def test_intervals_of_the_rates(report):
    low, high = report.after["intervals"]["forget_accuracy"]
    assert low < report.after["forget_accuracy"] < high
    text = report.to_markdown()
    assert "| 95 % interval | before | after | retrained | retrained again |" in text
    assert f"{100 * low:.1f} – {100 * high:.1f}" in text
    low, high = report.gap["intervals"]["mia_auc"]
    assert f"| MIA | {report.gap['mia_auc']:+.1f} points | {low:.1f} – {high:.1f} |" in text
    assert " 95 %" not in report.table()  # the short table stays short


def test_reports_without_intervals_are_read(report):
    older = report.to_dict()
    for figures in (older["before"], older["after"], older["retrained"], older["noise_floor"]["figures"]):
        del figures["intervals"]
        for result in figures["attacks"].values():
            for name in [name for name in result if name.endswith(("_low", "_high")) and name[:3] != "ci_"]:
                del result[name]
    for distance in (older["gap"], older["gap_before"], older["noise_floor"]["gap"]):
        del distance["intervals"]
    again = UnlearningReport.from_dict(json.loads(json.dumps(older)))
    text = again.to_markdown()
    assert "| 95 % interval |" not in text and "| figure | unlearned − retrained |" in text
    assert again.table().splitlines()[:-1] == report.table().splitlines()[:-1]


def test_strict_json():
    @dataclass
    class Settings:
        damping: float
        folder: Path
        _private: int = 1

    class Kind(Enum):
        SIGN = "sign"

    class Name(StrEnum):
        A = "a"

    values = {
        "nan": float("nan"),
        "infinite": -np.inf,
        "single": np.float32(0.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "array": np.array([1.0, np.nan]),
        "tensor": torch.tensor([1.0, float("inf")]),
        "dtype": torch.float32,
        "settings": Settings(0.1, Path("a") / "b"),
        "kind": Kind.SIGN,
        "name": Name.A,
        "set": {2, 1},
        3: (1, None),
    }
    assert strict(json.dumps(jsonable(values), allow_nan=False)) == {
        "nan": None,
        "infinite": None,
        "single": 0.5,
        "count": 3,
        "flag": True,
        "array": [1.0, None],
        "tensor": [1.0, None],
        "dtype": "torch.float32",
        "settings": {"damping": 0.1, "folder": os.path.join("a", "b")},
        "kind": "sign",
        "name": "a",
        "set": [1, 2],
        "3": [1, None],
    }


def test_from_dict_names_what_is_wrong(report):
    values = report.to_dict()
    with pytest.raises(RequestError, match="schema 99"):
        UnlearningReport.from_dict({**values, "schema": 99})
    with pytest.raises(RequestError, match="surprise"):
        UnlearningReport.from_dict({**values, "surprise": 1})
    with pytest.raises(RequestError, match="after"):
        UnlearningReport.from_dict({name: value for name, value in values.items() if name != "after"})


def test_save(report, tmp_path):
    written = report.save(tmp_path / "new" / "folder")
    assert sorted(path.name for path in written) == ["loss_histograms.png", "report.html", "report.json", "report.md"]
    assert sorted(written) == sorted((tmp_path / "new" / "folder").iterdir())  # no temporary file is left
    image = next(path for path in written if path.suffix == ".png")
    assert image.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert matplotlib.image.imread(image).std() > 0.01
    assert strict((tmp_path / "new/folder/report.json").read_text(encoding="utf-8")) == report.to_dict()
    assert UnlearningReport.load(tmp_path / "new" / "folder") == report


def test_markdown_holds_the_numbers(report, tmp_path):
    report.save(tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for figures in (report.before, report.after, report.retrained, report.noise_floor["figures"]):
        for name in ("forget_accuracy", "retain_accuracy", "test_accuracy", "held_out_accuracy", "mia_auc"):
            assert f"| {100 * figures[name]:.1f} |" in text
        assert f"| {figures['forget_loss']:.3f} |" in text
    for found in (report.gap, report.gap_before, report.noise_floor["gap"]):
        assert f"| {found['mean_absolute']:.2f} |" in text
    assert f"{report.gap['forget_accuracy']:+.1f} points" in text
    for word in (
        "**Verdict: check**",
        "| FA | forget accuracy |",
        "near the retrained model, not the lowest",
        "The proxies' AUC came to 50.2.",
        "Look here.",
        "| gradient | 1.2 | 3.0 MiB |",
        "1.0 GiB",
        "| calibration.k | 0.56 |",
        "`calibration.curve`",
        "![Row losses before and after](loss_histograms.png)",
        "rows to forget: 60",
        "retain rows: 47,500",
        "## What is not guaranteed",
        "noise floor",
        f"torch {version('torch')}",
    ):
        assert word in text, word
    assert "\n\n\n" not in text
    assert "None" not in text and "nan" not in text.replace("| nan | – |", "")


def test_table_is_aligned_and_short(report):
    lines = report.table().splitlines()
    assert len(lines) <= 12 and len({len(line) for line in lines}) == 1
    assert f"{100 * report.after['mia_auc']:.1f}" in report.table()
    assert "calibrated" in str(report) and "Warning: Look here." in str(report)
    assert "Verdict: check\n- The proxies' AUC came to 50.2.\n" in str(report)


@pytest.mark.parametrize("count", [1, 2, MINIMUM_ROWS_FOR_PER_ROW_FIGURES - 1])
def test_few_forget_rows_give_means_alone(measurement, tmp_path, count):
    (tmp_path / "loss_histograms.png").write_bytes(b"of an earlier request")
    before, after = measurement(-1.5, count=count), measurement(0.0, count=count, seed=1)
    report = UnlearningReport.build(
        "curvature",
        before,
        after,
        diagnostics={"step_norm": 1.0, "proxies": [{"per_row": [1.0], "k": 0.5}], "per_row_losses": [1.0] * count},
    )
    assert report.per_row_suppressed and report.before["per_row_suppressed"] and report.after["attacks"] is None
    assert not report._losses
    written = report.save(tmp_path)
    assert sorted(path.name for path in written) == ["report.html", "report.json", "report.md"]
    assert not (tmp_path / "loss_histograms.png").exists()
    values = strict((tmp_path / "report.json").read_text())
    assert values["per_row_suppressed"] is True
    assert values["diagnostics"] == {"step_norm": 1.0, "proxies": [{"k": 0.5}]}
    assert values["after"]["forget_loss"] == pytest.approx(after.forget.loss.mean())
    if count > 1:
        everything = (tmp_path / "report.json").read_text() + (tmp_path / "report.md").read_text()
        everything += (tmp_path / "report.html").read_text()
        assert not any(repr(float(loss))[:8] in everything for loss in [*before.forget.loss, *after.forget.loss])
    assert any("Few forget rows" in warning for warning in report.warnings)


def test_enough_rows_keep_everything(measurement):
    at_least = measurement(0.0, count=MINIMUM_ROWS_FOR_PER_ROW_FIGURES)
    report = UnlearningReport.build("curvature", at_least, at_least, diagnostics={"per_row_losses": [1.0]})
    assert not report.per_row_suppressed and report.after["attacks"] and report._losses
    assert report.to_dict()["diagnostics"] == {"per_row_losses": [1.0]}


def test_missing_sets_are_reported_not_invented(measurement, tmp_path):
    full = measurement(0.0)
    report = UnlearningReport.build(
        "identity", replace(full, test=None, retain=None), replace(full, test=None, retain=None), calibrated=True
    )
    assert report.after["test_accuracy"] is None and report.after["retain_loss"] is None
    assert report.counts["test_rows"] is None
    assert report.after["mia_auc"] == report.after["mia_auc_held_out"] is not None
    assert any("No test rows" in warning for warning in report.warnings)
    assert any("No retained rows" in warning for warning in report.warnings)
    report.save(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "test rows (TA)" not in text and "held-out set" in text and "No retrained model" in text

    alone = UnlearningReport.build("identity", Measurement(full.forget), Measurement(full.forget), calibrated=False)
    assert alone.after["mia_auc"] is None
    assert any("membership could not be measured" in warning for warning in alone.warnings)
    alone.save(tmp_path)
    assert "**uncalibrated**" in (tmp_path / "report.md").read_text()


def test_regression(measurement, tmp_path):
    models = {
        name: measurement(mean, kind=TaskKind.REGRESSION, seed=seed)
        for seed, (name, mean) in enumerate({"before": -1, "after": 0, "retrained": 0.1}.items())
    }
    report = UnlearningReport.build("identity", **models)
    assert report.gap["based_on"] == "loss" and report.after["forget_accuracy"] is None
    report.save(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "accuracy, " not in text and "% of loss" in text
    assert f"{report.gap['forget_loss']:+.1f} %" in text


def test_a_diverged_model(measurement, rows, tmp_path):
    before = measurement(-1.0)
    broken = replace(rows(np.full(60, np.nan)), targets=np.ones(60), correct=np.zeros(60))
    report = UnlearningReport.build("identity", before, replace(before, forget=broken))
    assert report.after["forget_loss"] is None and report.after["mia_auc"] is None
    assert any("diverged" in warning and "forget_loss" in warning for warning in report.warnings)
    assert len(report.save(tmp_path)) == 4


def test_agreement_with_the_retrained_model(measurement, rows, tmp_path):
    p = np.random.default_rng(0).dirichlet(np.ones(3), 30)
    ours, theirs = (Measurement(rows(np.ones(30), probabilities=q)) for q in (p, np.roll(p, 1, axis=1)))
    report = UnlearningReport.build("identity", ours, ours, retrained=theirs)
    assert report.agreement["forget"]["agreement"] == 0 and report.agreement["forget"]["jensen_shannon"] > 0
    assert "Jensen–Shannon" in report.to_markdown()


def test_inconsistent_measurements(measurement):
    one = measurement(0.0)
    with pytest.raises(RequestError, match="second_retrained"):
        UnlearningReport.build("identity", one, one, second_retrained=one)
    with pytest.raises(RequestError, match="same rows"):
        UnlearningReport.build("identity", one, measurement(0.0, count=61))


def test_histograms_use_no_global_state():
    random = np.random.default_rng(0)
    panels = {
        "before": {"forget rows": np.zeros(30), "test rows": random.exponential(size=50)},
        "after": {"forget rows": np.array([np.nan, np.inf, 1.0])},
        "retrained": {"forget rows": np.array([])},
    }
    for chosen in (panels, {"before": {"forget rows": np.ones(30)}}, {"before": {"forget rows": np.array([])}}):
        image = matplotlib.image.imread(io.BytesIO(loss_histograms(chosen)), format="png")
        assert image.shape[0] > 200
    pyplot = __import__("sys").modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
