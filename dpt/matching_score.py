"""The matching score s(z_t, y) of noisy latents: alone, with its gradient, or read off a sampling pass at no cost.

Shapes: B images, C latent channels, (h, w) latent size, P pooled text width.
"""

import torch
from diffusers import ModelMixin

from dpt.adapter.adapter import Scorer
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.features import denoiser_features
from dpt.sampling import ClassifierFreeGuidance
from dpt.tasks.itm import itm_score

HALF_GRADIENT_SCALE = 2.0**10  # keeps float16 gradients of the score, about 1e-4, from underflowing


def score_of_features(
    scorer: Scorer, features: list[torch.Tensor], timestep: torch.Tensor, pooled_prompt_embeds: torch.Tensor
) -> torch.Tensor:
    """The matching score of each image, (B,) float32, of the probed blocks' features and the pooled text (B, P)."""
    hs = scorer.adapter([feature.float() for feature in features], timestep)
    return itm_score(scorer.adapter.itm_embeddings(hs, scorer.itm_layer), pooled_prompt_embeds.float())


def matching_score(
    denoiser: ModelMixin,
    scorer: Scorer,
    noisy_latents: torch.Tensor,
    timestep: torch.Tensor,
    conditioning: Conditioning,
    **unet_inputs,
) -> torch.Tensor:
    """The matching score of each image, (B,) float32, by a pass of its own that stops at the probed block.

    Args:
        noisy_latents: in the variance-preserving space of the denoiser's input, (B, C, h, w).
        unet_inputs: further inputs of the U-Net.
    """
    noisy_latents = noisy_latents.to(denoiser.dtype)
    features, _ = denoiser_features(denoiser, scorer.blocks, noisy_latents, timestep, conditioning, **unet_inputs)
    return score_of_features(scorer, features, timestep, conditioning.pooled_prompt_embeds)


def score_gradient(
    denoiser: ModelMixin,
    scorer: Scorer,
    noisy_latents: torch.Tensor,
    timestep: torch.Tensor,
    conditioning: Conditioning,
    **unet_inputs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matching score of each image, (B,), and d s / d z_t, (B, C, h, w); both float32.

    The gradient is of the sum of the batch's scores, so each image's is its own. No weight gets a gradient.
    """
    with torch.enable_grad():
        noisy_latents = noisy_latents.detach().float().requires_grad_()
        score = matching_score(denoiser, scorer, noisy_latents, timestep, conditioning, **unet_inputs)
        gradient = gradient_of(score, noisy_latents, denoiser.dtype)
    return score.detach(), gradient


def gradient_of(score: torch.Tensor, noisy_latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of scores (B,) in the latents that they were computed from by a denoiser of that precision."""
    scale = HALF_GRADIENT_SCALE if dtype == torch.float16 else 1.0
    (gradient,) = torch.autograd.grad(score.sum() * scale, noisy_latents)
    return gradient / scale


class ScoreReader:
    """A `Guidance` that records the matching score, from the features that the pass it wraps computes anyway.

    Args:
        guidance: the pass; denoise: what calls it, a guidance method or the pass itself.
        trace: gets a record a step: step, timestep, and lists over images of score, length and relative_length of the
            correction. A step that the method has recorded already stays as it is.
        steps: the steps to read at.
    """

    def __init__(self, denoise, guidance: ClassifierFreeGuidance, scorer: Scorer, trace: list[dict], steps):
        self.denoise, self.guidance, self.scorer = denoise, guidance, scorer
        self.trace, self.steps = trace, steps
        guidance.watched = scorer.blocks

    def __call__(self, latents, timestep, step):
        """The result of the wrapped guidance."""
        result = self.denoise(latents, timestep, step)
        recorded = self.trace and self.trace[-1]["step"] == step
        if step in self.steps and not recorded:
            pooled = self.guidance.conditioning.pooled_prompt_embeds
            score = score_of_features(self.scorer, self.guidance.features, timestep, pooled).tolist()
            nothing = [0.0] * len(score)
            self.trace.append(
                {"step": step, "timestep": float(timestep), "score": score}
                | {"length": nothing, "relative_length": nothing}
            )
        return result
