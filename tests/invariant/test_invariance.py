"""The same memory, factors and forgetting whatever the number of processes, batch size, accumulation and padding."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import matrix
import pytest
import torch
from safetensors.torch import load_file
from several_processes import run_in_processes
from tiny_models import build, rows_of
from torch import Tensor
from unlearning_trainers import gradient_loop

WORLDS = (1, 2, 3)
SUMS = {"float32": 1e-5, "float64": 1e-10}  # relative to Σ‖∇ℓ_i‖
SOLVED = {"float32": 1e-3, "float64": 1e-10}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], tuple[dict[str, Tensor], Any]]:
    """(processes, setting) → tensors and figures."""
    folder = tmp_path_factory.mktemp("matrix")
    program = Path(__file__).with_name("matrix.py")
    jobs = run_in_processes(program, folder, *(f"matrix:{world}" for world in WORLDS))
    assert [[process["error"] for process in job] for job in jobs.values()] == [[None] * world for world in WORLDS]
    return {
        (world, setting): (
            load_file(folder / f"matrix-{world}" / f"{setting}.safetensors"),
            json.loads((folder / f"matrix-{world}" / f"{setting}.json").read_text()),
        )
        for world in WORLDS
        for setting in matrix.settings_of(world)
    }


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, named without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return float(sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5)


def norm(vector: dict[str, Tensor]) -> float:
    return distance(vector, {name: torch.zeros_like(value) for name, value in vector.items()})


def initial_weights() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in build("bert", num_hidden_layers=1).named_parameters()}


def test_every_pair_of_choices_meets_in_several_processes() -> None:
    some = {tuple(setting.split("-")) for setting in matrix.settings_of(2)}
    assert len(some) == 6 and some < {tuple(s.split("-")) for s in matrix.settings_of(1)}
    for one, other in itertools.combinations(range(len(matrix.CHOICES)), 2):
        pairs = itertools.product(map(str, matrix.CHOICES[one]), map(str, matrix.CHOICES[other]))
        assert {(setting[one], setting[other]) for setting in some} == set(pairs)


@pytest.mark.parametrize("which", ["train", "forget"])
def test_sums_are_those_of_a_loop_over_rows(which: str, results: dict[tuple[int, str], Any]) -> None:
    rows = rows_of("bert", matrix.ROWS)
    rows = rows if which == "train" else [rows[i] for i in matrix.FORGET]
    model = copy.deepcopy(build("bert", num_hidden_layers=1, dtype=torch.float64))
    expected, targets = gradient_loop(model, rows)
    scale = sum(norm(gradient_loop(model, [row])[0]) for row in rows)
    assert targets == len(rows)
    for (world, setting), (tensors, figures) in results.items():
        found = part(tensors, f"sum.{which}.")
        # Weights of float32 are those of float64 rounded: `build` draws them in float32.
        assert distance(found, expected) <= SUMS[setting.split("-")[0]] * scale, (world, setting)
        assert figures["processes"] == world
        assert (figures["rows"], figures["targets"], figures["factor_targets"]) == (matrix.ROWS,) * 3


@pytest.mark.parametrize("damping", matrix.DAMPINGS)
@pytest.mark.parametrize("which", ["train", "forget"])
def test_factors_precondition_alike(which: str, damping: float, results: dict[tuple[int, str], Any]) -> None:
    for kind, tolerance in SOLVED.items():
        prefix = f"solved.{which}.{damping}."
        reference = part(results[1, f"{kind}-1-1-longest"][0], prefix)
        assert norm(reference) > 0
        for (world, setting), (tensors, _) in results.items():
            if setting.startswith(kind):
                off = distance(part(tensors, prefix), reference)
                assert off <= tolerance * norm(reference), (world, setting)


def test_final_weights_and_reports_are_the_same(results: dict[tuple[int, str], Any]) -> None:
    start = initial_weights()
    for kind, tolerance in SOLVED.items():
        reference, figures_of_reference = results[1, f"{kind}-1-1-longest"]
        expected = part(reference, "weights.")
        moved = distance(expected, start)
        assert moved > 1e-3 * norm(start)
        for (world, setting), (tensors, figures) in results.items():
            if not setting.startswith(kind):
                continue
            assert distance(part(tensors, "weights."), expected) <= tolerance * moved, (world, setting)
            apart = {
                name: (figures[name], value)
                for name, value in figures_of_reference.items()
                if name != "processes" and figures[name] != pytest.approx(value, rel=1e-3, abs=1e-6, nan_ok=True)
            }
            assert not apart, (world, setting)
