"""A method whose step is noted before it is written, and taken from the note after a crash."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

from hf_iau.deletion.journal import Journal
from hf_iau.deletion.milestones import passed
from hf_iau.methods.context import ForgetContext
from hf_iau.methods.outcome import MethodOutcome
from hf_iau.utils.jsonable import jsonable

logger = logging.getLogger(__name__)

STEP = ("scale", "damping", "retain_weight")
"""What a step is made with."""


class JournaledMethod:
    """A method that notes its step in the journal, and takes the step that is noted there already."""

    def __init__(
        self, method: Any, journal: Journal, found: dict[str, Any] | None, note: Callable[[Journal], None]
    ) -> None:
        self.method, self.journal, self.found, self.note = method, journal, found, note
        self.name, self.config_class, self.citation = method.name, method.config_class, method.citation
        self.moves_only_trained = getattr(method, "moves_only_trained", False)

    def check(self, context: ForgetContext, config: Any) -> None:
        self.method.check(context, self._settled(config))

    def run(self, context: ForgetContext, config: Any) -> MethodOutcome:
        outcome: MethodOutcome = self.method.run(context, self._settled(config))
        if self.found is not None:
            logger.warning("The request was interrupted before: the step that it had found then is taken.")
            outcome.calibration, outcome.calibrated = self.found["calibration"], self.found["calibrated"]
            outcome.verdict = self.found["verdict"]
            outcome.diagnostics |= {"calibration": self.found["found"], "reasons": self.found["reasons"]}
        passed("step computed")
        self.journal = dataclasses.replace(self.journal, step=self._step(outcome, config))
        self.note(self.journal)
        passed("journal written")
        return outcome

    def _settled(self, config: Any) -> Any:
        if self.found is None:
            return config
        return dataclasses.replace(config, **{name: self.found[name] for name in STEP})

    def _step(self, outcome: MethodOutcome, config: Any) -> dict[str, Any] | None:
        found = outcome.diagnostics.get("calibration")
        # A walk is many steps, which k, λ and c do not describe: it is walked again.
        if not isinstance(found, Mapping) or "multi_step" in outcome.diagnostics:
            return None
        if not all(name in found and hasattr(config, name) for name in STEP):
            return None
        return {name: found[name] for name in STEP} | jsonable(
            {
                "found": found,
                "calibration": outcome.calibration,
                "calibrated": outcome.calibrated,
                "verdict": outcome.verdict,
                "reasons": outcome.diagnostics.get("reasons", []),
            }
        )
