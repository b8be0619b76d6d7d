"""PEFT adapters: which are active, and which kinds are known to work."""

from __future__ import annotations

from typing import Any

from torch import nn

# By the names of `peft.PeftType`, as strings, because older versions lack some. Each is in tests/peft.
SUPPORTED = frozenset(
    {"LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "FOURIERFT", "HRA", "RANDLORA", "VBLORA", "MISS", "ROAD"}
    | {"SHIRA", "C3A", "LN_TUNING", "TRAINABLE_TOKENS", "PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"}
)
_REASONS = {
    "ADALORA": "its loss has an orthogonality penalty, which is no sum over rows",
    "CPT": "its loss weights the tokens of a prompt",
    "POLY": "it picks its adapters by task",
    "MULTITASK_PROMPT_TUNING": "it picks its prompts by task",
    "XLORA": "it mixes several adapters by row",
}
# Options of LoRA that make adapters depend on the row.
_LORA_OPTIONS = ("alora_invocation_tokens", "arrow_config")
# Virtual tokens in front of a row are outputs without a label, and the last of them predicts the row's first token.
_VIRTUAL_TOKENS = ("PROMPT_TUNING", "P_TUNING")
_TASKS_WITHOUT_TOKENS = ("SEQ_CLS",)


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Names of the adapters that `model` uses now, PEFT's or Transformers' own `add_adapter`; () without PEFT."""
    owner = adapter_owner(model)
    if owner is None:
        return ()
    active = getattr(owner, "active_adapters", None)
    active = active() if callable(active) else active
    return (active,) if isinstance(active, str) else tuple(active or ())


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """The configurations of the active adapters, by name."""
    owner = adapter_owner(model)
    return {} if owner is None else {name: owner.peft_config[name] for name in active_adapters(model)}


def unsupported_reason(config: Any) -> tuple[str, str] | None:
    """What kind of adapter a PEFT configuration makes and why it is not supported; None where it is."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    option = next((option for option in _LORA_OPTIONS if getattr(config, option, None)), None)
    task = getattr(config.task_type, "value", config.task_type)
    if kind == "LORA" and option is not None:
        return f"LORA with {option}", "its effect depends on the row"
    if kind in _VIRTUAL_TOKENS and task not in _TASKS_WITHOUT_TOKENS:
        return f"{kind} for task_type={task}", "its virtual tokens shift the labels of the tokens"
    if kind in SUPPORTED:
        return None
    return kind, _REASONS.get(kind, "it was not tested")


def adapter_owner(model: nn.Module) -> Any:
    """The outermost module that holds adapters' configurations; None without PEFT."""
    return next((module for module in model.modules() if isinstance(getattr(module, "peft_config", None), dict)), None)
