"""`method="iau"` through the trainer: every kind of request."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from hf_iau import CalibrationError, IAUConfig, MissingMemoryError, RequestError
from hf_iau.data import RowSource, predictions
from hf_iau.data.digests import row_bytes
from hf_iau.data.trainer_rows import trainer_rows
from hf_iau.methods.iau import plan as search
from hf_iau.methods.iau.verdict import CHECK, OK, RETRAIN

RANDOM = np.random.default_rng(5).choice(1200, 240, replace=False)


def figures(report):
    return {name: report.diagnostics["calibration"][name] for name in ("source", "scale", "damping", "reached")}


def test_many_random_rows_calibrate_on_themselves(scene, trainer_of):
    report = trainer_of().unlearn(forget_indices=RANDOM, test_dataset=scene.test).report
    found = report.diagnostics["calibration"]
    assert found["source"] == "forget rows" and found["reached"] and report.calibrated
    assert report.diagnostics["shift_test"]["passed"]
    assert report.before["mia_auc_test"] > 0.55
    assert abs(report.after["mia_auc_test"] - 0.5) < 0.05
    assert report.after["forget_accuracy"] < report.before["forget_accuracy"] - 0.05
    assert report.after["held_out_loss"] < report.before["held_out_loss"] * 1.1
    assert report.verdict in (OK, CHECK) and report.diagnostics["reasons"]
    assert len(found["curve"]) + len(found["step_curve"]) <= 24


def auc_by_pairs(members, others):
    """Share of the pairs in which the member's loss is the lower one; ties count half."""
    wins = [1.0 if m < o else 0.5 if m == o else 0.0 for m in members for o in others]
    return sum(wins) / len(wins)


def lucky(losses, size):
    """Of many draws of so many rows, the one that the model knows best."""
    draws = [np.random.default_rng(seed).choice(1200, size, replace=False) for seed in range(50)]
    return min(draws, key=lambda rows: np.argsort(np.argsort(losses))[rows].mean())


@pytest.mark.parametrize("draw", ["random", "lucky"])
def test_the_loss_attack_at_the_end_beside_that_on_a_retrained_model(scene, trainer_of, draw):
    def losses(rows):
        return predictions.predict_rows(scene.model, RowSource(rows, None, batch_size=512)).loss

    scene.model.load_state_dict(scene.state)
    before, held_out = losses(scene.train), losses(scene.held_out)
    rows = RANDOM if draw == "random" else lucky(before, 60)
    retained = np.delete(before, rows)
    report = trainer_of().unlearn(forget_indices=rows).report
    found = report.diagnostics["loss_attack_on_forget_rows"]
    assert report.diagnostics["shift_test"]["passed"]
    end = auc_by_pairs(losses(scene.train.take(rows)), losses(scene.held_out))
    luck = auc_by_pairs(before[rows], held_out) - auc_by_pairs(retained, held_out)
    assert found["auc"] == pytest.approx(end) and found["expected"] == pytest.approx(0.5 + luck)
    assert found["standard_error"] == pytest.approx(np.sqrt((len(rows) + 801) / (12 * len(rows) * 800)))
    assert abs(luck) < 0.03 if draw == "random" else luck > 0.03
    assert not any("loss attack" in reason for reason in report.diagnostics["reasons"])


@pytest.mark.parametrize(
    "config, sentence",
    [
        (IAUConfig(multi_step=False, max_relative_step=0.001), "still tells the forget rows from held-out rows"),
        (
            IAUConfig(multi_step=False, scale=3.3, max_relative_step=2.0, damping_range=(1.0, 1.0)),
            "whose losses rose too far, from held-out rows",
        ),
    ],
    ids=["too short", "too long"],
)
def test_rows_that_an_attack_still_finds_are_to_be_checked(trainer_of, config, sentence):
    report = trainer_of().unlearn(forget_indices=RANDOM, config=config).report
    found = report.diagnostics["loss_attack_on_forget_rows"]
    assert abs(found["auc"] - found["expected"]) > 0.05
    assert report.verdict != OK and any(sentence in reason for reason in report.diagnostics["reasons"])


