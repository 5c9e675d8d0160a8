"""The adapter on finished pictures: their match with a text, and the boxes that a phrase refers to.

Pictures are encoded and noised to a timestep, all alike, since the adapter reads half-drawn pictures. Shapes: B
pictures, (H, W) their size.
"""

import torch

from dpt.adapter.adapter import Scorer
from dpt.backbones.features import denoiser_features
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.matching_score import matching_score
from dpt.sampling import initial_noise
from dpt.tasks.rec import objectness

TIMESTEP = 200
"""where pictures are read if nothing else is asked for"""


def noised(sd: StableDiffusion, pixels: torch.Tensor, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1], all by one noise, and the timestep as a tensor."""
    at = torch.tensor(timestep, device=sd.device)
    latents = sd.encode_images(pixels)
    noise = initial_noise([0] * len(latents), tuple(latents.shape[1:])).to(latents.device)
    return sd.scheduler.add_noise(latents, noise, at[None]), at


@torch.no_grad()
def matching_scores(
    sd: StableDiffusion,
    scorer: Scorer,
    pixels: torch.Tensor,
    texts: list[str],
    *,
    timestep: int = TIMESTEP,
    distilled_guidance: float | None = None,
) -> torch.Tensor:
    """The matching score of each picture and its text, (B,) float32.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        distilled_guidance: of FLUX; see `Sampling`.
    """
    conditioning = sd.condition(texts, size=tuple(pixels.shape[-2:])).with_guidance(distilled_guidance)
    return matching_score(sd.denoiser, scorer, *noised(sd, pixels, timestep), conditioning)


@torch.no_grad()
def rec_outputs(
    sd: StableDiffusion, scorer: Scorer, pixels: torch.Tensor, phrases: list[str], *, timestep: int = TIMESTEP
) -> dict[str, torch.Tensor]:
    """Outputs of the adapter's `RecHead` for pictures (B, 3, H, W) in [-1, 1] and a phrase each."""
    (noisy, at), conditioning = noised(sd, pixels, timestep), sd.condition(phrases, size=tuple(pixels.shape[-2:]))
    features, _ = denoiser_features(sd.denoiser, scorer.blocks, noisy.to(sd.dtype), at, conditioning)
    return scorer.adapter.rec_outputs(scorer.adapter([feature.float() for feature in features], at))


def boxes_of_phrases(outputs: dict[str, torch.Tensor]) -> list[list[tuple[float, list[float]]]]:
    """For each picture the boxes of `rec_outputs`, the surest first.

    Returns:
        (sureness from 0 to 1, box) each; a box is (centre x, centre y, width, height), as shares of the picture's.
    """
    found = zip(objectness(outputs["pred_logits"]).tolist(), outputs["pred_boxes"].tolist(), strict=True)
    return [sorted(zip(*rows, strict=True), key=lambda row: -row[0]) for rows in found]
