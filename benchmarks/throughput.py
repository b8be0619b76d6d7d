"""`python -m benchmarks.throughput --model llama-lora --size 1b --out DIR`: speed and memory of language models.

Training steps of the Trainer, gathering at the end of training, and requests that forget a share of the sequences, one
after the other on the same model, in the same precision and with the same checkpointing and compiling. Sequences are
random tokens of one length, for bytes and seconds do not depend on what is in them; so the requests are of given length
and damping, and a calibrated one is timed beside them, whose outcome says nothing.

The forget pass is the pass over the forgotten sequences in which their gradients are summed.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from benchmarks.hardware import hardware, peak_process_memory_bytes
from hf_iau import GatherConfig, IAUConfig, UnlearningTrainer

_MODELS = ("llama-lora", "gpt2")
# Hidden size, layers, heads, feed-forward size, vocabulary.
_LLAMA = {"tiny": (64, 2, 4, 192, 512), "small": (256, 4, 4, 768, 4096), "1b": (2048, 16, 32, 8192, 128256)}
_GPT2 = {"tiny": (64, 2, 4, 256, 512), "small": (256, 4, 4, 1024, 4096), "1b": (768, 12, 12, 3072, 50257)}
_WARM_UP = 2  # steps and passes in which kernels are chosen and models compiled
_HELD_OUT = 256


class _Steps(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._started = _now(self.device)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(_now(self.device) - self._started)


def main(
    out: Annotated[Path, typer.Option(help="Folder for throughput.json and throughput.md.")],
    model: Annotated[str, typer.Option(help=f"One of {', '.join(_MODELS)}.")] = "llama-lora",
    size: Annotated[
        str, typer.Option(help="tiny, small, or 1b: a Llama of 1.2 billion weights, or GPT-2 of 124 million.")
    ] = "small",
    sequences: Annotated[int, typer.Option(help="Training sequences.", min=100)] = 20_000,
    share: Annotated[float, typer.Option(help="Share of them to be forgotten.", min=0.001, max=0.5)] = 0.01,
    length: Annotated[int, typer.Option(help="Tokens a sequence.", min=8)] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences a batch.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Training steps.", min=5)] = 20,
    bf16: Annotated[bool, typer.Option("--bf16", help="bf16 autocast, in training and afterwards.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Gradient checkpointing.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile, by the Trainer.")] = False,
    memory_device: Annotated[str | None, typer.Option(help="As in GatherConfig.")] = None,
    curvature_rows: Annotated[int, typer.Option(help="As in GatherConfig.", min=1)] = 1024,
    sample_rows: Annotated[int, typer.Option(help="As in GatherConfig.", min=1)] = 4096,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of weights and tokens.")] = 0,
) -> None:
    """Measure, and say how the forget pass compares with training."""
    if model not in _MODELS or size not in _LLAMA:
        raise typer.BadParameter(f"--model {model} --size {size}: choose among {_MODELS} and {tuple(_LLAMA)}.")
    torch.set_num_threads(threads)
    set_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, words = _model(model, size, length)
    config = GatherConfig(
        precision="bfloat16" if bf16 else "float32",
        memory_device=memory_device,
        curvature_rows=curvature_rows,
        sample_rows=sample_rows,
        progress=False,
    )
    settings = {
        "bf16": bf16,
        "gradient_checkpointing": checkpointing,
        "torch_compile": compiled,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
    }
    results = _measure(network, words, device, config, settings, sequences, share, length, steps, seed)
    out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.throughput", *sys.argv[1:]])
    about = {"command": command, "hardware": hardware(), "model": model, "size": size, "seed": seed, **settings}
    (out / "throughput.json").write_text(json.dumps(about | results, indent=1))
    table = _table(results)
    (out / "throughput.md").write_text(f"{table}\n\n`{command}`\n")
    typer.echo(table)


def _measure(
    model: nn.Module,
    words: int,
    device: torch.device,
    config: GatherConfig,
    settings: dict[str, Any],
    sequences: int,
    share: float,
    length: int,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    train, held_out = _rows(sequences, length, words, seed), _rows(_HELD_OUT, length, words, seed + 1)
    forget = np.random.default_rng(seed).choice(sequences, max(1, round(share * sequences)), replace=False)
    timed = _Steps(device)
    trainer = UnlearningTrainer(
        model=model,
        args=TrainingArguments(
            tempfile.mkdtemp(),
            max_steps=steps,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            report_to="none",
            use_cpu=device.type == "cpu",
            **settings,
        ),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        callbacks=[timed],
    )
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}

    def timing(name: str, work: Any) -> Any:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = _now(device)
        done = work()
        seconds[name] = _now(device) - started
        peaks[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_process_memory_bytes()
        return done

    timing("train", trainer.train)
    memory = timing("gather", lambda: trainer.gather(config))
    memory.visits = None  # the few steps do not reach all rows that are to go
    given = IAUConfig(scale=1e-3, damping=1.0)
    # The first requests choose kernels; the second is the one that counts.
    timing("first unlearn", lambda: trainer.unlearn(forget_indices=forget, config=given)).revert()
    output = timing("unlearn, given step", lambda: trainer.unlearn(forget_indices=forget, config=given))
    output.revert()
    calibrated = timing(
        "unlearn, calibrated, one step",
        lambda: trainer.unlearn(forget_indices=forget, config=IAUConfig(multi_step=False)),
    )
    step = float(np.median(timed.seconds[_WARM_UP:]))
    tokens = settings["per_device_train_batch_size"] * length
    training, forgetting = tokens / step, len(forget) * length / output.report.seconds["gradient"]
    return {
        "weights": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "sequences": sequences,
        "forgotten": len(forget),
        "length": length,
        "coverage": memory.curvature.coverage() if memory.curvature else {},
        "memory_bytes": memory.nbytes(),
        "training_tokens_per_second": training,
        "forget_pass_tokens_per_second": forgetting,
        "ratio": forgetting / training,
        "seconds": seconds,
        "phases": {"given": output.report.seconds, "calibrated": calibrated.report.seconds},
        "peak_bytes": peaks,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _model(name: str, size: str, length: int) -> tuple[nn.Module, int]:
    """A model with random weights, and the size of its vocabulary."""
    if name == "gpt2":
        width, layers, heads, inner, words = _GPT2[size]
        settings = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": inner, "vocab_size": words}
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2LMHeadModel(GPT2Config(**settings, **dropout, n_positions=max(length, 1024), use_cache=False)), words
    width, layers, heads, inner, words = _LLAMA[size]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 4),
            intermediate_size=inner,
            max_position_embeddings=max(length, 2048),
            use_cache=False,
        )
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=targets)), words


def _rows(count: int, length: int, words: int, seed: int) -> datasets.Dataset:
    tokens = np.random.default_rng(seed).integers(1, words, (count, length)).tolist()
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def _table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['weights'] / 1e6:,.1f} M weights, {results['trainable'] / 1e6:,.1f} M of them trained; "
        f"{results['forgotten']:,} of {results['sequences']:,} sequences of {results['length']} tokens forgotten.",
        "",
        "| | seconds | peak memory, MiB |",
        "|---|---|---|",
    ]
    for name, taken in results["seconds"].items():
        lines.append(f"| {name} | {taken:.1f} | {results['peak_bytes'][name] / 2**20:,.0f} |")
    lines += [
        "",
        f"Training steps: {results['training_tokens_per_second']:,.0f} tokens/s; forget pass: "
        f"{results['forget_pass_tokens_per_second']:,.0f} tokens/s ({100 * results['ratio']:.0f} %).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
