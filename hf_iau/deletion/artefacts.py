"""What in a model's folder still holds the influence of forgotten rows, and how to be rid of it."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import ModelCard

from hf_iau.deletion.ledger import LEDGER_NAME
from hf_iau.deletion.saved_weights import saved_weights_fingerprint, weights_of_last_request
from hf_iau.errors import IAUError, PublishError, RequestError
from hf_iau.memory.memory_files import MEMORY_FOLDER, MEMORY_HEADER, is_memory_file, read_header
from hf_iau.report import tables

_CHECKPOINT = re.compile(r"checkpoint-\d+|last-checkpoint|tmp-checkpoint-\d+")
_SHARDED_STATE = re.compile(r"global_step\d+|(pytorch_model|optimizer)(_fsdp)?_\d+")
_TRAINING_STATE = re.compile(
    r"(rank\d+-of-\d+-)?(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|random_states_\d+\.pkl"
)
_LOADED_WEIGHTS = re.compile(
    r"(adapter_model|model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(pytorch|adapter)_model(-\d+-of-\d+)?\.bin(\.index\.json)?"
)
_ANY_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.(bak|old|orig))?")
_NO_WEIGHTS = {"training_args.bin", "tokenizer.bin"}
_TRACKERS = {"wandb", "mlruns", ".aim", ".neptune"}
_GIT_REMOTE = re.compile(r"^\s*url\s*=\s*(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """One artefact that still holds something of the rows.

    Attributes:
        path: the file or folder.
        kind: "checkpoint", "training state", "weights", "memory", "ledger", "log", "rows" or "history".
        bytes: its size on disk.
        why: what it holds.
        removable: whether `AuditReport.purge` removes it.
        remedy: what to do about it instead, where `purge` does not.
    """

    path: Path
    kind: str
    bytes: int
    why: str
    removable: bool = True
    remedy: str = ""


@dataclass
class AuditReport:
    """What `audit` found.

    Attributes:
        directory: the folder that was looked at.
        findings: ordered by path.
        has_model: whether the folder itself holds a model's weights; without them nothing with weights is removable,
            for it may be the only copy.
    """

    directory: Path
    findings: list[Finding] = field(default_factory=list)
    has_model: bool = True

    @property
    def removable(self) -> list[Finding]:
        """The findings that `purge` removes."""
        return [finding for finding in self.findings if finding.removable]

    def purge(self, findings: Iterable[Finding] | None = None) -> int:
        """Remove the removable findings (or those given). The live model is never among them. There is no undo.

        Returns:
            Bytes freed.

        Raises:
            PublishError: a finding is not removable or not from this report, or some could not be removed; the others
                are gone then.
        """
        chosen = self.removable if findings is None else list(findings)
        for finding in chosen:
            if not finding.removable or finding not in self.findings:
                raise PublishError(
                    f"purge(): {finding.path} is not a removable finding of this audit. {finding.remedy}"
                )
        freed, failed = 0, []
        for finding in chosen:
            try:
                if finding.path.is_dir() and not finding.path.is_symlink():
                    shutil.rmtree(finding.path)
                else:
                    finding.path.unlink(missing_ok=True)
                freed += finding.bytes
            except OSError as error:
                failed.append(f"{finding.path} ({error.strerror})")
        self.findings = [finding for finding in self.findings if os.path.lexists(finding.path)]
        if failed:
            raise PublishError(
                f"Could not remove {', '.join(failed)}: remove them by hand. {freed:,} bytes were freed."
            )
        return freed

    def to_dict(self) -> dict[str, Any]:
        """The findings in the types of JSON."""
        return {
            "directory": str(self.directory),
            "has_model": self.has_model,
            "findings": [
                {
                    "path": str(finding.path),
                    "kind": finding.kind,
                    "bytes": finding.bytes,
                    "why": finding.why,
                    "removable": finding.removable,
                    "remedy": finding.remedy,
                }
                for finding in self.findings
            ],
        }

    def __str__(self) -> str:
        if not self.findings:
            return f"Nothing found in {self.directory} that is known to hold the influence of forgotten rows."
        rows = [["path", "kind", "size", "purge", "why"]]
        for finding in self.findings:
            why = f"{finding.why} {finding.remedy}".strip()
            rows.append(
                [str(finding.path), finding.kind, tables.size(finding.bytes), "yes" if finding.removable else "no", why]
            )
        return tables.text(rows)


def audit(directory: str | Path, train_dataset: Any = None) -> AuditReport:
    """List what in (and around) a model's folder still holds the influence of rows that were forgotten.

    Looked for are other checkpoints, states of optimizers and random generators, copies of the weights, memories of
    other weights, logs, cached rows and the history of a cloned repository. Nothing is changed. Links are listed, not
    followed. Revisions on the Hub and copies elsewhere cannot be seen from here.

    Args:
        directory: where the model was saved, e.g. the Trainer's `output_dir`.
        train_dataset: the training rows, a `datasets.Dataset`, whose cache files are then listed as well.

    Returns:
        What was found, with sizes in bytes and reasons; `purge()` removes what is marked.

    Raises:
        RequestError: `directory` is no folder.
    """
    root = Path(directory)
    if not root.is_dir():
        raise RequestError(f"directory={str(directory)!r} is no folder: give the one that the model was saved in.")
    report = AuditReport(root, has_model=_has_weights(root))
    best = _best_checkpoint(root)
    found = [*_walk(root, root, report.has_model, best), *_live_memory(root), *_history(root)]
    found += [*_caches_of_card(root), *_caches_of_dataset(train_dataset)]
    if best is not None and not _is_inside(best, root):
        why = "trainer_state.json names it as the best checkpoint: weights from before a request."
        found.append(Finding(best, "checkpoint", _size(best), why, False, "It lies elsewhere: remove it by hand."))
    seen: set[Path] = set()
    for finding in sorted(found, key=lambda finding: str(finding.path)):
        if finding.path not in seen:
            seen.add(finding.path)
            report.findings.append(finding)
    return report


def _walk(folder: Path, root: Path, has_model: bool, best: Path | None) -> Iterator[Finding]:
    """Findings among the files below `folder`; a folder that is a finding as a whole is not entered."""
    only_copy = "" if has_model else f"{root} itself holds no model, so this may be the only one: remove it by hand."
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path, name = Path(entry.path), entry.name
        if entry.is_symlink():
            if _ANY_WEIGHTS.fullmatch(name) or _CHECKPOINT.fullmatch(name):
                if not (folder == root and _LOADED_WEIGHTS.fullmatch(name)):
                    why = f"A link to {os.readlink(path)}, which may hold older weights."
                    yield Finding(path, "weights", 0, why, False, "Look at what it points to.")
        elif entry.is_dir():
            if name == ".git" or (folder == root and name == MEMORY_FOLDER):
                continue  # looked at on their own
            is_best = best is not None and path.resolve() == best.resolve()
            if _CHECKPOINT.fullmatch(name) or is_best:
                what = "The best checkpoint" if is_best else "A checkpoint"
                why = f"{what} of the training run: its weights and optimizer state learned from the rows."
                yield Finding(path, "checkpoint", _size(path), why, has_model, only_copy)
            elif _SHARDED_STATE.fullmatch(name):
                why = "Sharded weights or optimizer state of the training run."
                yield Finding(path, "checkpoint", _size(path), why, has_model, only_copy)
            elif name in _TRACKERS:
                why = "What an experiment tracker kept: losses, perhaps weights, of the training run."
                yield Finding(path, "log", _size(path), why, False, "Delete the run with the tracker's own tools.")
            elif name == MEMORY_FOLDER:
                owned = _has_weights(folder)
                remedy = f"It belongs to the model in {folder}: audit that folder." if owned else ""
                why = "A memory beside other weights: gradients and curvature of the rows."
                yield Finding(path, "memory", _size(path), why, not owned, remedy)
            else:
                yield from _walk(path, root, has_model, best)
        else:
            yield from _file(path, root)


def _file(path: Path, root: Path) -> Iterator[Finding]:
    name, at_root = path.name, path.parent == root
    if _TRAINING_STATE.fullmatch(name):
        why = "State of the optimizer, its schedule or the random generators: moments of the rows' gradients."
        yield Finding(path, "training state", _size(path), why)
    elif name.startswith("events.out.tfevents.") or name == "trainer_state.json":
        yield Finding(path, "log", _size(path), "A log of the training run: losses while the rows were learned.")
    elif is_memory_file(name) or (name == MEMORY_HEADER and _is_memory_header(path)):
        why = f"A memory outside of {MEMORY_FOLDER}/: gradients and curvature of the rows."
        yield Finding(path, "memory", _size(path), why)
    elif name.endswith(".arrow"):
        cached = name.startswith(("cache-", "tmp"))
        remedy = "" if cached else "Delete the forgotten rows from it, or the whole of it."
        yield Finding(path, "rows", _size(path), "Rows themselves, perhaps forgotten ones.", cached, remedy)
    elif name.endswith((".parquet", ".jsonl", ".csv")):
        remedy = "Delete the forgotten rows from it, if they are there."
        yield Finding(path, "rows", _size(path), "Perhaps rows themselves.", False, remedy)
    elif at_root and _LOADED_WEIGHTS.fullmatch(name):
        # `from_pretrained` reads safetensors first, so a .bin beside it is not the model that is used.
        if name.startswith("pytorch_model") and any(root.glob("model*.safetensors")):
            why = "Weights in the older format, which are not read while model.safetensors lies beside them."
            yield Finding(path, "weights", _size(path), why, False, "Remove it by hand if it is older.")
    elif _ANY_WEIGHTS.fullmatch(name) and name not in _NO_WEIGHTS:
        live = root / name
        if at_root or not live.is_file() or not _same_bytes(live, path):
            why = "A file of weights other than the model's own, perhaps from before a request."
            yield Finding(path, "weights", _size(path), why, False, "Remove it by hand if it is a copy from before.")


def _live_memory(root: Path) -> Iterator[Finding]:
    """What lies in the folder's own `_iau/`: the memory, if it is of other weights, and left-over files."""
    folder = root / MEMORY_FOLDER
    if not folder.is_dir():
        return
    current = None
    if (folder / MEMORY_HEADER).is_file():
        path = folder / MEMORY_HEADER
        try:
            header = read_header(path)
            current = str(header["tensors"]["file"])
            weights, forgotten = header["model"]["weights"], header["forgotten_rows"]
        except (IAUError, KeyError, TypeError) as error:
            why = f"A memory that cannot be read: gradients of the rows all the same. ({error})"
            yield Finding(path, "memory", _size(path), why)
        else:
            live = saved_weights_fingerprint(root, expected=weights)
            if live is not None and live != weights:
                why = "A memory of other weights than the model's: it serves no request any more."
                yield Finding(path, "memory", _size(path), why)
                current = None  # so that its tensors go with it
            elif forgotten:
                size = _size(path) + _size(folder / Path(current).name)
                why = f"The memory in force. Its curvature was fitted before {forgotten:,} rows were forgotten."
                yield Finding(path, "memory", size, why, False, "Gather anew from the retained rows to be rid of it.")
    ledger = folder / LEDGER_NAME
    if ledger.is_file():
        if weights_of_last_request(ledger) is False:
            why = "The weights here are not those that the last request in the ledger left: perhaps from before it."
            yield Finding(root, "weights", 0, why, False, "Compare them with a copy, and run the request again.")
        why = "The ledger of requests, with keyed fingerprints of the forgotten rows: pseudonymous personal data."
        yield Finding(ledger, "ledger", _size(ledger), why, False, "Keep it as long as you must be able to prove them.")
    for path in sorted(folder.iterdir()):
        if is_memory_file(path.name) and path.name != current:
            why = "Left over from an earlier memory: gradients and curvature of the rows."
            yield Finding(path, "memory", _size(path), why)


