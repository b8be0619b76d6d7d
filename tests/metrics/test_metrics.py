"""Every metric as a class and as a folder for `evaluate.load`, with known answers and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import accuracy_score, roc_auc_score

import hf_iau.metrics
from hf_iau.data import RowPredictions
from hf_iau.errors import RequestError
from hf_iau.evaluation.model_agreement import agreement
from hf_iau.metrics.model_sets import klom, u_lira
from hf_iau.metrics.question_answers import forget_quality, model_utility, truth_ratio
from hf_iau.metrics.relearning import relearn_time
from hf_iau.metrics.shadow_models import ShadowPredictions, shadow_model_attack

FOLDER = Path(hf_iau.metrics.__file__).parent
CLASSES = 4


@dataclass(frozen=True)
class Case:
    name: str
    metric: type[evaluate.Metric]
    inputs: dict[str, Any]


def rows_of(random: np.random.Generator, sure: float, labels: np.ndarray) -> np.ndarray:
    """Probabilities: the higher `sure`, the more of them on the label."""
    logits = random.normal(size=(len(labels), CLASSES))
    logits[np.arange(len(labels)), labels] += sure
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def make_cases() -> dict[str, Case]:
    random = np.random.default_rng(0)
    splits = ["forget"] * 40 + ["retain"] * 60 + ["test"] * 50
    labels = random.integers(CLASSES, size=150)
    probabilities, retrained = rows_of(random, 1.5, labels), rows_of(random, 1.0, labels)
    shadow_labels = [random.integers(CLASSES, size=80) for _ in range(2)]
    members = [np.arange(80) < 40 for _ in range(2)]
    shadow = [
        np.where(inside[:, None], rows_of(random, 4.0, y), rows_of(random, 1.0, y))
        for y, inside in zip(shadow_labels, members, strict=True)
    ]
    of_rows = {"predictions": probabilities, "references": labels, "splits": splits}
    sets = {"predictions": random.normal(1, 1, (12, 9)), "references": random.normal(0, 1, (12, 7))}
    answers = {
        "losses": random.gamma(1, 1, 20),
        "paraphrased_losses": random.gamma(2, 1, 20),
        "perturbed_losses": random.gamma(2, 1, (20, 3)),
        "retrained_paraphrased_losses": random.gamma(2, 1, 20),
        "retrained_perturbed_losses": random.gamma(2, 1, (20, 3)),
        "splits": ["forget"] * 8 + ["retain"] * 12,
        "rouge_l_recall": random.uniform(size=20),
    }
    cases = [
        Case("tofu", hf_iau.metrics.TOFU, answers),
        Case("membership_inference", hf_iau.metrics.MembershipInference, of_rows),
        Case(
            "shadow_model_attack",
            hf_iau.metrics.ShadowModelAttack,
            of_rows | {"shadow_predictions": shadow, "shadow_references": shadow_labels, "shadow_members": members},
        ),
        Case("u_lira", hf_iau.metrics.ULiRA, sets),
        Case("klom", hf_iau.metrics.KLoM, sets | {"estimator": "gaussian", "permutations": 20}),
        Case("unlearning_gap", hf_iau.metrics.UnlearningGap, of_rows | {"retrained_predictions": retrained}),
        Case(
            "prediction_agreement",
            hf_iau.metrics.PredictionAgreement,
            {"predictions": probabilities, "references": retrained},
        ),
        Case(
            "relearn_time",
            hf_iau.metrics.RelearnTime,
            {"predictions": [3.0, 0.4, float("nan")], "references": [3.0, 1.0, 0.4], "target": 0.5},
        ),
        Case(
            "parameter_distance",
            hf_iau.metrics.ParameterDistance,
            {"predictions": np.array([3.0, 4.0]), "references": np.array([0.0, 2.0])},
        ),
    ]
    return {case.name: case for case in cases}


CASES = make_cases()


@pytest.fixture
def compute(tmp_path):
    """Calls the class of a metric with its case's inputs, some of them changed."""

    def call(name: str, config: str | None = None, **changes: Any) -> dict[str, Any]:
        metric = CASES[name].metric(config_name=config, cache_dir=str(tmp_path))
        inputs = CASES[name].inputs | changes
        return metric.compute(**{key: value for key, value in inputs.items() if value is not ...})

    return call


