"""Run folders: the state of a training run on disk, so that it can be killed at any moment.

outputs/<run_name>/{config.yaml, log.txt, metrics.jsonl, curves.png, samples/, checkpoints/step_0005000/}
step_N/{adapter.safetensors, lora/, config.yaml, training_state/{optimizer.safetensors, state.json}}
"""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from dpt.checkpoint.checkpoint import DPTCheckpoint, checkpoints, load_checkpoint, read_tensors, save_checkpoint
from dpt.config import load_config
from dpt.files import append_line, read_json
from dpt.images import numbered
from dpt.training.curves import drop_metrics_after, plot_curves
from dpt.training.settings import TrainConfig, check_finished

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")


class TrainingState(TypedDict):
    """The state of a run beside its tensors. Further keys that `save_step` is given are kept as they are."""

    step: int
    skipped: int
    stage: str
    samples_per_step: NotRequired[int]
    scaler: NotRequired[dict[str, float] | None]


def check_run(folder: Path, *, resume: bool) -> None:
    """Raises ValueError where the run folder holds another run or other files, or is no folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run folder {folder} is a file: choose another run_name or output_folder")
    config = folder / "config.yaml"
    if not resume and (config.exists() or checkpoints(folder)):
        raise ValueError(f"run folder {folder} exists: pass resume=true to go on with it, or another run_name")
    if config.exists():
        load_config(TrainConfig, config)  # else it is another program's
        return
    for name in ("log.txt", "metrics.jsonl", "curves.png"):  # a run writes them after its config
        if (folder / name).exists():
            raise ValueError(f"run folder {folder} holds {name} but no run's config.yaml: choose another run_name")


def is_finished(config: TrainConfig) -> bool:
    """Whether the run has its last checkpoint. False for a length in epochs, whose steps training alone knows.

    Raises:
        ValueError: it has, with other settings.
    """
    folder = Path(config.output_folder) / config.run_name
    newest = checkpoints(folder) if config.optim.epochs is None else []
    if not newest or int(newest[0].name.removeprefix("step_")) < config.optim.steps:
        return False
    check_finished(config, load_config(TrainConfig, folder / "config.yaml"))
    return True


def set_damaged_aside(folder: Path, notice=print) -> None:
    """Renames unreadable checkpoints, newest first, until one can be read, and removes the remains of a killed save.

    Raises:
        ValueError: there are checkpoints, and none can be read.
    """
    for leftover in (folder / "checkpoints").glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
    steps = checkpoints(folder)
    for step in steps:
        try:
            _read_step(step)
            return
        except (ValueError, OSError) as error:
            name = f"damaged_{step.name}"
            aside = step.with_name(name)
            if aside.exists():
                aside = next(path for path in numbered(step.parent, name + "-{}", 2) if not path.exists())
            step.rename(aside)
            notice(f"checkpoint {step} is damaged and passed over, it is now {aside.name}: {error}")
    if steps:
        raise ValueError(f"none of the {len(steps)} checkpoints of {folder} can be read")


def save_step(
    folder: Path,
    step: int,
    checkpoint: DPTCheckpoint,
    *,
    optimizer: torch.optim.Optimizer,
    names: list[str],
    state: dict,
    keep: int,
) -> Path:
    """Writes step_N at once or not at all, then removes all but the newest `keep`.

    Args:
        names: of the optimiser's parameters, in its order.
        state: further values that a resumption needs, as JSON.
    """
    target = folder / "checkpoints" / f"step_{step:07d}"
    tensors = {}
    for index, values in optimizer.state_dict()["state"].items():  # none for what never had a gradient
        tensors |= {f"{names[index]}|{key}": value.contiguous() for key, value in values.items()}

    def write_training_state(temporary: Path) -> None:
        (temporary / "training_state").mkdir()
        save_file(tensors, temporary / "training_state/optimizer.safetensors")
        (temporary / "training_state/state.json").write_text(json.dumps(state | {"step": step}))

    save_checkpoint(checkpoint, target, also=write_training_state)
    for old in checkpoints(folder)[keep:]:
        shutil.rmtree(old)
    return target


def load_newest(folder: Path) -> tuple[DPTCheckpoint, dict[str, torch.Tensor], dict] | None:
    """The newest step: its weights, the optimiser's tensors and state; None where there is none."""
    steps = checkpoints(folder)
    return _read_step(steps[0]) if steps else None


def _read_step(step: Path) -> tuple[DPTCheckpoint, dict[str, torch.Tensor], dict]:
    checkpoint = load_checkpoint(step)
    tensors = read_tensors(step / "training_state/optimizer.safetensors")
    path = step / "training_state/state.json"
    read_json(path, TrainingState)
    return checkpoint, tensors, read_json(path, dict[str, Any])


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor]) -> None:
    """Puts tensors that `save_step` wrote back into the optimiser.

    Raises:
        ValueError: moments of another shape than their parameter.
    """
    state = optimizer.state_dict()
    by_name: dict[str, dict] = {}
    for key, value in tensors.items():
        name, field = key.rsplit("|", 1)
        by_name.setdefault(name, {})[field] = value
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for field, value in by_name.get(name, {}).items():
            if field != "step" and value.shape != parameter.shape:
                raise ValueError(
                    f"the optimiser's {field} of {name} is {tuple(value.shape)}, the parameter is "
                    f"{tuple(parameter.shape)}: remove that checkpoint, and the run goes on from the one before"
                )
    state["state"] = {index: by_name[name] for index, name in enumerate(names) if name in by_name}
    optimizer.load_state_dict(state)


class RunLog:
    """Messages and figures of a run: `log.txt`, `metrics.jsonl` and `curves.png` in its folder.

    Args:
        step: the step at which the run goes on; a killed run's metrics after it are dropped.
    """

    def __init__(self, folder: Path, step: int):
        self.folder, self.metrics = folder, folder / "metrics.jsonl"
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        drop_metrics_after(self.metrics, step)

    def say(self, message: str) -> None:
        """Prints a line, beside any progress bar, and adds it to the log with the time."""
        tqdm.write(message)
        with (self.folder / "log.txt").open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")

    def record(self, step: int, figures: dict[str, float]) -> None:
        """Adds a line of figures."""
        append_line(self.metrics, {"step": step} | figures)

    def plot(self) -> None:
        """Draws the curves so far."""
        if self.metrics.exists():
            plot_curves(self.metrics, self.folder / "curves.png")


def versions() -> str:
    """The commit (with + where files differ from it), Python and the libraries that results depend on."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--abbrev=10"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    libraries = " ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return f"dpt {described or 'without git'}, python {platform.python_version()}, {libraries}"
