"""The denoising loop, and classifier-free guidance, the simplest guidance.

A guidance asks the denoiser, a U-Net or a transformer, and may wrap another guidance; the loop never learns of it. It
returns the noise prediction together with the latents that the scheduler steps on from, which it may have moved.

Shapes: B images, C latent channels, (h, w) latent size.
"""

from collections.abc import Callable

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from dpt.backbones.conditioning import Conditioning
from dpt.backbones.features import denoiser_features

Guidance = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
"""Maps (latents, timestep, step) to (noise prediction, latents to step from), all (B, C, h, w) but the timestep."""


def initial_noise(seeds: list[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal latents (B, *shape), float32 on the CPU: image b depends on seed b alone."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    denoise: Guidance,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    *,
    steps: range | None = None,
    step_options: dict | None = None,
    on_step: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> torch.Tensor:
    """Latents (B, C, h, w) after the scheduler's steps, in float32.

    Args:
        scheduler: with its timesteps set (`dpt.schedulers.set_timesteps`).
        latents: at the first of the steps; at step 0 that is noise times the scheduler's `init_noise_sigma`.
        steps: which of the schedule's steps to go; by default all.
        step_options: arguments of the scheduler's `step`, such as eta, or the generator of noise drawn at each step.
        on_step: called after each step with its number and the latents; a tensor that it returns takes their place.
        stop: asked before each step; True ends the sampling there.
    """
    for step in range(len(scheduler.timesteps)) if steps is None else steps:
        if stop is not None and stop():
            break
        timestep = scheduler.timesteps[step]
        noise_pred, latents = denoise(latents, timestep, step)
        latents = scheduler.step(noise_pred, timestep, latents, **(step_options or {})).prev_sample
        if on_step is not None and isinstance(changed := on_step(step, latents), torch.Tensor):
            latents = changed
    return latents


class ClassifierFreeGuidance:
    """Ho & Salimans 2022: eps = eps(z, negative) + guidance_scale * (eps(z, prompt) - eps(z, negative)); a `Guidance`.

    Args:
        conditioning: of the prompts; negative: of the negative or empty ones, for as many images.
        guidance_scale: up to 1 the negative half is not evaluated, as in diffusers.
        guidance_rescale: share of the result that gets eps(z, prompt)'s standard deviation (Lin et al. 2024, 3.4).
        unet_inputs: further inputs of the U-Net that are not an image's own.
    """

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        conditioning: Conditioning,
        negative: Conditioning,
        *,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
        unet_inputs: dict | None = None,
    ):
        self.unet_inputs = unet_inputs or {}
        self.denoiser, self.scheduler = denoiser, scheduler
        self.conditioning, self.negative = conditioning, negative
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.watched: tuple[str, ...] = ()
        """blocks whose features every pass keeps"""
        self.features: list[torch.Tensor] = []
        """of the watched blocks and the last pass's conditional half, (B, C_block, h_block, w_block) each"""
        self.halves: tuple[torch.Tensor, torch.Tensor] | None = None
        """the last negative and conditional predictions; None without guidance"""

    def __call__(self, latents, timestep, step, *, conditional: torch.Tensor | None = None):
        """The guided noise prediction, and the latents as they are.

        Args:
            conditional: the conditional half's latents, where a method moves them alone.
        """
        conditional = latents if conditional is None else conditional
        if self.guidance_scale <= 1:
            noise_pred = self.predict(conditional, timestep, self.conditioning)
            return noise_pred, latents
        both = Conditioning.join([self.negative, self.conditioning])
        noise_pred = self.predict(torch.cat([latents, conditional]), timestep, both)
        self.features = [feature[len(latents) :] for feature in self.features]
        return self.combine(*noise_pred.chunk(2)), latents

    def predict(self, latents, timestep, conditioning: Conditioning) -> torch.Tensor:
        """The noise prediction under one conditioning, float32; fills `features`."""
        noisy_latents = self.scheduler.scale_model_input(latents, timestep).to(self.denoiser.dtype)
        self.features, noise_pred = denoiser_features(
            self.denoiser, self.watched, noisy_latents, timestep, conditioning, with_noise_pred=True, **self.unet_inputs
        )
        return noise_pred.float()

    def combine(self, negative: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
        """The guided prediction of the two halves'."""
        self.halves = negative, positive
        guided = negative + self.guidance_scale * (positive - negative)
        return rescale_noise_cfg(guided, positive, self.guidance_rescale) if self.guidance_rescale else guided
