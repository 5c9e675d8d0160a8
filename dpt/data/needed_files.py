"""The files and folders that a config names. Imports nothing heavy."""

from pathlib import Path

from dpt.data.settings import DataSettings


def needed_files(data: DataSettings) -> list[Path]:
    """Every file and folder that the config names; of the shapes world none, which is made on the fly."""
    own = [] if data.trajectories is None else [Path(data.trajectories)]
    if data.kind != "coco":
        return own
    names = [data.images, data.expressions, data.itm, data.val_images, data.val_itm, *data.val_expressions]
    names += [data.latents] if data.latents else []
    return own + [Path(data.root) / name for name in names]
