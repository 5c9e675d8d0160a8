"""The `shapes` world as training samples (`dpt.data.collate.Sample`)."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dpt.array_files import read_array, save_array
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.base_models import CKPT_FOLDER
from dpt.data.collate import Sample, sample_generator
from dpt.data.hard_negatives import most_similar
from dpt.data.settings import DataSettings
from dpt.shapes.clip import embed_images, embed_texts, load_clip
from dpt.shapes.grammar import caption_text
from dpt.shapes.scenes import render
from dpt.shapes.vae import Latents, cache_latents, scene_latents
from dpt.shapes.world import ShapesWorld

NUM_SAMPLES = 10_000  # to train on, where the config names no number
NEGATIVES = ("edited", "mined")
NUM_TEXTS, NUM_IMAGES = 20, 4  # mined ones to draw from, as in the paper
CANDIDATES = 80  # mined, of which those that happen to be true are passed over


class Memo(dict):
    """The results of a function by its argument. It can be sent to worker processes, as those of functools cannot."""

    def __init__(self, function: Callable[[int], object]):
        super().__init__()
        self.function = function

    def __reduce__(self):
        return Memo, (self.function,)  # without the results

    def __missing__(self, index: int):
        self[index] = self.function(index)
        return self[index]


class ShapesSamples:
    """Random access to samples by (index, epoch); latents are cached on first use, by model and seed.

    Args:
        seed: of the world.
        draw_seed: of a sample's drawn wording, expression and negatives in an epoch.
        leave_out: kinds of edited negatives; the next sample of another kind takes their place.
        negatives: "edited", a minimal edit of the sample's own scene, or "mined", the other scenes of the set whose
            captions and pictures are most alike by the small CLIP (as in the paper, where CLIP mines them).
    """

    def __init__(
        self,
        sd: StableDiffusion,
        folder: Path,
        *,
        num_samples: int,
        split: str = "train",
        seed: int = 0,
        negatives: str = "edited",
        leave_out: tuple[str, ...] = (),
        draw_seed: int = 0,
    ):
        if negatives not in NEGATIVES:
            raise ValueError(f"data.negatives is {negatives!r}; it must be {' or '.join(NEGATIVES)}")
        if num_samples < 2:
            raise ValueError(f"data.num_samples is {num_samples}; random negatives need at least 2")
        self.world, self.num_samples = ShapesWorld(split, seed=seed), num_samples
        # made once: drawing them anew for every comparison takes longer than the U-Net's passes
        self._scene, self._example = Memo(self.world.scene), Memo(self.world.__getitem__)
        self.leave_out, self.draw_seed = leave_out, draw_seed
        factors = sd.vae.config.scaling_factor, sd.vae.config.shift_factor or 0.0
        self.scenes = Latents(scene_latents(sd.vae, self.world, folder, count=num_samples), *factors)
        self.edited = None
        if negatives == "edited":
            key = f"{self.world.key()} edited (4)"
            draw = lambda i: render(self.world[i].negative.scene)  # noqa: E731
            self.edited = Latents(cache_latents(sd.vae, draw, folder, key=key, count=num_samples), *factors)
        else:
            self.mined = mine_scenes(self.world, num_samples, folder)

    def __len__(self) -> int:
        return self.num_samples

    def get(self, index: int, epoch: int) -> Sample:
        """The sample of an index in an epoch; its random negative, wording and expression differ between epochs."""
        following = ((index + k) % self.num_samples for k in range(self.num_samples))
        index = next((i for i in following if self._example[i].negative.kind not in self.leave_out), None)
        if index is None:
            raise ValueError(f"data.leave_out leaves out all of the {self.num_samples} samples: name fewer kinds")
        example = self._example[index]
        generator = sample_generator(self.draw_seed, index, epoch, "draw")
        rng = np.random.default_rng(torch.randint(2**62, (1,), generator=generator).item())
        (other,) = self._false_of(index, rng.permutation(self.num_samples), 1)
        other_description, _ = self._scene[other]
        if self.edited is not None:
            negative_text = caption_text(example.negative.description, rng)
            negative_image, shown = self.edited.sample([index], generator), example.negative.description
        else:
            texts, images = (rows[index] for rows in self.mined)
            text = int(rng.choice(self._false_of(index, texts, NUM_TEXTS)))
            image = int(rng.choice(self._false_of(index, images, NUM_IMAGES)))
            negative_text = caption_text(self._scene[text][0], rng)
            negative_image, shown = self.scenes.sample([image], generator), self._scene[image][0]
        expression = example.expressions[int(rng.integers(len(example.expressions)))]
        own, random = (self.scenes.sample([i], generator) for i in (index, other))
        return Sample(
            id=index,
            images=torch.cat([own, negative_image, random]),
            captions=(caption_text(example.description, rng), negative_text, caption_text(other_description, rng)),
            expression=expression.text,
            boxes=torch.tensor(example.scene.boxes()[[expression.index]], dtype=torch.float32),
            tokens_positive=[[expression.span]],
            negative_image_caption=caption_text(shown, rng),
            negative_kind="" if self.edited is None else example.negative.kind,
        )

    def phrases(self, index: int) -> list[tuple[str, list[float]]]:
        """All expressions of a sample's scene, each with the box (cxcywh) that it refers to."""
        example = self._example[index]
        boxes = example.scene.boxes().tolist()
        return [(expression.text, boxes[expression.index]) for expression in example.expressions]

    def _false_of(self, index: int, candidates, count: int) -> list[int]:
        """The first candidates whose captions are false of the sample's scene, and the other way round."""
        (description, scene), found = self._scene[index], []
        for candidate in candidates:
            other, other_scene = self._scene[int(candidate)]
            if not description.holds(other_scene.objects) and not other.holds(scene.objects):
                found.append(int(candidate))
                if len(found) == count:
                    break
        if not found:
            raise ValueError(f"sample {index} has no true negative among {len(candidates)} candidates")
        return found


