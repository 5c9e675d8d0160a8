"""Ids of the Hugging Face hub in place of paths."""

import re
from pathlib import Path


def is_hub_id(name: str | Path) -> bool:
    """Whether a name reads like an id of the hub, such as leigangqu/DPT-T2I, and is no path of this machine."""
    path = Path(name)
    return (
        bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name))) and not path.exists() and not path.parent.exists()
    )


def check_there(name: str | Path) -> None:
    """Raises ValueError for weights that are no path of this machine and no id of the hub."""
    if not Path(name).exists() and not is_hub_id(name):
        raise ValueError(f"{name} is not there; pass our folder, a run's, or the released checkpoint")


WEIGHTS = ["config.yaml", "adapter.safetensors", "lora/*.safetensors", "pytorch_model.bin", "model.safetensors"]
"""the files of an adapter and its LoRA: ours, or the released ones"""


def fetch_weights(name: str | Path, *, local_files_only: bool = False) -> Path:
    """The folder of an adapter and its LoRA, downloaded where they are not in the cache.

    Raises:
        ValueError: neither on the hub nor, with `local_files_only`, in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=WEIGHTS, local_files_only=local_files_only))
    except (OSError, ValueError) as error:  # the hub's own errors are one or the other
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} is neither a path here nor to be had from the hub ({reason})") from error
