"""Feature maps of a denoiser of diffusers, a U-Net here, from a pass that stops after the last block needed.

Blocks are `down0..3`, `mid`, `up0..3`; a feature is one block, several joined by "+", or `all`, the nine in order.
`latents`, for comparison, is the U-Net's input.

Shapes: B batch, C latent channels, (h, w) latent size, L text tokens, E context width.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from dpt.backbones.blocks import LATENTS, is_flux, is_transformer
from dpt.backbones.offload import own_forward
from dpt.backbones.transformer_features import transformer_features


@dataclass(frozen=True)
class Conditioning:
    """What prompts become for the denoiser and the adapter; the first dimension of every tensor runs over images."""

    encoder_hidden_states: torch.Tensor
    """(B, L, E)"""
    pooled_prompt_embeds: torch.Tensor | None = None
    """(B, P), what ITM compares with"""
    further: dict[str, torch.Tensor] = field(default_factory=dict)
    """a model's further inputs by name, such as SDXL's `time_ids`"""

    def __len__(self) -> int:
        return len(self.encoder_hidden_states)

    def map(self, change) -> "Conditioning":
        """The same with each tensor changed by a function."""
        pooled = None if self.pooled_prompt_embeds is None else change(self.pooled_prompt_embeds)
        further = {name: change(value) for name, value in self.further.items()}
        return Conditioning(change(self.encoder_hidden_states), pooled, further)

    def __getitem__(self, indices) -> "Conditioning":
        """That of some images, by a list, a tensor or a slice of their indices."""
        return self.map(lambda value: value[indices])

    def with_guidance(self, scale: float | None) -> "Conditioning":
        """That with the guidance scale which distilled models take as an input; None leaves it.

        Raises:
            ValueError: a scale for a model that takes none.
        """
        if scale is None:
            return self
        if "guidance" not in self.further:
            raise ValueError(
                f"distilled_guidance is {scale:g}; this model takes none as an input: it is for FLUX.1-dev"
            )
        further = self.further | {"guidance": torch.full_like(self.further["guidance"], scale)}
        return Conditioning(self.encoder_hidden_states, self.pooled_prompt_embeds, further)

    @staticmethod
    def join(parts: Iterable["Conditioning"]) -> "Conditioning":
        """That of the images of several batches."""
        parts = list(parts)
        pooled = [part.pooled_prompt_embeds for part in parts]
        return Conditioning(
            torch.cat([part.encoder_hidden_states for part in parts]),
            None if any(value is None for value in pooled) else torch.cat(pooled),
            {name: torch.cat([part.further[name] for part in parts]) for name in parts[0].further},
        )


def denoiser_class(config) -> type:
    """The class of diffusers of a denoiser's config."""
    if not is_transformer(config):
        return UNet2DConditionModel
    return FluxTransformer2DModel if is_flux(config) else SD3Transformer2DModel


def unet_features(
    unet: UNet2DConditionModel,
    blocks: tuple[str, ...],
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    *,
    with_noise_pred: bool = False,
    gradients_up_to_features: bool = False,
    **unet_inputs,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The blocks' outputs, one (B, C_block, h_block, w_block) each, and the noise prediction where it is asked for.

    Without the noise prediction nothing behind the last block is run, unless the latent's size is one for which
    diffusers passes the skip connections' sizes on (sides not divisible by all of the U-Net's downsampling).

    Args:
        noisy_latents: (B, C, h, w).
        timesteps: (B,) or a scalar.
        conditioning: of B prompts.
        gradients_up_to_features: where gradients are on, switch them off behind the last of the blocks, so that the
            rest of a whole pass keeps no activations.
        unet_inputs: further inputs of the U-Net that are not an image's own.
    """
    if blocks == (LATENTS,) and not with_noise_pred:
        return [noisy_latents], None
    if is_transformer(unet.config):
        options = {"with_noise_pred": with_noise_pred, "gradients_up_to_features": gradients_up_to_features}
        return transformer_features(unet, blocks, noisy_latents, timesteps, conditioning, **options)
    captured: dict[str, torch.Tensor] = {LATENTS: noisy_latents}

    def keep(block):
        def hook(module, args, output):
            captured[block] = output[0] if isinstance(output, tuple) else output
            if gradients_up_to_features and all(name in captured for name in blocks):
                torch.set_grad_enabled(False)

        return hook

    handles = [_module(unet, block).register_forward_hook(keep(block)) for block in blocks if block != LATENTS]
    factor = 2 ** (len(unet.config.down_block_types) - 1)
    whole = with_noise_pred or any(side % factor for side in noisy_latents.shape[-2:])
    gradients = torch.is_grad_enabled()
    try:
        network = unet if whole else _truncated(unet, blocks)
        noise_pred = network(
            noisy_latents,
            timesteps,
            conditioning.encoder_hidden_states,
            **{"added_cond_kwargs": conditioning.further or None} | unet_inputs,
            return_dict=False,
        )[0]
    finally:
        torch.set_grad_enabled(gradients)
        for handle in handles:
            handle.remove()
    return [captured[block] for block in blocks], noise_pred if with_noise_pred else None


def _module(unet: UNet2DConditionModel, block: str) -> nn.Module:
    if block == "mid":
        return unet.mid_block
    if block.startswith("down"):
        return unet.down_blocks[int(block.removeprefix("down"))]
    return unet.up_blocks[int(block.removeprefix("up"))]


def _truncated(unet: UNet2DConditionModel, blocks: tuple[str, ...]) -> UNet2DConditionModel:
    """A twin that shares every module up to the last of the blocks and has none behind it."""
    twin = copy.copy(unet)
    twin._modules = dict(unet._modules)  # a shallow copy shares this table; cutting it would cut the original
    ups = [int(block.removeprefix("up")) for block in blocks if block.startswith("up")]
    downs = [int(block.removeprefix("down")) for block in blocks if block.startswith("down")]
    twin.up_blocks = unet.up_blocks[: max(ups) + 1] if ups else nn.ModuleList()
    if not ups and "mid" not in blocks:
        twin.mid_block = None
        twin.down_blocks = unet.down_blocks[: max(downs) + 1]
    twin.conv_norm_out = None
    twin.conv_out = nn.Identity()
    own_forward(twin, unet)
    return twin


def set_cpu_attention(unet: UNet2DConditionModel) -> None:
    """Chooses the attention that trains faster on a CPU; on other devices leaves the U-Net as it is.

    Fused for the largest map's self-attention; plain matrix products for cross-attention and smaller maps, where the
    fused backward is 2 to 8 times slower (measured on the embedded model, bf16: pretraining 0.85 s a step instead of
    1.04, a tuning step's passes to `up2` 1.12 s instead of 1.43).
    """
    if unet.device.type != "cpu" or is_transformer(unet.config):
        return
    largest = ("down_blocks.0.", f"up_blocks.{len(unet.up_blocks) - 1}.")
    unet.set_attn_processor(
        {
            name: AttnProcessor2_0() if ".attn1." in name and name.startswith(largest) else AttnProcessor()
            for name in unet.attn_processors
        }
    )