def test_no_attack_is_judged_where_rows_are_not_like_any_others_or_too_few(scene, trainer_of):
    few = trainer_of().unlearn(forget_indices=[3, 4, 5]).report
    one_class = np.flatnonzero(scene.train.labels.numpy() == 1)[:60]
    unlike = trainer_of().unlearn(forget_indices=one_class).report
    assert few.diagnostics["shift_test"] is None and not unlike.diagnostics["shift_test"]["passed"]
    for report in (few, unlike):
        assert report.diagnostics["loss_attack_on_forget_rows"] is None


def test_no_rows_are_looked_at_twice_at_the_same_weights(trainer_of, monkeypatch):
    """But for the report's own look at the end, which trusts no method's."""
    looks: list[tuple[bytes, bytes]] = []
    look = predictions._predict_own_rows

    def counted(model, source, keep):
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        rows = b"".join(row_bytes(source.dataset[i]) for i in range(len(source)))
        looks.append((hashlib.sha256(weights).digest(), hashlib.sha256(rows).digest()))
        return look(model, source, keep)

    monkeypatch.setattr(predictions, "_predict_own_rows", counted)
    report = trainer_of().unlearn(forget_indices=RANDOM, config=IAUConfig(multi_step=False)).report
    assert report.diagnostics["calibration"]["source"] == "forget rows"
    after = looks[-1][0]
    twice = {pair: count for pair, count in Counter(looks).items() if count > 1 and pair[0] != after}
    assert len(looks) > 10 and not twice


def test_proxies_give_about_the_same_scale(trainer_of):
    own = figures(
        trainer_of()
        .unlearn(forget_indices=RANDOM, config=IAUConfig(multi_step=False, calibrate_on="forget-rows"))
        .report
    )
    report = (
        trainer_of().unlearn(forget_indices=RANDOM, config=IAUConfig(multi_step=False, calibrate_on="proxies")).report
    )
    proxies = figures(report)
    assert proxies["source"] == "proxies" and len(report.diagnostics["calibration"]["draws"]) == 2
    same_damping = trainer_of().unlearn(
        forget_indices=RANDOM,
        config=IAUConfig(multi_step=False, calibrate_on="forget-rows", damping=proxies["damping"]),
    )
    ratio = proxies["scale"] / same_damping.report.diagnostics["calibration"]["scale"]
    assert 1 / 2 < ratio < 2
    assert own["reached"]


def test_no_more_held_out_rows_are_looked_at_than_proxies_are_worth(scene, trainer_of, monkeypatch):
    """Five for each of the larger draw; before any step they are not looked at again."""
    looked_at = []
    make = search.TrialRunner

    def watched(model, directions, target, held_out, **settings):
        looked_at.append((len(target), len(held_out)))
        return make(model, directions, target, held_out, **settings)

    monkeypatch.setattr(search, "TrialRunner", watched)
    config = IAUConfig(multi_step=False, calibrate_on="proxies", proxy_rows=(60, 30))
    report = trainer_of().unlearn(forget_indices=RANDOM[:30], config=config).report
    assert looked_at == [(60, 300), (30, 300)] and len(scene.held_out) > 300
    start = report.diagnostics["calibration"]["curve"][0]
    assert start["scale"] == 0.0 and start["criterion"] == report.diagnostics["advantage_of_training_rows"]


@pytest.mark.parametrize("rows", [[17], list(range(20, 32))])
def test_tiny_requests_use_proxies_and_move_their_rows(scene, trainer_of, rows):
    trainer = trainer_of()
    report = trainer.unlearn(forget_indices=rows).report
    assert report.diagnostics["calibration"]["source"] == "proxies"
    assert report.after["forget_loss"] > report.before["forget_loss"]
    assert abs(report.after["held_out_loss"] - report.before["held_out_loss"]) < 0.05
    assert report.per_row_suppressed


def test_a_single_row_alone_cannot_set_the_target(scene, trainer_of):
    row = scene.train.take(np.array([17]))
    with pytest.raises(CalibrationError, match="give it its train_dataset"):
        trainer_of(train_dataset=None).unlearn(row)
    assert trainer_of(train_dataset=None).unlearn(row, config=IAUConfig(scale=0.1, damping=0.1)).applied


