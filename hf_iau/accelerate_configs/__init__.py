"""Configurations for `accelerate launch`; `python -m hf_iau.accelerate_configs ddp` prints where one lies."""

from __future__ import annotations

from pathlib import Path

from hf_iau.errors import ConfigError


def available_configs() -> list[str]:
    """Names of the packaged configurations."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def config_file(name: str) -> Path:
    """The file for `accelerate launch --config_file`.

    Raises:
        ConfigError: unknown name.
    """
    if name not in available_configs():
        raise ConfigError(f"Configuration {name!r} is unknown: choose one of {', '.join(available_configs())}.")
    return Path(__file__).parent / f"{name}.yaml"
