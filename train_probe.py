#!/usr/bin/env python
"""Trains the adapter on a frozen denoiser (the paper's first stage).

python train_probe.py configs/shapes/probe.yaml run_name=my-probe [key=value ...]
accelerate launch train_probe.py configs/shapes/probe.yaml run_name=my-probe resume=true
"""

import sys

from dpt.training.launch import run_stage


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_stage("probe", argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
