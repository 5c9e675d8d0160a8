"""The denoising loop, as a pure function of a scheduler and a denoiser, and classifier-free guidance as a denoiser.

Shapes: B images, C latent channels, (h, w) latent size, L text tokens, E context width.
"""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import SchedulerMixin, UNet2DConditionModel

from dpt.stable_diffusion import StableDiffusion

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps the loop's latents (B, C, h, w) and a timestep to the model's prediction of the same shape."""


def initial_noise(seeds: list[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal latents (B, *shape), float32 on the CPU: image b depends on seed b alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def classifier_free_guidance(
    unet: UNet2DConditionModel,
    scheduler: SchedulerMixin,
    *,
    encoder_hidden_states: torch.Tensor,
    negative_encoder_hidden_states: torch.Tensor,
    guidance_scale: float,
) -> Denoiser:
    """Ho & Salimans 2022: eps = eps(z, negative) + guidance_scale * (eps(z, prompt) - eps(z, negative)).

    Args:
        encoder_hidden_states: the prompts' context, (B, L, E).
        negative_encoder_hidden_states: context of the negative or empty prompts, (B, L, E).
        guidance_scale: up to 1 the negative context is not evaluated, as in diffusers.
    """
    guided = guidance_scale > 1
    context = torch.cat([negative_encoder_hidden_states, encoder_hidden_states]) if guided else encoder_hidden_states

    def denoise(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        model_input = scheduler.scale_model_input(latents, timestep).to(unet.dtype)
        if not guided:
            return unet(model_input, timestep, context).sample.float()
        noise_pred = unet(torch.cat([model_input, model_input]), timestep, context).sample.float()  # (2B, C, h, w)
        negative, positive = noise_pred.chunk(2)
        return negative + guidance_scale * (positive - negative)

    return denoise


@torch.no_grad()
def sample(
    denoise: Denoiser,
    scheduler: SchedulerMixin,
    noise: torch.Tensor,
    *,
    num_inference_steps: int,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Denoises standard normal `noise` (B, C, h, w) to scaled latents of the same shape, in float32.

    Args:
        on_step: called after each step with its number and the latents.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        noise_pred = denoise(latents, timestep)
        latents = scheduler.step(noise_pred, timestep, latents).prev_sample
        if on_step is not None:
            on_step(step, latents)
    return latents


def draw(
    sd: StableDiffusion,
    prompts: list[str],
    seeds: list[int],
    *,
    negative_prompts: list[str] | None = None,
    guidance_scale: float = 7.5,
    num_inference_steps: int = 50,
    height: int | None = None,
    width: int | None = None,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> np.ndarray:
    """One batch of pictures, (B, H, W, 3) uint8: picture b shows prompt b, from the noise of seed b.

    Raises:
        ValueError: a size the model cannot draw.
    """
    noise = initial_noise(seeds, sd.latent_shape(height, width)).to(sd.device)
    context, _ = sd.encode_prompts(prompts)
    negative_context, _ = sd.encode_prompts(negative_prompts or [""] * len(prompts))
    denoise = classifier_free_guidance(
        sd.unet,
        sd.scheduler,
        encoder_hidden_states=context,
        negative_encoder_hidden_states=negative_context,
        guidance_scale=guidance_scale,
    )
    latents = sample(denoise, sd.scheduler, noise, num_inference_steps=num_inference_steps, on_step=on_step)
    pixels = sd.decode_latents(latents)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
