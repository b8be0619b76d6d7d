"""Tiny models and the obviously right for-loop that the curvature is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from hf_iau.curvature.blocks import KroneckerBlock
from hf_iau.data import RowSource, evaluation_mode, read_targets

Rows = list[dict[str, Tensor]]


def collate(rows: Rows) -> dict[str, Tensor]:
    """Stack; sequences are padded on the right, labels with -100."""
    batch = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        if values[0].dim() == 1 and values[0].dtype == torch.long:
            length = max(len(value) for value in values)
            fill = -100 if key == "labels" else 0
            values = [F.pad(value, (0, length - len(value)), value=fill) for value in values]
        batch[key] = torch.stack(values)
    return batch


def padded_collate(extra: int) -> Callable[[Rows], dict[str, Tensor]]:
    def pad(rows: Rows) -> dict[str, Tensor]:
        batch = collate(rows)
        return {
            key: F.pad(value, (0, extra), value=-100 if key == "labels" else 0) if value.dim() == 2 else value
            for key, value in batch.items()
        }

    return pad


def make_source(rows: Rows, batch_size: int = 4, collator: Callable = collate) -> RowSource:
    return RowSource(rows, collator, batch_size=batch_size)


class Net(nn.Module):
    """A classifier of `x` made of a body."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.body(x)}


class Twice(nn.Module):
    """A layer that is called several times, with different numbers of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        once = torch.tanh(self.shared(x))
        pairs = torch.tanh(self.shared(torch.stack([once, x], dim=1)))
        return self.head(pairs.sum(dim=1) + self.shared(once))


class Checkpointed(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.first = nn.Linear(5, 6)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.mode == "none":
            hidden = self.middle(hidden)
        else:
            hidden = checkpoint(self.middle, hidden, use_reentrant=self.mode == "reentrant")
        return self.head(hidden)


class Positions(nn.Module):
    """Linear layers at several positions, in-place activations of views, HF's transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = Conv1D(5, 6)
        self.third = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu_()
        return self.third(self.second(hidden).relu_()).mean(dim=1)


class WithoutHook(nn.Module):
    """`nn.MultiheadAttention` uses its output projection's weight without calling the module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, (3, 2), groups=2, padding="same", padding_mode="circular", dilation=(1, 2)),
        nn.GroupNorm(2, 4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=4, bias=False, padding=(1, 0), padding_mode="reflect"),
        nn.Flatten(2),
        nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def _images(n: int, channels: int, size: int, classes: int = 3) -> Rows:
    return [{"pixel_values": torch.randn(channels, size, size), "labels": torch.tensor(i % classes)} for i in range(n)]


def _vectors(n: int, *shape: int) -> Rows:
    return [{"x": torch.randn(*shape), "labels": torch.tensor(i % 3)} for i in range(n)]


def _texts(n: int, vocabulary: int, *, tokens: bool) -> Rows:
    rows = []
    for i in range(n):
        ids = torch.randint(1, vocabulary, (int(torch.randint(3, 8, ())),))
        ids[-1] = ids[0]  # a repeated token
        labels = ids.clone() if tokens else torch.tensor(i % 3)
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def build(name: str, *, n: int = 10, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Rows]:
    """A tiny model and rows for it."""
    torch.manual_seed(0)
    bert = {
        "vocab_size": 13,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 10,
        "max_position_embeddings": 16,
        "num_labels": 3,
        "initializer_range": 0.5,
    }
    if name == "mlp":
        model: nn.Module = Net(nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)))
        rows = _vectors(n, 5)
    elif name == "frozen":
        body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
        body[0].weight.requires_grad_(False)
        body[2].bias.requires_grad_(False)
        body[3].weight.requires_grad_(False)
        model, rows = Net(body), _vectors(n, 5)
    elif name == "cnn":
        model = Net(_cnn())
        rows = _vectors(n, 2, 9, 9)
        model(x=torch.stack([row["x"] for row in rows]))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = torch.randn(6)
                module.running_var = torch.rand(6) + 0.5
    elif name == "twice":
        model, rows = Net(Twice()), _vectors(n, 5)
    elif name == "positions":
        model, rows = Net(Positions()), _vectors(n, 7, 4)
    elif name == "bypassed":
        model, rows = Net(WithoutHook()), _vectors(n, 7, 4)
    elif name in ("none", "reentrant", "non-reentrant"):
        model, rows = Net(Checkpointed(name)), _vectors(n, 5)
    elif name == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5)
        )
        rows = _texts(n, 11, tokens=True)
    elif name == "llama":
        config = LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=10,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.5,
            tie_word_embeddings=False,
        )
        model, rows = LlamaForCausalLM(config), _texts(n, 11, tokens=True)
    elif name == "bert":
        model, rows = BertForSequenceClassification(BertConfig(**bert)), _texts(n, 13, tokens=False)
    elif name == "bert-mlm":
        model, rows = BertForMaskedLM(BertConfig(**bert)), _texts(n, 13, tokens=True)
    elif name == "lora":
        config = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS")
        model, rows = (
            get_peft_model(BertForSequenceClassification(BertConfig(**bert)), config),
            _texts(n, 13, tokens=False),
        )
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter)
    elif name == "vit":
        config = ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=10,
            image_size=8,
            patch_size=4,
            num_channels=2,
            num_labels=3,
            initializer_range=0.5,
        )
        model, rows = ViTForImageClassification(config), _images(n, 2, 8)
    else:
        raise ValueError(name)
    model = model.to(dtype)
    rows = [{key: v.to(dtype) if v.is_floating_point() else v for key, v in row.items()} for row in rows]
    return model, rows


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_vector(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in trainable(model).items()
    }


def one_by_one(model: nn.Module, rows: Rows, seed: int = 0) -> tuple[list[dict[str, Tensor]], int]:
    """Each row's gradient at its drawn labels, and the number of targets."""
    gradients, count = [], 0
    parameters = trainable(model)
    with evaluation_mode(model):
        for number, row in enumerate(rows):
            inputs = collate([row])
            targets = read_targets(model, model(**inputs), inputs["labels"])
            loss = targets.fisher_loss(np.array([number]), seed)
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            gradients.append(
                {
                    name: torch.zeros_like(p) if g is None else g
                    for (name, p), g in zip(parameters.items(), found, strict=True)
                }
            )
            count += len(targets)
    return gradients, count


