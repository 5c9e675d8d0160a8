"""What the adapter reads off finished pictures: do they match a text, and where is what a phrase refers to?

Pictures are encoded and noised to a timestep, all alike, since the adapter reads half-drawn pictures. Shapes: B
pictures, (H, W) their size.
"""

import torch

from dpt.adapter.adapter import Scorer
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.features import denoiser_features
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.sampling import initial_noise
from dpt.tasks.itm import itm_score
from dpt.tasks.rec import objectness

TIMESTEP = 200
"""where pictures are read if nothing else is asked for"""


@torch.no_grad()
def read_pictures(
    sd: StableDiffusion,
    scorer: Scorer,
    pixels: torch.Tensor,
    texts: list[str],
    *,
    timestep: int = TIMESTEP,
    distilled_guidance: float | None = None,
) -> tuple[torch.Tensor, Conditioning]:
    """Outputs of the adapter's queries, (layers, B, Q, D), for pictures under texts, and the texts' conditioning.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        distilled_guidance: of FLUX; see `Sampling`.
    """
    at = torch.tensor(timestep, device=sd.device)
    latents = sd.encode_images(pixels)
    noise = initial_noise([0] * len(latents), tuple(latents.shape[1:])).to(latents.device)
    noisy = sd.scheduler.add_noise(latents, noise, at[None]).to(sd.dtype)
    conditioning = sd.condition(texts, size=tuple(pixels.shape[-2:])).with_guidance(distilled_guidance)
    features, _ = denoiser_features(sd.denoiser, scorer.blocks, noisy, at, conditioning)
    return scorer.adapter([feature.float() for feature in features], at), conditioning


@torch.no_grad()
def matching_scores(
    sd: StableDiffusion, scorer: Scorer, pixels: torch.Tensor, texts: list[str], **options
) -> torch.Tensor:
    """The matching score of each picture (B, 3, H, W) and its text, (B,) float32.

    Args:
        options: those of `read_pictures`.
    """
    hs, conditioning = read_pictures(sd, scorer, pixels, texts, **options)
    return itm_score(scorer.adapter.itm_embeddings(hs, scorer.itm_layer), conditioning.pooled_prompt_embeds.float())


@torch.no_grad()
def boxes_of_phrases(
    sd: StableDiffusion, scorer: Scorer, pixels: torch.Tensor, phrases: list[str], **options
) -> list[list[tuple[float, list[float]]]]:
    """For each picture (B, 3, H, W) the boxes of its phrase, the surest first.

    Args:
        options: those of `read_pictures`.

    Returns:
        (sureness from 0 to 1, box) each; a box is (centre x, centre y, width, height), as shares of the picture's.
    """
    hs, _ = read_pictures(sd, scorer, pixels, phrases, **options)
    outputs = scorer.adapter.rec_outputs(hs)
    found = zip(objectness(outputs["pred_logits"]).tolist(), outputs["pred_boxes"].tolist(), strict=True)
    return [sorted(zip(*rows, strict=True), key=lambda row: -row[0]) for rows in found]
