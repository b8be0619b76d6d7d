"""Only the adapter forgets: the base stays, bit for bit, and the adapter still is a plain PEFT adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import as_dataset, bert, bert_tokens, language_rows, llama, pad_right, rows_of, text_rows, vit
from torch import nn
from unlearning_trainers import FORGET, WITH_CURVATURE, make_trainer, parameters_of, state_of

import hf_iau
from hf_iau import (
    GradientMemory,
    IAUCallback,
    IAUConfig,
    MemoryMismatchError,
    UnsupportedModelError,
    check_row_gradients,
)

STEP = IAUConfig(scale=0.1, damping=1.0, retain_weight=0.01)
BERT: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}


def adapted(base: nn.Module, config: Any, *, seed: int = 0) -> PeftModel:
    """`base` with adapters whose every weight matters (PEFT starts some at zero)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(base, copy.deepcopy(config))
        for parameter in model.parameters():
            if parameter.requires_grad and not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.2)
    return model


LORA: dict[str, tuple[Callable[[], nn.Module], str, LoraConfig]] = {
    "bert": (bert, "bert", LoraConfig(r=2, lora_alpha=4, **BERT)),
    "bert, rank-stabilised": (bert, "bert", LoraConfig(r=2, lora_alpha=4, use_rslora=True, lora_dropout=0.1, **BERT)),
    "llama": (llama, "llama", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")),
    "vit": (vit, "vit", LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])),
    "bert, weight-decomposed": (bert, "bert", LoraConfig(r=2, use_dora=True, **BERT)),
}


@pytest.mark.parametrize("case", LORA)
def test_training_and_unlearning_move_the_adapter_alone(case: str, tmp_path: Path) -> None:
    build, family, config = LORA[case]
    model = adapted(build(), config)
    start = state_of(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainer = make_trainer(tmp_path, family, model=model, callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    assert trainer.memory is not None and set(trainer.memory.parameters) == trained
    assert trainer.memory.gradient_sum is not None and set(trainer.memory.gradient_sum) == trained
    before = state_of(model)
    result = trainer.unlearn(forget_indices=FORGET, config=STEP)
    after = state_of(model)
    for name in after:
        if name in trained:
            assert not torch.equal(after[name], before[name]), name
        else:
            assert torch.equal(after[name], start[name]), name
    # Every adapter matrix has Kronecker factors; only DoRA's magnitudes are no matrices.
    assert trainer.memory.curvature is not None
    kinds = {name: layer["kind"] for layer in trainer.memory.curvature.layers() for name in layer["parameters"]}
    assert kinds.keys() == trained
    assert all(kind == "kronecker" for name, kind in kinds.items() if "lora_magnitude" not in name), kinds
    check = check_row_gradients(model, as_dataset(rows_of(family, 8)), data_collator=pad_right())
    assert check.passed, check.failing

    trainer.save_model()
    loaded = PeftModel.from_pretrained(build(), str(tmp_path)).eval()
    inputs = pad_right()(rows_of(family, 4))
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)["logits"], model.eval()(**inputs)["logits"])
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs)["logits"], model(**inputs)["logits"], rtol=1e-4, atol=1e-4)
    result.revert()
    assert all(torch.equal(value, before[name]) for name, value in state_of(model).items())


def test_the_gradient_sum_equals_a_loop_over_rows(tmp_path: Path) -> None:
    model = adapted(bert(), LORA["bert"][2]).double()
    rows = text_rows(12)
    memory = hf_iau.gather(model, as_dataset(rows), data_collator=pad_right(), config=WITH_CURVATURE)
    assert memory.gradient_sum is not None
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    model.eval()
    for row in rows:
        inputs = pad_right()([row])
        loss = F.cross_entropy(model(input_ids=inputs["input_ids"]).logits, inputs["labels"], reduction="sum")
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            expected[name] += gradient
    for name, total in expected.items():
        torch.testing.assert_close(memory.gradient_sum[name], total, rtol=1e-10, atol=1e-12)


# --- other kinds ------------------------------------------------------------------------------------------------------

