"""The U-Net of Stable Diffusion 1, 2 and XL: its blocks, a twin that stops early, and its prediction."""

import copy

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from dpt.backbones.blocks import block_names, is_transformer
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.offload import own_forward


def block_modules(unet: UNet2DConditionModel) -> dict[str, nn.Module]:
    """The blocks by name, in the order in which they are run."""
    modules = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return dict(zip(block_names(unet.config), modules, strict=True))


def block_map(unet: UNet2DConditionModel, output, noisy_latents: torch.Tensor) -> torch.Tensor:
    """The feature map (B, C_block, h_block, w_block) in a block's output."""
    return output[0] if isinstance(output, tuple) else output


def truncated(unet: UNet2DConditionModel, blocks: list[str], noisy_latents: torch.Tensor) -> UNet2DConditionModel:
    """A twin that shares every module up to the last of the blocks and has none behind it.

    Returns the U-Net itself for latents whose sides its downsampling does not divide: there diffusers passes the skip
    connections' sizes on.
    """
    factor = 2 ** (len(unet.config.down_block_types) - 1)
    if any(side % factor for side in noisy_latents.shape[-2:]):
        return unet
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


def predict(
    unet: UNet2DConditionModel,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    conditioning: Conditioning,
    **unet_inputs,
) -> torch.Tensor:
    """The noise prediction (B, C, h, w); of a twin that stops early, the output of its last block."""
    options = {"added_cond_kwargs": conditioning.further or None} | unet_inputs
    return unet(noisy_latents, timesteps, conditioning.encoder_hidden_states, **options, return_dict=False)[0]


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