def covariances(
    model: nn.Module, rows: Rows, block: KroneckerBlock, seed: int = 0, chosen: Sequence[int] | None = None
) -> list[tuple[Tensor, Tensor]]:
    """(A, S) of each group of a layer, position by position, of all rows or of those `chosen`."""
    module = model.get_submodule(block.name)
    layout = block.layout
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        out = output.clone()  # an own node, which in-place activations cannot touch
        calls.append((args[0].detach().clone(), out))
        number = len(calls) - 1
        out.register_hook(lambda gradient: store.update({number: gradient}))
        return out

    sums = [
        (
            torch.zeros(layout.columns, layout.columns, dtype=torch.float64),
            torch.zeros(layout.group_outputs, layout.group_outputs, dtype=torch.float64),
        )
        for _ in range(layout.groups)
    ]
    handle = module.register_forward_hook(keep)
    with evaluation_mode(model):
        for number, row in enumerate(rows):
            if chosen is not None and number not in chosen:
                continue
            calls.clear()
            store: dict[int, Tensor] = {}
            inputs = collate([row])
            read_targets(model, model(**inputs), inputs["labels"]).fisher_loss(np.array([number]), seed).backward()
            for call, gradient in store.items():
                found = list(_positions(module, calls[call][0], gradient, layout.groups))
                for group, a, g in found:
                    largest = max(float(other.abs().max()) for of, _, other in found if of == group)
                    if float(g.abs().max()) <= 1e-11 * largest:  # padding, unused and dead positions
                        continue
                    parts = ([a] if layout.weight else []) + ([torch.ones(1).double()] if layout.bias else [])
                    a = torch.cat(parts).double()
                    sums[group][0].add_(torch.outer(a, a))
                    sums[group][1].add_(torch.outer(g.double(), g.double()))
    handle.remove()
    return sums


def _positions(module: nn.Module, x: Tensor, g: Tensor, groups: int):
    """(group, input patch, output gradient) at each position of a batch of one."""
    if isinstance(module, (nn.Linear, Conv1D)):
        for a, s in zip(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), strict=True):
            yield 0, a, s
        return
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)[0]
    channels = x.shape[0] // groups
    for where in itertools.product(*(range(size) for size in g.shape[2:])):
        for group in range(groups):
            patch = x[group * channels : (group + 1) * channels]
            for axis, index in enumerate(where):
                taps = [
                    index * module.stride[axis] + tap * module.dilation[axis] for tap in range(module.kernel_size[axis])
                ]
                patch = patch.index_select(axis + 1, torch.tensor(taps))
            outputs = g[0].reshape(groups, -1, *g.shape[2:])[(group, slice(None), *where)]
            yield group, patch.reshape(-1), outputs


def dense(block: KroneckerBlock) -> list[Tensor]:
    """The curvature matrix of each group of a block, over (output, column) pairs."""
    matrices = []
    for q_in, q_out, values in zip(block.input_basis, block.output_basis, block.values, strict=True):
        basis = torch.kron(q_out, q_in)
        matrices.append(basis @ torch.diag(values.reshape(-1)) @ basis.T)
    return matrices


def relative(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest relative error, in norm, over tensors."""
    assert set(found) == set(expected)
    return max(
        float(
            (found[name].double() - expected[name].double()).norm() / expected[name].double().norm().clamp(min=1e-300)
        )
        for name in expected
    )
