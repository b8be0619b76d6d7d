"""`UnlearningSFTTrainer` on TRL itself: numbers are the user's, whatever TRL drops, cuts and tokenises."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from tiny_models import as_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig, SFTTrainer
from unlearning_trainers import WITH_CURVATURE, parameters_of

from hf_iau import GradientMemory, IAUCallback, IAUConfig, UnlearningTrainer, UnsupportedModelError
from hf_iau.trainer.callback import refuse_unsupported_engines
from hf_iau.trl import UnlearningSFTTrainer

GIVEN = IAUConfig(scale=0.1, damping=1.0)
WORDS = [f"w{i}" for i in range(30)]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a> {% generation %}{{ m['content'] }} <e>"
    "{% endgeneration %}{% else %}<u> {{ m['content'] }} {% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<e>", "<u>", "<a>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<e>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, initializer_range=0.2, pad_token_id=0, max_position_embeddings=64, **sizes)
    return LlamaForCausalLM(config)


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(rng.choice(WORDS, size=count))


def rows(kind: str, n: int = 24, seed: int = 0) -> datasets.Dataset:
    """Every sixth prompt fills `max_length` alone, so that its row is dropped; every fifth row is cut."""
    rng, made = np.random.default_rng(seed), []
    for i in range(n):
        prompt = words(rng, 14 if kind == "completion" and i % 6 == 3 else 4)
        answer = words(rng, 12 if i % 5 == 1 else 3)
        if kind == "completion":
            made.append({"prompt": prompt + " ", "completion": answer})
        elif kind == "messages":
            made.append({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]})
        else:
            made.append({"text": f"{prompt} {answer}"})
    return datasets.Dataset.from_list(made).add_column("person", [f"p{i}" for i in range(n)])


def arguments(folder: Path, **settings: Any) -> SFTConfig:
    defaults: dict[str, Any] = {
        "max_length": 10,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 3,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    return SFTConfig(str(folder), **(defaults | settings))


def sft(folder: Path, kind: str, trainer_class: Any = UnlearningSFTTrainer, **kwargs: Any) -> Any:
    settings = {"assistant_only_loss": kind == "messages"} | kwargs.pop("settings", {})
    given: dict[str, Any] = {
        "model": model(),
        "args": arguments(folder, **settings),
        "train_dataset": rows(kind),
        "eval_dataset": rows(kind, 8, seed=1),
        "processing_class": tokenizer(),
        "callbacks": [IAUCallback(WITH_CURVATURE)],
    }
    return trainer_class(**(given | kwargs))


@pytest.fixture(params=["completion", "messages", "text", "LoRA"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_request_is_that_of_the_tokenised_rows(tmp_path: Path, kind: str) -> None:
    """The same weights as when the rows are prepared by hand, and named by their places among what is left."""
    shape = "completion" if kind == "LoRA" else kind
    more = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"])} if kind == "LoRA" else {}
    trainer = sft(tmp_path / "a", shape, **more)
    given = rows(shape)
    left = [i for i in range(24) if not (shape == "completion" and i % 6 == 3)]
    assert (
        len(trainer.train_dataset) == len(left) and trainer.view.rows.numbers_at(np.arange(len(left))).tolist() == left
    )
    trainer.train()
    result = trainer.unlearn(given.select([10, 4, 23]), held_out_dataset=rows(shape, 6, seed=2), config=GIVEN)
    assert result.report.counts["forget_rows"] == 3 and result.report.counts["held_out_rows"] > 0
    by_number = sft(tmp_path / "b", shape, **more)
    by_number.train()
    by_number.unlearn(forget_indices=[10, 4, 23], config=GIVEN)

    other = sft(tmp_path / "c", shape, trainer_class=SFTTrainer, **(more | {"callbacks": None}))
    by_hand = UnlearningTrainer(
        model=other.model,
        args=other.args,
        train_dataset=other.train_dataset,
        eval_dataset=other.eval_dataset,
        data_collator=other.data_collator,
        callbacks=[IAUCallback(WITH_CURVATURE)],
    )
    by_hand.train()
    by_hand.unlearn(forget_indices=[left.index(i) for i in (10, 4, 23)], config=GIVEN)
    expected = parameters_of(by_hand.model)
    for found in (trainer, by_number):
        for name, value in parameters_of(found.model).items():
            assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-6), name


def test_dropped_and_cut_rows_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_iau"):
        trainer = sft(tmp_path, "completion")
    assert trainer.view.rows.dropped.tolist() == [3, 9, 15, 21]
    cut = [i for i in range(24) if i % 5 == 1 and i % 6 != 3]
    assert sorted(trainer.view.rows.cut.tolist()) == cut
    assert f"{len(cut)} of the training rows are longer than max_length=10" in caplog.text
    trainer.train()
    before = parameters_of(trainer.model)
    with pytest.warns(UserWarning, match="2 of the 2 requested rows were dropped by SFTTrainer"):
        assert not trainer.unlearn(forget_indices=[3, 21], config=GIVEN).applied
    assert all(value.equal(before[name]) for name, value in parameters_of(trainer.model).items())
    report = trainer.unlearn(forget_indices=[3, 6, 7], config=GIVEN).report
    assert report.counts["forget_rows"] == 2 and report.counts["left_out_rows"] == 1
    assert any("1 of the 3 requested rows were dropped" in sentence for sentence in report.warnings)
    assert any("1 of the 3 requested rows were cut by SFTTrainer" in sentence for sentence in report.warnings)


def test_a_shuffled_data_set_keeps_its_numbers(tmp_path: Path) -> None:
    trainer = sft(tmp_path, "text", settings={"shuffle_dataset": True})
    numbers = trainer.view.rows.numbers_at(np.arange(24))
    assert sorted(numbers.tolist()) == list(range(24)) != numbers.tolist()
    person = trainer.train_dataset["person"]
    assert [f"p{number}" for number in numbers] == list(person)


@pytest.mark.parametrize(
    "packing",
    [
        {"packing": True, "packing_strategy": "wrapped"},
        {"packing": True, "packing_strategy": "bfd"},
        {"padding_free": True, "max_length": None},
        {"eval_packing": True},
    ],
    ids=str,
)
def test_packing_is_refused_before_training(tmp_path: Path, packing: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModelError, match="puts several rows into one"):
        sft(tmp_path, "text", settings=packing)
    with pytest.raises(UnsupportedModelError, match="puts several rows into one"):
        IAUCallback().on_train_begin(arguments(tmp_path, **packing), None, None, model=model())  # type: ignore[arg-type]


def test_losses_that_are_none_of_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="loss_type='dft'"):
        sft(tmp_path, "text", settings={"loss_type": "dft"})
    plain = sft(tmp_path, "text", trainer_class=SFTTrainer, settings={"loss_type": "dft"})
    with pytest.raises(UnsupportedModelError, match="loss_type='dft'"):
        plain.train()


def test_a_callback_on_a_plain_sft_trainer_and_a_fresh_process(tmp_path: Path) -> None:
    plain = sft(tmp_path, "completion", trainer_class=SFTTrainer)
    plain.train()
    plain.save_model()
    memory = GradientMemory.load(tmp_path)
    assert memory.n_rows == 20
    fresh = LlamaForCausalLM.from_pretrained(tmp_path)
    trainer = sft(tmp_path, "completion", model=fresh)
    result = trainer.unlearn(forget_indices=[10, 4, 23], config=GIVEN)
    ours = sft(tmp_path / "ours", "completion")
    ours.train()
    ours.unlearn(forget_indices=[10, 4, 23], config=GIVEN)
    assert result.applied
    expected = parameters_of(ours.model)
    for name, value in parameters_of(trainer.model).items():
        assert torch.allclose(value, expected[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("config", [DPOConfig, KTOConfig, GRPOConfig, RewardConfig])
def test_other_trainers_are_refused_by_name(tmp_path: Path, config: Any) -> None:
    args = config(str(tmp_path), use_cpu=True, bf16=False, report_to="none")
    name = config.__name__.replace("Config", "Trainer")
    with pytest.raises(UnsupportedModelError, match=f"{name} cannot forget rows: its loss"):
        refuse_unsupported_engines(args)
    # A plain trainer with these arguments and the callback ends before it trains.
    trainer = Trainer(
        model(), args, train_dataset=as_dataset([{"input_ids": [1], "labels": [1]}]), callbacks=[IAUCallback()]
    )
    with pytest.raises(UnsupportedModelError, match=name):
        trainer.train()


def test_sentence_transformers_is_refused_by_name(tmp_path: Path) -> None:
    name = {"__module__": "sentence_transformers.sentence_transformer.training_args"}
    args = type("SentenceTransformerTrainingArguments", (TrainingArguments,), name)(str(tmp_path), use_cpu=True)
    with pytest.raises(
        UnsupportedModelError, match="SentenceTransformerTrainer cannot forget rows: its loss is a module"
    ):
        refuse_unsupported_engines(args)
