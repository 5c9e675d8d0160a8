"""Architectures of full size with random weights: what would not fit together shows here."""

import pytest
import torch
from diffusers import FluxTransformer2DModel

from dpt.backbones.architecture import CONFIGS, PROJECTIONS, TEXT_PROJECTIONS, architecture
from dpt.backbones.blocks import block_channels, block_names, block_prefix, parse_feature
from dpt.backbones.features import denoiser_class
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
        transformer = FluxTransformer2DModel(**CONFIGS["flux-dev"]).requires_grad_(False)
        assert sum(parameter.numel() for parameter in transformer.parameters()) == 11_901_408_320
        add_lora(transformer, rank=4, alpha=4.0)
    reached = {name.rsplit(".lora_", 1)[0] for name, p in transformer.named_parameters() if p.requires_grad}
    # 19 double blocks: four projections of the picture's tokens, four of the text's; 38 single ones: three
    assert len(reached) == 19 * 8 + 38 * 3
    assert sum(".attn.add_" in name or ".to_add_out" in name for name in reached) == 19 * 4
    assert block_channels("block14", transformer.config) == 3072
    assert parse_feature("block18+single37", transformer.config) == ("block18", "single37")


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_down_is_what_the_real_class_has(name, monkeypatch, tmp_path):
    monkeypatch.setattr("dpt.base_models.CKPT_FOLDER", tmp_path)
    known = architecture(name)
    with torch.device("meta"):
        network = denoiser_class(known.config)(**CONFIGS[name])
    assert known.weights == sum(value.numel() for value in network.state_dict().values())
    assert known.config.items() <= (dict(network.config) | CONFIGS[name]).items()
    reached = {
        path: module.in_features + module.out_features
        for path, module in network.named_modules()
        if path.endswith((*PROJECTIONS, *TEXT_PROJECTIONS))
    }
    blocks = {
        block: sum(n for path, n in reached.items() if path.startswith(block_prefix(block)))
        for block in block_names(network.config)
    }
    assert known.lora_widths == {block: width for block, width in blocks.items() if width}
    if "pooled_projection_dim" in network.config:
        assert network.config.pooled_projection_dim == known.pooled_width
