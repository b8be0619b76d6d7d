"""PEFT adapters: which kinds are known to work, and whether the trained one takes part in the model's output at all."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_iau.errors import UnsupportedModelError

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
    owner = _owner(model)
    if owner is None:
        return ()
    active = getattr(owner, "active_adapters", None)
    active = active() if callable(active) else active
    return (active,) if isinstance(active, str) else tuple(active or ())


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters that are not known to work, and those that do not take part in the model's output.

    Raises:
        UnsupportedModelError: an adapter is of an untested kind, merged into the base weights, or disabled.
    """
    owner = _owner(model)
    if owner is None:
        return
    for name in active_adapters(model):
        config = owner.peft_config[name]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        reason = _REASONS.get(kind, None if kind in SUPPORTED else "it was not tested")
        option = next((option for option in _LORA_OPTIONS if getattr(config, option, None)), None)
        task = getattr(config.task_type, "value", config.task_type)
        named = kind
        if kind == "LORA" and option is not None:
            named, reason = f"LORA with {option}", "its effect depends on the row"
        elif kind in _VIRTUAL_TOKENS and task not in _TASKS_WITHOUT_TOKENS:
            named, reason = f"{kind} for task_type={task}", "its virtual tokens shift the labels of the tokens"
        if reason is None:
            continue
        raise UnsupportedModelError(
            f"Adapter {name!r} is of kind {named}, which is not supported: {reason}. Train LoRA (or one of "
            f"{', '.join(sorted(SUPPORTED - {'LORA'}))}), or merge it with model.merge_and_unload() and gather from the "
            "merged model with requires_grad=True on the weights that are to forget."
        )
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged:
            raise UnsupportedModelError(
                f"Adapter {module.merged_adapters[0]!r} is merged into the base weights (layer {name!r}), so its own "
                "weights have no gradient and moving them would change nothing. Call model.unmerge_adapter(), or, since "
                "that leaves rounding in the base weights, load base model and adapter anew "
                "(PeftModel.from_pretrained(base, folder, is_trainable=True))."
            )
        if module.disable_adapters:
            raise UnsupportedModelError(
                f"The adapters are disabled (layer {name!r}), so their weights have no gradient. Leave the "
                "disable_adapter() context, or call model.enable_adapter_layers()."
            )


def _owner(model: nn.Module) -> Any:
    """The outermost module that holds adapters' configurations."""
    return next((module for module in model.modules() if isinstance(getattr(module, "peft_config", None), dict)), None)
