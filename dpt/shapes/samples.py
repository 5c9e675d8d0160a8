"""The `shapes` world as training samples (`dpt.data.collate.Sample`)."""

from pathlib import Path

import numpy as np
import torch

from dpt.data.collate import Sample, sample_generator
from dpt.shapes.captions import caption_text
from dpt.shapes.scenes import render
from dpt.shapes.vae import cache_latents
from dpt.shapes.world import ShapesWorld
from dpt.stable_diffusion import StableDiffusion

NEGATIVES = ("edited", "mined")


class ShapesSamples:
    """Random access to samples by (index, epoch); latents are cached on first use, by model and seed.

    Args:
        negatives: "edited", a minimal edit of the sample's own scene, or "mined", the other scenes of the set whose
            captions and pictures are most alike (as in the paper, where CLIP mines them).
        mined: with "mined", for each sample the indices of similar captions' and of similar images' scenes, (num, K)
            each, best first; see `mine_negatives`.
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
        mined: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        if negatives not in NEGATIVES:
            raise ValueError(f"data.negatives is {negatives!r}; it must be {' or '.join(NEGATIVES)}")
        if num_samples < 2:
            raise ValueError(f"data.num_samples is {num_samples}; random negatives need at least 2")
        self.world, self.num_samples, self.mined = ShapesWorld(split, seed=seed), num_samples, mined
        self.scaling_factor = sd.vae.config.scaling_factor
        self.scenes = cache_latents(
            sd.vae,
            lambda i: render(self.world.scene(i)[1]),
            folder,
            key=self.world.key(),
            count=num_samples,
        )
        self.edited = None
        if negatives == "edited":
            self.edited = cache_latents(
                sd.vae,
                lambda i: render(self.world[i].negative.scene),
                folder,
                key=f"{self.world.key()} edited",
                count=num_samples,
            )
        elif mined is None:
            raise ValueError("data.negatives is mined; mine them first")

    def __len__(self) -> int:
        return self.num_samples

    def get(self, index: int, epoch: int) -> Sample:
        """The sample of an index in an epoch; its random negative, wording and expression differ between epochs."""
        example = self.world[index]
        generator = sample_generator(17, index, epoch)
        rng = np.random.default_rng(torch.randint(2**62, (1,), generator=generator).item())
        other = self._false_of(index, rng.permutation(self.num_samples))
        other_description, _ = self.world.scene(other)
        if self.edited is not None:
            negative_text = caption_text(example.negative.description, rng)
            negative_image = self._latents(self.edited, index, generator)
        else:
            texts, images = self.mined
            text = self._false_of(index, texts[index][rng.permutation(texts.shape[1])])
            image = self._false_of(index, images[index][rng.permutation(images.shape[1])])
            negative_text = caption_text(self.world.scene(text)[0], rng)
            negative_image = self._latents(self.scenes, image, generator)
        expression = example.expressions[int(rng.integers(len(example.expressions)))]
        return Sample(
            id=index,
            images=torch.stack(
                [
                    self._latents(self.scenes, index, generator),
                    negative_image,
                    self._latents(self.scenes, other, generator),
                ]
            ),
            captions=(caption_text(example.description, rng), negative_text, caption_text(other_description, rng)),
            expression=expression.text,
            boxes=torch.tensor(example.scene.boxes()[[expression.index]], dtype=torch.float32),
            tokens_positive=[[expression.span]],
        )

    def _false_of(self, index: int, candidates) -> int:
        """The first candidate whose caption is false of the sample's scene, and the other way round."""
        description, scene = self.world.scene(index)
        for candidate in candidates:
            other, other_scene = self.world.scene(int(candidate))
            if not description.holds(other_scene.objects) and not other.holds(scene.objects):
                return int(candidate)
        raise ValueError(f"sample {index} has no true negative among {len(candidates)} candidates")

    def _latents(self, posteriors: np.ndarray, index: int, generator: torch.Generator) -> torch.Tensor:
        mean, logvar = torch.from_numpy(posteriors[index]).float().chunk(2)
        noise = torch.randn(mean.shape, generator=generator)
        return (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise) * self.scaling_factor


def mine_negatives(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, *, num_texts: int = 20, num_images: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """For each caption the most similar captions and images of other samples, by cosine, blockwise.

    Args:
        image_embeddings, text_embeddings: unit vectors (N, D) of samples' pictures and captions.

    Returns:
        Indices (N, num_texts) and (N, num_images), most similar first.
    """
    texts, images = [], []
    for start in range(0, len(text_embeddings), 1024):
        block = text_embeddings[start : start + 1024]
        for embeddings, count, found in ((text_embeddings, num_texts, texts), (image_embeddings, num_images, images)):
            scores = block @ embeddings.T  # (1024, N)
            rows = torch.arange(len(block))
            scores[rows, rows + start] = -torch.inf
            found.append(scores.topk(min(count, len(embeddings) - 1)).indices)
    return torch.cat(texts).numpy(), torch.cat(images).numpy()
