"""Controls of a probe: training without one of its inputs, to see what its accuracy is worth.

A probe that does as well without the denoiser's features, or without the text, has not read alignment off the denoiser
(Hewitt & Liang 2019). A control changes what the model is given, and nothing else.
"""

from dataclasses import replace

import numpy as np
import torch

from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.data.collate import Batch, as_latents


def control_unet(control: str, sd: StableDiffusion) -> None:
    """`random_unet` replaces the model's denoiser by one with random weights, the same on every call."""
    if control != "random_unet":
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = type(sd.denoiser).from_config(sd.denoiser.config)
    sd.denoiser = denoiser.to(sd.device, sd.dtype).eval().requires_grad_(False)


def control_batch(control: str, batch: Batch, sd: StableDiffusion) -> Batch:
    """The batch under the control: `image_blind` replaces every image by zeros, so that its noise alone is left."""
    if control != "image_blind":
        return batch
    return replace(batch, images=torch.zeros_like(as_latents(batch.images, sd)))


def control_inputs(control: str, inputs: dict, batch: Batch, sd: StableDiffusion, *, training: bool) -> dict:
    """The input of `DPT.forward` under the control; labels are shuffled in training alone.

    Args:
        inputs: the result of `encode_batch` for the batch.
    """
    if control in ("empty_prompt", "text_blind"):
        empty = sd.condition([""])
        for name in ("caption", "expression"):
            context = inputs[f"{name}_context"]
            inputs[f"{name}_context"] = empty.encoder_hidden_states.expand_as(context)
            for key, value in inputs.get(f"{name}_further", {}).items():
                inputs[f"{name}_further"][key] = empty.further[key].expand_as(value)
    if control in ("constant_text", "text_blind"):
        inputs["caption_pooled"] = torch.ones_like(inputs["caption_pooled"])
    if control == "shuffled_labels" and training:
        rngs = [np.random.default_rng((9, sample_id)) for sample_id in batch.ids]  # the same in every epoch
        inputs["itm_labels"] = torch.tensor(np.stack([rng.integers(3, size=2) for rng in rngs])).to(sd.device)  # (B, 2)
        for target, rng in zip(inputs["targets"], rngs, strict=True):
            boxes = target["boxes"].clone()
            sizes = boxes[:, 2:]
            boxes[:, :2] = sizes / 2 + torch.tensor(rng.random(sizes.shape)).to(boxes) * (1 - sizes)
            target["boxes"] = boxes  # as large, anywhere
    return inputs
