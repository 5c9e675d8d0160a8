"""Offloaded models draw what they draw otherwise, and compute where they are told to."""

import pytest
import torch

import txt2img
from dpt.adapter.adapter import DiscriminativeAdapter, Scorer
from dpt.backbones.blocks import block_channels
from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.offload import offload
from dpt.config import AdapterConfig
from dpt.drawing import Artist
from dpt.images import read_metadata
from dpt.sampling_settings import Sampling
from tests.families import FAMILIES

PROMPTS, CPU = ["a red circle", "two green stars"], torch.device("cpu")
MODELS = {"shapes": (lambda folder: "shapes", "up1")} | {
    name: (family.make, family.probed) for name, family in FAMILIES.items()
}


@pytest.mark.parametrize("how", ["model", "sequential"])
@pytest.mark.parametrize("family", MODELS)
def test_pictures_are_the_same(family, how, tmp_path):
    make, block = MODELS[family]
    model, drawn = str(make(tmp_path / "model")), []
    plain = Sampling(3.0, num_inference_steps=3, height=64, width=64)
    settings = [plain, plain.changed(correction_norm=0.05, correction_target="latent"), plain.changed(candidates=2)]
    for offloaded in (False, True):
        sd = load_stable_diffusion(model)
        torch.manual_seed(0)
        sizes = {"in_channels": [block_channels(block, sd.denoiser.config)], "text_dim": sd.pooled_width}
        adapter = DiscriminativeAdapter(AdapterConfig(hidden_dim=32, nheads=4, rec_text_dim=32, **sizes)).eval()
        if offloaded:
            offload(sd, how, CPU)
            weight = next(sd.denoiser.parameters())
            assert weight.is_meta == (how == "sequential")
            assert sd.device == CPU
        artist = Artist(sd, Scorer(adapter, (block,)))
        drawn.append([[one.latents for one in artist.draw(PROMPTS, [0, 1], each)] for each in settings])
    for before, now in zip(*drawn, strict=True):
        assert torch.equal(torch.stack(before), torch.stack(now))


def test_a_network_goes_when_the_next_one_is_called():
    sd = load_stable_diffusion("shapes")
    offload(sd, "model", CPU)
    hooks = [sd.parts[name]._hf_hook for name in ("text_encoder", "unet", "vae")]
    assert [hook.prev_module_hook.model for hook in hooks] == [sd.vae, sd.text_encoder, sd.denoiser]


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_from_the_command_line(how, tmp_path):
    words = ["--model", "shapes", "--prompt", PROMPTS[0], "--n_samples", "1", "--ddim_steps", "4", "--device", "cpu"]
    for name, more in {"plain": [], "offloaded": ["--offload", how]}.items():
        assert txt2img.main([*words, *more, "--outdir", str(tmp_path / name)]) == 0
    plain, offloaded = (read_metadata(tmp_path / name)[0]["settings"] for name in ("plain", "offloaded"))
    assert plain == offloaded
    files = [(tmp_path / name / "samples/00000.png").read_bytes()[-2000:] for name in ("plain", "offloaded")]
    assert files[0] == files[1]
