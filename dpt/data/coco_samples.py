"""COCO images with captions, mined negatives and referring expressions, as training samples."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.data.coco import base_name, image_path, load_pixels
from dpt.data.collate import Sample, sample_generator
from dpt.data.flip import can_mirror, mirror_text
from dpt.data.hard_negative_files import ItmItem, ItmNegatives
from dpt.data.latents import LatentFolder
from dpt.data.refcoco import ReferredImage, load_expressions
from dpt.data.settings import DataSettings


class CocoSamples:
    """Random access to samples by (index, epoch): a sample is an expression, or without expressions a caption.

    The caption of an expression's image, its hard negatives and the random ones are drawn anew in every epoch.

    Args:
        images: the folder of image files.
        size: height and width in pixels that images are resized to.
        expressions: referring expressions; those whose image has no caption among the negatives are left out.
        negatives: mined hard negatives; without them there is no ITM, and samples hold one image and empty captions.
        latents: cached latents, read instead of the images.
        flip: mirror half of the samples; "left" and "right" are swapped, or the sample is left as it is.
        seed: of the drawn caption, negatives and mirroring.

    Raises:
        ValueError: nothing left to train on.
    """

    def __init__(
        self,
        images: Path,
        size: int,
        *,
        expressions: list[ReferredImage] | None = None,
        negatives: ItmNegatives | None = None,
        latents: LatentFolder | None = None,
        flip: bool = False,
        seed: int = 0,
    ):
        if latents and flip:
            raise ValueError(
                "data.flip is true and data.latents is given; cached latents cannot be mirrored: leave one out"
            )
        self.images, self.size, self.negatives, self.latents, self.flip = images, size, negatives, latents, flip
        self.without_caption, self.seed = 0, seed
        if expressions is not None and negatives is not None:
            known = [e for e in expressions if e.path.name in negatives.texts_of]
            self.without_caption, expressions = len(expressions) - len(known), known
        self.expressions = expressions
        if not len(self):
            raise ValueError(
                "no samples: no expressions"
                + ("" if negatives is None else f" whose image has a caption in {negatives.path}")
            )
        if negatives is not None:
            distinct = negatives.texts_of if expressions is None else {e.path.name for e in expressions}
            if min(len(distinct), len(negatives.texts_of)) < 2:
                raise ValueError("all samples are of one image; random negatives need another one")

    def __len__(self) -> int:
        return len(self.negatives if self.expressions is None else self.expressions)

    def get(self, index: int, epoch: int) -> Sample:
        """The sample of an index in an epoch.

        Raises:
            ValueError: a file that cannot be read; it is named.
        """
        generator = sample_generator(self.seed, self._id(index), epoch, "draw")
        rng = np.random.default_rng(torch.randint(2**62, (1,), generator=generator).item())
        referred = None if self.expressions is None else self.expressions[index]
        paths, captions = [referred.path] if referred else [], ("", "", "")
        if self.negatives is not None:
            texts_of = self.negatives.texts_of
            text_id = int(rng.choice(texts_of[referred.path.name])) if referred else self._id(index)
            item = self.negatives.item(text_id)
            path = referred.path if referred else image_path(self.images, item.image)
            if base_name(item.image) != path.name:
                raise ValueError(
                    f"text {text_id} of {self.negatives.path} is listed for {path.name}, but is of {item.image}"
                )
            hard = image_path(self.images, str(rng.choice(item.neg_images)))
            paths = [path, hard, self._other_image(path.name, rng)]
            captions = (item.title, str(rng.choice(item.neg_captions)), self._other_caption(path.name, rng))
        sample = Sample(
            id=self._id(index),
            images=torch.stack([self._image(path) for path in paths]),
            captions=captions,
            expression=referred.expression if referred else "",
            boxes=torch.tensor(referred.boxes if referred else np.zeros((0, 4)), dtype=torch.float32),
            tokens_positive=[list(spans) for spans in referred.tokens_positive] if referred else [],
        )
        mirrored = self.flip and rng.random() < 0.5 and all(map(can_mirror, (*captions, sample.expression)))
        return mirror(sample) if mirrored else sample

    def _id(self, index: int) -> int:
        return self.negatives.ids[index] if self.expressions is None else self.expressions[index].id

    def _other_image(self, name: str, rng: np.random.Generator) -> Path:
        while True:
            if self.expressions is None:
                path = image_path(self.images, self._any_item(rng).image)
            else:
                path = self.expressions[int(rng.integers(len(self.expressions)))].path
            if path.name != name:
                return path

    def _other_caption(self, name: str, rng: np.random.Generator) -> str:
        while True:
            item = self._any_item(rng)
            if base_name(item.image) != name:
                return item.title

    def _any_item(self, rng: np.random.Generator) -> ItmItem:
        return self.negatives.item(self.negatives.ids[int(rng.integers(len(self.negatives)))])

    def _image(self, path: Path) -> torch.Tensor:
        return load_pixels(path, self.size) if self.latents is None else self.latents.read(path.stem)


def mirror(sample: Sample) -> Sample:
    """The mirrored sample: pixels, boxes, words and their character spans."""
    return Sample(
        id=sample.id,
        images=sample.images.flip(-1),
        captions=tuple(mirror_text(caption)[0] for caption in sample.captions),
        expression=mirror_text(sample.expression)[0],
        boxes=torch.cat([1 - sample.boxes[:, :1], sample.boxes[:, 1:]], dim=1),
        tokens_positive=[mirror_text(sample.expression, spans)[1] for spans in sample.tokens_positive],
    )


def training_samples(data: DataSettings, sd: StableDiffusion, *, seed: int, notice: Callable) -> CocoSamples:
    """The expressions that a config names, with their images' captions and negatives."""
    root = Path(data.root)
    images = _existing(root, "images", data.images)
    expressions = load_expressions(_existing(root, "expressions", data.expressions), images)[: data.num_samples]
    if not expressions:
        raise ValueError(f"data.expressions: {root / data.expressions} holds no expressions")
    latents = data.latents and LatentFolder(_existing(root, "latents", data.latents), sd, sd.default_size)
    samples = CocoSamples(
        images,
        sd.default_size,
        expressions=expressions,
        negatives=ItmNegatives(_existing(root, "itm", data.itm)),
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
    data: DataSettings, sd: StableDiffusion, *, num_samples: int, split: str
) -> dict[str, CocoSamples]:
    """The val sets by task, as the config names them."""
    root, size = Path(data.root), sd.default_size
    images = _existing(root, "val_images", data.val_images)
    sets = {"itm": CocoSamples(images, size, negatives=ItmNegatives(_existing(root, "val_itm", data.val_itm)))}
    for name in data.val_expressions:
        expressions = load_expressions(_existing(root, "val_expressions", name), _existing(root, "images", data.images))
        label = Path(name).stem.removeprefix("finetune_").removesuffix("_val")
        sets[f"rec_{label}"] = CocoSamples(root / data.images, size, expressions=expressions)
    return sets


def _existing(root: Path, key: str, relative: str) -> Path:
    """`root / relative`. Raises ValueError naming the config key and the remedy where there is nothing."""
    path = root / relative
    if not path.exists():
        raise ValueError(
            f"data.{key}: {path} does not exist; docs/data.md says where it comes from, "
            f"`python -m dpt.data check {root}` what else is missing"
        )
    return path
