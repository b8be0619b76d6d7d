"""One request under many settings of a run, from the same fixed weights; what comes out must not depend on them.

Also a program: `accelerate launch tests/invariant/matrix.py <folder>` runs the part of the matrix that belongs to the
number of processes (on GPUs where there are any) and leaves a file for each setting there, written by process 0.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import save_file
from tiny_models import Collator, Row, pad_right, rows_of
from torch import Tensor
from unlearning_trainers import WITH_CURVATURE, make_trainer

from hf_iau import IAUCallback, IAUConfig
from hf_iau.data.trainer_rows import model_of, trainer_rows
from hf_iau.distributed import get_world_size, is_main_process
from hf_iau.memory.gradient_sum import sum_row_gradients

ROWS = 11  # no number of processes or batch size divides it
FORGET = [1, 7]  # one of three processes has none
DAMPINGS = (0.1, 1.0)
STEP = IAUConfig(scale=0.5, damping=0.1, retain_weight=0.05)
DTYPES = {"float32": torch.float32, "float64": torch.float64}
BATCH_SIZES = (1, 3, 8)
ACCUMULATIONS = (1, 4)
PADDINGS = ("longest", "fixed")
CHOICES = (tuple(DTYPES), BATCH_SIZES, ACCUMULATIONS, PADDINGS)
SETTINGS = ["-".join(map(str, setting)) for setting in itertools.product(*CHOICES)]


def settings_of(processes: int) -> list[str]:
    """Every setting for one process; for several the fewest in which each value of one choice meets each of another."""
    if processes == 1:
        return SETTINGS
    pairs = [(b, other) for b in range(len(BATCH_SIZES)) for other in (0, 1)]
    # Two settings a batch size, which differ in all else; two choices are alike at one batch size, unlike at another.
    places = [(bit, b, bit ^ (b == 1), bit ^ (b == 2)) for b, bit in pairs]
    chosen = {"-".join(str(choice[p]) for choice, p in zip(CHOICES, place, strict=True)) for place in places}
    return [setting for setting in SETTINGS if setting in chosen]


def collator(padding: str) -> Collator:
    """Pads to the batch's longest row, or every batch to the same length."""
    if padding == "longest":
        return pad_right()

    def collate(rows: list[Row]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        return pad_right(extra=12 - longest)(rows)

    return collate


def run(setting: str, folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train one step that moves nothing, gather, unlearn.

    Returns:
        Tensors: both gradient sums, their preconditioned forms and the final weights; and the report's figures.
    """
    kind, batch_size, accumulation, padding = setting.split("-")
    trainer = make_trainer(
        folder,
        "bert",
        dtype=DTYPES[kind],
        model_settings={"num_hidden_layers": 1},
        rows=rows_of("bert", ROWS),
        settings={
            "per_device_train_batch_size": int(batch_size),
            "per_device_eval_batch_size": int(batch_size),
            "gradient_accumulation_steps": int(accumulation),
            "max_steps": 1,
            "learning_rate": 0.0,
            "optim": "sgd",
            "ddp_timeout": 60,
            "use_cpu": not torch.cuda.is_available(),
        },
        data_collator=collator(padding),
        callbacks=[IAUCallback(WITH_CURVATURE, save=False)],
    )
    trainer.train()
    memory = trainer.memory
    assert memory is not None
    assert memory.curvature is not None
    assert memory.gradient_sum is not None
    rows = trainer_rows(trainer, trainer.train_dataset.select(FORGET), "forget rows", int(batch_size))
    sums = {
        "forget": sum_row_gradients(model_of(trainer), trainer.row_loss, rows).tensors,
        "train": memory.gradient_sum,
    }
    found = {f"sum.{which}.{name}": tensor for which, total in sums.items() for name, tensor in total.items()}
    for which, damping in itertools.product(sums, DAMPINGS):
        for name, tensor in memory.curvature.solve(sums[which], damping).items():
            found[f"solved.{which}.{damping}.{name}"] = tensor
    assert trainer.memory is not None
    trainer.memory.visits = None  # one step reaches few rows, and others on other numbers of processes
    outcome = trainer.unlearn(forget_indices=FORGET, config=STEP)
    for name, parameter in model_of(trainer).named_parameters():
        found[f"weights.{name}"] = parameter.detach()
    figures = {name: value for name, value in outcome.report.after.items() if isinstance(value, float)}
    counts = {"rows": memory.n_rows, "targets": memory.n_targets, "factor_targets": memory.curvature.n_targets}
    return {name: tensor.cpu().contiguous().clone() for name, tensor in found.items()}, figures | counts


def matrix(folder: Path) -> None:
    """The settings that belong to the number of processes that there are."""
    for setting in settings_of(get_world_size()):
        tensors, figures = run(setting, folder / "trainer")
        if is_main_process():
            save_file(tensors, folder / f"{setting}.safetensors")
            (folder / f"{setting}.json").write_text(json.dumps(figures | {"processes": get_world_size()}))


def main() -> None:
    """Run as a program."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    matrix(folder)


if __name__ == "__main__":
    main()
