"""Gap arithmetic, on the CIFAR-10 measurements among others."""

from __future__ import annotations

import pytest

from hf_iau.evaluation.figures import Figures
from hf_iau.evaluation.retraining_gap import gap


def percent(ra: float, fa: float, ta: float, mia: float) -> Figures:
    return Figures(retain_accuracy=ra / 100, forget_accuracy=fa / 100, test_accuracy=ta / 100, mia_auc=mia / 100)


RETRAINED = percent(72.1, 63.2, 62.4, 50.4)


@pytest.mark.parametrize(
    "figures, published, differences",
    [
        (percent(75.1, 74.3, 62.5, 57.4), 5.28, (3.0, 11.1, 0.1, 7.0)),
        (percent(74.0, 71.9, 61.6, 56.4), 4.33, (1.9, 8.7, -0.8, 6.0)),
        (percent(69.6, 59.5, 59.1, 50.4), 2.37, (-2.5, -3.7, -3.3, 0.0)),
        (percent(76.0, 62.0, 62.0, 50.7), 1.39, (3.9, -1.2, -0.4, 0.3)),
    ],
)
def test_cifar_table(figures, published, differences):
    found = gap(figures, RETRAINED)
    assert found.mean_absolute == pytest.approx(published, abs=0.1)  # the four columns are rounded to 0.1
    assert (found.retain_accuracy, found.forget_accuracy, found.test_accuracy, found.mia_auc) == pytest.approx(
        differences
    )
    assert found.mean_absolute == pytest.approx(sum(map(abs, differences)) / 4)
    assert found.based_on == "accuracy"
    assert found.compared == ("retain_accuracy", "forget_accuracy", "test_accuracy", "mia_auc")


def test_no_distance_from_itself():
    assert gap(RETRAINED, RETRAINED).mean_absolute == 0


def test_missing_figures_are_left_out_and_named():
    found = gap(Figures(retain_accuracy=0.8, forget_accuracy=0.7, mia_auc=0.6), RETRAINED)
    assert found.test_accuracy is None
    assert found.compared == ("retain_accuracy", "forget_accuracy", "mia_auc")
    assert found.mean_absolute == pytest.approx((7.9 + 6.8 + 9.6) / 3)
    empty = gap(Figures(), RETRAINED)
    assert empty.mean_absolute is None
    assert empty.compared == ()


def test_regression_compares_losses():
    ours = Figures(retain_loss=1.1, forget_loss=1.5, test_loss=2.0, mia_auc=0.52)
    theirs = Figures(retain_loss=1.0, forget_loss=2.0, test_loss=2.0, mia_auc=0.50)
    found = gap(ours, theirs)
    assert found.based_on == "loss"
    assert (found.retain_loss, found.forget_loss, found.test_loss) == pytest.approx((10.0, -25.0, 0.0))
    assert found.mean_absolute == pytest.approx((10 + 25 + 0 + 2) / 4)
    assert found.retain_accuracy is None


def test_losses_of_classifiers_are_given_but_not_averaged():
    ours = Figures(forget_accuracy=0.5, forget_loss=2.0)
    theirs = Figures(forget_accuracy=0.6, forget_loss=1.0)
    found = gap(ours, theirs)
    assert found.forget_loss == pytest.approx(100)
    assert found.mean_absolute == pytest.approx(10)


def test_dictionaries_serve_as_figures():
    assert gap(percent(76.0, 62.0, 62.0, 50.7).to_dict(), RETRAINED.to_dict()) == gap(
        percent(76.0, 62.0, 62.0, 50.7), RETRAINED
    )
    assert gap(Figures(retain_loss=1.0), Figures(retain_loss=0.0)).retain_loss is None
    assert gap(RETRAINED, RETRAINED).to_dict()["compared"][0] == "retain_accuracy"
