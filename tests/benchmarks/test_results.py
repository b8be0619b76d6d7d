"""Ranks, front, claims, tables and plots, on cells whose answers are known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.claims import NO, PARTLY, UNKNOWN, YES, check_claims  # noqa: E402
from benchmarks.plots import plot_roc  # noqa: E402
from benchmarks.results import Panel, Result, average_ranks, closer_and_faster, front  # noqa: E402


def cell(
    gap: float, test_accuracy: float, seconds: float, mia: float = 0.0, seed: int = 0, method: str = "m"
) -> dict[str, Any]:
    differences = {"mean_absolute": gap, "test_accuracy": test_accuracy, "mia_auc": mia}
    return {
        "seed": seed,
        "method_name": method,
        "gap": differences,
        "gap_before": {"mean_absolute": 5.0, "mia_auc": 6.0},
        "noise_floor": {"mean_absolute": 1.0, "mia_auc": -0.5},
        "tuning": None,
        "requests": None,
        "timing": {
            "kind": "cpu",
            "unlearn_cpu_seconds": seconds,
            "unlearn_seconds": 10 * seconds,
            "retraining_cpu_seconds": 100.0,
            "retraining_seconds": 1000.0,
        },
    }


def panel(**cells: dict[str, Any]) -> Panel:
    return Panel("work", "scenario", tuple(Result(name, (c,)) for name, c in cells.items()))


def test_ranks_are_means_of_places_and_ties_share_one() -> None:
    ranks = average_ranks(panel(a=cell(1.0, -2.0, 3.0), b=cell(2.0, -1.0, 3.0), c=cell(3.0, -3.0, 1.0)))
    by_name = {rank.name: (rank.gap, rank.utility, rank.seconds) for rank in ranks}
    assert by_name == {"a": (1, 2, 2.5), "b": (2, 1, 2.5), "c": (3, 3, 1)}
    assert [rank.mean for rank in ranks] == pytest.approx([5.5 / 3, 5.5 / 3, 7 / 3])


def test_methods_are_compared_on_the_seeds_that_all_have_and_retraining_takes_no_part() -> None:
    good, bad = cell(1.0, 0.0, 1.0), cell(9.0, -9.0, 9.0)
    retraining = tuple(cell(0.0, 0.0, 9.0, seed=seed, method="retrain") for seed in (0, 1))
    some = Panel(
        "work",
        "scenario",
        (
            Result("two seeds", (bad, good | {"seed": 1})),
            Result("one seed", (cell(2.0, -1.0, 2.0),)),
            Result("another seed", (good | {"seed": 1},)),
            Result("retrain", retraining),
        ),
    )
    assert some.common_seeds == [0]
    assert [rank.name for rank in average_ranks(some)] == ["one seed", "two seeds"]
    assert [result.name for result in front(some.complete)] == ["one seed", "retrain"]


def test_the_front_holds_what_nothing_is_closer_and_faster_than() -> None:
    found = panel(fast=cell(4.0, 0, 1.0), worse=cell(5.0, 0, 2.0), close=cell(1.0, 0, 3.0), slow=cell(0.5, 0, 9.0))
    assert [result.name for result in front(found.results)] == ["fast", "close", "slow"]
    assert [result.name for result in closer_and_faster(found.results, found.results[1])] == ["fast"]


def test_a_model_that_diverged_ranks_last() -> None:
    ruined = cell(0.0, 0.0, 2.0)
    ruined["gap"] = dict.fromkeys(ruined["gap"])
    ranks = {rank.name: rank for rank in average_ranks(panel(good=cell(9.0, -9.0, 3.0), ruined=ruined))}
    assert (ranks["ruined"].gap, ranks["ruined"].utility, ranks["ruined"].seconds) == (2, 2, 1)


@pytest.mark.parametrize(
    ("mia", "removal"), [(-1.5, YES), (1.6, PARTLY), (2.9, PARTLY), (-3.1, NO)], ids=["floor", "near", "half", "far"]
)
def test_the_removal_claim_follows_the_distance_of_the_attack(mia: float, removal: str) -> None:
    found = panel(ours=cell(1.0, -0.5, 5.0, mia), other=cell(2.0, -4.0, 60.0))
    answers = {answer.claim.split(":")[0]: answer.answer for answer in check_claims(found, found.results[0])}
    assert answers == {"removal": removal, "efficiency": YES, "utility": YES, "balance": YES}


def test_one_forget_row_has_no_attack_to_be_judged_by() -> None:
    alone = cell(1.0, -0.5, 5.0)
    for figures in ("gap", "gap_before", "noise_floor"):
        alone[figures] = alone[figures] | {"mia_auc": None}
    answers = check_claims(panel(ours=alone), Result("ours", (alone,)))
    assert answers[0].answer == UNKNOWN and answers[1].answer == YES


def test_claims_are_denied_where_the_numbers_do_not_bear_them() -> None:
    found = panel(ours=cell(3.0, -3.5, 60.0, 6.0), a=cell(2.0, -4.0, 1.0), b=cell(1.0, 0.0, 2.0))
    assert {answer.answer for answer in check_claims(found, found.results[0])} == {NO}


def test_several_requests_are_held_against_as_many_retrainings() -> None:
    several = cell(1.0, 0.0, 150.0) | {"requests": [{}] * 20}
    answers = check_claims(panel(ours=several), Result("ours", (several,)))
    efficiency = next(answer for answer in answers if answer.claim.startswith("efficiency"))
    assert efficiency.answer == YES
    assert "7.5% of retraining for each request" in efficiency.evidence


def test_roc_curves_are_drawn_and_a_model_with_infinite_losses_is_left_out(tmp_path: Path) -> None:
    losses = {
        "before": (np.array([0.1, 0.2]), np.array([1.0, 2.0])),
        "ruined": (np.array([np.inf, np.nan]), np.array([1.0, 2.0])),
    }
    plot_roc(losses, "title", tmp_path / "roc.png")
    assert (tmp_path / "roc.png").read_bytes()[:4] == b"\x89PNG"
