"""`fine-tune`, `gradient-ascent`, `neggrad-plus` and `retrain` against plain loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from baselines import KEPT, assert_close, copy_in_training, exact_trainer, loss_of, row_batches
from safetensors.torch import save_file
from tiny_models import as_dataset, build, rows_of
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from unlearning_trainers import FORGET, ROWS, arguments, assert_bits, collator, gradient_loop, make_trainer, state_of

from hf_iau import RestrictionConfig, UnlearningTrainer
from hf_iau.errors import ConfigError, RequestError
from hf_iau.methods.baselines.fine_tune import FineTuneConfig
from hf_iau.methods.baselines.gradient_ascent import GradientAscentConfig
from hf_iau.methods.baselines.neggrad_plus import NegGradPlusConfig
from hf_iau.methods.baselines.retrain import RetrainConfig
from hf_iau.methods.baselines.training_loop import fitting_batch_size

SEED = 3  # of `arguments`
# No batch of a single row, which BatchNorm cannot train on.
TWO_EPOCHS = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5}


def unlearn(trainer: UnlearningTrainer, method: str, config: Any, **kwargs: Any) -> Any:
    return trainer.unlearn(forget_indices=FORGET, method=method, config=config, **kwargs)


# gradient-ascent


def test_the_first_step_of_gradient_ascent_is_lr_times_the_gradient(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    before = state_of(trainer.model)
    gradient, targets = gradient_loop(trainer.model, [rows_of("plain", ROWS)[i] for i in FORGET])
    unlearn(trainer, "gradient-ascent", GradientAscentConfig(epochs=1, lr=0.1, weight_decay=0.0))
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.1 * gradient[name] / targets, rtol=0, atol=1e-12)


def test_gradient_ascent_is_sgd_on_the_negative_loss_and_raises_it(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    expected = copy_in_training(trainer)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for epoch in range(3):
        for rows in row_batches(FORGET, 3, SEED, epoch):
            optimizer.zero_grad()
            (-loss_of(trainer, expected, rows)).backward()
            optimizer.step()
    config = GradientAscentConfig(epochs=3, lr=0.05, weight_decay=0.01)
    report = unlearn(trainer, "gradient-ascent", config).report
    assert_close(trainer.model, expected)
    assert report.after["forget_loss"] > report.before["forget_loss"]
    curve = report.diagnostics["forget_loss_by_epoch"]
    assert curve == sorted(curve)


# fine-tune


def test_fine_tuning_is_sgd_on_the_retained_rows(tmp_path: Path) -> None:
    """Also the running statistics of BatchNorm are those of a plain training loop."""
    trainer = exact_trainer(tmp_path, "resnet")
    expected = copy_in_training(trainer)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    for epoch in range(2):
        for rows in row_batches(KEPT, 3, SEED, epoch, "resnet"):
            optimizer.zero_grad()
            loss_of(trainer, expected, rows).backward()
            optimizer.step()
    unlearn(trainer, "fine-tune", FineTuneConfig(epochs=2, lr=0.02, batch_size=3))
    assert_close(trainer.model, expected)


def test_fine_tuning_lowers_the_loss_of_the_retained_rows(tmp_path: Path) -> None:
    report = unlearn(exact_trainer(tmp_path), "fine-tune", FineTuneConfig(epochs=5, lr=0.02)).report
    assert report.after["retain_loss"] < report.before["retain_loss"]
    curve = report.diagnostics["loss_by_epoch"]
    assert curve == sorted(curve, reverse=True)


def test_fine_tuning_with_adamw(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    expected = copy_in_training(trainer)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=1e-3, weight_decay=0.1)
    for rows in row_batches(KEPT, 3, SEED, 0):
        optimizer.zero_grad()
        loss_of(trainer, expected, rows).backward()
        optimizer.step()
    unlearn(trainer, "fine-tune", FineTuneConfig(epochs=1, lr=1e-3, optimizer="adamw", weight_decay=0.1, batch_size=3))
    assert_close(trainer.model, expected)


def test_the_loss_of_the_request_is_the_one_that_is_descended(tmp_path: Path) -> None:
    weights = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)

    def weighted(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        labels = inputs.pop("labels")
        return nn.functional.cross_entropy(model(**inputs)["logits"], labels, reduction="none") * weights[labels]

    trainer = exact_trainer(tmp_path, row_loss=weighted)
    expected = copy_in_training(trainer)
    (batch,) = row_batches(KEPT, 9, SEED, 0)
    (weighted(expected, trainer.data_collator([dict(row) for row in batch])).sum() / 9).backward()
    unlearn(trainer, "fine-tune", FineTuneConfig(epochs=1, lr=0.1, momentum=0.0, weight_decay=0.0, batch_size=9))
    for (name, value), other in zip(trainer.model.named_parameters(), expected.parameters(), strict=True):
        assert other.grad is not None
        torch.testing.assert_close(value, other - 0.1 * other.grad, rtol=0, atol=1e-12, msg=name)


def test_no_batch_holds_a_single_row_unless_asked_for() -> None:
    for n_rows in range(1, 40):
        for wanted in range(1, 12):
            size = fitting_batch_size(n_rows, wanted)
            assert size >= wanted
            assert wanted == 1 or n_rows == 1 or n_rows <= size or n_rows % size != 1
            assert size == wanted or all(n_rows % other == 1 for other in range(wanted, size))


# neggrad-plus


def test_neggrad_plus_is_sgd_on_the_weighted_difference(tmp_path: Path) -> None:
    trainer = exact_trainer(tmp_path)
    expected = copy_in_training(trainer)
    alpha, lr, size = 0.8, 0.05, 3
    of_forget = [rows for round_ in range(10) for rows in row_batches(FORGET, size, SEED, round_)]
    for epoch in range(2):
        for rows in row_batches(KEPT, size, SEED, epoch):
            expected.zero_grad()
            (alpha * loss_of(trainer, expected, rows)).backward()
            (-(1 - alpha) * loss_of(trainer, expected, of_forget.pop(0))).backward()
            with torch.no_grad():
                for parameter in expected.parameters():
                    parameter -= lr * parameter.grad
    unlearn(trainer, "neggrad-plus", NegGradPlusConfig(alpha=alpha, lr=lr, epochs=2, batch_size=size))
    assert_close(trainer.model, expected)


def test_neggrad_plus_without_forget_rows_in_it_is_fine_tuning(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 2, "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
    trainer = exact_trainer(tmp_path)
    first = unlearn(trainer, "neggrad-plus", NegGradPlusConfig(alpha=1.0, **settings))
    after = state_of(trainer.model)
    first.revert()
    unlearn(trainer, "fine-tune", FineTuneConfig(**settings))
    for name, value in state_of(trainer.model).items():
        torch.testing.assert_close(value, after[name], rtol=0, atol=1e-14)


# retrain


def new_model() -> nn.Module:
    return build("resnet", seed=int(torch.randint(1000, ())))  # follows the seed that the Trainer sets


def trained_anew(folder: Path, **kwargs: Any) -> nn.Module:
    trainer = Trainer(
        args=arguments(folder, **TWO_EPOCHS),
        train_dataset=as_dataset([rows_of("resnet", ROWS)[i] for i in KEPT]),
        data_collator=collator(torch.float32),
        **kwargs,
    )
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("where", ["trainer", "config"])
def test_retraining_is_a_plain_trainer_run_bit_for_bit(where: str, tmp_path: Path) -> None:
    expected = state_of(trained_anew(tmp_path / "plain", model_init=new_model))
    settings = TWO_EPOCHS
    if where == "trainer":
        trainer = make_trainer(tmp_path, "resnet", model=None, model_init=new_model, settings=settings)
        config = None
    else:
        trainer = make_trainer(tmp_path, "resnet", settings=settings)
        config = RetrainConfig(model_init=new_model)
    trainer.train()
    model = trainer.model
    np.random.seed(17)
    torch.manual_seed(17)  # the seed in the arguments counts
    result = unlearn(trainer, "retrain", config)
    assert trainer.model is model
    assert_bits(model, expected)
    assert result.report.diagnostics["steps"] == 4
    assert where == "trainer" or result.report.config["model_init"].endswith("new_model")
    assert not list(tmp_path.glob("checkpoint-*"))


def test_retraining_from_a_file_of_initial_weights(tmp_path: Path) -> None:
    start = build("resnet", seed=8)
    start.save_pretrained(tmp_path / "start")
    save_file(start.state_dict(), tmp_path / "start.safetensors")
    expected = state_of(trained_anew(tmp_path / "plain", model=start))
    for place in ("start", "start.safetensors"):
        trainer = make_trainer(tmp_path, "resnet", settings=TWO_EPOCHS)
        unlearn(trainer, "retrain", RetrainConfig(initial_weights=str(tmp_path / place)))
        assert_bits(trainer.model, expected)


def test_retraining_uses_the_loss_of_the_trainer(tmp_path: Path) -> None:
    class Doubled(UnlearningTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(model, inputs, *args, **kwargs)

    class Plain(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(model, inputs, *args, **kwargs)

    settings = {"optim": "sgd"}
    trainer = make_trainer(tmp_path, "plain", trainer_class=Doubled, settings=settings)
    kept = trainer.train_dataset.select(KEPT)
    init = lambda: build("plain", seed=4)  # noqa: E731
    plain = Plain(
        model_init=init,
        args=arguments(tmp_path, **settings),
        train_dataset=kept,
        data_collator=trainer.data_collator,
    )
    plain.train()
    unlearn(trainer, "retrain", RetrainConfig(model_init=init))
    assert_bits(trainer.model, state_of(plain.model))


def test_what_retraining_cannot_do_is_said_before_it_starts(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, "plain")
    with pytest.raises(RequestError, match=r"needs the model that training started from.*model_init"):
        unlearn(plain, "retrain", None)
    init = RetrainConfig(model_init=lambda: build("plain"))
    model = build("plain")
    with_optimizer = make_trainer(
        tmp_path, "plain", model=model, optimizers=(torch.optim.SGD(model.parameters(), lr=1), None)
    )
    with pytest.raises(RequestError, match="optimizer_cls_and_kwargs"):
        unlearn(with_optimizer, "retrain", init)
    restricted = make_trainer(tmp_path, "plain", restriction=RestrictionConfig(mode="exact"))
    with pytest.raises(RequestError, match="restriction="):
        unlearn(restricted, "retrain", init)

    class Sampled(UnlearningTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return super()._get_train_sampler(*args, **kwargs)

    with pytest.raises(RequestError, match="_get_train_sampler"):
        unlearn(make_trainer(tmp_path, "plain", trainer_class=Sampled), "retrain", init)
    before = state_of(plain.model)
    with pytest.raises(RequestError, match="same architecture"):
        unlearn(plain, "retrain", RetrainConfig(model_init=lambda: build("plain", classes=5)))
    save_file({"hidden.weight": model.hidden.weight.detach()}, tmp_path / "part.safetensors")
    with pytest.raises(ConfigError, match=r"lacks 3 trainable parameters, e.g. 'hidden.bias'"):
        unlearn(plain, "retrain", RetrainConfig(initial_weights=str(tmp_path / "part.safetensors")))
    assert_bits(plain.model, before)


def test_callbacks_that_were_not_repeated_are_named(tmp_path: Path) -> None:
    class Mine(TrainerCallback):
        pass

    trainer = make_trainer(tmp_path, "plain", callbacks=[Mine()])
    report = unlearn(trainer, "retrain", RetrainConfig(model_init=lambda: build("plain", seed=2))).report
    assert any("callbacks Mine" in sentence for sentence in report.warnings)
    assert isinstance(trainer.args, TrainingArguments)
    assert trainer.args.output_dir == str(tmp_path)