def test_mislabelled_rows_are_recognised_and_raise_accuracy(scene, trainer_of, tmp_path):
    """Rows with flipped labels look unlike training rows: they get the losses of labels that nobody taught."""
    from memorising_network import Classifier, Rows, fit

    from hf_iau import GatherConfig, gather

    labels = scene.train.labels.clone()
    wrong = np.random.default_rng(1).choice(1200, 240, replace=False)
    labels[wrong] = (labels[wrong] + 1) % 4
    train = Rows(scene.train.inputs, labels)
    torch.manual_seed(0)
    model = fit(Classifier(), train, epochs=40, seed=0)
    memory = gather(model, train, config=GatherConfig(gradient_sum="full", batch_size=128, progress=False))
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = trainer_of(model=model, train_dataset=train, memory=memory)
    report = trainer.unlearn(forget_indices=wrong, test_dataset=scene.test).report
    assert not report.diagnostics["shift_test"]["passed"]
    assert report.diagnostics["calibration"]["source"] == "multi-step"
    assert report.diagnostics["label_support"]["unsupported"] > 200
    assert report.after["test_accuracy"] > report.before["test_accuracy"] or report.verdict == RETRAIN
    assert report.after["forget_accuracy"] < report.before["forget_accuracy"] - 0.5
    # As they were treated before: proxies alone set the step.
    trainer = trainer_of(model=fit(Classifier(), train, epochs=0, seed=0), train_dataset=train, memory=memory)
    trainer.model.load_state_dict(trained)
    report = trainer.unlearn(forget_indices=wrong, reason="random").report
    assert report.diagnostics["calibration"]["source"] == "proxies" and report.diagnostics["label_support"] is None
    assert report.after["forget_accuracy"] < report.before["forget_accuracy"] - 0.1


def test_a_whole_class_says_retrain(scene, trainer_of):
    from datasets import Dataset

    rows = [
        {"pixel_values": x.tolist(), "labels": int(y)}
        for x, y in zip(scene.train.inputs, scene.train.labels, strict=True)
    ]
    train = Dataset.from_list(rows)
    from hf_iau import GatherConfig, gather

    scene.model.load_state_dict(scene.state)
    memory = gather(scene.model, train, config=GatherConfig(gradient_sum="none", batch_size=128, progress=False))
    assert memory.label_counts is not None and sum(memory.label_counts.values()) == 1200
    trainer = trainer_of(train_dataset=train, memory=memory)
    report = trainer.unlearn(forget_indices=np.flatnonzero(scene.train.labels.numpy() == 2)).report
    assert report.diagnostics["whole_class"] == 2
    assert report.diagnostics["calibration"]["source"] == "class share"
    assert report.verdict == RETRAIN and any("class 2" in reason for reason in report.diagnostics["reasons"])
    assert any("retrain" in sentence for sentence in report.warnings)
    assert report.after["forget_accuracy"] < report.before["forget_accuracy"] - 0.3


def test_a_whole_class_of_a_plain_torch_dataset_is_recognised(scene, trainer_of):
    report = trainer_of().unlearn(forget_indices=np.flatnonzero(scene.train.labels.numpy() == 1)).report
    assert report.diagnostics["whole_class"] == 1 and report.verdict == RETRAIN


def test_without_held_out_rows_the_step_is_short_and_says_so(trainer_of):
    report = trainer_of(eval_dataset=None).unlearn(forget_indices=RANDOM).report
    assert report.calibrated is False and report.verdict == CHECK
    assert report.diagnostics["relative_step_norm"] <= 0.0201
    assert any("held-out" in sentence for sentence in report.warnings)


def test_an_answer_is_remembered_and_reused(trainer_of):
    trainer = trainer_of()
    first = trainer.unlearn(forget_indices=[3, 4, 5])
    taken = first.report.diagnostics["calibration"]
    found = taken["scale"] - taken["retain_weight"]  # k without what makes up for the forget rows in c·Σ_D
    assert first.memory.calibration["scale"] == pytest.approx(found)
    second = trainer.unlearn(forget_indices=[13, 14, 15]).report.diagnostics["calibration"]
    assert second["source"] == "remembered"
    assert second["scale"] - second["retain_weight"] == pytest.approx(found)
    again = trainer.unlearn(forget_indices=[23, 24], config=IAUConfig(recalibrate=True)).report
    assert again.diagnostics["calibration"]["source"] == "proxies"


