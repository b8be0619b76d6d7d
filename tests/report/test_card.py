"""The model card's part on unlearning: what it tells, what it withholds, and that it survives a restart."""

from __future__ import annotations

import dataclasses
import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tiny_models import plain
from unlearning_trainers import FORGET, WITH_CURVATURE, make_trainer

from hf_iau import IAUCallback, IAUConfig, PublishError, UnlearningReport, UnlearningTrainer
from hf_iau.report.card import UnlearningCard

FIGURES = {
    "forget_accuracy": 0.975,
    "retain_accuracy": 0.99,
    "test_accuracy": 0.8125,
    "forget_loss": 0.1,
    "test_loss": float("nan"),
    "mia_auc": 0.625,
}


def report_of(rows: int = 250, **changes: Any) -> UnlearningReport:
    after = FIGURES | {"forget_accuracy": 0.8, "mia_auc": 0.51}
    values: dict[str, Any] = {
        "method": "iau",
        "config": {"scale": 3.25},
        "seed": 0,
        "counts": {"forget_rows": rows, "train_rows": 5000},
        "before": FIGURES,
        "after": after,
        "gap": {"mean_absolute": 1.234, "based_on": "accuracy"},
        "noise_floor": {"figures": {}, "gap": {"mean_absolute": 0.5, "based_on": "accuracy"}},
        "verdict": "ok",
        "calibrated": True,
    }
    return UnlearningReport(**(values | changes))


def test_the_section_as_a_whole() -> None:
    card = (
        UnlearningCard()
        .with_report(report_of(), "2026-01-31")
        .with_report(report_of(30, calibrated=False), "2026-02-28")
    )
    pattern = r"""## Unlearning

After training, 280 training rows were removed from this model's weights in 2 requests,
by approximate machine unlearning with `hf-iau` \(after \[arXiv 2507\.23257\]\(\S+\)\), not by training again\.

\| date \| method \| rows forgotten \| of \| calibrated \| gap \| noise floor \| verdict \|
\| :-- (\| --: )+\|
\| 2026-01-31 \| iau \| 250 \| 5,000 \| yes \| 1\.23 \| 0\.50 \| ok \|
\| 2026-02-28 \| iau \| 30 \| 5,000 \| no \| 1\.23 \| 0\.50 \| ok \|

\*gap\*: mean distance [^\n]*, in points; [^|]*\.

Figures of the last request:

\|  \| before \| after \|
\| :-- \| --: \| --: \|
\| accuracy, retained rows \(RA\), % \| 99\.0 \| 99\.0 \|
\| accuracy, forget rows \(FA\), % \| 97\.5 \| 80\.0 \|
\| accuracy, test rows \(TA\), % \| 81\.2 \| 81\.2 \|
\| loss, forget rows \| 0\.100 \| 0\.100 \|
\| membership AUC \(MIA\), % \| 62\.5 \| 51\.0 \|

### Limits of the unlearning

(- [^\n]+\n(  [^\n]+\n)*){5}"""
    assert re.fullmatch(pattern, card.section()), card.section()
    assert UnlearningCard().section() == ""


def test_figures_of_few_rows_are_withheld() -> None:
    request = UnlearningCard().with_report(report_of(19)).requests[0]
    assert set(request.before) == set(request.after) == {"retain_accuracy", "test_accuracy"}
    assert request.gap is None and request.noise_floor is None
    section = UnlearningCard((request,)).section()
    assert "fewer than 20 rows" in section and "forget rows" not in section
    assert {r.dataset_split for r in UnlearningCard((request,)).evaluation_results("text-classification")} == {
        "retain",
        "test",
    }
    assert "forget_loss" in UnlearningCard().with_report(report_of(20)).requests[0].after


def request_of(trainer: UnlearningTrainer, rows: list[int], **settings: Any) -> Any:
    return trainer.unlearn(forget_indices=rows, config=IAUConfig(scale=0.1, damping=0.1), **settings)


