"""A script of `test_checkpoint`: the released layout at SD 2.1's size with random numbers, and its peak memory."""

import json
import sys

import torch
from diffusers import UNet2DConditionModel

from dpt.adapter.adapter import DiscriminativeAdapter
from dpt.checkpoint.__main__ import main
from dpt.checkpoint.checkpoint import load_checkpoint
from dpt.checkpoint.released import adapter_key
from dpt.config import AdapterConfig
from dpt.lora import load_lora

keys_file, folder = sys.argv[1:]
with torch.device("meta"):
    unet = UNet2DConditionModel(
        sample_size=64, attention_head_dim=(5, 10, 20, 20), cross_attention_dim=1024, use_linear_projection=True
    )
    adapter = DiscriminativeAdapter(AdapterConfig()).state_dict()
with open(keys_file) as file:
    keys = [key for key in json.load(file) if not key.startswith("unet.")]
state = {key: torch.randn(adapter[adapter_key(key)].shape) for key in keys}
for name, module in unet.named_modules():
    if name.endswith(("attn1", "attn2")):
        for part in ("q", "k", "v", "out"):
            linear = module.to_out[0] if part == "out" else getattr(module, f"to_{part}")
            prefix = f"unet.{name}.processor.to_{part}_lora."
            state[prefix + "down.weight"] = torch.randn(4, linear.in_features)
            state[prefix + "up.weight"] = torch.randn(linear.out_features, 4)
torch.save(state, f"{folder}/pytorch_model.bin")
assert main(["convert", folder, f"{folder}/own"]) == 0
assert main(["inspect", f"{folder}/own"]) == 0
unet = unet.to(torch.bfloat16).to_empty(device="cpu")
load_lora(unet, load_checkpoint(f"{folder}/own").lora, alpha=4)
with open("/proc/self/status") as file:
    print(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1024**2)