def test_a_remembered_answer_that_is_too_costly_is_found_anew(trainer_of):
    """k = 20 would raise the held-out loss by far more than 2 %."""
    trainer = trainer_of()
    first = trainer.unlearn(forget_indices=[3, 4, 5])
    usual = first.report.diagnostics["calibration"]["scale"]
    trainer.memory.calibration["scale"] = 20.0 * max(usual, 1.0)
    report = trainer.unlearn(forget_indices=list(range(20, 60))).report
    found = report.diagnostics["calibration"]
    assert found["source"] == "proxies" and found["scale"] < 5.0 * max(usual, 1.0)
    assert report.after["held_out_loss"] < 1.1 * report.before["held_out_loss"]
    assert trainer.memory.calibration["scale"] < 5.0 * max(usual, 1.0)


def test_only_a_free_calibration_is_remembered(trainer_of):
    """A k or λ that the user gave for one request is no answer for the next."""
    trainer = trainer_of()
    for config in (IAUConfig(scale=0.01), IAUConfig(damping=5.0), IAUConfig(retain_weight=0.01)):
        result = trainer.unlearn(forget_indices=[3, 4, 5], config=config)
        assert result.memory.calibration is None
        result.revert()
    forced = trainer.unlearn(forget_indices=list(range(20, 40)), config=IAUConfig(calibrate_on="forget-rows"))
    passed = forced.report.diagnostics["shift_test"]["passed"]
    assert passed or forced.memory.calibration is None


def test_a_remembered_answer_does_not_override_the_configuration(trainer_of):
    trainer = trainer_of()
    trainer.unlearn(forget_indices=[3, 4, 5])
    known = trainer.memory.calibration
    low, high = known["damping"] * 3, known["damping"] * 30
    found = trainer.unlearn(forget_indices=[13, 14], config=IAUConfig(damping_range=(low, high))).report
    assert found.diagnostics["calibration"]["source"] == "proxies"
    assert low <= found.diagnostics["calibration"]["damping"] <= high
    found = trainer.unlearn(
        forget_indices=list(range(20, 60)), config=IAUConfig(calibrate_on="forget-rows", multi_step=False)
    ).report
    assert found.diagnostics["calibration"]["source"] == "forget rows"


def test_a_retain_weight_needs_a_gradient_sum(scene, trainer_of):
    memory = replace(scene.memory, gradient_sum=None, gradient_sum_kind="none")
    with pytest.raises(MissingMemoryError, match=r"retain_weight=0\.01"):
        trainer_of(memory=memory).unlearn(
            forget_indices=RANDOM, config=IAUConfig(scale=0.1, damping=1, retain_weight=0.01)
        )


def test_a_given_step_that_is_too_long_is_shortened_and_says_so(trainer_of):
    config = IAUConfig(scale=100.0, damping=0.1, max_relative_step=0.05)
    report = trainer_of().unlearn(forget_indices=RANDOM, config=config).report
    assert report.diagnostics["relative_step_norm"] == pytest.approx(0.05, rel=0.01)  # of the weights moved
    assert report.diagnostics["calibration"]["scale"] < 100.0
    assert report.verdict != OK and any("max_relative_step" in reason for reason in report.diagnostics["reasons"])


@pytest.mark.parametrize("held_out", ["with held-out rows", "without"])
def test_what_a_given_step_costs_retained_rows_is_seen(scene, trainer_of, held_out):
    """They are looked at before the step, too, though nothing is calibrated on them."""
    trainer = trainer_of() if held_out == "with held-out rows" else trainer_of(eval_dataset=None)
    report = trainer.unlearn(
        forget_indices=RANDOM, config=IAUConfig(scale=6.0, damping=0.1, max_relative_step=2.0)
    ).report
    lost = report.diagnostics["retained_accuracy_lost"]
    assert lost > 0.1
    assert lost == pytest.approx(report.before["retain_accuracy"] - report.after["retain_accuracy"], abs=0.02)
    assert any("accuracy on retained rows" in reason for reason in report.diagnostics["reasons"])


