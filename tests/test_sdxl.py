"""Stable Diffusion XL, small and random: equal to the stock pipeline, and everything else from the command line."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image

import train_probe
import train_tune
import txt2img
from dpt.adapter.adapter import DiscriminativeAdapter, Scorer
from dpt.backbones.architecture import architecture
from dpt.backbones.blocks import block_channels
from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.sdxl import StableDiffusionXL
from dpt.backbones.unet_features import unet_features
from dpt.base_models import CKPT_FOLDER
from dpt.checkpoint.checkpoint import DPTCheckpoint, load_checkpoint, save_checkpoint
from dpt.config import AdapterConfig, DPTConfig
from dpt.drawing import Artist
from dpt.images import read_metadata
from dpt.lora import add_lora, lora_state
from dpt.matching_score import matching_score, score_gradient
from dpt.sampling import ClassifierFreeGuidance, initial_noise, sample
from dpt.schedulers import set_timesteps
from dpt.settings import Sampling
from tests.xl_folder import PROJECTION, WIDTH, make_sdxl

PROMPTS = ["a red circle", "two blue stars above a green square"]
ADAPTER = AdapterConfig(in_channels=[64], hidden_dim=32, nheads=4, text_dim=PROJECTION, rec_text_dim=WIDTH)
RECIPES = CKPT_FOLDER.parent / "configs/sd21"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def sd(folder):
    return load_stable_diffusion(str(folder))


def test_a_folder_says_what_it_is(folder, sd):
    assert isinstance(sd, StableDiffusionXL)
    assert (sd.default_size, sd.latent_shape(), sd.pooled_width) == (128, (4, 16, 16), PROJECTION)
    known = architecture(str(folder))
    config, width, others = known.config, known.pooled_width, known.other_weights
    assert (config.addition_embed_type, width) == ("text_time", PROJECTION)
    assert others == sum(p.numel() for name, part in sd.parts.items() if name != "unet" for p in part.parameters())
    assert list(sd.parts) == ["text_encoder", "vae", "text_encoder_2", "unet"]
    assert architecture("sdxl").config.cross_attention_dim == 2048


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("negative", [None, "a yellow cross"])
@pytest.mark.parametrize("size", [(128, 128), (64, 192)])
def test_latents_equal_the_stock_pipeline(folder, sd, guidance_scale, negative, size):
    stock = StableDiffusionXLPipeline.from_pretrained(folder, **{k: v for k, v in sd.parts.items()})
    stock.scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    stock.set_progress_bar_config(disable=True)
    height, width = size
    noise = initial_noise([3, 4], sd.latent_shape(height, width))
    expected = stock(
        PROMPTS,
        negative_prompt=negative and [negative] * 2,
        latents=noise,
        guidance_scale=guidance_scale,
        num_inference_steps=6,
        height=height,
        width=width,
        output_type="latent",
    ).images
    sampling = Sampling(
        guidance_scale, num_inference_steps=6, height=height, width=width, negative_prompt=negative or ""
    )
    drawn = Artist(sd).draw(PROMPTS, [3, 4], sampling)
    assert (torch.stack([d.latents for d in drawn]) - expected).abs().max() < 1e-4
    texts = sd.condition(PROMPTS, size=size), sd.condition([negative or ""] * 2, size=size, negative=True)
    scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    set_timesteps(scheduler, 6, "cpu")
    denoise = ClassifierFreeGuidance(sd.unet, scheduler, *texts, guidance_scale=guidance_scale)
    assert (sample(denoise, scheduler, noise) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("block", ["down0", "down2", "mid", "up0", "up1", "up2"])
def test_features_equal_a_hook_s_capture_and_stop_there(sd, block):
    conditioning, seen, run = sd.condition(PROMPTS), {}, []
    latents, timestep = initial_noise([0, 1], sd.latent_shape()), torch.tensor(500)
    kinds = {"down": sd.unet.down_blocks, "up": sd.unet.up_blocks}
    module = sd.unet.mid_block if block == "mid" else kinds[block[:-1]][int(block[-1])]
    hooks = [module.register_forward_hook(lambda m, a, out: seen.update(x=out[0] if isinstance(out, tuple) else out))]
    with torch.no_grad():
        sd.unet(latents, timestep, conditioning.encoder_hidden_states, added_cond_kwargs=conditioning.further)
        hooks[0].remove()
        hooks = [b.register_forward_hook(lambda *_, k=k: run.append(k)) for k, b in enumerate(sd.unet.up_blocks)]
        (found,), _ = unet_features(sd.unet, (block,), latents, timestep, conditioning)
    for hook in hooks:
        hook.remove()
    assert torch.equal(found, seen["x"])
    assert found.shape[1] == block_channels(block, sd.unet.config)
    assert run == (list(range(int(block[-1]) + 1)) if block.startswith("up") else [])


def test_the_score_s_gradient_is_its_slope(folder, monkeypatch):
    sd, adapter = load_stable_diffusion(str(folder)), ADAPTER
    torch.manual_seed(0)
    scorer = Scorer(DiscriminativeAdapter(adapter).double().eval(), ("up1",))
    sd.unet.double()
    conditioning, timestep = sd.condition(["a red circle"]).map(torch.Tensor.double), torch.tensor(500)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    z = initial_noise([0], sd.latent_shape()).double()
    _, gradient = score_gradient(sd.unet, scorer, z, timestep, conditioning)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ends = [matching_score(sd.unet, scorer, z + h * direction, timestep, conditioning) for h in (1e-6, -1e-6)]
    assert ((ends[0] - ends[1]) / 2e-6).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_probe_tune_correct_and_choose_from_the_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [
        *(f"model.name={folder}", "model.feature=up1", "model.rec_text_encoder=clip", "data.kind=shapes"),
        *("adapter.hidden_dim=32", "adapter.nheads=4", "adapter.dim_feedforward=32", "adapter.dropout=0"),
        *("adapter.num_queries_itm=2", "adapter.num_queries_rec=4", "data.num_samples=8", "data.num_workers=0"),
        *("optim.mixed_precision=no", "optim.batch_size=2", "optim.warmup_steps=0", "checkpoints.every=2"),
        *("validation.num_samples=2", "validation.timesteps=[500]", "samples.every=-1"),
    ]
    probe, tune = (str(RECIPES / f"{stage}.yaml") for stage in ("probe", "tune"))
    assert train_probe.main([probe, *settings, "run_name=probe", "optim.steps=2"]) == 0
    assert train_probe.main([probe, *settings, "run_name=probe", "optim.steps=4", "resume=true"]) == 0
    start = ["init_from=outputs/probe", "lora.rank=2"]
    assert train_tune.main([tune, *settings, *start, "run_name=tune", "optim.steps=2"]) == 0
    words = ["--model", str(folder), "--prompt", PROMPTS[0], "--n_samples", "2", "--ddim_steps", "4", "--device", "cpu"]
    for name, more in {
        "plain": ["--dpt", "none"],
        "corrected": ["--dpt", "outputs/tune", "--correction_norm", "0.05", "--correction_target", "latent"],
        "chosen": ["--dpt", "outputs/tune", "--candidates", "2", "--choose_at", "0.5", "--correction_factor", "0"],
    }.items():
        assert txt2img.main([*words, *more, "--outdir", name]) == 0, capsys.readouterr().err
        assert len(read_metadata(tmp_path / name)) == 2
    pictures = {n: np.stack([Image.open(f) for f in sorted((tmp_path / n / "samples").glob("*.png"))]).astype(int)
                for n in ("plain", "corrected")}  # fmt: skip
    assert np.abs(pictures["plain"] - pictures["corrected"]).max() > 2


def test_a_tuned_lora_draws_alike_in_the_stock_pipeline(folder, tmp_path):
    sd = load_stable_diffusion(str(folder))
    add_lora(sd.unet, rank=2, alpha=2.0)
    torch.manual_seed(0)
    state = {name: torch.randn_like(value) * 0.2 for name, value in lora_state(sd.unet).items()}
    config = DPTConfig(str(folder), "up1", -1, ADAPTER, lora_rank=2, lora_alpha=2.0)
    save_checkpoint(DPTCheckpoint(config, DiscriminativeAdapter(ADAPTER), state), tmp_path / "dpt")
    sd = load_stable_diffusion(str(folder))
    load_checkpoint(tmp_path / "dpt").attach(sd)
    (ours,) = Artist(sd).draw(PROMPTS[:1], [0], Sampling(5.0, num_inference_steps=4))
    stock = StableDiffusionXLPipeline.from_pretrained(folder)
    stock.scheduler = DDIMScheduler.from_config(sd.scheduler.config)
    stock.load_lora_weights(tmp_path / "dpt/lora")
    stock.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 5.0, "num_inference_steps": 4, "output_type": "latent"}
    expected = stock(PROMPTS[0], latents=initial_noise([0], sd.latent_shape()), **options).images[0]
    assert (ours.latents - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "text_encoder_2"), "lacks the folder text_encoder_2 of Stable Diffusion XL"),
        (
            lambda f: (f / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}'),
            "is of StableDiffusionPipeline",
        ),
        (lambda f: shutil.rmtree(f / "tokenizer_2"), "is not a complete Stable Diffusion folder"),
        (lambda f: (f / "text_encoder_2/model.safetensors").write_bytes(b""), "text_encoder_2"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(folder, tmp_path, damage, message):
    shutil.copytree(folder, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_stable_diffusion(str(tmp_path / "model"))


def test_an_adapter_of_another_family_is_refused(folder, shapes_dpt, tmp_path, capsys):
    words = ["--model", str(folder), "--prompt", "star", "--dpt", str(shapes_dpt), "--outdir", str(tmp_path / "out")]
    assert txt2img.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
