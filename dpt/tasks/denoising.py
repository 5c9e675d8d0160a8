"""The denoising loss of tuning, which keeps the denoiser a generator. Its head is the denoiser's own output.

Shapes: B batch, C latent channels, (h, w) latent size, L text tokens, E context width.
"""

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel

from dpt.backbones.conditioning import Conditioning
from dpt.backbones.features import denoiser_features


def denoising_loss(
    noise_pred: torch.Tensor,
    target: torch.Tensor,
    timesteps: torch.Tensor,
    scheduler: SchedulerMixin,
    *,
    snr_gamma: float | None = None,
) -> dict[str, torch.Tensor]:
    """Mean squared error to the noise or velocity, (B, C, h, w) each; with `snr_gamma`, min-SNR weights (Hang 2023)."""
    squared = (noise_pred.float() - target.float()).square().flatten(1).mean(1)  # (B,)
    if snr_gamma is not None:
        snr = signal_to_noise_ratio(scheduler, timesteps)
        divisor = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
        squared = squared * snr.clamp(max=snr_gamma) / divisor
    return {"loss_denoise": squared.mean()}


def signal_to_noise_ratio(scheduler: SchedulerMixin, timesteps: torch.Tensor) -> torch.Tensor:
    """alpha_bar / (1 - alpha_bar) at the timesteps, (B,)."""
    alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    return alphas_cumprod / (1 - alphas_cumprod)


def denoising_of_step(
    denoiser: UNet2DConditionModel,
    noise_pred: torch.Tensor,
    inputs: dict,
    scheduler: SchedulerMixin,
    *,
    snr_gamma: float | None = None,
) -> dict[str, torch.Tensor]:
    """The loss of a training step.

    Args:
        noise_pred: of the pair's image under its caption, (B, C, h, w).
        inputs: as `DPT.forward` takes them. With `negative_context` the hard-negative and the random image are
            denoised too, under captions of their own: a control that spends a tuning step's cost on denoising.
    """
    target, timesteps = inputs["noise_target"], inputs["timesteps"]
    if "negative_context" in inputs:
        latents = inputs["noisy_latents"][:, 1:]
        own = Conditioning(inputs["negative_context"], further=inputs.get("negative_further", {}))
        timesteps = torch.cat([timesteps, timesteps.repeat_interleave(2)])
        pairs = latents.flatten(0, 1), timesteps[len(target) :], own.map(lambda value: value.flatten(0, 1))
        _, others = denoiser_features(denoiser, (), *pairs, with_noise_pred=True)
        noise_pred = torch.cat([noise_pred, others])
        target = torch.cat([target, inputs["negative_noise_target"].flatten(0, 1)])
    return denoising_loss(noise_pred, target, timesteps, scheduler, snr_gamma=snr_gamma)
