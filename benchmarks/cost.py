"""`python -m benchmarks.cost --out DIR`: what a request and the curvature cost, each beside its yardstick in one run.

Every pair is measured in turns, several times, and medians are compared, so that a busy machine slows both alike. With
one thread on a CPU seconds are the process' own CPU seconds, which other programs disturb less; else wall seconds. The
rows are noise of the shape of CIFAR-10 (seconds do not depend on what is in them), except for `end-to-end`.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from transformers import set_seed

from benchmarks.data import Split, stack_rows
from benchmarks.hardware import hardware, peak_process_memory_bytes
from benchmarks.models import make_model
from benchmarks.scenarios import RANDOM_5_PERCENT
from benchmarks.suites import LENET, Work
from benchmarks.training import ModelStore
from hf_iau import GatherConfig, IAUCallback, IAUPaperConfig, UnlearningTrainer, gather

Part = dict[str, Any]
Timed = Callable[[], object]

_CURVATURE_ROWS = 1024
_PARTS = ("gradient", "curvature", "end-to-end", "peers")
_IMAGE = {"lenet": (3, 32, 32), "small_cnn": (1, 8, 8), "small_resnet": (1, 28, 28), "small_vit": (1, 28, 28)}


class _TimedCallback(IAUCallback):
    """Knows what gathering cost."""

    seconds = 0.0

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        started = _clock()
        super().on_train_end(*args, **kwargs)
        self.seconds = _clock() - started


def main(
    out: Annotated[Path, typer.Option(help="Folder for cost.json and cost.md.")],
    parts: Annotated[str, typer.Option(help=f"Which of {', '.join(_PARTS)}, separated by commas.")] = ",".join(_PARTS),
    model: Annotated[str, typer.Option(help=f"One of {', '.join(_IMAGE)}, for all parts but end-to-end.")] = "lenet",
    data: Annotated[Path | None, typer.Option(help="CIFAR-10, for end-to-end; left out without it.")] = None,
    repeats: Annotated[int, typer.Option(help="Turns; medians are compared.", min=1)] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
) -> None:
    """Time requests and curvature against their yardsticks."""
    torch.set_num_threads(threads)
    asked = parts.split(",")
    unknown = sorted(set(asked) - set(_PARTS))
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose among {', '.join(_PARTS)}.", param_hint="--parts")
    work = replace(LENET, model=model, keep_optimizer=False)
    results: list[Part] = []
    if "gradient" in asked:
        results += gradient_cost(work, repeats)
    if "curvature" in asked:
        results += curvature_cost(work, repeats)
    if "end-to-end" in asked and data is not None:
        results += end_to_end_cost(out, data, repeats)
    if "peers" in asked:
        results += peer_cost(work, repeats)
    command = shlex.join(["python", "-m", "benchmarks.cost", *sys.argv[1:]])
    document = {"command": command, "hardware": hardware(), "peak_process_bytes": peak_process_memory_bytes()}
    document["parts"] = results
    out.mkdir(parents=True, exist_ok=True)
    name = "cost" if asked == list(_PARTS) else "cost-" + "-".join([*asked, model])
    (out / f"{name}.json").write_text(json.dumps(document, indent=1))
    text = markdown(document)
    (out / f"{name}.md").write_text(text)
    typer.echo(text)


def gradient_cost(work: Work, repeats: int, n_rows: int = 20_000, n_forget: int = 1_000) -> list[Part]:
    """Gradient and update phases of `iau-paper` against a bare loop over the same batches, and a pass over all rows."""
    train = _noise(work, n_rows)
    trainer = _trainer(work, train, request=True)
    trainer.gather(GatherConfig(gradient_sum="full", curvature="none", progress=False))
    rows = np.sort(np.random.default_rng(0).choice(n_rows, n_forget, replace=False))
    model: nn.Module = trainer.model  # type: ignore[assignment]

    def bare(positions: np.ndarray) -> float:
        """Forward and backward, gradients added up by autograd."""
        model.eval()
        started = time.perf_counter()
        for batch in np.array_split(positions, -(-len(positions) // work.request_batch_size)):
            inputs = stack_rows([train[int(i)] for i in batch])
            (model(**inputs)["loss"] * len(batch)).backward()
        seconds = time.perf_counter() - started
        model.zero_grad(set_to_none=True)
        return seconds

    def request() -> float:
        report = trainer.unlearn(
            forget_indices=rows, method="iau-paper", config=IAUPaperConfig(eta=1e-9), dry_run=True
        ).report
        return report.seconds["gradient"] + report.seconds["update"]

    # The report's phases are wall seconds, so the loops are timed on the wall clock here, too.
    everything = np.arange(n_rows)
    times = _in_turns({"request": request, "bare": lambda: bare(rows)}, 2 * repeats)
    times |= _in_turns({"request beside": request, "everything": lambda: bare(everything)}, repeats)
    ours, loop, beside, full = (_median(times[name]) for name in ("request", "bare", "request beside", "everything"))
    described = f"{work.model}, {n_forget:,} of {n_rows:,} rows, batches of {work.request_batch_size}"
    return [
        _part(
            "gradient and update phases / bare forward+backward over the forget rows",
            described,
            ours / loop,
            "<= 1.3",
            ours / loop <= 1.3,
            times,
        ),
        _part(
            "pass over all rows / gradient and update phases, as a share of n/n_f",
            described,
            (full / beside) / (n_rows / n_forget),
            ">= 0.7",
            (full / beside) / (n_rows / n_forget) >= 0.7,
            {},
        ),
    ]


def curvature_cost(work: Work, repeats: int, epochs: int = 3) -> list[Part]:
    """EK-FAC on a bounded number of rows, gathered by the callback, as a share of training; Σ_D apart."""
    parts = []
    for n_rows, goal in ((20_000, 0.05), (5_000, 0.17)):
        train = _noise(work, n_rows)
        shares, fits, trainings = [], [], []
        for _ in range(max(1, repeats // 2)):
            config = GatherConfig(gradient_sum="none", curvature_rows=_CURVATURE_ROWS, progress=False)
            callback = _TimedCallback(config, save=False)
            trainer = _trainer(replace(work, training=replace(work.training, epochs=epochs)), train, callback=callback)
            started = _clock()
            trainer.train()
            whole = _clock() - started
            fit = callback.seconds
            fits.append(fit)
            trainings.append(whole - fit)
            shares.append(fit / (whole - fit))
        share = _median(shares)
        described = f"{work.model}, {n_rows:,} rows × {epochs} epochs, curvature on {_CURVATURE_ROWS:,} rows"
        times = {"curvature": fits, "training": trainings}
        parts.append(_part("EK-FAC / training", described, share, f"<= {goal}", share <= goal, times))
    train = _noise(work, 5_000)
    model = _trainer(work, train).model
    config = GatherConfig(gradient_sum="full", curvature="none", progress=False, batch_size=work.training.batch_size)
    started = _clock()
    gather(model, train, data_collator=stack_rows, config=config)
    seconds = _clock() - started
    parts.append(
        _part("exact gradient sum / one epoch", f"{work.model}, 5,000 rows", seconds / (_median(trainings) / epochs))
    )
    return parts


def end_to_end_cost(out: Path, data: Path, repeats: int) -> list[Part]:
    """`unlearn()` with calibration and its own report, against retraining, on CIFAR-10 with the trained LeNet."""
    models = ModelStore(out / "models", data)
    case = models.case(LENET, RANDOM_5_PERCENT, 0)
    original = models.original(case)
    held_out = case.splits.held_out.dataset()
    trainer = models.trainer(LENET, original.model, case.train.dataset(), seed=0, held_out=held_out, for_request=True)
    trainer.gather(GatherConfig(progress=False))
    kept = np.setdiff1d(np.arange(len(case.train)), case.forget_rows)
    rows = case.train.select(kept).dataset()
    one_epoch = replace(LENET, training=replace(LENET.training, epochs=1))

    def request() -> None:
        trainer.unlearn(forget_indices=case.forget_rows, dry_run=True)

    def epoch() -> None:
        set_seed(0)
        model = make_model("lenet", case.splits.n_classes)
        models.trainer(one_epoch, model, rows, seed=0).train()

    times = _in_turns({"unlearn": request, "one epoch of retraining": epoch}, repeats)
    share = _median(times["unlearn"]) / (LENET.training.epochs * _median(times["one epoch of retraining"]))
    described = (
        f"lenet, 2,000 of 40,000 rows, {LENET.training.epochs} epochs (one timed, times {LENET.training.epochs})"
    )
    return [_part("unlearn() end to end / retraining", described, share, "<= 0.05", share <= 0.05, times)]


def peer_cost(work: Work, repeats: int) -> list[Part]:
    """EK-FAC fitted on the same rows, in the same batches and dtype, by this package and by its peers."""
    split = _noise(work, _CURVATURE_ROWS)
    model = _trainer(work, split).model
    config = GatherConfig(gradient_sum="none", curvature_rows=_CURVATURE_ROWS, batch_size=128, progress=False)
    fits: dict[str, Timed] = {"hf_iau": lambda: gather(model, split, data_collator=stack_rows, config=config)}
    goals = {"kronfluence": 1.1, "curvlinops": 3.0}
    makers = {"kronfluence": _kronfluence_fit, "curvlinops": _curvlinops_fit}
    missing = [name for name in makers if importlib.util.find_spec(name) is None]
    for name, make in makers.items():
        if name not in missing:
            fits[name] = make(model, split)
    times = _in_turns(fits, repeats)
    ours = _median(times["hf_iau"])
    described = f"{work.model}, {_CURVATURE_ROWS:,} rows, batches of 128, float32"
    parts = []
    for name, goal in goals.items():
        if name in missing:
            parts.append(_part(f"curvature fit / {name}'s", f"{name} is not installed", None, f"<= {goal}"))
        else:
            ratio = ours / _median(times[name])
            both = {"hf_iau": times["hf_iau"], name: times[name]}
            parts.append(_part(f"curvature fit / {name}'s", described, ratio, f"<= {goal}", ratio <= goal, both))
    return parts


def _kronfluence_fit(model: nn.Module, rows: Any) -> Timed:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = _logits(model(batch["pixel_values"]))
            labels = batch["labels"]
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return nn.functional.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task = Classification()
    folder = tempfile.TemporaryDirectory()
    analyzer = Analyzer(
        "cost",
        model=prepare_model(copy.deepcopy(model), task),
        task=task,
        cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        output_dir=folder.name,
        log_level=40,
    )
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=stack_rows))

    def fit() -> object:
        analyzer.fit_all_factors(
            "ekfac",
            dataset=rows,
            per_device_batch_size=128,
            factor_args=FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )
        return folder  # held as long as the analyzer

    return fit


def _curvlinops_fit(model: nn.Module, rows: Any) -> Timed:
    from curvlinops import EKFACLinearOperator

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model).eval()

        def forward(self, pixel_values: Tensor) -> Tensor:
            return _logits(self.inner(pixel_values))

    network = Logits()
    batches = torch.utils.data.DataLoader(rows, batch_size=128, collate_fn=_pair)

    def fit() -> None:
        covered = (nn.Linear, nn.Conv2d)
        parameters = [p for module in network.modules() if isinstance(module, covered) for p in module.parameters()]
        operator = EKFACLinearOperator(
            network,
            nn.CrossEntropyLoss(reduction="mean"),
            parameters,
            batches,
            check_deterministic=False,
            fisher_type="mc",
            separate_weight_and_bias=False,
            num_data=len(rows),
        )
        operator.compute_kronecker_factors()
        operator.compute_eigenvalue_correction()

    return fit


def _pair(rows: Sequence[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    batch = stack_rows(rows)
    return batch["pixel_values"], batch["labels"]


def _logits(output: Any) -> Tensor:
    return output["logits"]


def _noise(work: Work, n_rows: int) -> Any:
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.normal(size=(n_rows, *_IMAGE[work.model])).astype(np.float32))
    return Split(random.integers(0, 10, n_rows).astype(np.int64), images).dataset()


def _trainer(
    work: Work, train: Any, *, request: bool = False, callback: IAUCallback | None = None
) -> UnlearningTrainer:
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        models = ModelStore(Path(folder), None)
        trainer = models.trainer(work, make_model(work.model, 10), train, seed=0, for_request=request)
    if callback is not None:
        trainer.add_callback(callback)
    return trainer


def _in_turns(timed: dict[str, Timed], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, in turns, after one turn that does not count. A callable may time itself and return seconds."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(repeats + 1):
        for name, run in timed.items():
            started = _clock()
            own = run()
            seconds = own if isinstance(own, float) else _clock() - started
            if turn:
                times[name].append(seconds)
    return times


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _part(
    name: str,
    described: str,
    ratio: float | None,
    goal: str | None = None,
    met: bool | None = None,
    seconds: dict[str, list[float]] | None = None,
) -> Part:
    return {"name": name, "on": described, "ratio": ratio, "goal": goal, "met": met, "seconds": seconds or {}}


def markdown(document: dict[str, Any]) -> str:
    """The ratios as a table."""
    hardware = document["hardware"]
    lines = [
        "# Cost",
        "",
        f"Medians over turns; {hardware['processor']}, {hardware['threads']} thread(s) of {hardware['cpu_count']} "
        f"CPUs, torch {hardware['torch']}. Command: `{document['command']}`.",
        "",
        "| ratio | on | value | goal | met | median seconds |",
        "|---|---|---|---|---|---|",
    ]
    for part in document["parts"]:
        seconds = ", ".join(f"{name} {_median(values):.3g}" for name, values in part["seconds"].items())
        value = "–" if part["ratio"] is None else f"{part['ratio']:.3g}"
        met = {None: "", True: "yes", False: "no"}[part["met"]]
        lines.append(f"| {part['name']} | {part['on']} | {value} | {part['goal'] or ''} | {met} | {seconds} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
