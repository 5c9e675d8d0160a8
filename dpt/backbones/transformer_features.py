"""Feature maps of the diffusion transformers of Stable Diffusion 3 and FLUX, from a pass that stops where it may.

Blocks are `block0`, `block1`, ..., and of FLUX, behind these, `single0`, `single1`, ...; a block's map are its image
tokens, put where they stand in the picture. A pass without a prediction runs no block behind the last one needed.
Noisy latents come in the variance-preserving space, as those of every family do (see `dpt.backbones.flow`).

Shapes: B batch, C latent channels, (h, w) latent size, p patch size, D width of a token.
"""

import copy
from contextlib import suppress

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from dpt.backbones.blocks import LATENTS, patch_size
from dpt.backbones.flow import variance_scale
from dpt.backbones.offload import own_forward


class _Stop(Exception):
    """The last block that is needed has been run."""


class _Stopping(nn.Module):
    def forward(self, *args, **kwargs):
        raise _Stop


def transformer_features(
    transformer: SD3Transformer2DModel | FluxTransformer2DModel,
    blocks: tuple[str, ...],
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning,
    *,
    with_noise_pred: bool,
    gradients_up_to_features: bool,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The blocks' maps, (B, D, h / p, w / p) each, and the predicted velocity; see `unet_features`.

    Args:
        conditioning: with `pooled_projections` among the further inputs.
    """
    batch, _, height, width = noisy_latents.shape
    size = patch_size(transformer.config)
    captured: dict[str, torch.Tensor] = {LATENTS: noisy_latents}
    read = [block for block in blocks if block != LATENTS]

    def keep(block):
        def hook(module, args, output):  # (text tokens, image tokens)
            captured[block] = output[-1].transpose(1, 2).unflatten(2, (height // size, width // size))
            if gradients_up_to_features and all(name in captured for name in blocks):
                torch.set_grad_enabled(False)

        return hook

    named = transformer_blocks(transformer)
    handles = [named[block].register_forward_hook(keep(block)) for block in read]
    network, gradients, velocity = transformer, torch.is_grad_enabled(), None
    if not with_noise_pred:
        network = copy.copy(transformer)
        network._modules = dict(transformer._modules)  # a shallow copy shares this table
        last = max(list(named).index(block) for block in read) + 1
        double = transformer.transformer_blocks
        network.transformer_blocks = double[:last]
        if hasattr(transformer, "single_transformer_blocks"):
            network.single_transformer_blocks = transformer.single_transformer_blocks[: max(0, last - len(double))]
        network.norm_out = _Stopping()
        own_forward(network, transformer)
    timesteps = timesteps.expand(batch)
    scale = variance_scale(timesteps)[:, None, None, None].to(noisy_latents)
    try:
        with suppress(_Stop):
            velocity = _run(network, noisy_latents * scale, timesteps, conditioning)
    finally:
        torch.set_grad_enabled(gradients)
        for handle in handles:
            handle.remove()
    return [captured[block] for block in blocks], velocity


def _run(transformer, latents: torch.Tensor, timesteps: torch.Tensor, conditioning) -> torch.Tensor:
    """The velocity (B, C, h, w); of FLUX through its packed latents, four cells a token."""
    context, options = conditioning.encoder_hidden_states, {"return_dict": False, **conditioning.further}
    if isinstance(transformer, SD3Transformer2DModel):
        return transformer(latents, context, timestep=timesteps, **options)[0]
    batch, channels, height, width = latents.shape
    packed = FluxPipeline._pack_latents(latents, batch, channels, height, width)
    where = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, latents.dtype)
    text = torch.zeros(context.shape[1], 3, device=latents.device, dtype=latents.dtype)
    options |= {"img_ids": where, "txt_ids": text, "timestep": timesteps.to(latents.dtype) / 1000}
    velocity = transformer(packed, context, **options)[0]
    return FluxPipeline._unpack_latents(velocity, height, width, vae_scale_factor=1)


def transformer_blocks(transformer) -> dict[str, nn.Module]:
    """The blocks by name, in the order in which they are run."""
    single = getattr(transformer, "single_transformer_blocks", ())
    return {f"block{i}": block for i, block in enumerate(transformer.transformer_blocks)} | {
        f"single{i}": block for i, block in enumerate(single)
    }
