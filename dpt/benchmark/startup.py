"""Seconds and memory that commands take to answer. Imports nothing heavy."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    ("txt2img.py --help", 0),
    ("train_probe.py --help", 0),
    ("evaluate.py --help", 0),
    ("txt2img.py --n_samples 0", 2),
    ("train_probe.py configs/shapes/probe.yaml --dry-run", 0),
    ("-c import dpt", 0),
)
"""what Python is to run, and the exit code"""


def measure_startup(repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds and largest peak memory in MB of each command, run again and again, each in a process of its own.

    Raises:
        ValueError: a command ended with an unexpected exit code.
    """
    return {command: _measure(command, code, repeats) for command, code in COMMANDS}


def _measure(command: str, code: int, repeats: int) -> dict[str, float]:
    times, peaks = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command.split(" ", 1 if command.startswith("-c") else -1)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        times.append(time.perf_counter() - began)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != code:
            raise ValueError(f"{command} ended with exit code {process.returncode} instead of {code}")
        peaks.append(usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))
    return {"seconds": statistics.median(times), "peak_mb": max(peaks)}
