"""The rule by which baselines are tuned, and that it sees held-out rows alone."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import tuning  # noqa: E402
from benchmarks.suites import SUITES, SYNTHETIC  # noqa: E402
from benchmarks.training import ModelStore  # noqa: E402
from benchmarks.variants import RELEASED_TUNED, SETTINGS_A_METHOD, Variant  # noqa: E402
from hf_iau import IAUReleasedConfig, RequestError, UnlearningTrainer  # noqa: E402
from hf_iau.methods.base import available_methods  # noqa: E402


def trial(auc: float | None, ratio: float | None) -> dict[str, Any]:
    return {"auc": auc, "loss_ratio": ratio, "held_out_loss": ratio}


def test_the_auc_nearest_one_half_wins_within_the_tolerated_loss() -> None:
    tried = [trial(0.60, 1.0), trial(0.52, 1.04), trial(0.45, 1.05), trial(0.50, 1.06)]
    assert tuning.choose(tried) == 1


def test_over_forgetting_counts_like_remembering() -> None:
    assert tuning.choose([trial(0.58, 1.0), trial(0.45, 1.0)]) == 1


def test_the_lowest_held_out_loss_wins_where_every_setting_costs_too_much() -> None:
    assert tuning.choose([trial(0.50, 1.5), trial(0.60, 1.2), trial(None, None)]) == 1


def test_a_setting_that_diverged_is_never_preferred() -> None:
    assert tuning.choose([trial(None, None), trial(0.9, 9.0)]) == 1


def test_no_method_is_left_out() -> None:
    compared = {variant.method for variant in SUITES["cifar10_lenet"].every_variant}
    assert sorted(compared | {"unrolling-sgd"}) == available_methods()


def test_every_tuned_method_has_as_many_attempts() -> None:
    for suite in SUITES.values():
        for variant in suite.every_variant:
            for work in suite.works:
                assert len(variant.settings(work)) == (0 if variant.grid is None else SETTINGS_A_METHOD)
    with pytest.raises(ValueError, match="1 settings"):
        Variant("odd", "iau-released", grid=lambda work: (IAUReleasedConfig(),)).settings(SYNTHETIC)
    with pytest.raises(ValueError, match="not both"):
        Variant("both", "iau-released", config=IAUReleasedConfig(), grid=RELEASED_TUNED.grid)


def test_methods_that_calibrate_themselves_are_not_tuned() -> None:
    variants = {v.name: v for suite in SUITES.values() for v in suite.every_variant}
    assert all(variant.grid is None for variant in variants.values() if variant.method == "iau")


def test_tuning_has_no_way_to_a_retrained_model_or_a_test_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By construction: neither is among its arguments, and every request it makes is a dry run without them."""
    assert list(inspect.signature(tuning.tune).parameters) == ["trainer", "rows", "method", "settings"]
    models = ModelStore(tmp_path, None)
    case = models.case(SYNTHETIC, SUITES["synthetic"].scenarios[0], 0)
    train, held_out = (split.dataset() for split in (case.train, case.splits.held_out))
    trainer = models.trainer(SYNTHETIC, models.original(case).model, train, seed=0, held_out=held_out, for_request=True)
    seen: list[dict[str, Any]] = []
    unlearn = UnlearningTrainer.unlearn

    def spy(self: UnlearningTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return unlearn(self, *args, **kwargs)

    monkeypatch.setattr(UnlearningTrainer, "unlearn", spy)
    from benchmarks.requests import gather_config

    trainer.gather(gather_config(RELEASED_TUNED))
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    settings = RELEASED_TUNED.settings(SYNTHETIC)
    config, record = tuning.tune(trainer, case.forget_rows, "iau-released", settings)
    assert len(seen) == SETTINGS_A_METHOD
    for request in seen:
        assert request.keys() == {"forget_indices", "method", "config", "dry_run"}
        assert request["dry_run"] is True
    assert trainer.eval_dataset is held_out
    assert all((trainer.model.state_dict()[name] == tensor).all() for name, tensor in weights.items())
    assert record["chosen"] == record["tried"][settings.index(config)]["setting"]
    assert record["seconds"] > 0


def test_settings_that_fail_are_passed_over_and_one_that_works_is_taken() -> None:
    def unlearn(*, forget_indices: Any, method: str, config: float, dry_run: bool) -> Any:
        if config != 3.0:
            raise RequestError(f"setting {config} diverged")
        before, after = {"held_out_loss": 1.0}, {"held_out_loss": 2.0, "mia_auc_held_out": 0.5}
        return SimpleNamespace(report=SimpleNamespace(before=before, after=after))

    trainer: Any = SimpleNamespace(unlearn=unlearn)
    chosen, record = _tuned(trainer, (1.0, 3.0))
    assert chosen == 3.0
    assert not record["within_tolerance"]
    assert "diverged" in record["tried"][0]["error"]
    with pytest.raises(RequestError, match="diverged"):
        _tuned(trainer, (1.0, 2.0))


def _tuned(trainer: Any, settings: tuple[float, ...]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "options", lambda config: {"value": config})
        return tuning.tune(trainer, np.arange(3), "any", settings)
