"""A script of `test_engine`: a run from end to end, and the same run killed 20 times at random moments."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import dpt.training.trainer  # noqa: F401 - the script imports it late; children share what is here already
import train_tune

NUM_KILLS = 20
torch.set_num_threads(1)
folder, *arguments = sys.argv[1:]


def start(name: str, *more: str) -> int:
    """Runs in a child process, which shares what is imported already."""
    child = os.fork()
    if child == 0:
        with open(Path(folder) / f"{name}.txt", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os._exit(train_tune.main([*arguments, f"output_folder={folder}/{name}", *more]))
    return child


began = time.perf_counter()
assert os.waitstatus_to_exitcode(os.waitpid(start("whole"), 0)[1]) == 0, (Path(folder) / "whole.txt").read_text()
whole = time.perf_counter() - began
log = Path(folder) / "whole/run/log.txt"
rng, kills, steps = random.Random(0), 0, []
while True:
    child = start("killed", "resume=true")
    if kills < NUM_KILLS:
        # after training has begun anew, so that every life makes some progress
        marks = Path(folder) / "killed/run/log.txt"
        lives = marks.read_text().count("parameters to train") if marks.exists() else 0
        while not marks.exists() or marks.read_text().count("parameters to train") == lives:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), (Path(folder) / "killed.txt").read_text()[-3000:]
            time.sleep(0.01)
        time.sleep(rng.uniform(0, whole / 20))
        os.kill(child, signal.SIGKILL)
        kills += 1
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL, f"it was over after {kills} kills: more steps are needed"
        continue
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, (Path(folder) / "killed.txt").read_text()[-3000:]
    break
print(json.dumps({"kills": kills, "seconds_uninterrupted": whole}))
