"""Flow matching (Liu et al. 2023, Esser et al. 2024) in the terms of the other schedulers.

A noisy latent is z = (1 - sigma) x + sigma n, its timestep 1000 sigma, and the velocity n - x is predicted. In the
variance-preserving space it is z / s with s = sqrt((1 - sigma)^2 + sigma^2), so that one length of a correction means
the same move of signal to noise everywhere; alpha = (1 - sigma) / s there.
"""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

NUM_TRAIN_TIMESTEPS = 1000


def variance_scale(timesteps: torch.Tensor) -> torch.Tensor:
    """s of timesteps, float32 of their shape."""
    sigma = timesteps.float() / NUM_TRAIN_TIMESTEPS
    return ((1 - sigma) ** 2 + sigma**2).sqrt()


class FlowScheduler(FlowMatchEulerDiscreteScheduler):
    """The model's own Euler steps, with the noising and scaling that diffusers' other schedulers have."""

    init_noise_sigma = 1.0

    def set_timesteps(self, num_inference_steps=None, device=None, *, shape: tuple[int, int, int], **given):
        """As the stock pipelines set them: the larger the picture, the noisier, where the model's config says so.

        Args:
            shape: of the latents, (C, h, w); a token is 2 x 2 of them.
        """
        if self.config.use_dynamic_shifting:
            named = ("base_image_seq_len", 256), ("max_image_seq_len", 4096), ("base_shift", 0.5), ("max_shift", 1.15)
            given["mu"] = calculate_shift(shape[1] * shape[2] // 4, *(self.config.get(*pair) for pair in named))
        super().set_timesteps(num_inference_steps, device=device, **given)

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """alpha squared of each whole timestep, (1000,)."""
        timesteps = torch.arange(NUM_TRAIN_TIMESTEPS)
        return self.alpha(timesteps) ** 2

    def alpha(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The share of the clean latent in the variance-preserving space, float32 of the timesteps' shape."""
        return (1 - timesteps.float() / NUM_TRAIN_TIMESTEPS) / variance_scale(timesteps)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """z / s of latents z (B, C, h, w)."""
        return sample / variance_scale(torch.as_tensor(timestep)).to(sample)

    def add_noise(self, original_samples, noise, timesteps) -> torch.Tensor:
        """z / s of clean latents (B, C, h, w), their noise and timesteps (B,)."""
        sigma = (timesteps.float() / NUM_TRAIN_TIMESTEPS).to(original_samples)[:, None, None, None]
        scale = variance_scale(timesteps).to(original_samples)[:, None, None, None]
        return ((1 - sigma) * original_samples + sigma * noise) / scale


class FluxScheduler(FlowScheduler):
    """FLUX's steps begin at sigma = 1 and end at 1 / steps, before they are shifted."""

    def set_timesteps(self, num_inference_steps=None, device=None, *, shape: tuple[int, int, int], **given):
        """See `FlowScheduler.set_timesteps`."""
        if not given:
            given["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(num_inference_steps, device, shape=shape, **given)
