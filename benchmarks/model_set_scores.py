"""Sets of models against a set of retrained ones: U-LiRA and KLoM of each, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from benchmarks.tuning import RULE
from hf_iau.metrics.model_sets import MINIMUM_MODELS, KLoMEstimator, klom, u_lira
from hf_iau.utils.jsonable import jsonable

SIDES = ("forget", "retained", "test")
DO_NOTHING, RETRAINED_SET, RETRAINED_AGAIN = "do nothing", "retrained", "retrained again"

Document = dict[str, Any]
Measured = Sequence[tuple[Document, dict[str, np.ndarray]]]


def scores(found: dict[str, Measured], seed: int) -> list[Document]:
    """Both tests of each set against the retrained one, with seeds and costs.

    Args:
        found: for each set the JSON of its models and their margins by side, each `(rows,)`; one is `RETRAINED_SET`.
        seed: of folds, exchanges and resamples.

    Returns:
        One entry a set, in their order: both tests with all models and, under `by_models`, with a quarter and half of
        them and against all retrained models together. A model with a margin that is not finite is left out and counted
        as diverged; tests are None where fewer than 4 models are left, and for `RETRAINED_SET` itself.
    """
    arrays = {name: _finite(models) for name, models in found.items()}
    reference, _ = arrays[RETRAINED_SET]
    whole = len(found[RETRAINED_SET])
    counts = [whole // part for part in (4, 2) if whole // part >= MINIMUM_MODELS]
    entries = []
    for name, models in found.items():
        margins, kept = arrays[name]
        tested = name != RETRAINED_SET and min(kept.sum(), reference["forget"].shape[1]) >= MINIMUM_MODELS
        entry = {
            "set": name,
            "seeds": [cell["seed"] for (cell, _), k in zip(models, kept, strict=True) if k],
            "diverged_seeds": [cell["seed"] for (cell, _), k in zip(models, kept, strict=True) if not k],
            "mean_margins": {side: float(margins[side].mean()) if kept.any() else None for side in SIDES},
            "u_lira": None,
            "klom": None,
            "by_models": [],
            **_costs([cell for cell, _ in models]),
        }
        if tested:
            entry["u_lira"] = u_lira(margins["forget"], reference["forget"], seed=seed).to_dict()
            entry["klom"] = {
                side: {
                    estimator: klom(margins[side], reference[side], estimator, seed=seed).to_dict()
                    for estimator in get_args(KLoMEstimator)
                }
                for side in SIDES
            }
            rivals = [reference["forget"]]
            if name != RETRAINED_AGAIN:
                rivals.append(np.concatenate([reference["forget"], arrays[RETRAINED_AGAIN][0]["forget"]], axis=1))
            entry["by_models"] = [_fewer(margins["forget"], rivals[0], count, seed) for count in counts]
            entry["by_models"] += [_fewer(margins["forget"], rival, None, seed) for rival in rivals]
        entries.append(jsonable(entry))
    return entries


def _fewer(unlearned: np.ndarray, retrained: np.ndarray, count: int | None, seed: int) -> Document:
    """Both tests on the forget rows with the first `count` models of each set, or with all."""
    unlearned, retrained = unlearned[:, :count], retrained[:, :count]
    return {
        "unlearned_models": unlearned.shape[1],
        "retrained_models": retrained.shape[1],
        "u_lira": u_lira(unlearned, retrained, seed=seed).to_dict(),
        "klom": klom(unlearned, retrained, "gaussian", bootstrap=0, seed=seed).to_dict(),
    }


def markdown(document: Document) -> str:
    """The table of a run's figures."""
    hardware = document["hardware"]
    sets = {entry["set"]: entry for entry in document["sets"]}
    reference = sets[RETRAINED_SET]
    first = document["sets"][0]
    lines = [
        f"# Sets of models: {document['work']}",
        "",
        f"## {document['work']}, {document['scenario']} ({document['forget_rows']:,} rows), {document['models']} "
        "models a set",
        "",
        f"Forget set of seed {document['seed']}. Seeds of the originals {_range(first['seeds'])}, of the retrained "
        f"models {_range(reference['seeds'])}, of those retrained again {_range(sets[RETRAINED_AGAIN]['seeds'])}. "
        f"{hardware['accelerator'] or hardware['processor']}, {hardware['threads']} thread(s) of "
        f"{hardware['cpu_count']} CPUs, torch {hardware['torch']}. Command: `{document['command']}`.",
        "",
        "| set | U-LiRA accuracy [95 %] | AUC [95 %] | KLoM forget (at chance) | p | retained | test | histogram, "
        "forget (at chance) | margin of forget rows | of test rows | seconds (CPU) | setting |",
        "|---" * 12 + "|",
    ]
    for entry in document["sets"]:
        lines.append(_row(entry, reference))
    training = [cost for cost in (entry["training"] for entry in document["sets"]) if cost is not None]
    seconds = sum(cost["cpu_seconds"] for cost in training)
    peaks = [entry["peak_bytes"] for entry in document["sets"] if entry["peak_bytes"] is not None]
    lines += [
        "",
        f"Each set against `{RETRAINED_SET}`. KLoM in nats, by normal fits, mean over the rows, with its value when "
        "whole models change sets at random, and p, the share of such exchanges with a mean at least as large; "
        "*histogram* is the published estimator. Margins: mean, less that of the retrained models (above 0: surer of "
        "the label than they are). Seconds: one `unlearn()` call with its own report, mean over the models, wall "
        "(CPU); training a model for "
        "the last two. Settings are tuned on the first original alone and serve all: " + RULE,
        "",
        f"Training of all {sum(cost['models'] for cost in training)} models: {seconds:.0f} CPU seconds; gathering, "
        f"tuning and unlearning: {sum(entry['unlearning_cpu_seconds'] for entry in document['sets']):.0f}. "
        f"Peak memory of a request above the process' own: {max(peaks, default=0) / 2**20:.0f} MB, of the process: "
        f"{document['peak_process_bytes'] / 2**20:.0f} MB.",
        "",
        *_by_models(document["sets"]),
    ]
    return "\n".join(lines)