_PLAIN = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
_PROMPT = {"task_type": "SEQ_CLS", "num_virtual_tokens": 3}
OTHERS: dict[str, Any] = {
    "LORA with biases": LoraConfig(r=2, bias="lora_only", **BERT),
    "LORA on embeddings": LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["word_embeddings", "query"]),
    "LORA from the base's singular vectors": LoraConfig(r=2, init_lora_weights="pissa", **BERT),
    "LORA with new tokens": LoraConfig(r=2, trainable_token_indices={"word_embeddings": [2, 3]}, **BERT),
    "IA3": peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]
    ),
    "LOHA": peft.LoHaConfig(r=2, **_PLAIN),
    "LOKR": peft.LoKrConfig(r=2, **_PLAIN),
    "OFT": peft.OFTConfig(r=2, oft_block_size=0, **_PLAIN),
    "BOFT": peft.BOFTConfig(boft_block_size=4, **_PLAIN),
    "VERA": peft.VeraConfig(r=2, **_PLAIN),
    "FOURIERFT": peft.FourierFTConfig(n_frequency=10, **_PLAIN),
    "HRA": peft.HRAConfig(r=2, **_PLAIN),
    "RANDLORA": peft.RandLoraConfig(r=2, **_PLAIN),
    "VBLORA": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, **_PLAIN),
    "MISS": peft.MissConfig(r=2, **_PLAIN),
    "ROAD": peft.RoadConfig(group_size=2, **_PLAIN),
    "SHIRA": peft.ShiraConfig(r=2, random_seed=1, **_PLAIN),
    "C3A": peft.C3AConfig(block_size=4, **_PLAIN),
    "LN_TUNING": peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"]),
    "TRAINABLE_TOKENS": peft.TrainableTokensConfig(
        task_type="SEQ_CLS", token_indices=[2, 3], target_modules=["word_embeddings"]
    ),
    "PROMPT_TUNING": peft.PromptTuningConfig(**_PROMPT),
    "PREFIX_TUNING": peft.PrefixTuningConfig(**_PROMPT),
    "P_TUNING": peft.PromptEncoderConfig(encoder_hidden_size=8, **_PROMPT),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_adapters(kind: str, tmp_path: Path) -> None:
    model = adapted(bert(), OTHERS[kind])
    start = state_of(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rows = as_dataset(rows_of("bert", 8))
    check = check_row_gradients(model, rows, data_collator=pad_right(), rows=6, batch_sizes=(3,))
    assert check.passed, check.failing
    memory = hf_iau.gather(model, rows, data_collator=pad_right(), config=WITH_CURVATURE)
    trainer = make_trainer(tmp_path, "bert", model=model, rows=rows_of("bert", 8), memory=memory)
    trainer.unlearn(forget_indices=[1, 4], config=STEP)
    now = state_of(model)
    moved = {name for name in now if not torch.equal(now[name], start[name])}
    assert moved and moved <= trained
    assert memory.gradient_sum is not None
    with_gradient = {name for name, total in memory.gradient_sum.items() if float(total.norm()) > 1e-6}
    assert moved >= with_gradient, with_gradient - moved
    if kind == "LORA from the base's singular vectors":
        return  # its base weights are changed when the adapter is made, which PEFT does not save
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(bert(), str(tmp_path / "adapter")).eval()
    inputs = pad_right()(text_rows(4))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)["logits"], model.eval()(**inputs)["logits"], rtol=1e-6, atol=1e-6)


def test_every_kind_that_is_let_through_is_tested() -> None:
    from hf_iau.data.adapters import SUPPORTED

    assert {kind.split()[0] for kind in OTHERS} == SUPPORTED
    assert {kind.value for kind in peft.PeftType} >= SUPPORTED


