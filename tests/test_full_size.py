"""Architectures of full size with random weights: what would not fit together shows here."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from dpt.backbones.loading import ARCHITECTURES, OTHER_PARAMETERS, architecture
from dpt.backbones.unet_features import block_channels, parse_feature
from dpt.benchmark.random_models import random_model
from dpt.benchmark.steps import sampling_steps, training_steps
from dpt.lora import add_lora

PARAMETERS = {"random-sdxl": 2_567_463_684, "random-sd35": 2_243_171_520}
"""as the real ones have; Stable Diffusion 3.5's table of positions, 226 million values, is none"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_corrected_and_a_probe_step(name):
    """bfloat16 on a CPU, 32x32 latents: 10 GB, a minute."""
    model = random_model(name)
    assert sum(parameter.numel() for parameter in model.denoiser.parameters()) == PARAMETERS[name]
    stepped = sampling_steps(model, 1)["corrected"]().prev_sample
    assert stepped.shape == (1, model.latent_channels, 32, 32)
    assert stepped.isfinite().all()
    assert 0 < training_steps(model, 1)["batched"]() < 1000


def test_flux_on_the_meta_device():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**ARCHITECTURES["flux-dev"]).requires_grad_(False)
        assert sum(parameter.numel() for parameter in transformer.parameters()) == 11_901_408_320
        add_lora(transformer, rank=4, alpha=4.0)
    reached = {name.rsplit(".lora_", 1)[0] for name, p in transformer.named_parameters() if p.requires_grad}
    # 19 double blocks: four projections of the picture's tokens, four of the text's; 38 single ones: three
    assert len(reached) == 19 * 8 + 38 * 3
    assert sum(".attn.add_" in name or ".to_add_out" in name for name in reached) == 19 * 4
    assert block_channels("block14", transformer.config) == 3072
    assert parse_feature("block18+single37", transformer.config) == ("block18", "single37")


@pytest.mark.parametrize("name", ["sd3-medium", "sd35-medium", "flux-dev", "flux-schnell"])
def test_what_is_known_before_a_download(name, monkeypatch, tmp_path):
    monkeypatch.setattr("dpt.backbones.loading.CKPT_FOLDER", tmp_path)
    config, width, others = architecture(name)
    assert config.pooled_projection_dim == width
    assert others == OTHER_PARAMETERS[name]
