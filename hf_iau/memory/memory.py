"""`GradientMemory`: the gradients and curvature of a training run, and proof of what they belong to."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_iau.curvature import Curvature
from hf_iau.curvature.sharded_blocks import fetch_tensor
from hf_iau.data import RowLoss, RowSource, evaluation_mode
from hf_iau.data.precision import memory_device
from hf_iau.distributed import full_tensor, is_main_process, shard_like, sync_errors
from hf_iau.errors import IAUError, MemoryFileError, MemoryMismatchError, MissingMemoryError, StaleMemoryError
from hf_iau.memory.fingerprints import data_fingerprint, model_fingerprint, package_versions, weights_fingerprint
from hf_iau.memory.memory_files import (
    MEMORY_FOLDER,
    MEMORY_HEADER,
    SCHEMA_VERSION,
    TENSOR_FILE,
    check_fields,
    file_order,
    header_digest,
    read_header,
    read_tensors,
    write_tensors_one_by_one,
)
from hf_iau.memory.row_identity import RowIdentity
from hf_iau.utils.atomic_files import (
    file_digest,
    make_private_folder,
    sync_folder,
    write_atomically,
    write_text_atomically,
)

_SUM_PREFIX = "gradient_sum."
_IDENTITY_PREFIX = "row_identity."
_VISITS = "row_visits"
_FILE_METADATA = {"format": "pt"}
_PROBE_ROWS = 8
# Fields with a form of their own in the files.
_NOT_PLAIN = ("parameters", "gradient_sum", "curvature", "row_identity", "visits")


@dataclass
class GradientMemory:
    """What is stored of one model and its training rows.

    A memory is personal data: two versions of it differ by about the forgotten rows' gradient. It is written with mode
    0600 into a folder that `push_to_hub` never uploads.

    Attributes:
        parameters: name → shape of every parameter that was fine-tuned, in the model's order.
        n_rows: training rows that are still in.
        n_targets: their targets (rows of a classifier, tokens of a language model).
        label_counts: class → rows, for single-label rows; None where rows have no one class.
        gradient_sum: Σ_D of row-loss gradients at these weights, or None; float32 (float64 for float64 parameters, and
            in older files).
        gradient_sum_kind: "full", "sampled", "first-order" (moved along with the weights) or "none".
        gradient_sum_rows: rows that the sum was made of.
        gradient_sum_error: standard error of a sampled sum, as a Euclidean norm; 0 for an exact one.
        weight_decay: parameter name → coefficient of coupled L2 in the mean loss; empty for decoupled decay.
        curvature: the curvature of the mean row loss, or None.
        model, data, loss: fingerprints.
        settings: the gathering configuration.
        calibration: what earlier calibrations found, or None.
        forgotten_rows, forgotten_targets: taken out by requests since the memory was gathered.
        relative_path: summed length of all steps since then, relative to the weights' norm.
        curvature_path: what `relative_path` was when the curvature was estimated; 0 where that was when gathering.
        row_identity: keyed fingerprints of the training rows, forgotten ones among them; those made without a key of
            yours are not saved, so that None is read.
        visits: how often each row of the data set was trained on, int32, `(rows,)`; None where it is not known.
        held_out: `loss` of the held-out rows at the weights that were gathered from and a digest (`content`) of those
            rows; None until the first request measures it.
        seconds: what gathering cost, by phase.
        versions: of the packages that made it.

    Examples:
        With `model`, `train` and `folder` of the example of `UnlearningTrainer`:

        >>> from hf_iau import GatherConfig, GradientMemory, gather
        >>> path = gather(model, train, config=GatherConfig(progress=False)).save(f"{folder}/memory")
        >>> path.name
        'memory.json'
        >>> memory = GradientMemory.load(f"{folder}/memory")
        >>> memory.check_model(model)  # raises where they do not belong together
        >>> memory.label_counts
        {'0': 35, '1': 29}
    """

    parameters: dict[str, tuple[int, ...]]
    n_rows: int
    n_targets: int
    model: dict[str, str]
    data: dict[str, Any]
    loss: dict[str, Any]
    label_counts: dict[str, int] | None = None
    gradient_sum: dict[str, Tensor] | None = None
    gradient_sum_kind: str = "none"
    gradient_sum_rows: int = 0
    gradient_sum_error: float = 0.0
    weight_decay: dict[str, float] = field(default_factory=dict)
    curvature: Curvature | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    forgotten_rows: int = 0
    forgotten_targets: int = 0
    relative_path: float = 0.0
    curvature_path: float = 0.0
    row_identity: RowIdentity | None = None
    visits: np.ndarray | None = None
    held_out: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=package_versions)
    schema_version: int = SCHEMA_VERSION

    # --- belonging ------------------------------------------------------------------------------------------------

    def check_model(self, model: nn.Module) -> None:
        """Raise unless `model` has the architecture and, bit for bit, the weights of this memory.

        Raises:
            MemoryMismatchError: another architecture, or another active adapter.
            StaleMemoryError: the weights have moved since.
        """
        now = model_fingerprint(model)
        if now["architecture"] != self.model["architecture"]:
            raise MemoryMismatchError(
                f"The memory was gathered from a {self.model['class']} (architecture {self.model['architecture'][:8]}) "
                f"but the model is a {now['class']} (architecture {now['architecture'][:8]}): their parameters differ "
                "in name or shape. Load the memory that lies beside this model, or gather anew with hf_iau.gather()."
            )
        if now.get("adapters") != self.model.get("adapters", now.get("adapters")):
            raise MemoryMismatchError(
                f"The memory was gathered with adapter {self.model['adapters']!r} active but {now.get('adapters')!r} "
                "is active now: activate the adapter that is to forget "
                f"(model.set_adapter({self.model['adapters']!r}))."
            )
        if now["weights"] != self.model["weights"]:
            raise StaleMemoryError(
                f"The memory belongs to weights {self.model['weights'][:8]} but the model now has {now['weights'][:8]}:"
                " it was trained, loaded in another precision or changed since. Load the weights that were saved with "
                "the memory, or gather anew with hf_iau.gather()."
            )

    def check_data(self, model: nn.Module, dataset: Any) -> None:
        """Raise `MemoryMismatchError` unless `dataset` is the training set of this memory."""
        now = data_fingerprint(model, dataset)
        if now != self.data:
            raise MemoryMismatchError(
                f"The memory was gathered from {self.data['rows']} rows with columns {self.data['columns']} (content "
                f"{self.data['content'][:8]}) but train_dataset has {now['rows']} rows with columns {now['columns']} "
                f"(content {now['content'][:8]}): row numbers would name other rows. Give the training set that the "
                "memory was made of, in its order, or pass the rows themselves as forget_dataset."
            )

    def check_loss(self, row_loss: RowLoss) -> None:
        """Raise `MemoryMismatchError` unless `row_loss` is the loss of this memory."""
        now = row_loss.fingerprint()
        recorded = {key: value for key, value in self.loss.items() if key not in ("probe", "probe_rows")}
        if now != recorded:
            raise MemoryMismatchError(
                f"The memory was gathered with the loss {recorded} but the request uses {now}. Use the loss that was "
                "trained, or gather anew with hf_iau.gather(..., row_loss=…)."
            )

    def probe_loss(self, model: nn.Module, row_loss: RowLoss, source: RowSource) -> float:
        """Σ ℓ over the first few rows of `source`: a number that two different losses do not share."""
        rows = source.select(np.arange(min(_PROBE_ROWS, len(source))))
        with evaluation_mode(model), torch.no_grad():
            return float(sum(float(row_loss(model, inputs)[0]) for _, inputs in rows.passes_of_all(model)))

    def check_probe(self, model: nn.Module, row_loss: RowLoss, source: RowSource) -> None:
        """Raise `MemoryMismatchError` when the loss of the first training rows is not what it was when gathering."""
        if "probe" not in self.loss:
            return
        now = self.probe_loss(model, row_loss, source)
        then = float(self.loss["probe"])
        if not math.isclose(now, then, rel_tol=1e-2, abs_tol=1e-4):
            raise MemoryMismatchError(
                f"The loss of the first training rows was {then:.6g} when the memory was gathered and is {now:.6g} now "
                "at the same weights, so the request uses another loss (other class weights or smoothing?) or other "
                "rows. Use the loss that was trained, or gather anew."
            )

    # --- what it holds --------------------------------------------------------------------------------------------

    def require_full_sum(self, method: str) -> dict[str, Tensor]:
        """The gradient sum, for a method that accepts an exact one only."""
        if self.gradient_sum is None or self.gradient_sum_kind != "full":
            raise MissingMemoryError(
                f"method={method!r} needs the exact gradient sum of the training rows but the memory's is "
                f"{self.gradient_sum_kind!r}. Gather with GatherConfig(gradient_sum='full') (one pass over the "
                "training rows) or pass retain_dataset=."
            )
        return self.gradient_sum

    def require_curvature(self, method: str) -> Curvature:
        """The curvature, for a method that cannot do without."""
        if self.curvature is None:
            raise MissingMemoryError(
                f"method={method!r} needs curvature but the memory holds none. Gather with "
                "GatherConfig(curvature='ekfac'), or choose method='iau-paper' or 'iau-released'."
            )
        self.curvature.check()
        return self.curvature

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the gradient sum and some layers' curvature only."""
        sharded = any(isinstance(total, DTensor) for total in (self.gradient_sum or {}).values())
        return sharded or (self.curvature is not None and self.curvature.is_sharded)

    def unsharded(self) -> GradientMemory:
        """The memory with all of its tensors in every process; itself, where it is so. Called by all processes."""
        if not self.is_sharded:
            return self
        sums = None if self.gradient_sum is None else {n: full_tensor(t) for n, t in self.gradient_sum.items()}
        curvature = None if self.curvature is None else self.curvature.unsharded()
        return dataclasses.replace(self, gradient_sum=sums, curvature=curvature)

    def on_main_process(self) -> GradientMemory:
        """In process 0 the memory with all of its tensors in the host's memory; itself elsewhere. Called by all."""
        if not self.is_sharded:
            return self
        tensors = {name: tensor.cpu() for name, tensor in self._fetched() if is_main_process()}
        if not is_main_process():
            return self
        sums = {name: tensors[f"{_SUM_PREFIX}{name}"] for name in self.gradient_sum or {}}
        curvature = None
        if self.curvature is not None:
            rest = {name: t for name, t in tensors.items() if not name.startswith((_SUM_PREFIX, _IDENTITY_PREFIX))}
            curvature = Curvature.from_tensors(rest, self.curvature.metadata())
        return dataclasses.replace(self, gradient_sum=sums or None, curvature=curvature)

    def sharded_like(self, model: nn.Module) -> GradientMemory:
        """The memory with a part in each process, as the parameters of `model` are; itself, where it is so."""
        if self.is_sharded:
            return self
        parameters = dict(model.named_parameters())
        sums = self.gradient_sum
        if sums is not None:
            devices = {name: memory_device(parameters[name].device) for name in sums}
            sums = {name: shard_like(total, parameters[name]).to(devices[name]) for name, total in sums.items()}
        curvature = None if self.curvature is None else self.curvature.sharded()
        return dataclasses.replace(self, gradient_sum=sums, curvature=curvature)

    @property
    def path_since_curvature(self) -> float:
        """Summed length of the steps since the curvature was estimated, relative to the weights' norm."""
        return self.relative_path - self.curvature_path

    def placed_for(self, model: nn.Module) -> GradientMemory:
        """The memory where a request works with it: on the device it was gathered to, else beside the parameters.

        One that was loaded lies in the host's memory, where each direction would be made by the CPU.
        """
        parameters = dict(model.named_parameters())
        sums, curvature = self.gradient_sum, self.curvature
        if sums is not None:
            sums = {name: total.to(memory_device(parameters[name].device)) for name, total in sums.items()}
        asked = self.settings.get("factor_device")
        if curvature is not None:
            homes = {b.name: parameters[next(iter(b.shapes))].device for b in curvature.blocks.values()}
            curvature = curvature.placed(
                {name: torch.device(asked) if asked else memory_device(home) or home for name, home in homes.items()}
            )
        return dataclasses.replace(self, gradient_sum=sums, curvature=curvature)

    def nbytes(self) -> int:
        """Bytes of all tensors, those that other processes hold among them."""
        held = sum(t.numel() * t.element_size() for t in (self.gradient_sum or {}).values())
        held += 0 if self._saved_identity is None else self._saved_identity.fingerprints.nbytes
        return held + (self.curvature.nbytes() if self.curvature is not None else 0)

    def after_step(
        self,
        model: nn.Module,
        *,
        rows: int,
        targets: int,
        relative_step: float,
        gradient_sum: dict[str, Tensor] | None,
        label_counts: Mapping[str, int] | None = None,
    ) -> GradientMemory:
        """The memory of the moved model, without the forgotten rows.

        Args:
            model: the model after the step.
            rows, targets: how many were forgotten.
            relative_step: step length over the weights' norm.
            gradient_sum: Σ′_D to first order, or None where it is not known.
            label_counts: classes of the forgotten rows.
        """
        left = None
        if self.label_counts is not None and label_counts is not None:
            left = {label: count - label_counts.get(label, 0) for label, count in self.label_counts.items()}
        return dataclasses.replace(
            self,
            n_rows=self.n_rows - rows,
            n_targets=max(self.n_targets - targets, 0),  # of tokens it is an estimate
            model={**self.model, "weights": weights_fingerprint(model)},
            loss={key: value for key, value in self.loss.items() if key not in ("probe", "probe_rows")},
            label_counts=left,
            gradient_sum=gradient_sum,
            gradient_sum_kind="none" if gradient_sum is None else "first-order",
            forgotten_rows=self.forgotten_rows + rows,
            forgotten_targets=self.forgotten_targets + targets,
            relative_path=self.relative_path + relative_step,
            versions=package_versions(),
        )

    # --- files ----------------------------------------------------------------------------------------------------

    def save(self, directory: str | Path) -> Path:
        """Write the memory into `directory` (made if missing): tensors first, then the header that names them.

        A crash in between leaves the older memory readable. Returns the header's path. One that is sharded is
        saved by all ranks together: one tensor after the other comes to rank 0, which writes the same files.
        """
        folder = Path(directory)
        if self.is_sharded:
            with sync_errors("saving the memory"):
                if is_main_process():
                    self._save(folder)
                else:
                    for _ in self._fetched():
                        pass
        else:
            self._save(folder)
        return folder / MEMORY_HEADER

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by their key in the file; of those that other processes hold, parts or none of the content."""
        tensors = {f"{_SUM_PREFIX}{name}": t for name, t in (self.gradient_sum or {}).items()}
        if self.curvature is not None:
            tensors |= self.curvature.tensors()
        if self._saved_identity is not None:
            tensors |= self._saved_identity.tensors()
        if self.visits is not None:
            small = self.visits.max(initial=0) < 256
            tensors[_VISITS] = torch.from_numpy(self.visits.astype(np.uint8 if small else np.int32))
        return tensors

    @property
    def _saved_identity(self) -> RowIdentity | None:
        """Fingerprints whose key will be known to who reads them."""
        return None if self.row_identity is None or self.row_identity.of_process else self.row_identity

    def _fetched(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the order of the file, one after the other whole in every process."""
        tensors = self._tensors()
        blocks = {} if self.curvature is None else self.curvature.blocks
        owners = {key: block.owner for block in blocks.values() for key in block.tensors()}
        for name in file_order(tensors):
            with sync_errors(f"saving {name}"):
                pass  # what failed so far is told before anything is sent
            owner = owners.get(name)
            if owner is None:
                yield name, full_tensor(tensors[name])
            else:
                yield name, fetch_tensor(tensors[name], owner, f"saving {name}")

    def _save(self, folder: Path) -> None:
        make_private_folder(folder, ignored_by_git=folder.name == MEMORY_FOLDER)
        tensors = self._tensors()
        digest: list[str] = []

        def write_tensors(path: Path) -> None:
            if self.is_sharded:
                write_tensors_one_by_one(path, tensors, self._fetched(), _FILE_METADATA)
            else:
                plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
                save_file(plain, path, metadata=_FILE_METADATA)
            digest.append(file_digest(path))

        staged = folder / ".memory-staged.safetensors"
        write_atomically(staged, write_tensors)
        name = f"memory-{digest[0]}.safetensors"
        staged.replace(folder / name)
        sync_folder(folder)
        header = self._header() | {"tensors": {"file": name, "digest": digest[0], "count": len(tensors)}}
        header = json.loads(json.dumps(header))  # as a reader will see it, so that its digest is the same
        text = json.dumps(header | {"digest": header_digest(header)}, indent=1, sort_keys=True)
        write_text_atomically(folder / MEMORY_HEADER, text)
        for other in folder.glob("memory-*.safetensors"):
            if other.name != name and TENSOR_FILE.fullmatch(other.name):
                other.unlink()

    @classmethod
    def load(cls, directory: str | Path) -> GradientMemory:
        """Read a memory written by `save`; `directory` may also be the model's output directory.

        Raises:
            MemoryFileError: missing, truncated, corrupt or malformed.
            MemoryMismatchError: written by another schema version.
        """
        folder = Path(directory)
        if not (folder / MEMORY_HEADER).is_file() and (folder / MEMORY_FOLDER / MEMORY_HEADER).is_file():
            folder = folder / MEMORY_FOLDER
        header = read_header(folder / MEMORY_HEADER)
        try:
            tensors = read_tensors(folder, header["tensors"])
            return cls._from_parts(header, tensors)
        except IAUError:
            raise
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise MemoryFileError(
                f"The memory in {folder} is malformed ({type(error).__name__}: {error}). Restore it from a copy or "
                "gather anew with hf_iau.gather()."
            ) from error

    def _header(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _NOT_PLAIN}
        return plain | {
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
            "parameter_order": list(self.parameters),
            "curvature": None if self.curvature is None else self.curvature.metadata(),
            "row_identity": None if self._saved_identity is None else self._saved_identity.metadata(),
        }

    @classmethod
    def _from_parts(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> GradientMemory:
        shapes = {name: tuple(int(n) for n in header["parameters"][name]) for name in header["parameter_order"]}
        sums = {name[len(_SUM_PREFIX) :]: t for name, t in tensors.items() if name.startswith(_SUM_PREFIX)}
        kind = header["gradient_sum_kind"]
        if bool(sums) != (kind != "none") or (sums and set(sums) != set(shapes)):
            raise MemoryFileError(f"The memory says its gradient sum is {kind!r} but its tensors do not match that.")
        for name, tensor in sums.items():
            if tuple(tensor.shape) != shapes[name] or tensor.dtype not in (torch.float32, torch.float64):
                raise MemoryFileError(
                    f"gradient_sum[{name!r}] is {tensor.dtype} of shape {tuple(tensor.shape)}, expected float32 or "
                    f"float64 of shape {shapes[name]}: the memory is corrupt."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise MemoryFileError(f"gradient_sum[{name!r}] holds NaN or infinity: the memory is corrupt.")
        identity = None
        if header["row_identity"] is not None:
            identity = RowIdentity.from_tensors(tensors, header["row_identity"])
            if len(identity) != header["data"]["rows"]:
                raise MemoryFileError(
                    f"The memory has {len(identity)} row fingerprints for {header['data']['rows']} rows: it is corrupt."
                )
        visits = tensors.get(_VISITS)
        if visits is not None and (
            visits.dtype not in (torch.uint8, torch.int32)
            or tuple(visits.shape) != (header["data"]["rows"],)
            or bool((visits < 0).any())
        ):
            raise MemoryFileError(
                f"{_VISITS} is {visits.dtype} of shape {tuple(visits.shape)}, expected a count of at least 0 for each "
                f"of {header['data']['rows']} rows: the memory is corrupt."
            )
        curvature = None
        if header["curvature"] is not None:
            others = (_SUM_PREFIX, _IDENTITY_PREFIX, _VISITS)
            rest = {name: t for name, t in tensors.items() if not name.startswith(others)}
            curvature = Curvature.from_tensors(rest, header["curvature"])
        plain = {name: header[name] for name in cls.__dataclass_fields__ if name not in _NOT_PLAIN}
        check_fields(plain)
        counted = None if visits is None else visits.numpy().astype(np.int32)
        return cls(
            parameters=shapes,
            gradient_sum=sums or None,
            curvature=curvature,
            row_identity=identity,
            visits=counted,
            **plain,
        )
