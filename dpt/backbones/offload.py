"""Models larger than the accelerator's memory: their parts, or their layers, stay on the CPU until they are needed.

The hooks are accelerate's, which diffusers' `enable_model_cpu_offload` and `enable_sequential_cpu_offload` set too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import cpu_offload, cpu_offload_with_hook

if TYPE_CHECKING:
    from dpt.backbones.stable_diffusion import StableDiffusion


def offload(sd: StableDiffusion, how: str, device: torch.device) -> None:
    """Keeps a model that lies on the CPU there, and computes on the device.

    Args:
        how: "model": a network is on the device from its call to the next network's. "sequential": a layer is there
            while it is run, which is slow and takes least memory.
    """
    sd.execution_device = device
    networks = list(sd.parts.values())
    if how == "sequential":
        for network in networks:
            cpu_offload(network, device, offload_buffers=bool(network._parameters))
        return
    first = last = None
    for network in sorted(networks, key=lambda network: network is sd.vae):  # which is called last
        _, last = cpu_offload_with_hook(network, device, prev_module_hook=last)
        first = first or last
    first.hook.prev_module_hook = last  # of the pictures before


def own_forward(network: torch.nn.Module, original: torch.nn.Module) -> None:
    """Gives a shallow copy of a network its class's `forward`, where offloading has put one that runs the original."""
    hook = network.__dict__.pop("_hf_hook", None)
    network.__dict__.pop("forward", None)
    if hook is not None:
        hook.pre_forward(original)
