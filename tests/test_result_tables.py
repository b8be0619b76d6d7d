"""Published tables are those of `docs/results/`, and cells become such files without losing a figure."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import result_tables  # noqa: E402
from benchmarks.result_tables import PAGES, RESULTS, Column, comparison, filled, read_tables, table  # noqa: E402

NAMES = sorted(path.stem for path in RESULTS.glob("*.json"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_tables_of_a_page_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text, read_tables()) == text, "run `python -m benchmarks.result_tables`"


def test_every_results_file_is_shown_once_in_the_results() -> None:
    shown = re.findall(r"<!-- ([\w-]+):begin -->", (ROOT / "docs" / "results.md").read_text(encoding="utf-8"))
    assert sorted(shown) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_a_column_and_every_table_says_where_it_comes_from(name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    keys = {column["key"] for column in result["columns"]}
    assert all(set(row) <= keys for row in result["rows"])
    assert result["command"] and result["hardware"]
    assert "\n\n" in read_tables()[name]


def test_values_are_printed_with_signs_spreads_and_real_minus_signs() -> None:
    columns = [
        {"key": "name", "label": "method"},
        {"key": "TA", "label": "TA", "signed": True},
        {"key": "gap", "label": "gap", "digits": 2, "bold": True},
    ]
    rows = [{"name": "a", "TA": [-0.44, 1.26], "gap": 1.005}, {"name": "b", "TA": 0.04}, {"name": "c", "TA": 1234.5}]
    assert table({"columns": columns, "rows": rows, "hardware": "One core.", "command": "run"}).splitlines() == [
        "| method | TA | gap |",
        "|---|---|---|",
        "| a | −0.4\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}1.3 | **1.00** |",
        "| b | 0.0 | – |",
        "| c | +1,234.5 | – |",
        "",
        "One core. `run`",
    ]


def test_nothing_is_put_on_a_page_whose_marks_are_wrong() -> None:
    assert filled("a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb", {"x": "new"}) == (
        "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb"
    )
    with pytest.raises(ValueError, match="there is no docs/results/y"):
        filled("<!-- y:begin -->\n<!-- y:end -->", {"x": "new"})
    with pytest.raises(ValueError, match="lacks"):
        filled("<!-- x:begin -->", {"x": "new"})


def cell(seed: int, method: str, gap: float, seconds: float) -> dict[str, Any]:
    def figures(value: float) -> dict[str, float | None]:
        named = dict.fromkeys(("retain_accuracy", "forget_accuracy", "test_accuracy"), value)
        return {**named, "mia_auc": None, "mean_absolute": abs(value)}

    return {
        "seed": seed,
        "method": method,
        "scenario": "Random 5 percent",
        "command": "python -m benchmarks.run some --out /home/me/out --data /data/rows",
        "hardware": {"accelerator": None, "processor": "A CPU", "threads": 1, "torch": "2.0"},
        "gap": figures(gap),
        "gap_before": figures(-3.0 - seed),
        "noise_floor": figures(0.5),
        "timing": {"unlearn_cpu_seconds": seconds, "retraining_cpu_seconds": 10.0},
    }


def test_cells_become_rows_with_means_and_standard_deviations() -> None:
    cells = [cell(0, "iau", 1.0, 2.0), cell(1, "iau", 2.0, 4.0), cell(0, "salun", -1.0, 5.0)]
    result = comparison(cells)
    before, iau, salun, floor = result["rows"]
    assert before["seeds"] == 2 and before["gap"] == [3.5, 0.707] and before["RA"] == [-3.5, 0.707]
    assert iau["method"] == "`iau`" and iau["gap"] == [1.5, 0.707] and iau["seconds"] == 3.0 and "MIA" not in iau
    assert salun["seeds"] == 1 and salun["FA"] == -1.0
    assert floor["method"] == "retrained again (noise floor)" and floor["seconds"] == 10.0
    assert result["command"] == "python -m benchmarks.run some --out OUT --data DATA"
    assert {Column(**column).key for column in result["columns"]} >= set(iau)


def test_a_finished_suite_is_taken_over_and_the_note_below_its_table_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "some.json").write_text('{"note": "One seed."}')
    (tmp_path / "out" / "some" / "cells").mkdir(parents=True)
    (tmp_path / "out" / "some" / "cells" / "a.json").write_text(json.dumps(cell(0, "iau", 1.0, 2.0)))
    (written,) = result_tables.collect(tmp_path / "out")
    assert written.name == "some.json"
    found = json.loads(written.read_text())
    assert found["note"] == "One seed." and found["rows"][1]["gap"] == 1.0