def test_the_card_goes_with_the_weights(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    trainer = make_trainer(folder, callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    request_of(trainer, FORGET[:1])
    second = request_of(trainer, FORGET[1:])
    assert [r.forget_rows for r in trainer.unlearning_card.requests] == [1, 2]
    second.revert()
    assert [r.forget_rows for r in trainer.unlearning_card.requests] == [1]
    request_of(trainer, [9], dry_run=True)
    trainer.save_model()
    assert stat.S_IMODE((folder / "_iau" / "card.json").stat().st_mode) == 0o600

    # Another process, with the saved weights: the card goes on.
    model = type(trainer.model).from_pretrained(folder)
    again = make_trainer(folder, model=model)
    request_of(again, FORGET[1:])
    assert [r.forget_rows for r in again.unlearning_card.requests] == [1, 2]
    again.create_model_card()
    assert "3 training rows were removed" in (folder / "README.md").read_text()

    # With other weights, or after training again, it does not.
    assert make_trainer(folder).unlearning_card == UnlearningCard()
    again.train()
    assert again.unlearning_card == UnlearningCard()
    again.save_model()
    assert not (folder / "_iau" / "card.json").exists()


def test_create_model_card_keeps_what_was_known(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text(
        "---\nbase_model: org/base\nlicense: mit\ndatasets:\n- org/rows\ntags:\n- mine\n---\n# Mine\n"
    )
    trainer = make_trainer(folder, memory=None)
    for _ in range(2):
        trainer.unlearning_card = trainer.unlearning_card.with_report(report_of(), "2026-01-31")
        trainer.create_model_card(tags=["asked"])
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.license, card.data.datasets) == ("org/base", "mit", ["org/rows"])
    assert {"mine", "asked", "machine-unlearning", "hf-iau"} <= set(card.data.tags)
    assert len(card.data.tags) == len(set(card.data.tags))
    assert card.text.count("## Unlearning\n") == 1 and card.text.count("2026-01-31") == 2
    results = [r for r in card.data.eval_results if r.dataset_split == "test" and r.metric_type == "accuracy"]
    assert [(r.task_type, r.dataset_type, r.metric_value) for r in results] == [
        ("text-classification", "org/rows", 0.8125)
    ]
    # Strict YAML and the Hub's form of results.
    index = card.data.to_dict()["model-index"]
    assert index[0]["name"] == "model" and {"task", "dataset", "metrics"} <= set(index[0]["results"][0])


def test_a_model_without_a_task_of_the_hub(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\ntags: []\n---\n# Mine\n")
    UnlearningCard().with_report(report_of()).complete(path, task=None)
    card = ModelCard.load(path)
    assert card.data.eval_results is None and card.data.tags == ["machine-unlearning", "hf-iau"]
    assert "## Unlearning" in card.text


@pytest.mark.parametrize("content", [b"\xff", b"---\n[1]\n---\n", b"---\n: : :\n---\n"])
def test_a_broken_card_is_named(tmp_path: Path, content: bytes) -> None:
    trainer = make_trainer(tmp_path)
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(PublishError, match=r"README\.md cannot be read"):
        trainer.create_model_card()
    assert (tmp_path / "README.md").read_bytes() == content
    (tmp_path / "README.md").write_text("no metadata")
    trainer.create_model_card()
    assert "library_name: transformers" in (tmp_path / "README.md").read_text()


def test_damaged_card_data_is_refused(tmp_path: Path) -> None:
    model = plain()
    UnlearningCard().with_report(report_of(), "2026-01-31").save(tmp_path, model)
    assert UnlearningCard.of_weights(tmp_path, model).requests[0].date == "2026-01-31"
    assert UnlearningCard.of_weights(tmp_path, plain(seed=1)) == UnlearningCard()
    path = tmp_path / "card.json"
    good = json.loads(path.read_text())
    for name in [field.name for field in dataclasses.fields(UnlearningCard().with_report(report_of()).requests[0])]:
        for value in ([], "x", True, -1, None, {"a": 1}, {"forget_loss": "x"}):
            if isinstance(value, type(good["requests"][0][name])) and not isinstance(value, dict):
                continue
            if value is None and name in ("verdict", "calibrated", "train_rows", "gap", "noise_floor"):
                continue
            if value == -1 and name in ("gap", "noise_floor"):
                continue
            bad = json.loads(json.dumps(good))
            bad["requests"][0][name] = value
            path.write_text(json.dumps(bad))
            with pytest.raises(PublishError):
                UnlearningCard.load(tmp_path)
