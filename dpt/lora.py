"""LoRA on the U-Net's attention: the released layout into PEFT."""

import torch
from diffusers import UNet2DConditionModel

ADAPTER_NAME = "dpt"


def load_released_lora(unet: UNet2DConditionModel, state: dict[str, torch.Tensor]) -> None:
    """Attaches LoRA tensors of the old attention-processor layout as the PEFT adapter "dpt".

    Args:
        state: `unet.<block>...attn{1,2}.processor.to_{q,k,v,out}_lora.{down,up}.weight`; alpha is the rank.
    """
    unet.load_lora_adapter(state, prefix="unet", adapter_name=ADAPTER_NAME)
    unet.requires_grad_(False)
