"""Run folders: where a training run keeps its state, so that it can be killed at any moment.

outputs/<run_name>/{config.yaml, log.txt, metrics.jsonl, checkpoints/step_0005000/}
step_N/{adapter.safetensors, lora/, config.yaml, training_state/{optimizer.safetensors, state.json}}
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from dpt.checkpoint import DPTCheckpoint, load_checkpoint, read_tensors, save_checkpoint


def open_run(folder: Path, *, resume: bool) -> Path:
    """Makes a run folder, or opens it again.

    Raises:
        ValueError: it exists and `resume` is off.
    """
    if folder.exists() and not resume:
        raise ValueError(f"run folder {folder} exists: pass resume=true to go on with it, or another run_name")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return folder


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
        state: what else a resumption needs, as JSON.
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
    for old in _steps(folder)[keep:]:
        shutil.rmtree(old)
    return target


def load_newest(folder: Path, notice=print) -> tuple[DPTCheckpoint, dict[str, torch.Tensor], dict] | None:
    """The newest complete step: its weights, the optimiser's tensors and state; None where there is none.

    A damaged step is named, and the one before it taken.
    """
    for step in _steps(folder):
        try:
            checkpoint = load_checkpoint(step)
            tensors = read_tensors(step / "training_state/optimizer.safetensors")
            return checkpoint, tensors, json.loads((step / "training_state/state.json").read_text())
        except (ValueError, OSError) as error:
            notice(f"checkpoint {step} is damaged and passed over: {error}")
    return None


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, torch.Tensor]) -> None:
    """Puts tensors that `save_step` wrote back into the optimiser."""
    state = optimizer.state_dict()
    by_name: dict[str, dict] = {}
    for key, value in tensors.items():
        name, field = key.rsplit("|", 1)
        by_name.setdefault(name, {})[field] = value
    state["state"] = {index: by_name[name] for index, name in enumerate(names) if name in by_name}
    optimizer.load_state_dict(state)


def _steps(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step_*"), reverse=True)