def test_a_given_scale_holds_without_held_out_rows(trainer_of):
    report = trainer_of(eval_dataset=None).unlearn(forget_indices=[5], config=IAUConfig(scale=0.003)).report
    assert report.calibrated is False
    assert report.diagnostics["calibration"]["scale"] == 0.003


def test_given_values_are_taken_and_nothing_is_tried(scene, trainer_of, monkeypatch):
    monkeypatch.setattr("hf_iau.methods.iau.trial.TrialRunner.run", lambda *_: pytest.fail("a trial was run"))
    trainer = trainer_of()
    config = IAUConfig(scale=0.2, damping=0.5, retain_weight=0.01)
    result = trainer.unlearn(forget_indices=RANDOM, config=config)
    assert result.report.diagnostics["calibration"]["source"] == "given"
    from hf_iau.data import ModelRowLoss
    from hf_iau.memory.gradient_sum import sum_row_gradients

    result.revert()
    forget = sum_row_gradients(scene.model, ModelRowLoss(), trainer_rows(trainer, scene.train.take(RANDOM), "rows", 64))
    exact = scene.memory.gradient_sum
    numerator = {n: 0.2 * forget.tensors[n] - 0.01 * exact[n] for n in exact}
    step = {n: s / 960 for n, s in scene.memory.curvature.solve(numerator, 0.5).items()}
    trainer.unlearn(forget_indices=RANDOM, config=config)
    for name, change in step.items():
        moved = scene.model.get_parameter(name).detach() - scene.state[name]
        torch.testing.assert_close(moved, change.float(), rtol=1e-4, atol=1e-6)


def test_held_out_rows_that_were_trained_on_are_refused(scene, trainer_of):
    mixed = scene.train.take(np.arange(400))
    with pytest.raises(RequestError, match="training rows"):
        trainer_of(eval_dataset=mixed).unlearn(forget_indices=RANDOM)
    with pytest.raises(CalibrationError, match="at least 100"):
        trainer_of(eval_dataset=scene.held_out.take(np.arange(60))).unlearn(forget_indices=RANDOM)


def test_near_duplicates_among_retained_rows_are_reported(scene, trainer_of):
    from memorising_network import Rows

    from hf_iau import GatherConfig, gather

    inputs = scene.train.inputs.clone()
    inputs[600:630] = inputs[:30]
    train = Rows(inputs, scene.train.labels)
    scene.model.load_state_dict(scene.state)
    memory = gather(scene.model, train, config=GatherConfig(gradient_sum="none", batch_size=128, progress=False))
    report = trainer_of(train_dataset=train, memory=memory).unlearn(forget_indices=list(range(30))).report
    assert report.diagnostics["near_duplicates"]["similar"] >= 25
    assert any("near-duplicates" in sentence for sentence in report.warnings)


def test_a_kept_copy_of_a_forgotten_row_can_be_forgotten_later(scene, trainer_of):
    from memorising_network import Rows

    from hf_iau import GatherConfig, gather

    inputs, labels = scene.train.inputs.clone(), scene.train.labels.clone()
    inputs[600], labels[600] = inputs[3], labels[3]
    train = Rows(inputs, labels)
    scene.model.load_state_dict(scene.state)
    options = GatherConfig(gradient_sum="none", batch_size=128, progress=False)
    memory = gather(scene.model, train, config=options)
    trainer = trainer_of(train_dataset=train, memory=memory)
    given = IAUConfig(scale=0.01, damping=0.1)
    trainer.unlearn(forget_indices=[3], config=given)
    assert trainer.gather(options).n_rows == 1199
    trainer.unlearn(forget_indices=[600], config=given)
    assert trainer.gather(options).n_rows == 1198
    with pytest.raises(RequestError, match="already forgotten"):
        trainer.unlearn(forget_indices=[600], config=given)
