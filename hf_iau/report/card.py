"""The model card's part on unlearning: filled while requests are run, written when the model is saved."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard
from torch import nn
from transformers.modelcard import TASK_MAPPING

from hf_iau.data.targets import base_model
from hf_iau.errors import PublishError
from hf_iau.evaluation.figures import MINIMUM_ROWS_FOR_PER_ROW_FIGURES
from hf_iau.memory.fingerprints import weights_fingerprint
from hf_iau.report import tables
from hf_iau.report.pages import markdown_environment
from hf_iau.report.report import UnlearningReport
from hf_iau.utils.atomic_files import PRIVATE_FOLDER, write_atomically
from hf_iau.utils.jsonable import json_text

logger = logging.getLogger(__name__)

CARD_FILE = "card.json"
TAGS = ("machine-unlearning", "hf-iau")
SECTION = "## Unlearning"
_SCHEMA = 2
_MAX_BYTES = 16 * 2**20
_SPLITS = {"test": "test rows", "held_out": "held-out rows", "retain": "retained rows", "forget": "forget rows"}
_FIGURES = (*(f"{split}_{kind}" for split in _SPLITS for kind in ("accuracy", "loss")), "mia_auc")


@dataclass(frozen=True)
class ServedRequest:
    """What the card tells of one request: counts and means, no row and no id.

    Attributes:
        date: day on which it was served (UTC, ISO 8601).
        method: name of the method.
        calibrated: whether its step was calibrated; None when there was nothing to calibrate.
        forget_rows: rows forgotten.
        train_rows: rows that the model was trained on until then, or None.
        before, after: figures of `hf_iau.evaluation.Figures`; those over the forget rows are left out when they were
            fewer than `MINIMUM_ROWS_FOR_PER_ROW_FIGURES`.
        gap: mean distance from a retrained model (see `hf_iau.evaluation.Gap`), or None.
        noise_floor: the same between two retrained models, or None.
        gap_unit: "points" or "% of loss".
        verdict: the report's, or None.
    """

    date: str
    method: str
    calibrated: bool | None
    forget_rows: int
    train_rows: int | None
    before: dict[str, float]
    after: dict[str, float]
    gap: float | None
    noise_floor: float | None
    gap_unit: str
    verdict: str | None

    @classmethod
    def of_report(cls, report: UnlearningReport, date: str | None = None) -> ServedRequest:
        """The part of a report that may be published."""
        few = report.counts["forget_rows"] < MINIMUM_ROWS_FOR_PER_ROW_FIGURES
        gap, floor = report.gap or {}, (report.noise_floor or {}).get("gap") or {}
        return cls(
            date=date or datetime.now(UTC).date().isoformat(),
            method=report.method,
            calibrated=report.calibrated,
            forget_rows=report.counts["forget_rows"],
            train_rows=report.counts.get("train_rows"),
            before=_public_figures(report.before, few),
            after=_public_figures(report.after, few),
            gap=None if few else gap.get("mean_absolute"),
            noise_floor=None if few else floor.get("mean_absolute"),
            gap_unit="% of loss" if gap.get("based_on") == "loss" else "points",
            verdict=report.verdict,
        )

    @classmethod
    def from_dict(cls, values: Any) -> ServedRequest:
        """Read what `dataclasses.asdict` wrote.

        Raises:
            PublishError: malformed.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise PublishError(f"A request in {CARD_FILE} must have exactly the entries {', '.join(sorted(names))}.")
        expected: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(("date", "method", "gap_unit"), (str,)),
            "verdict": (str, type(None)),
            "calibrated": (bool, type(None)),
            "forget_rows": (int,),
            "train_rows": (int, type(None)),
            **dict.fromkeys(("gap", "noise_floor"), (int, float, type(None))),
            **dict.fromkeys(("before", "after"), (dict,)),
        }
        for name, kinds in expected.items():
            value = values[name]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise PublishError(f"{name!r} of a request in {CARD_FILE} is {value!r}: the file is corrupt.")
        for figures in (values["before"], values["after"]):
            for name, value in figures.items():
                if name not in _FIGURES or isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise PublishError(f"The figure {name!r} in {CARD_FILE} is {value!r}: the file is corrupt.")
        return cls(**values)


