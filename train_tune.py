#!/usr/bin/env python
"""Trains the adapter and LoRA together (the paper's second stage).

python train_tune.py configs/shapes/tune.yaml run_name=my-tune [key=value ...]
accelerate launch train_tune.py configs/shapes/tune.yaml run_name=my-tune resume=true
"""

import sys

from dpt.training.launch import run_stage


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    return run_stage("tune", argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())
