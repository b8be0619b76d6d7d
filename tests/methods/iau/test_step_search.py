"""The search for k, λ and c."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_models import RowList, build, pad_right
from tiny_models import rows_of as texts_of
from torch.nn.utils.rnn import pad_sequence
from transformers import default_data_collator

from hf_iau import GatherConfig, gather
from hf_iau.data import ModelRowLoss, RowSource, predict_rows
from hf_iau.data.duplicates import find_near_duplicates
from hf_iau.evaluation.attacks import attack_auc
from hf_iau.memory.gradient_sum import sum_row_gradients
from hf_iau.methods.iau.directions import Directions
from hf_iau.methods.iau.reference import shift_test
from hf_iau.methods.iau.step_search import (
    Calibration,
    add_retain_correction,
    calibrate,
    find_scale,
    first_guess,
    power_factor,
    standard_error_of_auc,
)
from hf_iau.methods.iau.trial import Trial, TrialRunner, auc_distance, class_share_distance
from hf_iau.methods.step import step_norm


def rows_of(dataset, name="rows"):
    return RowSource(dataset, default_data_collator, batch_size=512, name=name)


def directions_of(scene, rows, correction_sum=None):
    total = sum_row_gradients(scene.model, ModelRowLoss(), rows)
    return Directions(scene.memory.curvature, total.tensors, correction_sum, scene.memory.n_targets - total.n_targets)


def test_the_retain_correction_has_a_damping_of_its_own(scene, runner):
    """(k − c)·(C+λ)⁻¹Σ_f − c·(C+λ_c)⁻¹Σ_r, where λ is below λ_c; else one λ for both."""
    curvature, exact, forget = scene.memory.curvature, scene.memory.gradient_sum, runner.directions.forget_sum
    directions = Directions(curvature, forget, exact, 900, retain_damping=0.1)
    retained = {name: exact[name].double() - forget[name].double() for name in exact}
    first, second = curvature.solve(forget, 0.001), curvature.solve(retained, 0.1)
    for name, change in directions.step(0.7, 0.001, 0.02).items():
        expected = (0.68 * first[name] - 0.02 * second[name]) / 900
        torch.testing.assert_close(change.double(), expected.double(), rtol=1e-3, atol=1e-6)
    shared = Directions(curvature, forget, exact, 900)
    for damping in (0.1, 1.0):
        one, other = (d.step(0.7, damping, 0.02) for d in (directions, shared))
        assert all(torch.equal(one[name], other[name]) for name in one)
    one, other = (d.step(0.7, 0.001, 0.0) for d in (directions, shared))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert directions.norm(0.7, 0.001, 0.02) == pytest.approx(step_norm(directions.step(0.7, 0.001, 0.02)), rel=1e-6)


@pytest.fixture
def runner(scene):
    scene.model.load_state_dict(scene.state)
    forget = rows_of(scene.train.take(np.arange(300)))
    return TrialRunner(scene.model, directions_of(scene, forget), forget, rows_of(scene.held_out))


class Response:
    """Answers trials by formulas of k."""

    n_target = 500

    def __init__(self, criterion, loss=lambda k: 1.0, longest=1e9, target_loss=0.5):
        self.criterion, self.loss, self.limit, self.target_loss = criterion, loss, longest, target_loss

    def longest(self, *_):
        return self.limit

    def run(self, k, damping, c=0.0):
        return Trial(k, damping, c, 0.1, self.criterion(k), self.loss(k), self.target_loss)


def test_directions_are_the_formula(scene, runner):
    exact = scene.memory.gradient_sum
    directions = Directions(scene.memory.curvature, runner.directions.forget_sum, exact, 900)
    step = directions.step(0.7, 0.1, 0.02)
    for name, change in step.items():
        numerator = {k: 0.7 * runner.directions.forget_sum[k] - 0.02 * exact[k] for k in exact}
        expected = scene.memory.curvature.solve(numerator, 0.1)[name] / 900
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-6)
    slope = sum(float((directions.forget_sum[n].double() * directions.at(0.1)[n].double()).sum()) for n in step)
    assert directions.slope(0.1) == pytest.approx(slope, rel=1e-9)


def test_trials_leave_no_trace_and_tell_what_the_step_does(scene, runner):
    trial = runner.run(0.3, 0.1)
    assert all(torch.equal(value, scene.model.state_dict()[name]) for name, value in scene.state.items())
    # The same by hand.
    with torch.no_grad():
        for name, change in runner.directions.step(0.3, 0.1, 0.0).items():
            scene.model.get_parameter(name).add_(change.float())
    forget, held_out = (predict_rows(scene.model, rows) for rows in (runner.target, runner.held_out))
    scene.model.load_state_dict(scene.state)
    assert trial.criterion == pytest.approx(attack_auc(forget, held_out, "loss") - 0.5, abs=1e-4)
    assert trial.held_out_loss == pytest.approx(held_out.mean_loss, rel=1e-5)
    assert trial.target_loss == pytest.approx(forget.mean_loss, rel=1e-5)


def test_a_failing_trial_restores_the_weights(scene, runner, monkeypatch):
    monkeypatch.setattr("hf_iau.methods.iau.trial.predict_rows", lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    with pytest.raises(RuntimeError, match="boom"):
        runner.run(0.3, 0.1)
    assert all(torch.equal(value, scene.model.state_dict()[name]) for name, value in scene.state.items())


def test_the_scale_found_is_the_root_of_a_fine_grid(runner):
    start = runner.run(0.0, 0.1)
    assert start.criterion > 0.05  # the network has memorised
    trial, reached, _ = find_scale(runner, 0.1, 0.0, start=start, tolerance=0.005, max_relative_step=0.5)
    assert reached and abs(trial.criterion) <= 0.005
    grid = [runner.run(float(k), 0.1) for k in np.geomspace(trial.scale / 4, trial.scale * 4, 17)]
    signs = [t.scale for t in grid if t.criterion > 0]
    assert max(signs, default=0.0) <= trial.scale * 1.4
    assert min(t.scale for t in grid if t.criterion < 0) >= trial.scale / 1.4


def test_the_step_stays_within_its_bound(runner):
    start = runner.run(0.0, 0.1)
    trial, reached, _ = find_scale(runner, 0.1, 0.0, start=start, tolerance=1e-6, max_relative_step=0.01)
    assert not reached
    assert all(t.relative_step <= 0.01 * (1 + 1e-6) for t in runner.trials)
    assert trial.relative_step == pytest.approx(0.01, rel=1e-3)


def test_a_step_that_ruins_the_held_out_rows_is_too_long():
    """The criterion vanishes at k = 1, but the held-out loss has risen by 30 % at k = 0.3 already."""

    fake = Response(lambda k: 0.1 * (1 - k), loss=lambda k: 1.0 + k)
    trial, reached, _ = find_scale(
        fake, 0.1, 0.0, start=fake.run(0.0, 0.1), tolerance=0.005, max_relative_step=0.5, guess=0.9
    )
    assert not reached and 0.1 < trial.scale <= 0.3


@pytest.mark.parametrize("power", [0.5, 0.85, 1.0, 1.6])
def test_a_scale_that_is_too_small_is_raised_by_a_power_law(power):
    """What the response is: so the third step arrives, wherever the first one was."""

    fake = Response(lambda k: 0.1 * (1 - (k / 0.8) ** power))
    start = fake.run(0.0, 0.1)
    first = 0.8 * 0.45 ** (1 / power)  # brings 45 % of what is missing
    _, reached, scale = find_scale(
        fake, 0.1, 0.0, start=start, tolerance=1e-3, max_relative_step=0.5, guess=first, trials=3
    )
    if power <= 1.0:  # else the second step, along a line, goes too far
        assert reached and scale == pytest.approx(0.8, rel=1e-3)


def test_the_power_law_of_what_steps_bring():
    def tried(*pairs):
        return [Trial(k, 0.1, 0.0, 0.1, criterion, 1.0, 0.5) for k, criterion in pairs]

    assert power_factor(0.1, tried((0.1, 0.05))) == pytest.approx(2.0)
    assert power_factor(0.1, tried((0.1, -0.1))) == pytest.approx(0.5)  # too far
    assert power_factor(0.1, tried((0.1, 0.05), (0.4, 0.0))) == pytest.approx(1.0)
    assert power_factor(0.1, tried((0.1, 0.08), (0.4, 0.06))) == pytest.approx(2.5**2)  # exponent one half
    assert power_factor(0.1, tried((0.1, 0.05), (0.3, 0.06))) == pytest.approx(2.5)  # it fell back
    assert power_factor(0.1, tried((0.1, 0.1))) == math.inf  # nothing was brought
    assert power_factor(-0.1, tried((0.1, 0.01))) == 0.0  # there was nothing to be brought


@pytest.mark.parametrize("guess", [0.2, 0.74, 0.86, 0.97, 1.4])
def test_the_scale_returned_is_nearer_than_the_tolerance(guess):
    """What a step brings is a power of k with exponent 0.85; a trial within 0.01 of 0.1 ends the search."""

    fake = Response(lambda k: 0.1 * (1 - (k / 0.8) ** 0.85), longest=0.81)
    trial, reached, scale = find_scale(
        fake, 0.1, 0.0, start=fake.run(0.0, 0.1), tolerance=0.01, max_relative_step=0.5, guess=guess
    )
    assert reached and abs(trial.criterion) <= 0.01
    assert scale == pytest.approx(0.8, rel=0.015) and scale <= 0.81


def test_a_scale_that_is_not_reached_is_the_trials_own():
    fake = Response(lambda k: 0.1 * (1 - k / 0.8), longest=0.5)
    trial, reached, scale = find_scale(
        fake, 0.1, 0.0, start=fake.run(0.0, 0.1), tolerance=0.005, max_relative_step=0.5, guess=0.3
    )
    assert not reached and trial.scale == scale == 0.5


def test_a_step_is_looked_at_once_by_runners_that_share_what_they_saw(scene, runner, monkeypatch):
    first = runner.run(0.1, 0.1)
    sharing = TrialRunner(
        scene.model, runner.directions, None, runner.held_out, criterion=lambda *_: 0.0, held_out_at=runner.held_out_at
    )
    with monkeypatch.context() as patch:
        patch.setattr("hf_iau.methods.iau.trial.predict_rows", lambda *_: pytest.fail("looked again"))
        again = sharing.run(0.1, 0.1)
    assert again.held_out_loss == first.held_out_loss and again.relative_step == first.relative_step
    assert sharing.run(0.2, 0.1).held_out_loss > first.held_out_loss


def test_calibration_is_downhill_in_the_held_out_loss_and_cheap(runner):
    start = runner.run(0.0, 1.0)
    found = calibrate(
        runner, source="forget rows", damping=None, damping_range=(1e-3, 10.0), max_relative_step=0.5, start=start
    )
    assert found.reached and abs(found.criterion) <= found.tolerance
    assert len(runner.trials) <= 20
    on_target = [t for t in runner.trials if abs(t.criterion) <= found.tolerance]
    chosen = min(on_target, key=lambda t: t.held_out_loss)
    assert found.damping == chosen.damping and found.scale == pytest.approx(chosen.scale, rel=0.25)
    there = runner.run(found.scale, found.damping)
    assert abs(there.criterion) <= abs(chosen.criterion) + 0.001


def test_calibration_finds_its_way_on_an_analytic_response():
    """AUC and held-out loss given by formulas: k* = 0.2/√λ, best λ = 0.01."""

    class Fake:
        trials: list[Trial]
        n_target = targets = 500

        def __init__(self):
            self.trials = []
            self.held_out = range(2000)
            self.directions = self

        def slope(self, damping):
            return 500.0 * math.sqrt(damping)

        def longest(self, damping, relative_step):
            return 1e9

        def run(self, k, damping, c=0.0):
            criterion = 0.1 * (1 - (k * math.sqrt(damping) / 0.2) ** 0.8)
            loss = 1.0 + 0.05 * abs(math.log10(damping) + 2)
            trial = Trial(k, damping, c, 0.1, criterion, loss, 0.8 + (0.1 - criterion))
            self.trials.append(trial)
            return trial

    fake = Fake()
    found = calibrate(
        fake, source="x", damping=None, damping_range=(1e-4, 10.0), max_relative_step=0.5, start=fake.run(0.0, 1.0)
    )
    assert found.damping == pytest.approx(0.01)
    assert found.scale == pytest.approx(2.0, rel=0.01)


def test_a_row_without_targets_does_not_spoil_the_criterion(scene):
    """A text whose labels are all ignored has no loss, which is not a model that the step destroyed."""
    scene.model.load_state_dict(scene.state)
    known = predict_rows(scene.model, rows_of(scene.train.take(np.arange(200))))
    unseen = predict_rows(scene.model, rows_of(scene.held_out))

    def without_target(rows, value=math.nan):
        first = np.arange(len(rows)) == 0
        return dataclasses.replace(
            rows, loss=np.where(first, value, rows.loss), targets=np.where(first & math.isnan(value), 0.0, rows.targets)
        )

    rest = known.select(np.arange(1, 200)), unseen.select(np.arange(1, len(unseen)))
    assert auc_distance(without_target(known), without_target(unseen)) == auc_distance(*rest) > 0.0
    assert auc_distance(without_target(known, math.inf), unseen) == -0.5
    share = class_share_distance(1)
    assert -1.0 < share(None, without_target(unseen)) <= 1.0 and share(None, without_target(unseen, math.inf)) == -1.0


def test_the_first_guess_counts_tokens_and_not_texts():
    """To first order the mean loss of a token rises by slope / tokens a unit of k."""
    model, texts = build("gpt2"), texts_of("gpt2", 24)
    memory = gather(model, RowList(texts), data_collator=pad_right(), config=GatherConfig(progress=False))
    forget, unseen = (RowSource(RowList(rows), pad_right()) for rows in (texts[:8], texts_of("gpt2", 8, seed=1)))
    total = sum_row_gradients(model, ModelRowLoss(), forget)
    rest = memory.n_targets - total.n_targets
    assert total.n_targets > 2 * len(forget)
    runner = TrialRunner(
        model, Directions(memory.curvature, total.tensors, None, rest, total.n_targets), forget, unseen
    )
    start = runner.baseline_trial(predict_rows(model, forget), predict_rows(model, unseen))
    rise = runner.directions.slope(0.1) / total.n_targets
    k = 1e-3 / rise
    assert (runner.run(k, 0.1).target_loss - start.target_loss) / k == pytest.approx(rise, rel=0.05)
    start = dataclasses.replace(start, held_out_loss=start.target_loss + 0.1 * rise)
    assert first_guess(runner, 0.1, start) == pytest.approx(0.05)


def test_luck_of_the_draw_is_taken_out(scene):
    """Two draws of proxies, one easy and one hard, are to be forgotten by about the same scale."""
    scene.model.load_state_dict(scene.state)
    held_out = rows_of(scene.held_out)
    losses = predict_rows(scene.model, rows_of(scene.train)).loss
    advantage = auc_distance(predict_rows(scene.model, rows_of(scene.train)), predict_rows(scene.model, held_out))
    order = np.argsort(losses)
    generator = np.random.default_rng(0)
    draws = {
        "easy": np.concatenate([order[:40], generator.choice(1200, 160, replace=False)]),
        "hard": np.concatenate([order[-40:], generator.choice(1200, 160, replace=False)]),
    }
    scales: dict[bool, dict[str, float]] = {True: {}, False: {}}
    for corrected in (True, False):
        for name, positions in draws.items():
            rows = rows_of(scene.train.take(np.unique(positions)))
            runner = TrialRunner(scene.model, directions_of(scene, rows), rows, held_out)
            start = runner.run(0.0, 0.1)
            if corrected:
                runner.offset = start.criterion - advantage
                start = runner.run(0.0, 0.1)
                assert start.criterion == pytest.approx(advantage)
            trial, *_ = find_scale(runner, 0.1, 0.0, start=start, tolerance=0.005, max_relative_step=0.9)
            scales[corrected][name] = trial.scale
    spread = {corrected: abs(math.log(found["easy"] / found["hard"])) for corrected, found in scales.items()}
    assert spread[True] < spread[False]


def test_the_retain_correction_repairs_the_held_out_loss_and_no_more(scene):
    scene.model.load_state_dict(scene.state)
    rows = rows_of(scene.train.take(np.arange(300)))
    directions = directions_of(scene, rows, scene.memory.gradient_sum)
    runner = TrialRunner(scene.model, directions, rows, rows_of(scene.held_out))
    start = runner.run(0.0, 1.0)
    found = calibrate(
        runner, source="forget rows", damping=0.1, damping_range=(0.1, 0.1), max_relative_step=0.5, start=start
    )
    own = TrialRunner(scene.model, directions, None, rows_of(scene.held_out), criterion=lambda *_: 0.0)
    done = add_retain_correction(
        own,
        found,
        before=own.baseline_trial(None, predict_rows(scene.model, rows_of(scene.held_out))),
        retain_weights=(0.003, 0.01, 0.03, 0.1),
        max_relative_step=0.5,
    )
    plain = done.step_curve[1]["held_out_loss"]
    assert done.held_out_loss <= plain
    assert done.held_out_loss_before == pytest.approx(start.held_out_loss)
    weights = [t["retain_weight"] for t in done.step_curve[2:]]
    if done.held_out_loss_before < plain and weights:
        # Either every weight helped or stopped helping on the way, or the loss of before was met by interpolation.
        met = done.held_out_loss == pytest.approx(done.held_out_loss_before, rel=0.02)
        assert met or weights == sorted(weights)
    assert done.retain_weight == 0.0 or done.retain_weight in weights


def test_the_retain_correction_stops_at_the_loss_of_before():
    """A held-out loss of 1.2 − 20 c (1.0 before): c = 0.01 by interpolation between 0.003 and 0.03."""

    class Fake:
        def __init__(self):
            self.trials = []

        def longest(self, *_):
            return 1e9

        def run(self, k, damping, c=0.0):
            trial = Trial(k, damping, c, 0.1, 0.0, 1.0 if k == 0 else 1.2 - 20 * c, 0.0)
            self.trials.append(trial)
            return trial

    fake = Fake()
    done = add_retain_correction(
        fake,
        Calibration(0.5, 0.1, 0.0, source="proxies"),
        before=fake.run(0.0, 0.1),
        retain_weights=(0.003, 0.03, 0.1),
        max_relative_step=0.5,
    )
    assert done.retain_weight == pytest.approx(0.01)
    assert done.held_out_loss == pytest.approx(1.0)
    assert done.scale == pytest.approx(0.51)  # Σ_D holds Σ_f too


def test_the_retain_correction_does_not_learn_the_forget_rows_again(scene):
    """The step taken is k·Σ_f against c times the gradient sum of the *retained* rows."""
    scene.model.load_state_dict(scene.state)
    kept, rows = rows_of(scene.train.take(np.arange(300, 1200))), rows_of(scene.train.take(np.arange(300)))
    directions = directions_of(scene, rows, scene.memory.gradient_sum)
    own = TrialRunner(scene.model, directions, None, rows_of(scene.held_out), criterion=lambda *_: 0.0)
    before = own.baseline_trial(None, predict_rows(scene.model, rows_of(scene.held_out)))
    found = Calibration(0.2, 0.1, 0.0, source="forget rows")
    weights = (0.003, 0.01, 0.03)
    done = add_retain_correction(own, found, before=before, retain_weights=weights, max_relative_step=0.5)
    assert done.retain_weight > 0.0
    retained = sum_row_gradients(scene.model, ModelRowLoss(), kept)
    against = Directions(scene.memory.curvature, directions.forget_sum, retained.tensors, directions.remaining)
    step = directions.step(done.scale, done.damping, done.retain_weight)
    for name, change in against.step(0.2, 0.1, done.retain_weight).items():
        assert torch.allclose(step[name], change, rtol=0, atol=1e-4 * float(change.abs().max()))
    kept_scale = add_retain_correction(
        own, found, before=before, retain_weights=weights, max_relative_step=0.5, keep_scale=True
    )
    assert kept_scale.scale == 0.2


def test_rows_that_look_no_better_known_than_held_out_ones():
    """The criterion is below zero at k = 0 and ranks do not change: the search ends, with a short step."""

    fake = Response(lambda k: -0.02, target_loss=1.1)
    start = fake.run(0.0, 0.1)
    trial, reached, _ = find_scale(fake, 0.1, 0.0, start=start, tolerance=0.005, max_relative_step=0.5, guess=0.1)
    assert not reached and 0.0 <= trial.scale <= 0.1


@pytest.mark.parametrize("damping_range", [(0.2, 0.4), (0.3, 0.5), (1e-3, 10.0)])
def test_the_range_of_damping_is_kept(runner, damping_range):
    start = runner.run(0.0, damping_range[0])
    found = calibrate(
        runner, source="x", damping=None, damping_range=damping_range, max_relative_step=0.5, scale=0.01, start=start
    )
    assert damping_range[0] <= found.damping <= damping_range[1]


def test_a_given_retain_weight_is_kept():
    """Even where it makes the held-out loss worse, or better than before."""

    class Fake:
        def __init__(self, slope):
            self.trials, self.slope = [], slope

        def longest(self, *_):
            return 1e9

        def run(self, k, damping, c=0.0):
            return Trial(k, damping, c, 0.1, 0.0, 1.0 if k == 0 else 1.1 + self.slope * c, 0.0)

    for slope in (1.0, -20.0):
        found = Calibration(0.5, 0.1, 0.0, source="proxies")
        fake = Fake(slope)
        before = fake.run(0.0, 0.1)
        done = add_retain_correction(
            fake, found, before=before, retain_weights=(), max_relative_step=0.5, retain_weight=0.02
        )
        assert done.retain_weight == 0.02 and done.held_out_loss == pytest.approx(1.1 + slope * 0.02)


def test_a_ruinous_step_is_halved(scene):
    scene.model.load_state_dict(scene.state)
    rows = rows_of(scene.train.take(np.arange(300)))
    directions = directions_of(scene, rows)
    runner = TrialRunner(scene.model, directions, None, rows_of(scene.held_out), criterion=lambda *_: 0.0)
    limit = runner.longest(10.0, 0.5)
    done = add_retain_correction(
        runner,
        Calibration(limit, 10.0, 0.0, source="proxies"),
        before=runner.run(0.0, 10.0),
        retain_weights=(),
        max_relative_step=0.5,
    )
    assert done.halvings >= 1 and not done.reached
    assert done.scale == pytest.approx(limit / 2**done.halvings)


def test_standard_error_of_auc_by_simulation():
    generator = np.random.default_rng(0)
    values = [
        stats.mannwhitneyu(generator.normal(size=100), generator.normal(size=400)).statistic / (100 * 400)
        for _ in range(2000)
    ]
    assert standard_error_of_auc(100, 400) == pytest.approx(float(np.std(values)), rel=0.06)


def test_shift_test_knows_random_rows_from_mislabelled_ones(scene):
    scene.model.load_state_dict(scene.state)
    train = predict_rows(scene.model, rows_of(scene.train))
    rejected = 0
    for seed in range(40):
        order = np.random.default_rng(seed).permutation(1200)
        rejected += not shift_test(train.select(order[:250]), train.select(order[250:])).passed
    assert rejected <= 5  # about 2 % each are expected to fail
    flipped = scene.train.take(np.arange(250))
    flipped.labels = (flipped.labels + 1) % 4
    wrong = predict_rows(scene.model, rows_of(flipped))
    assert not shift_test(wrong, train.select(np.arange(250, 1200))).passed
    one_class = train.select(train.label == 2)
    result = shift_test(one_class, train)
    assert not result.passed and result.label_p is not None and result.label_p < 1e-6


def test_near_duplicates_are_found(scene):
    forget = scene.train.take(np.arange(50))
    retained = scene.train.take(np.arange(100, 1000))
    clean = find_near_duplicates(rows_of(forget), rows_of(retained))
    assert clean is not None and clean.similar == 0
    retained.inputs[:5] = forget.inputs[:5] + 1e-3 * torch.randn(5, forget.inputs.shape[1])
    found = find_near_duplicates(rows_of(forget), rows_of(retained))
    assert found is not None and found.similar == 5
    assert (found.forget_rows, found.retained_rows) == (50, 900)


def test_near_duplicate_texts_are_found():
    generator = np.random.default_rng(0)
    texts = [{"input_ids": generator.integers(0, 5000, 24).tolist(), "labels": 0} for _ in range(60)]
    twin = {"input_ids": [*texts[3]["input_ids"][:-4], 7, 8, 9, 10], "labels": 1}
    found = find_near_duplicates(rows_of(texts[:20]), rows_of([*texts[20:], twin]))
    assert found is not None and found.similar == 0
    same = {"input_ids": texts[3]["input_ids"][::-1], "labels": 1}
    found = find_near_duplicates(rows_of(texts[:20]), rows_of([*texts[20:], same]))
    assert found is not None and found.similar == 1


@pytest.mark.parametrize("longest", [200, 2000])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_near_duplicate_sounds_are_found_however_far_batches_are_padded(longest, batch_size):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 2, longest, (40,), generator=generator).tolist()
    sounds = [torch.randn(length, generator=generator) for length in lengths]

    def source(rows):
        def collate(batch):
            return {"input_values": pad_sequence(batch, batch_first=True), "labels": torch.zeros(len(batch))}

        return RowSource(rows, collate, batch_size=batch_size)

    found = find_near_duplicates(source(sounds[:10]), source([*sounds[10:], sounds[3], sounds[6]]))
    assert found is not None and found.similar == 2


def test_the_baseline_is_the_trial_of_no_step(scene):
    """From predictions made before, with the luck of the draw taken out where it is known."""
    scene.model.load_state_dict(scene.state)
    rows, held_out = rows_of(scene.train.take(np.arange(300))), rows_of(scene.held_out)
    looks = predict_rows(scene.model, rows), predict_rows(scene.model, held_out)
    plain, lucky = (TrialRunner(scene.model, directions_of(scene, rows), rows, held_out) for _ in range(2))
    start, found = plain.run(0.0, 1.0), plain.baseline_trial(*looks)
    assert found == start
    assert lucky.baseline_trial(*looks, 0.07).criterion == 0.07 == lucky.trials[0].criterion
    assert lucky.run(0.0, 1.0).criterion == pytest.approx(0.07)
