"""Which samples a run trains on, and which it is measured on: of either world, by its config."""

from collections.abc import Callable
from pathlib import Path

from dpt.config import DataSettings
from dpt.data.itm import ItmNegatives
from dpt.data.latents import LatentFolder
from dpt.data.refcoco import load_expressions
from dpt.data.samples import CocoSamples
from dpt.data.trajectories import RankedPrompts
from dpt.shapes.samples import ShapesSamples
from dpt.stable_diffusion import StableDiffusion

NUM_SHAPES = 10_000


def training_samples(data: DataSettings, sd: StableDiffusion, *, seed: int, notice: Callable = print):
    """The training set of the paper's losses; None where there are trajectories alone.

    Args:
        seed: of what is drawn of a sample: its caption, negatives, mirroring.

    Raises:
        ValueError: a missing folder or file, or nothing in it; it is named.
    """
    if data.kind == "trajectories":
        return None
    if data.kind == "shapes":
        count = NUM_SHAPES if data.num_samples is None else data.num_samples
        return ShapesSamples(
            sd,
            Path(data.cache_folder),
            num_samples=count,
            negatives=data.negatives,
            leave_out=tuple(data.leave_out),
            split="train",
            draw_seed=seed,
        )
    root = Path(data.root)
    images = existing(root, "images", data.images)
    expressions = load_expressions(existing(root, "expressions", data.expressions), images)[: data.num_samples]
    if not expressions:
        raise ValueError(f"data.expressions: {root / data.expressions} holds no expressions")
    latents = data.latents and LatentFolder(existing(root, "latents", data.latents), sd, sd.default_size)
    samples = CocoSamples(
        images,
        sd.default_size,
        expressions=expressions,
        negatives=ItmNegatives(existing(root, "itm", data.itm)),
        latents=latents,
        flip=data.flip,
        seed=seed,
    )
    long = [e.id for e in expressions if sd.truncated_part(e.expression)]
    if long:
        notice(f"{len(long)} expressions are longer than the text encoder reads, and are cut; the first is {long[0]}")
    if samples.without_caption:
        notice(f"{samples.without_caption} expressions are left out: no caption of their image is in {data.itm}")
    return samples


def validation_samples(
    data: DataSettings, sd: StableDiffusion, *, num_samples: int, split: str = "val"
) -> dict[str, object]:
    """The val sets by task: `itm`, and `rec_<name>` for each list of expressions.

    Args:
        split: of the shapes world, val or test; coco's lists are those that the config names.
    """
    if data.kind == "trajectories":
        return {}
    if data.kind == "shapes":
        samples = ShapesSamples(
            sd, Path(data.cache_folder), num_samples=num_samples, negatives=data.negatives, split=split
        )
        return {"itm": samples, "rec_shapes": samples}
    root, size = Path(data.root), sd.default_size
    images = existing(root, "val_images", data.val_images)
    sets = {"itm": CocoSamples(images, size, negatives=ItmNegatives(existing(root, "val_itm", data.val_itm)))}
    for name in data.val_expressions:
        expressions = load_expressions(existing(root, "val_expressions", name), existing(root, "images", data.images))
        label = Path(name).stem.removeprefix("finetune_").removesuffix("_val")
        sets[f"rec_{label}"] = CocoSamples(root / data.images, size, expressions=expressions)
    return sets


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


def existing(root: Path, key: str, relative: str) -> Path:
    """`root / relative`. Raises ValueError naming the config key and the remedy where there is nothing."""
    path = root / relative
    if not path.exists():
        raise ValueError(
            f"data.{key}: {path} does not exist; docs/data.md says where it comes from, "
            f"`python -m dpt.data check {root}` what else is missing"
        )
    return path
