"""Pushing to the Hub: what is sent, what never is, and how failures are told; against a server of our own."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers.utils.hub
from fake_hub import FakeHub
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import _http, disable_progress_bars
from tiny_models import as_dataset, bert, pad_right, text_rows
from transformers import AutoModelForSequenceClassification, Trainer
from unlearning_trainers import WITH_CURVATURE, arguments, make_trainer

from hf_iau import IAUCallback, IAUConfig, PublishError, UnlearningTrainer

TOKEN = "hf_right"
ROWS, FORGET = 60, list(range(0, 44, 2))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The server, and huggingface_hub pointed at it as with `HF_ENDPOINT` and `HF_HUB_DISABLE_XET=1`."""
    server = FakeHub(TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=server.url))
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    disable_progress_bars()
    yield server
    server.shutdown()
    server.server_close()


def rows_with_secrets(n: int = ROWS) -> list[dict[str, Any]]:
    """Rows with a raw text and an id, which the model does not take."""
    return [
        row | {"text": f"the secret of row {number:04d}", "user_id": f"person-{7919 * (number + 1)}"}
        for number, row in enumerate(text_rows(n, length=(9, 14)))
    ]


def trainer_on(folder: Path, *, callbacks: Any = None, **settings: Any) -> UnlearningTrainer:
    return make_trainer(
        folder,
        rows=rows_with_secrets(),
        eval_dataset=as_dataset(text_rows(40, seed=1)),
        callbacks=[IAUCallback(WITH_CURVATURE)] if callbacks is None else callbacks,
        settings={"hub_model_id": "me/model", "hub_token": TOKEN, "per_device_train_batch_size": 20, **settings},
    )


def forget(trainer: UnlearningTrainer) -> Any:
    config = IAUConfig(scale=0.1, damping=0.1)
    return trainer.unlearn(forget_indices=FORGET, config=config, test_dataset=as_dataset(text_rows(40, seed=2)))


def patterns_of_secrets(folder: Path, trainer: UnlearningTrainer) -> Iterator[tuple[str, bytes]]:
    """What must be in no upload: raw texts, ids, tokens in several spellings, row numbers, the memory's bytes."""
    for row in rows_with_secrets():
        yield row["text"], row["text"].encode()
        yield row["user_id"], row["user_id"].encode()
        tokens = row["input_ids"]
        for separator in (", ", ",", " "):
            yield f"tokens of {row['text']}", separator.join(map(str, tokens)).encode()
        for kind in (np.int32, np.int64):
            yield f"tokens of {row['text']} as {kind.__name__}", np.asarray(tokens, kind).tobytes()
    for separator in (", ", ",", "\n"):
        yield "row numbers", separator.join(map(str, FORGET[:6])).encode()
    assert trainer.memory is not None and trainer.memory.gradient_sum is not None
    for name, tensor in trainer.memory.gradient_sum.items():
        values = tensor[tensor != 0].numpy()
        if len(values) >= 4:
            yield f"gradient sum of {name}", values[:1].tobytes()
    for path in (folder / "_iau").iterdir():
        yield path.name, path.name.encode()
        yield f"content of {path.name}", path.read_bytes()[-64:]


