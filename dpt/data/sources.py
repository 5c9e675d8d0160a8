"""The samples that a run trains on and those that it is measured on, by its config.

A world of data is a module with `training_samples` and `validation_samples`.
"""

from collections.abc import Callable

from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.data import coco_samples
from dpt.data.settings import DataSettings
from dpt.data.trajectories import RankedPrompts
from dpt.shapes import samples as shapes_samples

WORLDS = {"shapes": shapes_samples, "coco": coco_samples}


def training_samples(data: DataSettings, sd: StableDiffusion, *, seed: int, notice: Callable = print):
    """The training set of the paper's losses; None where there are trajectories alone.

    Args:
        seed: of a sample's drawn caption, negatives and mirroring.

    Raises:
        ValueError: a missing folder or file, or nothing in it; it is named.
    """
    if data.kind == "trajectories":
        return None
    return WORLDS[data.kind].training_samples(data, sd, seed=seed, notice=notice)


def validation_samples(
    data: DataSettings, sd: StableDiffusion, *, num_samples: int, split: str = "val"
) -> dict[str, object]:
    """The val sets by task: `itm`, and `rec_<name>` for each list of expressions.

    Args:
        split: of the shapes world, val or test; coco's lists are those that the config names.
    """
    if data.kind == "trajectories":
        return {}
    return WORLDS[data.kind].validation_samples(data, sd, num_samples=num_samples, split=split)


def ranked_prompts(data: DataSettings, sd: StableDiffusion, *, held_out: bool, seed: int = 0) -> RankedPrompts | None:
    """Own trajectories to train on, or those held out of training; None where the config names none."""
    if data.trajectories is None:
        return None
    return RankedPrompts(
        data.trajectories,
        data.labels,
        model=sd.name,
        latent_shape=sd.latent_shape(),
        held_out=held_out,
        num_prompts=None if held_out else data.num_prompts,
        seed=seed,
    )
