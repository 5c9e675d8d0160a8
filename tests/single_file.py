"""A diffusers folder of Stable Diffusion 1 as one file, in the names of the original code."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _unet_name(name: str, layers: int) -> str:
    stem, end = name.rsplit(".", 1)
    if stem in ENDS:
        return f"{ENDS[stem]}.{end}"
    side, level, kind, number, rest = re.fullmatch(
        r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", stem
    ).groups()
    if kind == "resnets":
        rest = RESNET[rest]
    level, number = int(level or 0), int(number)
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}.{end}"
    if kind == "downsamplers":
        return f"input_blocks.{(level + 1) * (layers + 1)}.0.op.{end}"
    if side == "down_blocks":
        return f"input_blocks.{level * (layers + 1) + number + 1}.{int(kind == 'attentions')}.{rest}.{end}"
    if kind == "upsamplers":
        return f"output_blocks.{level * (layers + 1) + layers}.UP.conv.{end}"
    return f"output_blocks.{level * (layers + 1) + number}.{int(kind == 'attentions')}.{rest}.{end}"


def _vae_name(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(
        r"mid_block\.attentions\.0\.([\w.]+)\.(\w+)$", lambda m: f"mid.attn_1.{VAE_ATTENTION[m[1]]}.{m[2]}", name
    )
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)


def save_single_file(folder: Path, file: Path, *, layers: int, levels: int) -> None:
    """Writes the weights of the folder's U-Net, autoencoder and text encoder as one file.

    Args:
        layers: of a block of the U-Net; levels: of the autoencoder.
    """
    state = {}
    for name, value in load_file(folder / "unet/diffusion_pytorch_model.safetensors").items():
        state["model.diffusion_model." + _unet_name(name, layers)] = value
    for name in [name for name in state if ".UP." in name]:  # behind the attention, where there is one
        block = name.split(".UP.")[0]
        place = 2 if f"{block}.1.norm.weight" in state else 1
        state[name.replace("UP", str(place))] = state.pop(name)
    for name, value in load_file(folder / "vae/diffusion_pytorch_model.safetensors").items():
        is_linear = "mid_block.attentions" in name and value.ndim == 2
        state["first_stage_model." + _vae_name(name, levels)] = value[:, :, None, None] if is_linear else value
    for name, value in load_file(folder / "text_encoder/model.safetensors").items():
        state["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = value
    state = {name: value.contiguous() for name, value in state.items()}
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state}, file)