def training_samples(data: DataSettings, sd: StableDiffusion, *, seed: int, notice: Callable) -> ShapesSamples:
    """The scenes that a config trains on."""
    return ShapesSamples(
        sd,
        Path(data.cache_folder),
        num_samples=NUM_SAMPLES if data.num_samples is None else data.num_samples,
        negatives=data.negatives,
        leave_out=tuple(data.leave_out),
        draw_seed=seed,
    )


def validation_samples(
    data: DataSettings, sd: StableDiffusion, *, num_samples: int, split: str
) -> dict[str, ShapesSamples]:
    """The scenes of val or test, for both tasks."""
    options = {"num_samples": max(2, num_samples), "negatives": data.negatives, "split": split}  # one is negative
    samples = ShapesSamples(sd, Path(data.cache_folder), **options)
    return {"itm": samples, "rec_shapes": samples}


def mine_scenes(world: ShapesWorld, num_samples: int, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The scenes whose captions, and whose pictures, are most like each caption by the small CLIP; kept in `folder`.

    Returns:
        Indices (num_samples, K) twice, most similar first.
    """
    weights = (CKPT_FOLDER / "shapes/clip/model.safetensors").read_bytes()
    digest = hashlib.sha256(f"{world.key()} {num_samples} {CANDIDATES}".encode() + weights).hexdigest()[:12]
    path = folder / f"mined_{digest}.npy"
    if path.exists():
        return tuple(read_array(path, (2, num_samples, min(CANDIDATES, num_samples - 1))))
    clip, tokenizer = load_clip(CKPT_FOLDER / "shapes/clip")
    texts = [world.caption(i) for i in range(num_samples)]
    parts = [range(first, min(first + 256, num_samples)) for first in range(0, num_samples, 256)]
    with torch.no_grad():
        images = torch.cat([embed_images(clip, [render(world.scene(i)[1]) for i in part]) for part in parts]).numpy()
        captions = torch.cat([embed_texts(clip, tokenizer, [texts[i] for i in part]) for part in parts]).numpy()
    own, count = np.arange(num_samples)[:, None], min(CANDIDATES, num_samples - 1)
    mined = most_similar(captions, own, captions, own, count), most_similar(captions, own, images, own, count)
    save_array(path, np.stack(mined))
    return mined
