"""A small vision model learns wrong labels by heart, then forgets 80 of them without being retrained.

Runs offline in less than three minutes on two CPU cores:

    python examples/demo.py --output_dir outputs/demo

The demonstration itself is `hf_iau/cli/demo.py`, so that `hf-iau demo` runs it without a clone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from hf_iau.cli.demo import run_demo


@dataclass
class DemoArguments:
    """What can be set; the defaults are the demonstration that the README shows."""

    output_dir: str = field(default="outputs/demo", metadata={"help": "Where the report is written."})
    seed: int = field(default=0, metadata={"help": "Seed of split, wrong labels, training and calibration."})
    quick: bool = field(default=False, metadata={"help": "A few seconds of training: to test the script, not to look."})


if __name__ == "__main__":
    (arguments,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses()
    run_demo(arguments.output_dir, seed=arguments.seed, quick=arguments.quick)
