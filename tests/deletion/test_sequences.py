"""Random sequences of all that one can do with a trainer: no row is forgotten wrongly, lost, or comes back.

The model keeps its own account: `tally` counts how often the row with a number was forgotten, `trained` how often it
was trained on. So the weights themselves say what they know, whatever the package's records claim. HF_IAU_SEQUENCES
sets how many sequences are tried.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.torch import load_file
from tiny_models import as_dataset
from torch import Tensor, nn
from transformers import default_data_collator
from unlearning_trainers import arguments

from hf_iau import (
    AlreadyForgottenError,
    DeletionService,
    GatherConfig,
    IAUCallback,
    MemoryMismatchError,
    StorageError,
    UnknownRowsError,
    UnlearningTrainer,
)
from hf_iau.deletion.journal import JournalFile
from hf_iau.methods import base
from hf_iau.methods.base import register_method
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome

KEY = "the key of random sequences, 40 letters"
ROWS = 14
# Rows 3, 8 and 11 are copies of each other, and 5 and 6.
CONTENT = [3 if i in (8, 11) else 5 if i == 6 else i for i in range(ROWS)]
CONFIG = GatherConfig(gradient_sum="none", curvature="none", progress=False)


class Accountant(nn.Module):
    """A classifier that counts which rows it was trained on and made to forget."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(2, 2)
        self.tally = nn.Parameter(torch.zeros(ROWS))
        self.register_buffer("trained", torch.zeros(ROWS))

    def forward(self, features: Tensor, number: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        if self.training:
            self.trained += torch.bincount(number, minlength=ROWS)
        logits = self.output(features) + 0.0 * self.tally.sum()
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


@dataclass(frozen=True)
class CountRowsConfig:
    """Nothing to set."""


class CountRows:
    """Counts the forget rows in the weights."""

    name: ClassVar[str] = "test-count-rows"
    config_class: ClassVar[type] = CountRowsConfig
    citation: ClassVar[str] = "none"

    def check(self, context: ForgetContext, config: CountRowsConfig) -> None:
        pass

    def run(self, context: ForgetContext, config: CountRowsConfig) -> MethodOutcome:
        with torch.no_grad():
            for _, inputs in context.forget:
                context.model.tally += torch.bincount(inputs["number"], minlength=ROWS)  # type: ignore[operator]
        return MethodOutcome()


def rows(contents: list[int], start: int = 0) -> Any:
    return as_dataset(
        [
            {"features": [0.1 * c, 1.0 - 0.2 * c], "number": c, "labels": c % 2, "user": f"u{start + i}"}
            for i, c in enumerate(contents)
        ]
    )


TRAIN = rows(CONTENT)
HELD_OUT = as_dataset([{"features": [9.0 + i, 1.0], "number": 0, "labels": i % 2} for i in range(4)])
UNKNOWN = as_dataset([{"features": [50.0, 1.0], "number": 0, "labels": 1}])


def make_trainer(folder: Path, model: Accountant | None = None, dataset: Any = None) -> UnlearningTrainer:
    return UnlearningTrainer(
        model=model or Accountant(),
        args=arguments(folder, optim="sgd", max_steps=4, seed=1),
        train_dataset=TRAIN if dataset is None else dataset,
        eval_dataset=HELD_OUT,
        data_collator=default_data_collator,
        callbacks=[IAUCallback(CONFIG)],
    )


def on_disk(folder: Path) -> Accountant:
    model = Accountant()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@pytest.fixture(autouse=True)
def _with_key_and_method(_no_key_of_the_machine: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("HF_IAU_KEY", KEY)
    register_method(CountRows)
    yield
    del base._METHODS[CountRows.name]


class _Trained:
    """A folder with a trained model and its memory, made once."""

    folder: Path | None = None

    @classmethod
    def copy_to(cls, folder: Path) -> None:
        if cls.folder is None:
            cls.folder = Path(tempfile.mkdtemp())
            trainer = make_trainer(cls.folder)
            trainer.train()
            trainer.save_model()
        shutil.copytree(cls.folder, folder, dirs_exist_ok=True)


NUMBERS = st.sets(st.integers(0, ROWS - 1), min_size=1, max_size=4)


class Sequences(RuleBasedStateMachine):
    """`gone` and `saved` are the rows that must be out of the model in memory, and of the one on disk."""

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        _Trained.copy_to(self.folder)
        self.gone: set[int] = set()
        self.saved: set[int] = set()
        self.waiting: set[int] = set()
        self.last: tuple[Any, set[int]] | None = None
        self.trainer = make_trainer(self.folder, on_disk(self.folder))
        self.other: tuple[UnlearningTrainer, set[int]] | None = None

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    @property
    def ask(self) -> dict[str, Any]:
        return {"method": "test-count-rows"}

    def too_many(self, numbers: set[int]) -> bool:
        """Not tried here: a request of all rows that are left, which is refused whatever else is wrong with it; and one
        of a copy of a row that waits, which takes the waiting one along, as the queue goes by content."""
        waiting = {CONTENT[i] for i in self.waiting - numbers}
        if any(CONTENT[i] in waiting for i in numbers):
            return True
        return len(self.gone | self.saved) + len(self.waiting) + len(numbers) >= ROWS

    def service(self, trainer: UnlearningTrainer | None = None) -> DeletionService:
        return DeletionService(trainer or self.trainer, id_column="user")

    # --- what one can do ----------------------------------------------------------------------------------------------

    @rule(numbers=NUMBERS)
    def forget(self, numbers: set[int]) -> None:
        if self.too_many(numbers):
            return
        before = set(self.gone)
        if numbers & self.gone:
            with pytest.raises(AlreadyForgottenError):
                self.trainer.unlearn(forget_indices=numbers, **self.ask)
            return
        result = self.trainer.unlearn(forget_indices=numbers, **self.ask)
        self.gone |= numbers
        self.last = (result, before)

    @rule(numbers=NUMBERS)
    def forget_content(self, numbers: set[int]) -> None:
        """Of equal rows, as many copies go as are asked for: those that come first and are still in."""
        if self.too_many(numbers):
            return
        before, chosen = set(self.gone), list[int]()
        for number in sorted(numbers):
            free = [i for i in range(ROWS) if CONTENT[i] == CONTENT[number] and i not in {*self.gone, *chosen}]
            if not free:
                with pytest.raises(AlreadyForgottenError):
                    self.trainer.unlearn(TRAIN.select(sorted(numbers)), **self.ask)
                return
            chosen.append(free[0])
        result = self.trainer.unlearn(TRAIN.select(sorted(numbers)), **self.ask)
        self.gone |= set(chosen)
        self.last = (result, before)

    @rule()
    def forget_unknown(self) -> None:
        with pytest.raises(UnknownRowsError):
            self.trainer.unlearn(UNKNOWN, **self.ask)

    @precondition(lambda self: self.last is not None)
    @rule()
    def revert(self) -> None:
        assert self.last is not None
        result, self.gone = self.last
        result.revert()
        self.last = None

    @rule()
    def save(self) -> None:
        if not self.saved <= self.gone:
            return
        self.trainer.save_model()
        self.saved = set(self.gone)
        self.last = None

    @rule()
    def reload(self) -> None:
        self.trainer = make_trainer(self.folder, on_disk(self.folder))
        self.gone, self.last = set(self.saved), None

    @rule(numbers=NUMBERS)
    def serve(self, numbers: set[int]) -> None:
        if self.too_many(numbers):
            return
        self.serve_with(self.trainer, self.gone, numbers)

    def serve_with(self, trainer: UnlearningTrainer, gone: set[int], numbers: set[int]) -> None:
        if numbers & gone:
            try:
                # A request of just these rows may have been served before: then it is answered.
                assert not self.service(trainer).unlearn(forget_indices=numbers, **self.ask).applied
            except AlreadyForgottenError:
                pass
            return
        assert self.service(trainer).unlearn(forget_indices=numbers, **self.ask).applied
        gone |= numbers
        self.saved, self.last = set(gone), None
        self.waiting -= gone

    @rule(numbers=NUMBERS)
    def serve_ids(self, numbers: set[int]) -> None:
        if self.too_many(numbers):
            return
        ids = [f"u{number}" for number in sorted(numbers)]
        if numbers <= self.gone:
            try:
                assert not self.service().unlearn(ids=ids, **self.ask).applied
            except AlreadyForgottenError:
                pass
            return
        assert self.service().unlearn(ids=ids, **self.ask).applied
        self.gone |= numbers
        self.saved, self.last = set(self.gone), None
        self.waiting -= self.gone

    @rule(numbers=NUMBERS)
    def queue(self, numbers: set[int]) -> None:
        if self.too_many(numbers):
            return
        if numbers & self.gone:
            with pytest.raises(AlreadyForgottenError):
                self.service().queue(forget_indices=numbers)
            return
        self.service().queue(forget_indices=numbers)
        self.waiting |= numbers

    @precondition(lambda self: self.waiting)
    @rule()
    def serve_queue(self) -> None:
        """Waiting copies of one content are interchangeable, so what is gone is known by content alone."""
        due = Counter(CONTENT[i] for i in self.waiting)
        result = self.service().serve_queue(**self.ask)
        self.waiting, self.last = set(), None
        if result is None:
            return
        found = set(np.flatnonzero(self.trainer.memory.row_identity.forgotten).tolist())
        assert self.gone <= found
        new = Counter(CONTENT[i] for i in found - self.gone)
        for content, count in new.items():
            assert count <= due[content]
        for content, count in due.items():
            left = sum(CONTENT[i] == content for i in range(ROWS) if i not in self.gone)
            assert new[content] == min(count, left)
        self.gone, self.saved = found, set(found)

    @rule(numbers=NUMBERS, committed=st.booleans())
    def crash(self, numbers: set[int], committed: bool) -> None:
        """The process dies before or after the commit; the next one finds the old state or the new one whole."""
        if self.too_many(numbers):
            return
        if numbers & self.gone:
            return
        name = "finish" if committed else "seal"
        with pytest.MonkeyPatch.context() as patch:

            def dies(*args: Any) -> None:
                raise SystemExit("killed")

            patch.setattr(JournalFile, name, dies)
            with pytest.raises(SystemExit):
                self.service().unlearn(forget_indices=numbers, **self.ask)
        if committed:
            self.saved = self.gone | numbers
            self.waiting -= self.saved
        self.trainer = make_trainer(self.folder, on_disk(self.folder))
        self.service()  # finishes what was committed, and gives the model its weights
        self.gone, self.last = set(self.saved), None

    @rule()
    def gather(self) -> None:
        self.trainer.gather()

    @rule()
    def train_on(self) -> None:
        """Rows that are out are not trained on, and what is trained is saved."""
        before = self.trainer.model.trained.clone()
        self.trainer.train()
        new = self.trainer.model.trained - before
        assert new.sum() > 0
        left = {CONTENT[i] for i in range(ROWS) if i not in self.gone}
        assert all(new[content] == 0 for content in range(ROWS) if content not in left)
        self.last = None
        if self.saved <= self.gone:
            self.trainer.save_model()
            self.saved = set(self.gone)
        else:
            self.reload()

    @rule()
    def another_trainer_is_made(self) -> None:
        self.other = (make_trainer(self.folder, on_disk(self.folder)), set(self.saved))

    @precondition(lambda self: self.other is not None)
    @rule(numbers=NUMBERS)
    def the_other_trainer_serves(self, numbers: set[int]) -> None:
        """It may be from before other requests: then it takes over what they left first, or refuses."""
        if self.too_many(numbers):
            return
        assert self.other is not None
        trainer, _ = self.other
        try:
            served = self.service(trainer).unlearn(forget_indices=numbers, **self.ask).applied
        except (AlreadyForgottenError, StorageError):
            served = False
        if served:
            assert not numbers & self.saved
            self.saved = self.saved | numbers
            self.waiting -= self.saved
            self.other = (trainer, set(self.saved))
            self.reload()

    @precondition(lambda self: self.other is not None)
    @rule()
    def the_other_trainer_saves(self) -> None:
        assert self.other is not None
        trainer, _ = self.other
        with contextlib.suppress(StorageError):
            trainer.save_model()
        found = Counter({i: int(n) for i, n in enumerate(on_disk(self.folder).tally.tolist()) if n})
        assert not Counter(CONTENT[i] for i in self.saved) - found, "rows came back"

    @rule(seed=st.integers(0, 5))
    def shuffled(self, seed: int) -> None:
        """Numbers of a data set in another order are refused; rows and ids mean the same rows."""
        order = np.random.default_rng(seed).permutation(ROWS)
        whole = self.trainer.train_dataset
        self.trainer.train_dataset = TRAIN.select(order)
        if [CONTENT[i] for i in order] != CONTENT:
            with pytest.raises(MemoryMismatchError):
                self.trainer.unlearn(forget_indices=[int(order[0])], **self.ask)
        self.trainer.train_dataset = whole

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def the_weights_say_so(self) -> None:
        if not hasattr(self, "trainer"):
            return
        for model, gone in ((self.trainer.model, self.gone), (on_disk(self.folder), self.saved)):
            found = Counter({i: int(n) for i, n in enumerate(model.tally.tolist()) if n})
            assert found == Counter(CONTENT[i] for i in gone)

    @invariant()
    def the_memory_says_so(self) -> None:
        if hasattr(self, "trainer"):
            assert set(np.flatnonzero(self.trainer.memory.row_identity.forgotten).tolist()) == self.gone


TestSequences = Sequences.TestCase
TestSequences.settings = settings(
    max_examples=int(os.environ.get("HF_IAU_SEQUENCES", "20")),
    stateful_step_count=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    # A failure is told as it was found: making it smaller takes longer than a test may.
    phases=[phase for phase in Phase if phase is not Phase.shrink],
)
