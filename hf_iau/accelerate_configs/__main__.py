"""`python -m hf_iau.accelerate_configs <name>`: where the configuration lies."""

from typing import Annotated

import typer

from hf_iau.accelerate_configs import available_configs, config_file
from hf_iau.errors import ConfigError


def main(name: Annotated[str, typer.Argument(help=f"One of: {', '.join(available_configs())}.")]) -> None:
    """Print the path of a configuration for `accelerate launch --config_file`."""
    try:
        typer.echo(config_file(name))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
