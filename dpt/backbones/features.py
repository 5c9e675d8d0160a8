"""Feature maps of a denoiser, from a pass that stops after the last block needed.

A feature is a block, several joined by "+", or of a U-Net `all`; `dpt.backbones.blocks` has their names. The
modules `unet` and `diffusion_transformer` hold how the two kinds of denoisers differ, in four functions of the same
names: `block_modules`, `block_map`, `truncated` and `predict`.

Shapes: B batch, C latent channels, (h, w) latent size.
"""

import torch
from diffusers import FluxTransformer2DModel, ModelMixin, SD3Transformer2DModel, UNet2DConditionModel

from dpt.backbones import diffusion_transformer, unet
from dpt.backbones.blocks import LATENTS, is_flux, is_transformer
from dpt.backbones.conditioning import Conditioning


def denoiser_class(config) -> type:
    """The class of diffusers of a denoiser's config."""
    if not is_transformer(config):
        return UNet2DConditionModel
    return FluxTransformer2DModel if is_flux(config) else SD3Transformer2DModel


def denoiser_features(
    denoiser: ModelMixin,
    blocks: tuple[str, ...],
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    *,
    with_noise_pred: bool = False,
    gradients_up_to_features: bool = False,
    **unet_inputs,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The blocks' maps, one (B, C_block, h_block, w_block) each, and the noise prediction where it is asked for.

    Without the noise prediction nothing behind the last block is run, unless a U-Net cannot (see `unet.truncated`).

    Args:
        noisy_latents: (B, C, h, w), in the variance-preserving space.
        timesteps: (B,) or a scalar.
        conditioning: of B prompts.
        gradients_up_to_features: with gradients on, switch them off behind the last of the blocks, so that the
            rest of a whole pass keeps no activations.
        unet_inputs: further inputs of a U-Net that are not an image's own.
    """
    if blocks == (LATENTS,) and not with_noise_pred:
        return [noisy_latents], None
    kind = diffusion_transformer if is_transformer(denoiser.config) else unet
    captured: dict[str, torch.Tensor] = {LATENTS: noisy_latents}

    def keep(block):
        def hook(module, args, output):
            captured[block] = kind.block_map(denoiser, output, noisy_latents)
            if gradients_up_to_features and all(name in captured for name in blocks):
                torch.set_grad_enabled(False)

        return hook

    modules, read = kind.block_modules(denoiser), [block for block in blocks if block != LATENTS]
    handles = [modules[block].register_forward_hook(keep(block)) for block in read]
    gradients = torch.is_grad_enabled()
    try:
        network = denoiser if with_noise_pred else kind.truncated(denoiser, read, noisy_latents)
        noise_pred = kind.predict(network, noisy_latents, timesteps, conditioning, **unet_inputs)
    finally:
        torch.set_grad_enabled(gradients)
        for handle in handles:
            handle.remove()
    return [captured[block] for block in blocks], noise_pred if with_noise_pred else None
