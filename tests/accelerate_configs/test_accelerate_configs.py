"""The packaged configurations are Accelerate's, and one really launches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

from hf_iau import ConfigError
from hf_iau.accelerate_configs import available_configs, config_file

EXPECTED = {
    "single": (DistributedType.NO, 1, False),
    "ddp": (DistributedType.MULTI_GPU, 2, False),
    "fsdp2": (DistributedType.FSDP, 2, False),
    "cpu_two_processes": (DistributedType.MULTI_GPU, 2, True),
}
REPOSITORY = Path(__file__).parents[2]

SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tiny_models import plain, plain_rows
from unlearning_trainers import FORGET, WITH_CURVATURE, make_trainer, parameters_of
from hf_iau import IAUCallback, IAUConfig

trainer = make_trainer(Path(sys.argv[2]), "plain", callbacks=[IAUCallback(WITH_CURVATURE)])
trainer.train()
before = parameters_of(trainer.model)
trainer.unlearn(forget_indices=FORGET, config=IAUConfig(scale=0.1, damping=1.0))
moved = sum(float((p - before[name]).abs().sum()) for name, p in parameters_of(trainer.model).items())
found = {"moved": moved, "processes": trainer.args.world_size, "backend": trainer.accelerator.distributed_type}
Path(sys.argv[2], f"process-{trainer.args.process_index}.json").write_text(json.dumps(found))
"""


@pytest.mark.parametrize("name", EXPECTED)
def test_configurations_are_read_by_accelerate(name: str) -> None:
    config = load_config_from_file(str(config_file(name)))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_processes, config.use_cpu) == EXPECTED[name]
    known = set(ClusterConfig.__dataclass_fields__)
    assert set(yaml.safe_load(config_file(name).read_text())) <= known


def test_every_configuration_is_tested() -> None:
    assert available_configs() == sorted(EXPECTED)
    with pytest.raises(ConfigError, match=r"'deepspeed' is unknown: choose one of .*ddp"):
        config_file("deepspeed")


def test_two_processes_are_launched(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config_file("cpu_two_processes")),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with socket.socket() as kept:
        # Bound and not listening, it keeps the port from all but the launcher, which reuses addresses as well.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        where = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(kept.getsockname()[1])]
        done = subprocess.run(
            [*command, *where, str(script), str(REPOSITORY / "tests"), str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((tmp_path / f"process-{number}.json").read_text()) for number in range(2)]
    assert [about["processes"] for about in found] == [2, 2]
    assert found[0]["moved"] == found[1]["moved"] > 0
    assert (tmp_path / "_iau" / "memory.json").is_file()
