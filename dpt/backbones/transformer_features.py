"""Feature maps of a diffusion transformer of Stable Diffusion 3, from a pass that stops after the last block needed.

Blocks are `block0`, `block1`, ...; a block's map are its image tokens, put where they stand in the picture. Noisy
latents come in the variance-preserving space, as those of every family do (see `dpt.backbones.flow`).

Shapes: B batch, C latent channels, (h, w) latent size, p patch size, D width of a token.
"""

import copy
from contextlib import suppress

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from dpt.backbones.flow import variance_scale


class _Stop(Exception):
    """The last block that is needed has been run."""


class _Stopping(nn.Module):
    def forward(self, *args, **kwargs):
        raise _Stop


def transformer_features(
    transformer: SD3Transformer2DModel,
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
    size = transformer.config.patch_size
    captured: dict[str, torch.Tensor] = {}

    def keep(block):
        def hook(module, args, output):  # (text tokens, image tokens)
            captured[block] = output[-1].transpose(1, 2).unflatten(2, (height // size, width // size))
            if gradients_up_to_features and all(name in captured for name in blocks):
                torch.set_grad_enabled(False)

        return hook

    numbers = [int(block.removeprefix("block")) for block in blocks]
    modules = [transformer.transformer_blocks[number] for number in numbers]
    handles = [module.register_forward_hook(keep(block)) for module, block in zip(modules, blocks, strict=True)]
    network, gradients, velocity = transformer, torch.is_grad_enabled(), None
    if not with_noise_pred:
        network = copy.copy(transformer)
        network._modules = dict(transformer._modules)  # a shallow copy shares this table
        network.transformer_blocks = transformer.transformer_blocks[: max(numbers) + 1]
        network.norm_out = _Stopping()
    timesteps = timesteps.expand(batch)
    scale = variance_scale(timesteps)[:, None, None, None].to(noisy_latents)
    try:
        with suppress(_Stop):
            velocity = network(
                noisy_latents * scale,
                conditioning.encoder_hidden_states,
                timestep=timesteps,
                return_dict=False,
                **conditioning.further,
            )[0]
    finally:
        torch.set_grad_enabled(gradients)
        for handle in handles:
            handle.remove()
    return [captured[block] for block in blocks], velocity