def _by_models(entries: Sequence[Document]) -> list[str]:
    """What fewer models would have shown, and what all retrained models together show."""
    tested = [entry for entry in entries if entry["by_models"]]
    if not tested:
        return []
    heads = [f"{found['unlearned_models']}, {found['retrained_models']}" for found in tested[0]["by_models"]]
    lines = [
        "The same by the number of models, unlearned and retrained: U-LiRA accuracy [95 %]; KLoM on the forget rows by "
        "normal fits (at chance), p.",
        "",
        "| set | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for entry in tested:
        columns = []
        for found in entry["by_models"]:
            attack, divergence = found["u_lira"], found["klom"]
            interval = f"[{attack['accuracy_low']:.3f}, {attack['accuracy_high']:.3f}]"
            columns.append(
                f"{attack['accuracy']:.3f} {interval}; {_with_chance(divergence)}, {divergence['p_value']:.3f}"
            )
        columns += ["–"] * (len(heads) - len(columns))
        lines.append(f"| {entry['set']} | " + " | ".join(columns) + " |")
    return [*lines, ""]


def _row(entry: Document, reference: Document) -> str:
    incomplete = len(entry["seeds"]) != len(reference["seeds"])
    name = f"{entry['set']} ({len(entry['seeds'])} models)" if incomplete else entry["set"]
    if entry["u_lira"] is not None:
        found, by_side = entry["u_lira"], entry["klom"]
        gaussian = {side: by_side[side]["gaussian"] for side in SIDES}
        columns = [
            f"**{found['accuracy']:.3f}** [{found['accuracy_low']:.3f}, {found['accuracy_high']:.3f}]",
            f"{found['auc']:.3f} [{found['auc_low']:.3f}, {found['auc_high']:.3f}]",
            _with_chance(gaussian["forget"]),
            f"{gaussian['forget']['p_value']:.3f}",
            *(_with_chance(gaussian[side]) for side in ("retained", "test")),
            _with_chance(by_side["forget"]["histogram"]),
        ]
    else:
        columns = ["–"] * 7
    for side in ("forget", "test"):
        own, theirs = entry["mean_margins"][side], reference["mean_margins"][side]
        columns.append("–" if None in (own, theirs) else f"{own - theirs:+.2f}")
    if entry["unlearn_seconds"] is not None:
        columns.append(f"{entry['unlearn_seconds']:.1f} ({entry['unlearn_cpu_seconds']:.1f})")
    elif entry["set"] == DO_NOTHING:
        columns.append("0")
    else:
        cost = entry["training"]
        columns.append(f"{cost['seconds'] / cost['models']:.1f} ({cost['cpu_seconds'] / cost['models']:.1f})")
    columns.append(_setting(entry["tuning"]))
    return f"| {name} | " + " | ".join(columns) + " |"


def _with_chance(found: Document) -> str:
    return f"{found['mean']:.2f} ({found['chance_mean']:.2f})"


def _setting(tuning: Document | None) -> str:
    """The chosen setting, as far as the settings differ."""
    if tuning is None:
        return ""
    tried = [trial["setting"] for trial in tuning["tried"]]
    names = [name for name in tried[0] if len({repr(setting[name]) for setting in tried}) > 1]
    beyond = "" if tuning["within_tolerance"] else " (beyond the tolerated loss)"
    return ", ".join(f"{name} {tuning['chosen'][name]:g}" for name in names) + beyond


def _finite(models: Measured) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Margins by side, `(rows, models)`, of the models that have not diverged, and which those are."""
    kept = np.array([all(np.isfinite(margins[side]).all() for side in SIDES) for _, margins in models], dtype=bool)
    chosen = [margins for (_, margins), k in zip(models, kept, strict=True) if k]
    if not chosen:
        return {side: np.empty((0, 0)) for side in SIDES}, kept
    return {side: np.stack([margins[side] for margins in chosen], axis=1) for side in SIDES}, kept


def _costs(cells: Sequence[Document]) -> Document:
    """What a set's models cost: training, where the set is of trained models, or requests."""
    requests = [cell["request"] for cell in cells if "request" in cell]
    trained = [cell["training"] for cell in cells if "request" not in cell]
    tuning = next((cell["tuning"] for cell in cells if cell.get("tuning")), None)
    gathering = sum(sum(cell.get("gather_seconds_by_phase", {}).values()) for cell in cells)
    tuned = 0.0 if tuning is None else tuning["cpu_seconds"]
    return {
        "training": {
            "models": len(trained),
            "seconds": sum(record["seconds"] for record in trained),
            "cpu_seconds": sum(record["cpu_seconds"] for record in trained),
        }
        if trained
        else None,
        "unlearn_seconds": float(np.mean([r["seconds"] for r in requests])) if requests else None,
        "unlearn_cpu_seconds": float(np.mean([r["cpu_seconds"] for r in requests])) if requests else None,
        "gathering_seconds": gathering,
        "unlearning_cpu_seconds": gathering + tuned + sum(r["cpu_seconds"] for r in requests),
        "tuning": tuning,
        "verdicts": [r["verdict"] for r in requests],
        "peak_bytes": max(
            (max(c["peak_bytes_by_phase"].values(), default=0) for c in cells if "request" in c), default=None
        ),
    }


def _range(seeds: Sequence[int]) -> str:
    """`0 to 15`, or the numbers where some are missing."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return ", ".join(map(str, seeds))