def _history(root: Path) -> Iterator[Finding]:
    git = root / ".git"
    if not git.exists():
        return
    config = git / "config"
    remotes = _GIT_REMOTE.findall(config.read_text(encoding="utf-8", errors="replace")) if config.is_file() else []
    origin = re.sub(r"//[^/@]*@", "//", remotes[0]) if remotes else "no remote"  # never show a token
    yield Finding(
        git,
        "history",
        _size(git),
        f"A git history ({origin}): every earlier version of the weights can be had from it.",
        False,
        "Squash it here and on the Hub (HfApi.super_squash_history, permanently_delete_lfs_files); see "
        "docs/how_to/publish.md.",
    )


def _caches_of_card(root: Path) -> Iterator[Finding]:
    """Caches of the data sets that the model card names."""
    try:
        named = ModelCard.load(root / "README.md", ignore_metadata_errors=True).data.get("datasets") or []
    except Exception:  # a card that is absent or broken names none
        return
    for name in [named] if isinstance(named, str) else named:
        if isinstance(name, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and ".." not in name:
            path = Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")
            if path.is_dir():
                why = f"Cached rows of {name}, which the model card names."
                yield Finding(path, "rows", _size(path), why, False, "Remove it by hand unless others use it.")


def _caches_of_dataset(train_dataset: Any) -> Iterator[Finding]:
    for entry in getattr(train_dataset, "cache_files", None) or []:
        path = Path(entry["filename"])
        remedy = "Call train_dataset.cleanup_cache_files() or remove it by hand unless others use it."
        yield Finding(path, "rows", _size(path), "Cached rows of the training set.", False, remedy)


def _has_weights(folder: Path) -> bool:
    return any(_LOADED_WEIGHTS.fullmatch(entry.name) and entry.is_file() for entry in os.scandir(folder))


def _best_checkpoint(root: Path) -> Path | None:
    """The folder that a `trainer_state.json` below `root` names as its best checkpoint, if it exists."""
    states = [root / "trainer_state.json", *sorted(root.glob("checkpoint-*/trainer_state.json"))]
    for state in states:
        try:
            named = json.loads(state.read_text(encoding="utf-8"))["best_model_checkpoint"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(named, str) and named and "\0" not in named:
            for path in (Path(named), root / Path(named).name):
                if path.is_dir() and path.resolve() != root.resolve():
                    return path
    return None


def _is_memory_header(path: Path) -> bool:
    try:
        read_header(path)
    except IAUError:
        return False
    return True


def _same_bytes(one: Path, other: Path) -> bool:
    if one.stat().st_size != other.stat().st_size:
        return False
    with open(one, "rb") as first, open(other, "rb") as second:
        while block := first.read(1 << 20):
            if block != second.read(1 << 20):
                return False
    return True


def _is_inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count nothing."""
    if path.is_symlink() or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_size
    return sum(_size(Path(entry.path)) for entry in os.scandir(path))
