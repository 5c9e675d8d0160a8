"""The diffusion transformers of Stable Diffusion 3 and FLUX: their blocks, a twin that stops early, and its prediction.

A block's map are its image tokens, put where they stand in the picture. Noisy latents come in the variance-preserving
space, as those of every family do (see `dpt.backbones.flow`).

Shapes: B batch, C latent channels, (h, w) latent size, p patch size, D width of a token.
"""

import copy

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from dpt.backbones.blocks import patch_size
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.flow import variance_scale
from dpt.backbones.offload import own_forward

MMDiT = SD3Transformer2DModel | FluxTransformer2DModel


class _Stop(Exception):
    """The last block that is needed has been run."""


class _Stopping(nn.Module):
    def forward(self, *args, **kwargs):
        raise _Stop


def block_modules(transformer: MMDiT) -> dict[str, nn.Module]:
    """The blocks by name, in the order in which they are run."""
    single = getattr(transformer, "single_transformer_blocks", ())
    return {f"block{i}": block for i, block in enumerate(transformer.transformer_blocks)} | {
        f"single{i}": block for i, block in enumerate(single)
    }


def block_map(transformer: MMDiT, output: tuple[torch.Tensor, ...], noisy_latents: torch.Tensor) -> torch.Tensor:
    """The map (B, D, h / p, w / p) of a block's output, (text tokens, image tokens)."""
    cells = [side // patch_size(transformer.config) for side in noisy_latents.shape[-2:]]
    return output[-1].transpose(1, 2).unflatten(2, cells)


def truncated(transformer: MMDiT, blocks: list[str], noisy_latents: torch.Tensor) -> MMDiT:
    """A twin that shares the blocks up to the last of these and stops behind it."""
    twin = copy.copy(transformer)
    twin._modules = dict(transformer._modules)  # a shallow copy shares this table
    names, double = list(block_modules(transformer)), transformer.transformer_blocks
    last = max(names.index(block) for block in blocks) + 1
    twin.transformer_blocks = double[:last]
    if hasattr(transformer, "single_transformer_blocks"):
        twin.single_transformer_blocks = transformer.single_transformer_blocks[: max(0, last - len(double))]
    twin.norm_out = _Stopping()
    own_forward(twin, transformer)
    return twin


def predict(
    transformer: MMDiT, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
) -> torch.Tensor | None:
    """The velocity (B, C, h, w); None of a twin that stops early. FLUX gets packed latents, four cells a token."""
    batch, channels, height, width = noisy_latents.shape
    timesteps = timesteps.expand(batch)
    latents = noisy_latents * variance_scale(timesteps)[:, None, None, None].to(noisy_latents)
    context, options = conditioning.encoder_hidden_states, {"return_dict": False, **conditioning.further}
    try:
        if isinstance(transformer, SD3Transformer2DModel):
            return transformer(latents, context, timestep=timesteps, **options)[0]
        packed = FluxPipeline._pack_latents(latents, batch, channels, height, width)
        where = FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, latents.device, latents.dtype)
        text = torch.zeros(context.shape[1], 3, device=latents.device, dtype=latents.dtype)
        options |= {"img_ids": where, "txt_ids": text, "timestep": timesteps.to(latents.dtype) / 1000}
        velocity = transformer(packed, context, **options)[0]
    except _Stop:
        return None
    return FluxPipeline._unpack_latents(velocity, height, width, vae_scale_factor=1)
