"""What the IAU paper claims, checked on the cells: is it so here, partly so, or not?

Claims of Liu et al. 2025 (arXiv 2507.23257): removal as good as retraining's by a membership attack, efficiency,
comparable utility, and the best balance of them by average rank. The thresholds below are ours and stand beside each
answer; the answers are computed from the cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.results import Panel, Result, average_ranks
from benchmarks.variants import RETRAIN

YES, PARTLY, NO, UNKNOWN = "yes", "partly", "no", "–"

REMOVAL_TOLERANCE = 1.0  # points of AUC beyond the noise floor's own distance
FAST, WORTHWHILE = 0.1, 0.5  # of retraining's seconds
UTILITY_LOST, UTILITY_MUCH_LOST = 1.0, 3.0  # points of test accuracy


@dataclass(frozen=True)
class Answer:
    """One claim for one method.

    Attributes:
        claim: what is claimed.
        test: when the answer is yes, and when partly.
        answer: "yes", "partly", "no", or "–" where it cannot be told.
        evidence: the numbers.
    """

    claim: str
    test: str
    answer: str
    evidence: str


def check_claims(panel: Panel, result: Result) -> list[Answer]:
    """The four claims for one method on one work and scenario."""
    return [_removal(panel, result), _efficiency(panel, result), _utility(result), _average_rank(panel, result)]


def claims_table(panel: Panel, names: list[str]) -> list[str]:
    """The answers as lines of a Markdown table, one column a method; empty where none of them is finished."""
    found = [result for name in names if (result := panel.of(name)) is not None]
    if not found:
        return []
    answers = [check_claims(panel, result) for result in found]
    lines = [
        "| claim | yes if (partly if) | " + " | ".join(f"`{result.name}`" for result in found) + " |",
        "|---" * (2 + len(found)) + "|",
    ]
    for same_claim in zip(*answers, strict=True):
        columns = [f"**{answer.answer}**: {answer.evidence}" for answer in same_claim]
        lines.append(f"| {same_claim[0].claim} | {same_claim[0].test} | " + " | ".join(columns) + " |")
    return lines


def _removal(panel: Panel, result: Result) -> Answer:
    claim = "removal: the attack sees what it sees of a retrained model"
    test = f"AUC within {REMOVAL_TOLERANCE:g} point beyond the noise floor (half of the distance gone)"
    if any(c["gap_before"]["mia_auc"] is None for c in result.cells):
        return Answer(claim, test, UNKNOWN, "too few forget rows for an attack")
    floors = [abs(c["noise_floor"]["mia_auc"]) for c in panel.once if c["noise_floor"]]
    floor = float(np.mean(floors)) if floors else 0.0
    before = float(np.mean([abs(c["gap_before"]["mia_auc"]) for c in result.cells]))
    distance = result.removal
    if distance <= floor + REMOVAL_TOLERANCE:
        answer = YES
    else:
        answer = PARTLY if distance <= before / 2 else NO
    return Answer(
        claim,
        test,
        answer,
        f"{distance:.1f} points away, before {before:.1f}, floor {floor:.1f}",
    )


def _efficiency(panel: Panel, result: Result) -> Answer:
    requests = len(result.cells[0]["requests"] or [None])
    share = result.seconds / (requests * panel.retraining_seconds())
    others = [r for r in panel.complete if r.method != RETRAIN and r.name != result.name]
    faster = sum(r.seconds < result.seconds for r in others)
    answer = YES if share <= FAST else PARTLY if share <= WORTHWHILE else NO
    return Answer(
        "efficiency: a fraction of retraining",
        f"at most {FAST:.0%} of retraining's seconds ({WORTHWHILE:.0%})",
        answer,
        f"{result.seconds:.1f} s, {share:.1%} of retraining{' for each request' if requests > 1 else ''}; {faster} of "
        f"{len(others)} other methods are faster",
    )


def _utility(result: Result) -> Answer:
    lost = -result.utility
    answer = YES if lost <= UTILITY_LOST else PARTLY if lost <= UTILITY_MUCH_LOST else NO
    return Answer(
        "utility: test accuracy as after retraining",
        f"at most {UTILITY_LOST:g} point lower ({UTILITY_MUCH_LOST:g} points)",
        answer,
        f"{result.utility:+.1f} points",
    )


def _average_rank(panel: Panel, result: Result) -> Answer:
    ranks = average_ranks(panel)
    place = next((i for i, rank in enumerate(ranks, start=1) if rank.name == result.name), None)
    claim, test = "balance: the best average rank", "first of all methods (in the first third)"
    if place is None:
        return Answer(claim, test, NO, "not finished for the seeds of the others")
    answer = YES if place == 1 else PARTLY if place <= len(ranks) / 3 else NO
    return Answer(claim, test, answer, f"average rank {ranks[place - 1].mean:.1f}, place {place} of {len(ranks)}")
