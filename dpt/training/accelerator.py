"""Accelerate and the learning rate, set up by the config alone."""

import math
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from dpt.training.settings import OptimSettings, TrainConfig

DEVICE_VARIABLES = ("ACCELERATE_USE_CPU", "ACCELERATE_TORCH_DEVICE", "ACCELERATE_CPU_AFFINITY")
"""Variables by which `accelerate launch` names devices; the config sets everything else."""


def learning_rate_factor(step: int, *, steps: float, warmup_steps: float, schedule: str) -> float:
    """Factor of the learning rate: linear warm-up, then constant, linear or cosine to zero at `steps`.

    Beyond `steps` a cosine rises again, as the reference's does with more processes than accumulated batches.
    """
    if step < warmup_steps:
        return min(1.0, (step + 1) / warmup_steps)
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return {"constant": 1.0, "linear": max(0.0, 1 - progress), "cosine": cosine}[schedule]


def schedule_stretch(optim: OptimSettings, processes: int) -> float:
    """Length of the schedule in runs: the reference counts micro-batches, and steps once a process."""
    return optim.gradient_accumulation_steps / processes if optim.schedule_length == "reference" else 1


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate, set up by the config alone. Of the environment's ACCELERATE_* variables only those for devices count.

    Raises:
        ValueError: a precision or a tracker that cannot be used here.
    """
    # with a loss off, the parameters that only it reaches have no gradient
    weights = [weight for name, weight in vars(config.loss.weights).items() if name not in ("reward", "rank")]
    some_off = not all(weights) or config.loss.itm_every > 1 or config.data.kind == "trajectories"
    cpu = not torch.accelerator.is_available()
    if cpu and config.optim.mixed_precision == "fp16":
        raise ValueError("optim.mixed_precision is fp16; a CPU trains in bf16 or no (float32)")
    ignored = [name for name in os.environ if name.startswith("ACCELERATE_") and name not in DEVICE_VARIABLES]
    hidden = {name: os.environ.pop(name) for name in ignored}
    try:
        accelerator = Accelerator(
            cpu=cpu,  # else several processes on CPUs would not find each other
            mixed_precision=config.optim.mixed_precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=some_off)],
            log_with=config.tracker,
            project_dir=str(Path(config.output_folder) / config.run_name),
        )
        if config.tracker and not accelerator.log_with:
            raise ValueError("it is not installed")
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"tracker {config.tracker!r} or mixed precision cannot be used: {' '.join(str(error).split())[:160]}"
        ) from error
    finally:
        os.environ.update(hidden)
    return accelerator
