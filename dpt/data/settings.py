"""Settings of a run's data. Imports nothing heavy."""

from dataclasses import dataclass, field

from dpt.bounds import bounded, one_of

NEGATIVE_KINDS = ("attribute", "count", "relation", "size")


@dataclass
class DataSettings:
    """The sources of samples; paths are relative to `root`. docs/data.md shows the tree."""

    kind: str = one_of("shapes", "shapes", "coco", "trajectories")
    """shapes; coco: COCO with RefCOCO/+/g and mined hard negatives; trajectories: nothing but those"""
    num_samples: int | None = bounded(None, at_least=0, at_most=10_000_000)
    """the first so many; by default 10,000 of shapes, all of coco"""
    negatives: str = one_of("edited", "edited", "mined")
    """shapes: edited (a minimal edit of the sample) or mined (other scenes that are alike, as in the paper)"""
    leave_out: list[str] = field(default_factory=list)
    """shapes, edited: kinds of negative not to train on: attribute, count, relation, size"""
    cache_folder: str = "outputs/cache"
    """shapes: for latents"""
    root: str | None = None
    """coco: the data folder"""
    images: str = "train2014"
    expressions: str = "annotations/finetune_refall_train.json"
    itm: str = "itm/train"
    """hard negatives: a folder, or a .tsv"""
    latents: str | None = None
    """a folder of cached latents, read instead of the training images"""
    val_expressions: list[str] = field(
        default_factory=lambda: [
            f"annotations/finetune_{name}_val.json" for name in ("refcoco", "refcoco+", "refcocog")
        ]
    )
    """their images are in `images`"""
    val_itm: str = "itm/val.tsv"
    val_images: str = "val2014"
    """the images of `val_itm`"""
    flip: bool = False
    """coco: mirror half of the images, swapping left and right in the texts; the paper does not"""
    latent_sample: str = one_of("mean", "mean", "posterior")
    """coco: of images that training encodes, the mean of the autoencoder's posterior, or a draw from it in every epoch,
    as in the reference. Shapes' are always drawn"""
    num_workers: int = bounded(0, at_least=0, at_most=256)
    """processes that read data ahead"""
    trajectories: str | None = None
    """a folder of `python -m dpt.data trajectories`: own half-drawn pictures whose score is to rank them; with shapes
    or coco beside those samples"""
    labels: str = "oracle"
    """by which scorer's values: the folder's labels_<labels>.jsonl"""
    prompts_per_step: int = bounded(6, at_least=1, at_most=4096)
    """of the trajectories, a device and batch"""
    num_prompts: int | None = bounded(None, at_least=10, at_most=10_000_000)
    """the first so many of the folder's, for learning curves; by default all"""


def check_data(data: DataSettings) -> None:
    """Raises ValueError where settings of data exclude each other."""
    if data.kind == "coco" and data.negatives != "edited":
        raise ValueError(
            f"data.negatives is {data.negatives!r}; coco's are those of data.itm, the setting is for shapes"
        )
    if data.kind == "trajectories" and data.trajectories is None:
        raise ValueError("data.trajectories is missing: a folder that `python -m dpt.data trajectories` has filled")
    if data.kind == "coco" and data.root is None:
        raise ValueError("data.root is missing: the folder that docs/data.md shows")
    unknown = [kind for kind in data.leave_out if kind not in NEGATIVE_KINDS]
    if unknown or len(set(data.leave_out)) == len(NEGATIVE_KINDS):
        raise ValueError(f"data.leave_out is {data.leave_out}; it may name some of {', '.join(NEGATIVE_KINDS)}")
    if data.leave_out and (data.kind != "shapes" or data.negatives != "edited"):
        raise ValueError(f"data.leave_out is {data.leave_out}; only edited negatives of shapes have a kind")
    cached = data.latents is not None or data.kind != "coco"
    if data.flip and cached:
        raise ValueError("data.flip is true; cached latents cannot be mirrored, only coco images: leave it out")
    if data.latent_sample == "posterior" and cached:
        raise ValueError("data.latent_sample is 'posterior'; it is for coco's images: cached latents are as they are")