@dataclass(frozen=True)
class UnlearningCard:
    """The requests that a model has served, as far as its card tells of them."""

    requests: tuple[ServedRequest, ...] = ()

    def with_report(self, report: UnlearningReport, date: str | None = None) -> UnlearningCard:
        """The card with one more request."""
        return UnlearningCard((*self.requests, ServedRequest.of_report(report, date)))

    def section(self) -> str:
        """The card's section on unlearning, in Markdown; empty when there were no requests."""
        if not self.requests:
            return ""
        served = [["date", "method", "rows forgotten", "of", "calibrated", "gap", "noise floor", "verdict"]]
        for request in self.requests:
            served.append(
                [
                    request.date,
                    request.method,
                    f"{request.forget_rows:,}",
                    "–" if request.train_rows is None else f"{request.train_rows:,}",
                    {True: "yes", False: "no", None: "–"}[request.calibrated],
                    tables.number(request.gap, 1, 2),
                    tables.number(request.noise_floor, 1, 2),
                    request.verdict or "–",
                ]
            )
        last = self.requests[-1]
        comparison = tables.comparison({"before": last.before, "after": last.after}, {})
        return (
            markdown_environment()
            .get_template("unlearning.md.jinja")
            .render(
                heading=SECTION,
                requests=len(self.requests),
                rows=sum(request.forget_rows for request in self.requests),
                served=tables.markdown(served),
                comparison=tables.markdown(comparison) if len(comparison) > 1 else None,
                last=last,
                minimum_rows=MINIMUM_ROWS_FOR_PER_ROW_FIGURES,
                uncalibrated=any(request.calibrated is False for request in self.requests),
            )
        )

    def evaluation_results(self, task: str, dataset: str | None = None) -> list[EvalResult]:
        """The figures after the last request, in the Hub's model-index form.

        Args:
            task: the Hub's name of the task, e.g. "text-classification".
            dataset: the training data set's id on the Hub, if it has one.
        """
        if not self.requests:
            return []
        results = []
        for name, value in self.requests[-1].after.items():
            if name == "mia_auc":
                split, metric, title = "forget", "roc_auc", "membership AUC (loss attack), after unlearning"
            else:
                split, metric = name.rsplit("_", 1)
                title = f"{metric}, {_SPLITS[split]}, after unlearning"
            results.append(
                EvalResult(
                    task_type=task,
                    dataset_type=dataset or "custom",
                    dataset_name=dataset or "training data of this model",
                    dataset_split=split.replace("_", "-"),
                    metric_type=metric,
                    metric_name=title,
                    metric_value=round(value, 6),
                )
            )
        return results

    def complete(self, path: Path, *, task: str | None, earlier: Mapping[str, Any] | None = None) -> None:
        """Write tags, evaluation results and the section on unlearning into the model card `path`.

        Args:
            path: a card in Markdown, as `Trainer.create_model_card` writes it.
            task: the Hub's name of the task, or None where it has none; no evaluation results are written then.
            earlier: metadata of the card that was there before; its `base_model`, `license`, `language` and `datasets`
                are kept where the new card has none. A model that was loaded from a folder to forget has no other way
                to know what it was made of.
        """
        card = ModelCard.load(path, ignore_metadata_errors=True)
        data = card.data
        for name in ("base_model", "license", "language", "datasets"):
            if not data.get(name) and (earlier or {}).get(name):
                data[name] = (earlier or {})[name]
        if self.requests:
            data.tags = [*(data.get("tags") or []), *(tag for tag in TAGS if tag not in (data.get("tags") or []))]
            named = data.get("datasets")
            dataset = named[0] if isinstance(named, list) and named else named
            if task is not None:
                data.model_name = data.get("model_name") or path.absolute().parent.name
                data.eval_results = [*(data.get("eval_results") or []), *self.evaluation_results(task, dataset)]
            head = card.text.split(f"\n{SECTION}\n")[0].rstrip("\n")
            card.text = f"{head}\n\n{self.section()}"
        card.save(path)

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write the card's data into `folder` (`<model>/_iau`), for requests in other processes; none, no file.

        Args:
            folder: made if missing.
            model: the one that the card describes; its fingerprint is noted.
        """
        path = folder / CARD_FILE
        if not self.requests:
            path.unlink(missing_ok=True)
            return
        folder.mkdir(parents=True, exist_ok=True, mode=PRIVATE_FOLDER)
        values = {
            "schema": _SCHEMA,
            "weights": weights_fingerprint(model),
            "requests": [dataclasses.asdict(request) for request in self.requests],
        }
        text = json_text(values)

        def write(target: Path) -> None:
            target.write_text(text, encoding="utf-8")

        write_atomically(path, write)

    @classmethod
    def load(cls, folder: Path) -> tuple[UnlearningCard, str | None]:
        """The card saved in `folder` and the fingerprint of its weights; an empty one and None where there is none.

        Raises:
            PublishError: the file is damaged.
        """
        path = folder / CARD_FILE
        if not path.is_file():
            return cls(), None
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise PublishError(f"{path} is {path.stat().st_size} bytes, too large: it is corrupt.")
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["schema"] != _SCHEMA or not isinstance(values["weights"], str):
                raise PublishError(f"{path} has schema {values['schema']!r}; this hf_iau reads {_SCHEMA}.")
            requests = tuple(ServedRequest.from_dict(request) for request in values["requests"])
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise PublishError(
                f"{path} is damaged ({type(error).__name__}: {error}). Restore it or delete it; the model card then "
                "tells of later requests only."
            ) from error
        return cls(requests), values["weights"]

    @classmethod
    def of_weights(cls, folder: Path, model: nn.Module) -> UnlearningCard:
        """The card saved in `folder`, if it is of `model` as it is now; else an empty one."""
        card, weights = cls.load(folder)
        if weights is not None and weights != weights_fingerprint(model):
            logger.warning("%s describes other weights than the model's, and is left out.", folder / CARD_FILE)
            return cls()
        return card


def card_metadata(path: Path) -> dict[str, Any]:
    """Metadata of a model card; nothing where there is none.

    Raises:
        PublishError: the card cannot be read, so neither can the Trainer write on it.
    """
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    except Exception as error:  # YAML has its own errors, and somebody's README may hold anything
        raise PublishError(
            f"The model card {path} cannot be read ({type(error).__name__}: {error}): mend its metadata block, or "
            "remove it to have it written anew."
        ) from error


def task_of_model(model: nn.Module) -> str | None:
    """The Hub's name of what a model of `transformers` does, or None for any other model."""
    name = type(base_model(model)).__name__
    tasks: dict[str, Any] = TASK_MAPPING
    for task, classes in tasks.items():
        for value in classes.values():
            if name in (value if isinstance(value, (tuple, list)) else (value,)):
                return task
    return None


def _public_figures(figures: Mapping[str, Any], few: bool) -> dict[str, float]:
    shown = [name for name in _FIGURES if not (few and (name.startswith("forget") or name == "mia_auc"))]
    found = {name: figures.get(name) for name in shown}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}
