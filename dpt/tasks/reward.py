"""Reward (Clark et al. 2024, DRaFT; Prabhudesai et al. 2023, AlignProp): LoRA that raises the matching score.

A training step draws half of a picture of each caption by the model as it is now. Gradients flow through the last of
the steps alone. The score comes from the adapter in evaluation mode, on the denoiser without its LoRA, so that
features cannot learn to please it.

Shapes: B samples, C latent channels, (h, w) latent size.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from diffusers import SchedulerMixin

from dpt.data.collate import Batch, sample_generator
from dpt.matching_score import matching_score
from dpt.sampling import ClassifierFreeGuidance, sample
from dpt.sampling_settings import Sampling
from dpt.schedulers import make_scheduler, set_timesteps

if TYPE_CHECKING:
    from dpt.adapter.adapter import Scorer
    from dpt.backbones.conditioning import Conditioning
    from dpt.backbones.stable_diffusion import StableDiffusion


def reward_inputs(batch: Batch, sd: StableDiffusion, sampling: Sampling, *, until: float, seed: int) -> dict:
    """The arguments of `reward_loss` for a batch's captions: noise of each sample's own, and one step for all.

    Args:
        sampling: how pictures are drawn.
        until: the step is drawn evenly from the first such share of the steps.

    Raises:
        ValueError: a schedule of a single step.
    """
    named = zip(batch.ids, batch.epochs, strict=True)
    generators = [sample_generator(seed, *pair, "reward") for pair in named]
    captions = [captions[0] for captions in batch.captions]
    shape = sd.latent_shape()
    steps = sampling.num_inference_steps
    if steps < 2:
        raise ValueError(f"num_inference_steps is {steps}; a half-drawn picture needs at least 2")
    last = min(max(1, round(until * steps)), steps - 1)
    return {
        "noise": torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(sd.device),
        "conditioning": sd.condition(captions).with_guidance(sampling.distilled_guidance),
        "negative": sd.condition([""] * len(captions), negative=True).with_guidance(sampling.distilled_guidance),
        "sampling": sampling,
        "step": int(torch.randint(last, (1,), generator=generators[0])),
    }


def reward_loss(
    denoiser,
    scorer: Scorer,
    base: SchedulerMixin,
    *,
    noise: torch.Tensor,
    conditioning: Conditioning,
    negative: Conditioning,
    sampling: Sampling,
    step: int,
) -> dict[str, torch.Tensor]:
    """1 - the mean matching score of half-drawn pictures, as `loss_reward`.

    Args:
        denoiser: with LoRA, which alone gets gradients.
        base: the model's scheduler.
        noise: standard normal, (B, C, h, w).
        conditioning, negative: of the captions and of the negative prompts, B each.
        step: pictures are drawn up to this step without gradients, and through it with them.
    """
    scheduler = make_scheduler(base, sampling.scheduler)
    set_timesteps(scheduler, sampling.num_inference_steps, noise.device, shape=noise.shape[1:])
    guidance = ClassifierFreeGuidance(
        denoiser,
        scheduler,
        conditioning,
        negative,
        guidance_scale=sampling.guidance_scale,
        guidance_rescale=sampling.guidance_rescale,
    )
    latents = sample(guidance, scheduler, noise * scheduler.init_noise_sigma, steps=range(step))
    noise_pred, latents = guidance(latents, scheduler.timesteps[step], step)
    latents = scheduler.step(noise_pred, scheduler.timesteps[step], latents).prev_sample
    timestep = scheduler.timesteps[step + 1]
    with without_lora(denoiser), standing_still(scorer.adapter):
        score = matching_score(denoiser, scorer, scheduler.scale_model_input(latents, timestep), timestep, conditioning)
    return {"loss_reward": 1 - score.mean()}


@contextlib.contextmanager
def without_lora(denoiser):
    """The denoiser as it was before LoRA."""
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()


@contextlib.contextmanager
def standing_still(adapter: torch.nn.Module):
    """The adapter in evaluation mode while the context lasts."""
    training = adapter.training
    adapter.eval()
    try:
        yield
    finally:
        adapter.train(training)