UNSUPPORTED = {
    "ADALORA": (peft.AdaLoraConfig(total_step=10, init_r=3, target_r=2, **BERT), "orthogonality"),
    "OSF": (peft.OSFConfig(task_type="SEQ_CLS", target_modules=["query"]), "not tested"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_other_kinds_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    config, reason = UNSUPPORTED[kind]
    model = get_peft_model(bert(), config)
    trainer = make_trainer(tmp_path, model=model, callbacks=[IAUCallback(WITH_CURVATURE)])
    with pytest.raises(UnsupportedModelError, match=rf"{kind}.*{reason}.*merge_and_unload"):
        trainer.train()
    with pytest.raises(UnsupportedModelError, match=kind):
        check_row_gradients(model, as_dataset(text_rows(4)), data_collator=pad_right())


# --- merged, disabled, several ----------------------------------------------------------------------------------------


@pytest.fixture
def gathered(tmp_path: Path) -> Any:
    model = adapted(bert(), LORA["bert"][2])
    memory = hf_iau.gather(model, as_dataset(text_rows(12)), data_collator=pad_right(), config=WITH_CURVATURE)
    return make_trainer(tmp_path, "bert", model=model, memory=memory)


def test_merged_adapters_are_refused(gathered: Any) -> None:
    gathered.model.merge_adapter()
    before = state_of(gathered.model)
    for ask in (lambda: gathered.unlearn(forget_indices=FORGET, config=STEP), gathered.gather):
        with pytest.raises(UnsupportedModelError, match=r"'default' is merged.*unmerge_adapter"):
            ask()
    assert all(torch.equal(value, before[name]) for name, value in state_of(gathered.model).items())


def test_a_merged_copy_can_be_gathered_and_forgets(tmp_path: Path) -> None:
    merged = adapted(bert(), LORA["bert"][2]).merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
    before = parameters_of(merged)
    memory = hf_iau.gather(merged, as_dataset(text_rows(12)), data_collator=pad_right(), config=WITH_CURVATURE)
    make_trainer(tmp_path, "bert", model=merged, memory=memory).unlearn(forget_indices=FORGET, config=STEP)
    assert any(not torch.equal(value, before[name]) for name, value in parameters_of(merged).items())


def test_disabled_adapters_are_refused(gathered: Any) -> None:
    with gathered.model.disable_adapter(), pytest.raises(UnsupportedModelError, match="disabled"):
        gathered.unlearn(forget_indices=FORGET, config=STEP)
    assert gathered.unlearn(forget_indices=FORGET, config=STEP).applied


def test_of_several_adapters_the_active_one_forgets(tmp_path: Path) -> None:
    model = adapted(bert(), LORA["bert"][2])
    model.add_adapter("other", LoraConfig(r=2, **BERT))
    trainer = make_trainer(tmp_path, "bert", model=model, callbacks=[IAUCallback(WITH_CURVATURE)])
    trainer.train()
    before = state_of(model)
    model.set_adapter("other")
    with pytest.raises(MemoryMismatchError, match=r"'default' active but 'other'.*set_adapter\('default'\)"):
        trainer.unlearn(forget_indices=FORGET, config=STEP)
    model.set_adapter("default")
    trainer.unlearn(forget_indices=FORGET, config=STEP)
    moved = {name for name, value in state_of(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(".other." in name for name in moved)
    trainer.save_model()
    assert GradientMemory.load(tmp_path).model["adapters"] == "default"


def test_two_active_adapters_forget_together(tmp_path: Path) -> None:
    model = adapted(bert(), without_modules(LORA["bert"][2]))  # of a saved module only one copy can be active
    model.add_adapter("other", LoraConfig(r=3, target_modules=["key"]))
    model.base_model.set_adapter(["default", "other"])
    memory = hf_iau.gather(model, as_dataset(text_rows(12)), data_collator=pad_right(), config=WITH_CURVATURE)
    assert memory.model["adapters"] == "default, other"
    before = parameters_of(model)
    make_trainer(tmp_path, "bert", model=model, memory=memory).unlearn(forget_indices=FORGET, config=STEP)
    moved = [name for name, value in parameters_of(model).items() if not torch.equal(value, before[name])]
    assert any(".default." in name for name in moved) and any(".other." in name for name in moved)


def test_adapters_that_the_model_itself_holds(tmp_path: Path) -> None:
    """`model.add_adapter(...)` of Transformers, without a `PeftModel` around."""
    model: Any = bert()
    model.add_adapter(LORA["bert"][2])
    trainer = make_trainer(tmp_path, "bert", model=model, callbacks=[IAUCallback(WITH_CURVATURE)])
    start = parameters_of(model)
    trainer.train()
    assert trainer.memory is not None and trainer.memory.model["adapters"] == "default"
    trainer.unlearn(forget_indices=FORGET, config=STEP)
    trained = set(trainer.memory.parameters)
    moved = {name for name, value in parameters_of(model).items() if not torch.equal(value, start[name])}
    assert moved == trained and all("lora" in name or "classifier" in name for name in trained)


def test_narrow_base_weights_under_wide_adapters() -> None:
    """A bf16 base with the float32 adapters that PEFT makes: sums and Kronecker factors hold to the base's rounding."""
    narrow = adapted(bert().bfloat16(), without_modules(LORA["bert"][2]))
    rows, config = as_dataset(text_rows(24)), WITH_CURVATURE
    assert {p.dtype for p in narrow.parameters() if p.requires_grad} == {torch.float32}
    check = check_row_gradients(narrow, rows, data_collator=pad_right())
    assert check.passed and check.tolerance > 1e-3, check
    memory = hf_iau.gather(narrow, rows, data_collator=pad_right(), config=config)
    assert memory.curvature is not None and set(memory.curvature.coverage()) == {"kronecker"}


def without_modules(config: LoraConfig) -> LoraConfig:
    """The adapters alone."""
    return replace(config, task_type=None, modules_to_save=None)


def test_prefixes_of_a_language_model(tmp_path: Path) -> None:
    model = adapted(llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    rows = as_dataset(language_rows(12))
    assert check_row_gradients(model, rows, data_collator=pad_right()).passed
    memory = hf_iau.gather(model, rows, data_collator=pad_right(), config=WITH_CURVATURE)
    before = parameters_of(model)
    make_trainer(tmp_path, "llama", model=model, memory=memory).unlearn(forget_indices=FORGET, config=STEP)
    moved = {name for name, value in parameters_of(model).items() if not torch.equal(value, before[name])}
    assert moved == set(memory.parameters)


def test_prompts_of_a_language_model_are_refused() -> None:
    model = adapted(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING for task_type=CAUSAL_LM"):
        hf_iau.gather(model, as_dataset(language_rows(12)), data_collator=pad_right(), config=WITH_CURVATURE)


def test_token_classifier(tmp_path: Path) -> None:
    config = LoraConfig(task_type="TOKEN_CLS", r=2, target_modules=["query", "value"])
    model = adapted(bert_tokens(), config)
    rows = as_dataset(rows_of("bert-tokens", 8))
    assert check_row_gradients(model, rows, data_collator=pad_right()).passed