def listed(values: Any) -> Any:
    """Arrays as lists, however deep."""
    if isinstance(values, dict):
        return {key: listed(value) for key, value in values.items()}
    if isinstance(values, list):
        return [listed(value) for value in values]
    return values.tolist() if isinstance(values, np.ndarray) else values


def test_every_folder_is_a_case():
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir() and (path / f"{path.name}.py").exists()}
    assert folders == CASES.keys()
    assert {case.metric.__name__ for case in CASES.values()} == set(hf_iau.metrics.__all__)


_LOADER = """
import json, sys
import evaluate
from pathlib import Path

folder, cases = Path(sys.argv[1]), json.load(sys.stdin)
found = {}
for name, inputs in cases.items():
    metric = evaluate.load(str(folder / name), experiment_id="of_" + name)
    found[name] = metric.compute(**inputs)
print("RESULT" + json.dumps(found))
"""


def test_evaluate_loads_every_folder_without_a_network(compute, tmp_path):
    """In a fresh process and another folder, with nothing cached; the values are those of the classes."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(FOLDER.parents[1]),
    }
    for name in ("HF_MODULES_CACHE", "HF_EVALUATE_CACHE", "HF_METRICS_CACHE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", _LOADER, str(FOLDER)],
        input=json.dumps({name: listed(case.inputs) for name, case in CASES.items()}),
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = json.loads(done.stdout.split("RESULT")[1])
    for name in CASES:
        assert json.dumps(loaded[name]) == json.dumps(compute(name)), name


@pytest.mark.parametrize("name", CASES)
def test_readme_names_every_value(compute, name):
    text = (FOLDER / name / "README.md").read_text(encoding="utf-8")
    for part in ("## How to use", "## Values", "**Which value is good:**", "etrained", "## Limits", "## Citation"):
        assert part in text, part
    found = compute(name)
    values = dict(found)
    for nested in ("loss", "svc_confidence"):
        values |= found[nested] if name == "membership_inference" else {}
    for key in values:
        stem = key.removesuffix("_low").removesuffix("_high")
        assert f"`{key}`" in text or (key != stem and f"`{stem}` (" in text), key
    json.dumps(found)  # plain numbers alone


@pytest.mark.parametrize("name", CASES)
def test_info_is_filled(name, tmp_path):
    info = CASES[name].metric(cache_dir=str(tmp_path))
    assert len(info.description) > 50 and "@" in info.citation and "Returns" in info.inputs_description


@pytest.mark.parametrize("name", ["u_lira", "prediction_agreement", "parameter_distance"])
def test_lists_arrays_and_tensors_alike(compute, name):
    inputs = CASES[name].inputs
    as_tensors = {key: torch.as_tensor(value) for key, value in inputs.items()}
    assert compute(name, **listed(inputs)) == compute(name) == compute(name, **as_tensors)


def test_membership_of_rows_known_by_heart(compute):
    labels = np.zeros(60, dtype=int)
    known, unknown = np.tile([0.97, 0.01, 0.01, 0.01], (30, 1)), np.tile([0.1, 0.4, 0.3, 0.2], (30, 1))
    splits = ["forget"] * 30 + ["test"] * 30
    found = compute(
        "membership_inference", predictions=np.concatenate([known, unknown]), references=labels, splits=splits
    )
    assert found.keys() == {"loss", "confidence", "entropy", "modified_entropy", "correctness"}
    for result in found.values():
        assert (result["auc"], result["ci_low"], result["ci_high"], result["balanced_accuracy"]) == (1, 1, 1, 1)
        assert result["tpr_at_1_percent_fpr"] == result["tpr_at_0_1_percent_fpr"] == 1


def test_membership_of_rows_like_any_others(compute):
    random = np.random.default_rng(1)
    labels = random.integers(CLASSES, size=500)
    found = compute(
        "membership_inference",
        predictions=rows_of(random, 1.0, labels),
        references=labels,
        splits=["forget"] * 200 + ["held_out"] * 300,
    )
    for result in found.values():
        assert result["ci_low"] <= 0.5 <= result["ci_high"]
        assert result["balanced_accuracy_low"] == 0.5
        assert result["tpr_at_1_percent_fpr_low"] <= 0.01 <= result["tpr_at_1_percent_fpr_high"]


def test_membership_is_that_of_scikit_learn(compute):
    inputs = CASES["membership_inference"].inputs
    p, labels, splits = inputs["predictions"], inputs["references"], np.array(inputs["splits"])
    judged = splits != "retain"
    members = (splits == "forget")[judged]
    found = compute("membership_inference")
    own = p[np.arange(len(p)), labels]
    assert found["confidence"]["auc"] == pytest.approx(roc_auc_score(members, own[judged]))
    assert found["loss"]["auc"] == pytest.approx(roc_auc_score(members, np.log(own)[judged]))
    assert found["correctness"]["auc"] == pytest.approx(roc_auc_score(members, (p.argmax(1) == labels)[judged]))
    share = found["svc_confidence"]
    assert 0 <= share["share_low"] <= share["share"] <= share["share_high"] <= 1


def test_membership_from_losses_alone(compute):
    found = compute(
        "membership_inference",
        config="losses",
        predictions=[0.1, 0.3, 0.2, 1.0, 0.25],
        references=...,
        splits=["forget"] * 3 + ["test"] * 2,
    )
    assert found.keys() == {"loss"} and found["loss"]["auc"] == pytest.approx(5 / 6)


def test_shadow_attack_is_the_measure(compute):
    inputs = CASES["shadow_model_attack"].inputs
    shadows = []
    for p, y, inside in zip(
        *(inputs[f"shadow_{key}"] for key in ("predictions", "references", "members")), strict=True
    ):
        made = RowPredictions.from_probabilities(p, y)
        shadows.append(ShadowPredictions(made.select(inside), made.select(~inside)))
    victim = RowPredictions.from_probabilities(inputs["predictions"], inputs["references"])
    splits = np.array(inputs["splits"])
    expected = shadow_model_attack(victim.select(splits == "forget"), victim.select(splits == "test"), shadows)
    assert compute("shadow_model_attack") == expected.to_dict()


def test_sets_of_models_are_the_measures(compute):
    unlearned, retrained = (CASES["u_lira"].inputs[name] for name in ("predictions", "references"))
    assert compute("u_lira", folds=3, seed=1) == u_lira(unlearned, retrained, 3, 1).to_dict()
    assert compute("klom") == klom(unlearned, retrained, "gaussian", 20).to_dict()


def test_gap_by_hand(compute):
    inputs = CASES["unlearning_gap"].inputs
    labels, splits = inputs["references"], np.array(inputs["splits"])
    ours, theirs = inputs["predictions"], inputs["retrained_predictions"]
    found = compute("unlearning_gap")
    expected = []
    for name, split in (("retain_accuracy", "retain"), ("forget_accuracy", "forget"), ("test_accuracy", "test")):
        a, b = (accuracy_score(labels[splits == split], p[splits == split].argmax(1)) for p in (ours, theirs))
        assert found[name] == pytest.approx(100 * (a - b))
        low, high = found["intervals"][name]
        assert low < found[name] < high
        expected.append(abs(found[name]))
    judged = splits != "retain"
    auc = [roc_auc_score((splits == "forget")[judged], p[np.arange(150), labels][judged]) for p in (ours, theirs)]
    assert found["mia_auc"] == pytest.approx(100 * (auc[0] - auc[1]))
    assert found["mean_absolute"] == pytest.approx(np.mean([*expected, abs(found["mia_auc"])]))
    assert found["unlearned"]["mia_auc"] == pytest.approx(auc[0])
    same = compute("unlearning_gap", predictions=theirs)
    assert same["mean_absolute"] == 0


def test_agreement_by_scipy(compute):
    inputs = CASES["prediction_agreement"].inputs
    p, q = inputs["predictions"], inputs["references"]
    found = compute("prediction_agreement")
    assert found["jensen_shannon"] == pytest.approx((jensenshannon(p, q, axis=1) ** 2).mean())
    assert found["agreement"] == (p.argmax(1) == q.argmax(1)).mean()
    assert found == agreement(*(RowPredictions.from_probabilities(x) for x in (p, q))).to_dict()


def test_relearning_compared(compute):
    assert compute("relearn_time") == {"relearned_at": 1, "retrained_at": 2, "ratio": 0.5}
    assert compute("relearn_time", target=0.1) == {"relearned_at": None, "retrained_at": None, "ratio": None}
    assert compute("relearn_time", target=5.0)["ratio"] is None  # the retrained model knew them from the start
    curves = {"predictions": [0.2, 0.9], "references": [0.2, 0.8]}
    assert compute("relearn_time", **curves, target=0.8, higher_is_better=True)["ratio"] == 1
    with pytest.raises(RequestError, match="target=None"):
        compute("relearn_time", target=None)
    assert relearn_time.__module__ == "hf_iau.metrics.relearning"  # the metric does not shadow the function


def test_distance_by_hand(compute):
    assert compute("parameter_distance") == {"absolute": pytest.approx(13**0.5), "relative": pytest.approx(13**0.5 / 2)}


def test_tofu_is_the_measures_on_the_rows_that_each_is_about(compute):
    inputs = CASES["tofu"].inputs
    ours, theirs = (
        truth_ratio(inputs[f"{whose}paraphrased_losses"], inputs[f"{whose}perturbed_losses"])
        for whose in ("", "retrained_")
    )
    quality = forget_quality(ours[:8], theirs[:8])
    utility = model_utility(inputs["losses"][8:], ours[8:], inputs["rouge_l_recall"][8:])
    found = compute("tofu")
    assert (found["forget_quality"], found["ks_statistic"]) == (quality.p_value, quality.statistic)
    assert (found["model_utility"], found["truth_ratio"]) == (utility.utility, utility.truth_ratio)
    assert (found["forget_rows"], found["retain_rows"]) == (8, 12)
    assert compute("tofu", rouge_l_recall=None)["rouge_l_recall"] is None


def test_bad_input(compute):
    with pytest.raises(RequestError, match="each row is 'forget' or 'retain'"):
        compute("tofu", splits=["forget"] * 20)
    with pytest.raises(RequestError, match="one number for each of the 20 rows"):
        compute("tofu", rouge_l_recall=[1.0])
    splits = CASES["membership_inference"].inputs["splits"]
    with pytest.raises(RequestError, match="'validation'"):
        compute("membership_inference", splits=["validation", *splits[1:]])
    with pytest.raises(RequestError, match="no 'forget'"):
        compute("membership_inference", splits=["test"] * 150)
    with pytest.raises(RequestError, match="neither 'test' nor 'held_out'"):
        compute("membership_inference", splits=["forget"] * 150)
    with pytest.raises(RequestError, match="softmax"):
        compute("membership_inference", predictions=np.ones((150, CLASSES)))
    with pytest.raises(RequestError, match="predictions: give one list of numbers a row"):
        compute("u_lira", predictions=[[1.0, 2.0]] * 11 + [[1.0]])
    with pytest.raises(RequestError, match="all three of each shadow model"):
        compute("shadow_model_attack", shadow_members=[])
    with pytest.raises(RequestError, match="one for each row"):
        compute("shadow_model_attack", shadow_members=[[True]] * 2)
