"""`python -m benchmarks.memory --out DIR`: peak memory of gathering and of a request, and estimates.

The bound is training's own peak, one float32 copy of the trained weights and the factors; with a memory on another
device than the model's, training's own peak. `eigenvectors` is what is held beside all that while those of the largest
factor are found, which does not grow with the number of layers.

Bytes are those of PyTorch's allocator: on a CPU its events, on CUDA `max_memory_allocated`. Rows are random tokens, for
bytes and seconds do not depend on what is in them. Seconds are taken in a second run, without the profiler.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments, default_data_collator, set_seed

from benchmarks.hardware import hardware
from hf_iau import Estimate, GatherConfig, IAUConfig, UnlearningTrainer, estimate
from hf_iau.curvature.eigenvectors import eigenvector_bytes
from hf_iau.curvature.layers import plan_layers
from hf_iau.utils.timing import peak_allocated_bytes

_LENGTH, _VOCABULARY, _CLASSES = 32, 2000, 10
_ROWS, _HELD_OUT, _FORGET = 400, 200, 40
_MODELS = ("full", "lora")


def main(
    out: Annotated[Path, typer.Option(help="Folder for memory.json and memory.md.")],
    models: Annotated[str, typer.Option(help=f"Which of {', '.join(_MODELS)}, separated by commas.")] = ",".join(
        _MODELS
    ),
    width: Annotated[int, typer.Option(help="Hidden size of the BERT-style model.", min=64)] = 256,
    layers: Annotated[int, typer.Option(help="Its layers.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows a batch.", min=1)] = 16,
    eval_batch_size: Annotated[
        int | None, typer.Option(help="Rows a batch without gradients; default: as with them, as in the Trainer.")
    ] = None,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Gradient checkpointing.")] = False,
    memory_device: Annotated[str | None, typer.Option(help="As in GatherConfig.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Measure peaks, and compare forecasts with them."""
    torch.set_num_threads(threads)
    names = models.split(",")
    if unknown := sorted(set(names) - set(_MODELS)):
        raise typer.BadParameter(f"{', '.join(unknown)}: choose among {', '.join(_MODELS)}.", param_hint="--models")
    config = GatherConfig(batch_size=batch_size, memory_device=memory_device, curvature_rows=128, progress=False)
    results = []
    for name in names:
        set_seed(0)
        model = _model(name, width, layers)
        if checkpointing:
            model.gradient_checkpointing_enable()
        results.append({"model": name, **_measure(model, config, batch_size, eval_batch_size or batch_size)})
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.memory", *sys.argv[1:]])
    settings = {"width": width, "layers": layers, "memory_device": memory_device}
    about = {"command": command, "hardware": hardware(), "settings": settings}
    (out / "memory.json").write_text(json.dumps(about | {"results": results}, indent=1))
    table = _table(results)
    (out / "memory.md").write_text(f"{table}\n\n`{command}`\n")
    typer.echo(table)


def _measure(model: nn.Module, config: GatherConfig, batch_size: int, eval_batch_size: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    train, held_out = _rows(_ROWS, 0), _rows(_HELD_OUT, 1)

    def trainer(memory: Any = None) -> UnlearningTrainer:
        folder = tempfile.mkdtemp()
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=eval_batch_size,
            max_steps=6,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        return UnlearningTrainer(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=default_data_collator,
            memory=memory,
        )

    wishes = IAUConfig(multi_step=False)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    own = 0 if device.type == "cuda" else weights  # what the profiler of the CPU does not see, being there before
    training = own + peak_allocated_bytes(lambda: trainer().train(), device)
    model.zero_grad(set_to_none=True)
    forecast: Estimate = estimate(
        model,
        train,
        config,
        method_config=wishes,
        request_rows=_FORGET,
        held_out_rows=_HELD_OUT,
        prediction_batch_size=eval_batch_size,
        data_collator=default_data_collator,
    )
    gathered: list[Any] = []
    gathering = own + peak_allocated_bytes(lambda: gathered.append(trainer().gather(config)), device)
    memory = gathered[0]
    held = own + (memory.nbytes() if own else 0)
    forget = np.arange(_FORGET)

    def request() -> None:
        trainer(memory).unlearn(forget_indices=forget, config=wishes).revert()

    requesting = held + peak_allocated_bytes(request, device)
    seconds = {"gather": _seconds(lambda: trainer().gather(config)), "unlearn": _seconds(request)}
    factors = memory.curvature.nbytes()
    # With a memory device, what belongs to the memory is not on the device that trains.
    kept_away = device.type == "cuda" and torch.device(config.memory_device or "cuda").type != "cuda"
    return {
        "trainable": trainable,
        "weights": weights,
        "training_peak": training,
        "gathering_peak": gathering,
        "request_peak": requesting,
        "memory": memory.nbytes(),
        "factors": factors,
        "bound": training + (0 if kept_away else 4 * trainable + factors),
        "eigenvectors": eigenvector_bytes(plan_layers(model, kronecker=True, max_factor_size=config.max_factor_size)),
        "seconds": seconds,
        "forecast": forecast.to_dict(),
    }


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _model(name: str, width: int, layers: int) -> nn.Module:
    settings = {
        "vocab_size": _VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "intermediate_size": 4 * width,
        "max_position_embeddings": _LENGTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": _CLASSES,
    }
    model = BertForSequenceClassification(BertConfig(**settings))
    if name == "full":
        return model
    adapters = LoraConfig(task_type="SEQ_CLS", r=16, target_modules=["query", "key", "value", "dense"])
    return get_peft_model(model, copy.deepcopy(adapters))


def _rows(count: int, seed: int) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, _VOCABULARY, (count, _LENGTH))
    labels = rng.integers(0, _CLASSES, count)
    return datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})


def _table(results: list[dict[str, Any]]) -> str:
    lines = ["| MiB | " + " | ".join(str(result["model"]) for result in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    keys = ("weights", "training_peak", "bound", "gathering_peak", "request_peak", "memory", "factors", "eigenvectors")
    for key in keys:
        sizes = [f"{result[key] / 2**20:.1f}" for result in results]
        lines.append(f"| {key.replace('_', ' ')} | " + " | ".join(sizes) + " |")
    for key in ("gathering_peak", "request_peak"):
        held = [_verdict(result[key], result["bound"]) for result in results]
        lines.append(f"| {key.replace('_', ' ')} within the bound | " + " | ".join(held) + " |")
    for key in ("gathering_peak", "request_peak", "memory"):
        sizes = [f"{result['forecast']['bytes'][key] / 2**20:.1f}" for result in results]
        lines.append(f"| forecast {key.replace('_', ' ')} | " + " | ".join(sizes) + " |")
    for key in ("gather", "unlearn"):
        pairs = [f"{result['seconds'][key]:.1f} ({result['forecast']['seconds'][key]:.1f})" for result in results]
        lines.append(f"| seconds of {key} (forecast) | " + " | ".join(pairs) + " |")
    return "\n".join(lines)


def _verdict(peak: int, bound: int) -> str:
    return "yes" if peak <= bound else f"no, {(peak - bound) / 2**20:.1f} above"


if __name__ == "__main__":
    typer.run(main)
