"""The U-Net of the `shapes` world: SD 2.1's topology with one layer a block, trained on web-like captions."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel

from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.data.loader import step_indices
from dpt.shapes.grammar import caption_text
from dpt.shapes.vae import Latents
from dpt.shapes.world import ShapesWorld

SNR_RANGE = (1.0, 5.0)
MAX_WEIGHT = 6.0


def make_unet(*, channels: list[int], heads: list[int], context_width: int, sample_size: int) -> UNet2DConditionModel:
    """SD 2.1's block types and linear projections at another size, random weights."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        block_out_channels=tuple(channels),
        attention_head_dim=tuple(heads),  # diffusers' name for the number of heads
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=context_width,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def make_scheduler() -> DDIMScheduler:
    """DDIM with SD 2.1-base's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def denoising_weights(scheduler: DDIMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """Weights (B,) of the noise's squared errors: in terms of the clean latents' error, the SNR clipped to 1 and 5.

    Below SNR 1 the number and places of objects are decided; unweighted, those timesteps hardly count. Above
    5 it is detail, to which the decoder is robust. No weight exceeds `MAX_WEIGHT`, since near pure noise nothing can be
    learnt. (Min-SNR weighting, Hang et al. 2023, is the upper bound alone.)
    """
    alphas = scheduler.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    return (snr.clamp(*SNR_RANGE) / snr).clamp(max=MAX_WEIGHT)


def denoising_losses(
    sd: StableDiffusion, latents: Latents, world: ShapesWorld, step: int, *, batch_size: int, caption_dropout: float
) -> dict[str, torch.Tensor]:
    """The weighted denoising loss of one step on web-like captions; an epoch draws each scene once."""
    pairs = step_indices(step, count=batch_size, num_samples=len(latents), seed=4)
    rng = np.random.default_rng((3, step))
    captions = [
        "" if rng.random() < caption_dropout else world.web_caption(i, world.scene(i)[0], epoch=e) for i, e in pairs
    ]
    errors, weights = _denoising_errors(sd, latents, np.array([i for i, _ in pairs]), captions, seed=step)
    return {"loss_denoise": (weights * errors).mean()}


def _denoising_errors(sd, latents, indices, captions, *, seed):
    """Mean squared error of the predicted noise, and its weight: each (B,)."""
    generator = torch.Generator().manual_seed(seed)
    z = latents.sample(indices, generator)
    noise = torch.randn(z.shape, generator=generator)
    # one timestep of each of B equal parts of the schedule (Kingma et al. 2021): less noise in the loss
    strata = torch.randperm(len(z), generator=generator) + torch.rand(len(z), generator=generator)
    num_timesteps = sd.scheduler.config.num_train_timesteps
    timesteps = (strata / len(z) * num_timesteps).long().clamp(max=num_timesteps - 1)  # rounding may reach the end
    context, _ = sd.encode_prompts(captions)
    noise_pred = sd.denoiser(sd.scheduler.add_noise(z, noise, timesteps), timesteps, context).sample
    errors = F.mse_loss(noise_pred.float(), sd.noise_target(z, noise, timesteps), reduction="none").mean((1, 2, 3))
    return errors, denoising_weights(sd.scheduler, timesteps)


@torch.no_grad()
def validation_losses(sd: StableDiffusion, latents: Latents, world: ShapesWorld) -> dict[str, float]:
    """Mean denoising loss on cached val scenes with clean captions, weighted as in training and not weighted.

    Noise and timesteps are the same each time.
    """
    batches = []
    for start in range(0, len(latents), 64):
        indices = np.arange(start, min(start + 64, len(latents)))
        captions = [caption_text(world.scene(int(i))[0], world.generator(int(i), 5)) for i in indices]
        batches.append(_denoising_errors(sd, latents, indices, captions, seed=start))
    errors, weights = (torch.cat(values) for values in zip(*batches, strict=True))
    return {"val_loss": (weights * errors).mean().item(), "val_loss_unweighted": errors.mean().item()}
