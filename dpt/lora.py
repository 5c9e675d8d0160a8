"""LoRA on the U-Net's attention, through PEFT; tensors travel in diffusers' names (`<module>.lora_{A,B}.weight`)."""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from dpt.unet_features import parse_feature

ADAPTER_NAME = "dpt"
_RELEASED = re.compile(r"unet\.(?P<attention>.+)\.processor\.to_(?P<name>q|k|v|out)_lora\.(?P<part>down|up)\.weight")


def lora_key(released_key: str) -> str | None:
    """diffusers' name of a tensor of the old attention-processor layout; None for any other name."""
    match = _RELEASED.fullmatch(released_key)
    if not match:
        return None
    module = "to_out.0" if match["name"] == "out" else f"to_{match['name']}"
    return f"{match['attention']}.{module}.lora_{'A' if match['part'] == 'down' else 'B'}.weight"


def lora_metadata(state: dict[str, torch.Tensor], alpha: float) -> dict:
    """PEFT settings of LoRA tensors of one rank, as diffusers keeps them beside the tensors."""
    rank = next(value.shape[0] for key, value in state.items() if ".lora_A." in key)
    return {"r": rank, "lora_alpha": alpha, "target_modules": sorted({key.rsplit(".lora_", 1)[0] for key in state})}


def load_lora(
    unet: UNet2DConditionModel, state: dict[str, torch.Tensor], *, alpha: float, trainable: bool = False
) -> None:
    """Attaches LoRA tensors as the PEFT adapter "dpt" in place of one already there; the U-Net is frozen.

    Args:
        state: diffusers' names, without a prefix; all of one rank.
        alpha: the update is scaled by alpha / rank.
        trainable: LoRA gets gradients and float32 values, which a half-precision U-Net would round.

    Raises:
        ValueError: a module or a shape that the U-Net does not have.
    """
    modules = dict(unet.named_modules())
    for key, tensor in state.items():
        path = key.rsplit(".lora_", 1)[0]
        module = modules.get(path)
        if module is None:
            raise ValueError(f"LoRA tensor {key}: this U-Net has no module {path}")
        module = getattr(module, "base_layer", module)
        wanted = module.in_features if ".lora_A." in key else module.out_features
        found = tensor.shape[1] if ".lora_A." in key else tensor.shape[0]
        if wanted != found:
            raise ValueError(f"LoRA tensor {key} is for width {found}; this U-Net's {path} has {wanted}")
    remove_lora(unet)
    prefixed = {f"unet.{key}": value for key, value in state.items()}
    metadata = {f"unet.{key}": value for key, value in lora_metadata(state, alpha).items()}
    unet.load_lora_adapter(prefixed, prefix="unet", adapter_name=ADAPTER_NAME, metadata=metadata)
    unet.requires_grad_(False)
    if trainable:
        for name, parameter in unet.named_parameters():
            if ".lora_" in name:
                tensor = state[name.replace(f".{ADAPTER_NAME}.", ".")]
                parameter.data = tensor.to(parameter.device, torch.float32, copy=True)
                parameter.requires_grad_(True)


def load_external_lora(unet: UNet2DConditionModel, path: Path) -> None:
    """Attaches a LoRA in diffusers' format (a folder or file, such as another method's) to the U-Net, frozen.

    Raises:
        ValueError: nothing readable there, or nothing for a U-Net in it.
    """
    if not path.exists():
        raise ValueError(f"lora {path} is not there")
    remove_lora(unet)
    try:
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(path, return_lora_metadata=True)
        StableDiffusionPipeline.load_lora_into_unet(
            state, alphas, unet, adapter_name=ADAPTER_NAME, metadata=metadata or None
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"lora {path} does not fit this U-Net: {' '.join(str(error).split())[:200]}") from error
    if ADAPTER_NAME not in getattr(unet, "peft_config", {}):
        raise ValueError(f"lora {path} holds nothing for a U-Net")
    unet.requires_grad_(False)


def remove_lora(unet: UNet2DConditionModel) -> None:
    """Detaches the PEFT adapter "dpt", if there is one."""
    if ADAPTER_NAME in getattr(unet, "peft_config", {}):
        unet.delete_adapters(ADAPTER_NAME)


def add_lora(unet: UNet2DConditionModel, *, rank: int, alpha: float, blocks: tuple[str, ...] = ()) -> None:
    """Adds a fresh, trainable LoRA (its update starts at zero) to every attention projection, in float32.

    Args:
        blocks: restricts it to these blocks of the U-Net (see `unet_features`); none means all.

    Raises:
        ValueError: blocks without attention, or that the U-Net does not have.
    """
    for block in blocks:
        parse_feature(block, unet.config)
    prefixes = tuple(_prefix(block) for block in blocks)
    targets = [
        name
        for name, _ in unet.named_modules()
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")) and (not prefixes or name.startswith(prefixes))
    ]
    if not targets:
        raise ValueError(f"lora.blocks is {list(blocks)}; there is no attention in them")
    remove_lora(unet)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
    unet.add_adapter(config, adapter_name=ADAPTER_NAME)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _prefix(block: str) -> str:
    if block == "mid":
        return "mid_block."
    kind = block.rstrip("0123456789")
    return f"{kind}_blocks.{block.removeprefix(kind)}."


def lora_state(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The tensors of the PEFT adapter "dpt", in diffusers' names; empty where there is none."""
    if ADAPTER_NAME not in getattr(unet, "peft_config", {}):
        return {}
    return get_peft_model_state_dict(unet, adapter_name=ADAPTER_NAME)