def test_push_after_a_request(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    trainer = trainer_on(folder, save_strategy="steps", save_steps=2)
    trainer.train()
    result = forget(trainer)
    result.report.save(folder)
    trainer.push_to_hub(commit_message="Forgot some rows")
    assert hub.commits == ["Forgot some rows"]
    assert {"model.safetensors", "config.json", "README.md"} <= set(hub.files)
    assert not [name for name in hub.files if "_iau" in name or "memory" in name or "checkpoint" in name]
    assert hub.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()

    # The memory that belongs to the pushed weights lies beside them, on this machine only.
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert trainer.memory is not None
    trainer.memory.check_model(model)
    assert (folder / "_iau" / "memory.json").is_file() and (folder / "_iau" / "card.json").is_file()

    sent = hub.sent
    assert b"model_type" in sent  # the search below looks at what was really sent
    searched = 0
    for what, pattern in patterns_of_secrets(folder, trainer):
        assert pattern not in sent, f"{what} was uploaded"
        searched += 1
    assert searched > 6 * ROWS

    card = ModelCard(hub.files["README.md"].decode())
    assert {"machine-unlearning", "hf-iau"} <= set(card.data.tags)
    assert card.text.count("## Unlearning\n") == 1
    after = result.report.after
    values = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert values["test", "accuracy"] == pytest.approx(after["test_accuracy"], abs=1e-6)
    assert values["forget", "loss"] == pytest.approx(after["forget_loss"], abs=1e-6)
    assert values["forget", "roc_auc"] == pytest.approx(after["mia_auc"], abs=1e-6)


def test_push_without_a_request_has_no_section(hub: FakeHub, tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path / "model", callbacks=[])
    trainer.push_to_hub()
    card = ModelCard(hub.files["README.md"].decode())
    assert "## Unlearning" not in card.text and "machine-unlearning" not in (card.data.tags or [])


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_hub_strategies_upload_no_memory(hub: FakeHub, tmp_path: Path, strategy: str) -> None:
    """A second training run, with the first one's memory in the folder: checkpoints are pushed in the background."""
    folder = tmp_path / "model"
    pushing = {"push_to_hub": True, "hub_strategy": strategy, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    for _ in range(2):
        trainer = trainer_on(folder, hub_always_push=True, **pushing)
        trainer.train()
        trainer._finish_current_push()
    assert (folder / "_iau" / "memory.json").is_file()
    folders = {name.split("/")[0] for name in hub.files if "/" in name}
    expected = {"checkpoint": {"last-checkpoint"}, "all_checkpoints": {"checkpoint-1", "checkpoint-2"}}
    assert folders == expected[strategy]
    assert not [name for name in hub.files if "_iau" in name or "memory" in name]
    assert b"gradient_sum." not in hub.sent


@pytest.mark.parametrize("kind", ["plain", "unlearning"])
@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_memory_in_a_checkpoint_is_not_uploaded(hub: FakeHub, tmp_path: Path, kind: str, strategy: str) -> None:
    """The Trainer uploads the whole checkpoint folder with these strategies, so a memory in it is refused."""

    class Saving(IAUCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stray = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "_iau"
            stray.mkdir(parents=True)
            (stray / "memory.json").write_text("{}")

    settings = {"hub_model_id": "me/model", "hub_token": TOKEN, "push_to_hub": True, "hub_strategy": strategy}
    args = arguments(tmp_path / "model", save_strategy="steps", save_steps=1, **settings)
    trainer_class = {"plain": Trainer, "unlearning": UnlearningTrainer}[kind]
    trainer = trainer_class(
        model=bert(),
        args=args,
        train_dataset=as_dataset(text_rows()),
        data_collator=pad_right(),
        callbacks=[Saving(WITH_CURVATURE)],
    )
    with pytest.raises(PublishError, match=r"checkpoint-1.*1 private files.*_iau/memory\.json"):
        trainer.train()
    trainer._finish_current_push()
    assert not hub.files


@pytest.mark.parametrize("place", ["sub/_iau/memory.json", "sub/memory-" + "0" * 32 + ".safetensors", "memory.json"])
def test_a_memory_that_would_be_pushed_is_refused(hub: FakeHub, tmp_path: Path, place: str) -> None:
    trainer = trainer_on(tmp_path / "model", callbacks=[])
    stray = tmp_path / "model" / place
    stray.parent.mkdir(parents=True, exist_ok=True)
    stray.write_bytes(b"gradients")
    with pytest.raises(PublishError, match="private files of hf_iau"):
        trainer.push_to_hub()
    assert not hub.requests


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_missing_or_wrong_token(hub: FakeHub, tmp_path: Path) -> None:
    for token in (None, "hf_wrong"):
        trainer = trainer_on(tmp_path / "model", callbacks=[], hub_token=token)
        with pytest.raises(PublishError, match=r"me/model \(401\): run `hf auth login`"):
            trainer.push_to_hub()
        with pytest.raises(PublishError, match="401"):
            trainer_on(tmp_path / "model", callbacks=[], hub_token=token, push_to_hub=True)
    assert not hub.files


def test_a_token_that_may_not_write(hub: FakeHub, tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path / "model", callbacks=[])
    hub.refuse = 403
    with pytest.raises(PublishError, match=r"may not write to me/model \(403\)"):
        trainer.push_to_hub()
    assert not hub.files


@pytest.mark.parametrize("where", ["/preupload/", "/large/", "/commit/", "/api/repos/create"])
def test_a_connection_that_breaks(hub: FakeHub, tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    trainer = trainer_on(tmp_path / "model", callbacks=[])
    hub.drop = where
    with pytest.raises(PublishError, match="connection to the Hub broke while pushing to me/model"):
        trainer.push_to_hub()
    assert not hub.files and not hub.commits
    tries = sum(where in request for request in hub.requests)
    assert tries > 1 or where in ("/commit/", "/api/repos/create")  # the others are retried by huggingface_hub
    hub.drop = None
    trainer.push_to_hub()
    assert "model.safetensors" in hub.files


def test_a_broken_hub_and_no_network(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_on(tmp_path / "model", callbacks=[])
    hub.refuse = 500
    with pytest.raises(PublishError, match="answered 500"):
        trainer.push_to_hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE"):
        trainer.push_to_hub()


def test_other_errors_keep_their_kind(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_on(tmp_path / "model", callbacks=[])
    monkeypatch.setattr(trainer, "create_model_card", lambda **kwargs: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        trainer.push_to_hub()


def test_a_report_that_tells_of_single_rows_is_not_pushed(hub: FakeHub, tmp_path: Path) -> None:
    trainer = trainer_on(tmp_path)
    trainer.train()
    report = trainer.unlearn(forget_indices=[3], config=IAUConfig(scale=0.1, damping=0.1)).report
    report.save(tmp_path)
    with pytest.raises(PublishError, match=r"would publish report\.json, the report of a request of so few rows"):
        trainer.push_to_hub()
    for path in tmp_path.glob("report.*"):
        path.rename(tmp_path / "_iau" / path.name)
    trainer.push_to_hub()
