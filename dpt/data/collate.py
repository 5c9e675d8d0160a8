"""Samples and batches of both worlds, and the input of `DPT.forward` made of them.

Shapes: B samples, N boxes, C latent channels, (h, w) latent size, (H, W) image, T expression tokens.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from dpt.backbones.conditioning import Conditioning
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.rec_text import RecTextEncoder
from dpt.tasks import all_tasks
from dpt.tasks.task import Task


@dataclass
class Sample:
    """One training sample. Index 0 is the pair itself, 1 a hard negative, 2 a random one."""

    id: int
    """the same in every epoch and on every machine; names the sample's random numbers"""
    images: torch.Tensor
    """pixels (K, 3, H, W) in [-1, 1], or scaled latents (K, C, h, w); K is 3, or 1 where there is no matching"""
    captions: tuple[str, str, str]
    expression: str
    boxes: torch.Tensor
    """(N, 4) normalised cxcywh; N may be 0"""
    tokens_positive: list[list[tuple[int, int]]]
    """for each box the [begin, end) character spans of its phrase in `expression`"""
    negative_image_caption: str = ""
    """a caption that is true of the hard-negative image"""
    negative_kind: str = ""
    """what the hard-negative caption gets wrong, where that is known"""


@dataclass
class Batch:
    """Samples put together; `images` is (B, K, ...), the lists run over samples."""

    ids: list[int]
    images: torch.Tensor
    captions: list[tuple[str, str, str]]
    expressions: list[str]
    boxes: list[torch.Tensor]
    tokens_positive: list[list[list[tuple[int, int]]]]
    negative_image_captions: list[str]
    epochs: list[int]
    num_boxes: int = field(init=False)
    """all boxes of the batch"""

    def __post_init__(self):
        self.num_boxes = sum(len(boxes) for boxes in self.boxes)


def collate(samples: list[Sample], epochs: list[int] | None = None) -> Batch:
    """Puts samples together in their order; `epochs` says of which epoch each is (by default the first)."""
    return Batch(
        [s.id for s in samples],
        torch.stack([s.images for s in samples]),
        [s.captions for s in samples],
        [s.expression for s in samples],
        [s.boxes for s in samples],
        [s.tokens_positive for s in samples],
        [s.negative_image_caption for s in samples],
        epochs or [0] * len(samples),
    )


def sample_generator(seed: int, sample_id: int, epoch: int, purpose: str) -> torch.Generator:
    """The random numbers of one sample in one epoch, whatever batch, rank or run it is in.

    Args:
        purpose: "noise" (timestep and noise), "draw" (what is drawn of the sample), "latents" (of its images'
            posteriors) or "reward" (its own pictures): independent streams.
    """
    stream = ("noise", "draw", "latents", "reward").index(purpose)
    state = np.random.SeedSequence((seed, sample_id, epoch, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & (2**63 - 1))


def as_latents(
    images: torch.Tensor, sd: StableDiffusion, generators: list[torch.Generator] | None = None
) -> torch.Tensor:
    """Scaled latents (B, K, C, h, w) of a batch's images: pixels (B, K, 3, H, W) are encoded, latents kept.

    Args:
        generators: one a sample, of draws from the autoencoder's posterior; by default its mean is taken.
    """
    if images.shape[2] != 3:
        return images
    if generators is not None:
        return torch.stack([sd.encode_images(*pair) for pair in zip(images, generators, strict=True)])
    return sd.encode_images(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def draw_timesteps(generators: list[torch.Generator], limits: tuple[int, int]) -> torch.Tensor:
    """A timestep from [first, last] by each generator, (B,)."""
    first, last = limits
    return torch.cat([torch.randint(first, last + 1, (1,), generator=generator) for generator in generators])


def draw_noise(generators: list[torch.Generator], shape: tuple[int, int, int], offset: float) -> torch.Tensor:
    """Noise (B, C, h, w) of a latent's shape by each generator; `offset` weights a part that is one value a channel."""
    noise = [torch.randn(shape, generator=generator) for generator in generators]
    if offset:
        noise = [
            own + offset * torch.randn((shape[0], 1, 1), generator=generator)
            for own, generator in zip(noise, generators, strict=True)
        ]
    return torch.stack(noise)


def conditioning_inputs(name: str, conditioning: Conditioning) -> dict:
    """A conditioning as `DPT.forward` takes it: `<name>_context`, and `<name>_further` for further inputs."""
    further = {f"{name}_further": conditioning.further} if conditioning.further else {}
    return {f"{name}_context": conditioning.encoder_hidden_states, **further}


@torch.no_grad()
def encode_batch(
    batch: Batch,
    sd: StableDiffusion,
    rec_text: RecTextEncoder,
    *,
    seed: int,
    timesteps: tuple[int, int] | None = None,
    noise_offset: float = 0.0,
    tasks: tuple[Task, ...] | None = None,
    denoise_negatives: bool = False,
    posterior: bool = False,
) -> dict:
    """The input of `DPT.forward`, from everything that no gradient reaches.

    A sample's three images share its timestep and noise. Equal captions of the batch are encoded once.

    Args:
        rec_text: without a model there are no `token_states`.
        timesteps: drawn from [first, last]; by default from the whole schedule.
        noise_offset: weight of noise that is constant over a channel.
        tasks: whose targets are made; by default all, with the paper's settings.
        posterior: draw the latents of pixels from the autoencoder's posterior, by (seed, sample, epoch).
        denoise_negatives: add the inputs for denoising the other two images under captions of their own.
    """
    device = sd.device  # diffusers looks for it anew each time
    named = list(zip(batch.ids, batch.epochs, strict=True))
    draws = [sample_generator(seed, *pair, "latents") for pair in named] if posterior else None
    latents = as_latents(batch.images, sd, draws).to(device).float()  # (B, K, C, h, w)
    generators = [sample_generator(seed, *pair, "noise") for pair in named]
    drawn = draw_timesteps(generators, timesteps or (0, sd.scheduler.config.num_train_timesteps - 1)).to(device)  # (B,)
    noise = draw_noise(generators, latents.shape[2:], noise_offset).to(device)  # (B, C, h, w)
    noisy = [sd.scheduler.add_noise(latents[:, k], noise, drawn) for k in range(latents.shape[1])]
    texts = [text for captions in batch.captions for text in captions] + batch.expressions
    if denoise_negatives:
        own = zip(batch.negative_image_captions, [captions[2] for captions in batch.captions], strict=True)
        texts += [text for pair in own for text in pair]
    conditioning, count = sd.condition(texts), len(drawn)
    captions = conditioning[: 3 * count].map(lambda value: value.unflatten(0, (-1, 3)))
    inputs = {
        "noisy_latents": torch.stack(noisy, dim=1),
        "timesteps": drawn,
        "noise_target": sd.noise_target(latents[:, 0], noise, drawn),
        **conditioning_inputs("caption", captions),
        "caption_pooled": captions.pooled_prompt_embeds,
        **conditioning_inputs("expression", conditioning[3 * count : 4 * count]),
        "num_boxes": max(1, batch.num_boxes),
    }
    if denoise_negatives:
        negatives = conditioning[4 * count :].map(lambda value: value.unflatten(0, (-1, 2)))
        inputs |= conditioning_inputs("negative", negatives)
        targets = [sd.noise_target(latents[:, k], noise, drawn) for k in (1, 2)]
        inputs["negative_noise_target"] = torch.stack(targets, dim=1)
    for task in all_tasks() if tasks is None else tasks:
        inputs |= task.targets(batch, rec_text, device)
    return inputs
