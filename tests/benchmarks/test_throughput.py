"""Tokens a second of small language models, on whatever there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from benchmarks.throughput import main


@pytest.mark.parametrize("model", ["llama-lora", "gpt2"])
def test_figures_are_those_of_a_run(model: str, tmp_path: Path) -> None:
    settings = {"sequences": 100, "share": 0.05, "length": 8, "steps": 5, "curvature_rows": 16, "sample_rows": 16}
    main(out=tmp_path, model=model, size="tiny", checkpointing=model == "gpt2", **settings)
    found = json.loads((tmp_path / "throughput.json").read_text())
    assert found["forgotten"] == 5
    assert found["trainable"] < found["weights"] if model == "llama-lora" else found["trainable"] == found["weights"]
    assert found["coverage"]["kronecker"] > 0
    given = found["phases"]["given"]
    assert found["forget_pass_tokens_per_second"] == pytest.approx(5 * 8 / given["gradient"])
    assert found["ratio"] == pytest.approx(found["forget_pass_tokens_per_second"] / found["training_tokens_per_second"])
    assert sum(given.values()) <= found["seconds"]["unlearn, given step"]
    assert all(peak > 0 for peak in found["peak_bytes"].values())
    assert "tokens/s" in (tmp_path / "throughput.md").read_text()


def test_a_size_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="7b"):
        main(out=tmp_path, size="7b")
