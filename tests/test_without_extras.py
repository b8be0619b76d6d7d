"""What works without the packages of the extras, and what says which extra to install."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

OPTIONAL = ("evaluate", "matplotlib", "rich", "sklearn", "typer")

SCRIPT = """
import json, sys
from pathlib import Path

for name in json.loads(sys.argv[2]):
    sys.modules[name] = None  # as if it were not installed

import numpy as np
from hf_iau import *
from hf_iau import IAUCallback, IAUConfig, UnlearningReport
from hf_iau.errors import MissingPackageError
from hf_iau.evaluation import svc_confidence_attack
from unlearning_trainers import FORGET, WITH_CURVATURE, make_trainer

folder = Path(sys.argv[1])
trainer = make_trainer(folder, "plain", callbacks=[IAUCallback(WITH_CURVATURE)])
trainer.train()
report = trainer.unlearn(forget_indices=FORGET, config=IAUConfig(scale=0.1, damping=1.0)).report
report.save(folder)
assert UnlearningReport.load(folder).counts["forget_rows"] == len(FORGET)

for ask, words in (
    (lambda: svc_confidence_attack(*np.random.default_rng(0).random((3, 9))), "scikit-learn, which"),
    (lambda: __import__("hf_iau.metrics"), "evaluate, which"),
):
    try:
        ask()
    except MissingPackageError as error:
        assert words in str(error) and 'pip install "hf-iau[metrics]"' in str(error), error
        assert isinstance(error, ImportError) and error.name in ("sklearn", "evaluate")
    else:
        raise AssertionError(words)
print("done")
"""


def test_a_request_needs_none_of_them(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(OPTIONAL)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.rstrip().endswith("done")
