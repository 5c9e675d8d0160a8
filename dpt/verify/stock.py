"""Latents that diffusers' own pipeline draws, to compare with."""

import torch
from diffusers import FluxPipeline

from dpt.backbones.flux import DISTILLED_GUIDANCE, Flux
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.sampling_settings import Sampling


def stock_latents(
    sd: StableDiffusion, prompts: list[str], noise: torch.Tensor, sampling: Sampling, *, lora: str | None = None
) -> torch.Tensor:
    """Finished latents (B, C, h, w) of prompts from noise (B, C, h, w), by the model's stock pipeline.

    Args:
        sampling: without correction or choosing; its guidance, steps and negative prompt are read.
        lora: a folder or file that the pipeline loads first.
    """
    pipeline, factor = sd.stock_pipeline(), sd.vae_scale_factor
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    height, width = (factor * side for side in noise.shape[-2:])
    negative = sampling.negative_prompt
    options = {"guidance_scale": sampling.guidance_scale, "latents": noise, "negative_prompt": None}
    if negative or isinstance(sd, Flux):  # Stable Diffusion XL leads away from zeros where there is none
        options["negative_prompt"] = [negative] * len(prompts)
    if isinstance(sd, Flux):
        guidance = DISTILLED_GUIDANCE if sampling.distilled_guidance is None else sampling.distilled_guidance
        packed = FluxPipeline._pack_latents(noise, *noise.shape)
        options |= {"true_cfg_scale": sampling.guidance_scale, "guidance_scale": guidance, "latents": packed}
        options["max_sequence_length"] = sd.longest_reader[1]
    drawn = pipeline(
        prompts,
        num_inference_steps=sampling.num_inference_steps,
        height=height,
        width=width,
        output_type="latent",
        **options,
    ).images
    return FluxPipeline._unpack_latents(drawn, height, width, factor) if isinstance(sd, Flux) else drawn
