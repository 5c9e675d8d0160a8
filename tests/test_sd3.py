"""Stable Diffusion 3, small and random: equal to the stock pipeline, and everything else from the command line."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

import train_probe
import train_tune
import txt2img
from dpt.adapter.adapter import DiscriminativeAdapter, Scorer
from dpt.backbones.architecture import architecture
from dpt.backbones.blocks import block_channels, parse_feature
from dpt.backbones.flow import FlowScheduler, variance_scale
from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.sd3 import StableDiffusion3
from dpt.backbones.unet_features import unet_features
from dpt.base_models import CKPT_FOLDER, half_precision
from dpt.checkpoint.checkpoint import DPTCheckpoint, load_checkpoint, save_checkpoint
from dpt.config import AdapterConfig, DPTConfig
from dpt.drawing import Artist
from dpt.images import read_metadata
from dpt.lora import add_lora, lora_state
from dpt.matching_score import matching_score, score_gradient
from dpt.sampling import initial_noise
from dpt.settings import Sampling
from tests.sd3_folder import PROJECTION, TOKEN_WIDTH, WIDTH, make_sd3

PROMPTS = ["a red circle", "two blue stars above a green square"]
ADAPTER = AdapterConfig(in_channels=[TOKEN_WIDTH], hidden_dim=32, nheads=4, text_dim=2 * PROJECTION, rec_text_dim=WIDTH)
RECIPES = CKPT_FOLDER.parent / "configs/sd21"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sd3(tmp_path_factory.mktemp("sd3") / "model")


@pytest.fixture(scope="module")
def sd(folder):
    return load_stable_diffusion(str(folder))


def stock_of(folder):
    absent = {"feature_extractor": None, "image_encoder": None}
    if not (folder / "text_encoder_3").is_dir():
        absent |= {"text_encoder_3": None, "tokenizer_3": None}
    stock = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    stock.set_progress_bar_config(disable=True)
    return stock


def test_a_folder_says_what_it_is(folder, sd):
    assert isinstance(sd, StableDiffusion3)
    assert (sd.default_size, sd.latent_shape(), sd.pooled_width) == (128, (16, 16, 16), 2 * PROJECTION)
    assert list(sd.parts) == ["text_encoder", "text_encoder_2", "vae", "transformer"]
    known = architecture(str(folder))
    config, width, others = known.config, known.pooled_width, known.other_weights
    assert (config.num_layers, width) == (4, 2 * PROJECTION)
    assert others == sum(p.numel() for n, part in sd.parts.items() if n != "transformer" for p in part.parameters())
    with pytest.raises(ValueError, match="H is 72; it must be a positive multiple of 16"):
        sd.latent_shape(72, 128)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("negative", [None, "a yellow cross"])
@pytest.mark.parametrize("size", [(128, 128), (64, 192)])
def test_latents_equal_the_stock_pipeline(folder, sd, guidance_scale, negative, size):
    height, width = size
    expected = stock_of(folder)(
        PROMPTS,
        negative_prompt=[negative or ""] * 2,
        latents=initial_noise([3, 4], sd.latent_shape(height, width)),
        guidance_scale=guidance_scale,
        num_inference_steps=6,
        height=height,
        width=width,
        output_type="latent",
    ).images
    sampling = Sampling(guidance_scale, num_inference_steps=6, height=height, width=width)
    drawn = Artist(sd).draw(PROMPTS, [3, 4], sampling.changed(negative_prompt=negative))
    assert (torch.stack([d.latents for d in drawn]) - expected).abs().max() < 1e-4
    pixels = stock_of(folder)(PROMPTS[0], latents=initial_noise([3], sd.latent_shape()), num_inference_steps=2).images[
        0
    ]
    (ours,) = Artist(sd).draw(PROMPTS[:1], [3], Sampling(7.0, num_inference_steps=2))
    assert np.abs(np.asarray(pixels).astype(int) - ours.image).max() <= 1


def test_t5_is_read_where_it_is(tmp_path):
    folder = make_sd3(tmp_path / "model", with_t5=True)
    sd = load_stable_diffusion(str(folder))
    expected = stock_of(folder).encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    context, pooled = sd.encode_prompts(PROMPTS)
    assert torch.allclose(context, expected[0], atol=1e-5)
    assert torch.allclose(pooled, expected[2], atol=1e-5)
    shutil.rmtree(folder / "text_encoder_3")
    without = load_stable_diffusion(str(folder)).encode_prompts(PROMPTS)[0]
    assert not torch.equal(context, without)
    assert not without[:, 77:].any()


def test_t5_can_be_left_out(tmp_path, capsys):
    folder = make_sd3(tmp_path / "model", with_t5=True)
    whole, without = load_stable_diffusion(str(folder)), load_stable_diffusion(str(folder), no_t5=True)
    assert (whole.has_t5, without.has_t5) == (True, False)
    assert not without.encode_prompts(PROMPTS)[0][:, 77:].any()
    config = DPTConfig(str(folder), "block2", -1, ADAPTER, t5=True)
    save_checkpoint(DPTCheckpoint(config, DiscriminativeAdapter(ADAPTER), {}), tmp_path / "dpt")
    load_checkpoint(tmp_path / "dpt").attach(whole)
    with pytest.raises(ValueError, match="was made with T5: give the model its T5 back"):
        load_checkpoint(tmp_path / "dpt").attach(without)
    words = ["--model", str(folder), "--prompt", PROMPTS[0], "--ddim_steps", "2", "--device", "cpu", "--no_t5"]
    assert txt2img.main([*words, "--n_samples", "1", "--dpt", "none", "--outdir", str(tmp_path / "out")]) == 0
    assert txt2img.main([*words, "--dpt", str(tmp_path / "dpt"), "--outdir", str(tmp_path / "out")]) == 2
    assert "was made with T5" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no_t5 is set; shapes is not Stable Diffusion 3"):
        load_stable_diffusion("shapes", no_t5=True)


def test_images_are_encoded_and_decoded_by_scale_and_shift(folder, sd):
    stock, pixels = stock_of(folder), torch.rand(2, 3, 128, 128) * 2 - 1
    config = stock.vae.config
    expected = (stock.vae.encode(pixels).latent_dist.mean - config.shift_factor) * config.scaling_factor
    assert torch.allclose(sd.encode_images(pixels), expected, atol=1e-5)
    decoded = stock.vae.decode(expected / config.scaling_factor + config.shift_factor).sample
    assert torch.allclose(sd.decode_latents(expected), (decoded / 2 + 0.5).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize("block", ["block0", "block1", "block3"])
def test_features_equal_a_hook_s_capture_and_stop_there(sd, block):
    conditioning, seen, run = sd.condition(PROMPTS), [], []
    z, timestep, number = initial_noise([0, 1], sd.latent_shape(64, 128)), torch.tensor(500.0), int(block[-1])
    blocks = sd.unet.transformer_blocks
    hook = blocks[number].register_forward_hook(lambda module, args, output: seen.append(output[-1]))
    with torch.no_grad():
        context = conditioning.encoder_hidden_states
        velocity = sd.unet(z, context, conditioning.pooled_prompt_embeds, timestep.expand(2), return_dict=False)[0]
        hook.remove()
        hooks = [one.register_forward_hook(lambda *_, k=k: run.append(k)) for k, one in enumerate(blocks)]
        inputs = z / variance_scale(timestep), timestep, conditioning
        (found,), nothing = unet_features(sd.unet, (block,), *inputs)
        assert run == list(range(number + 1))
        (again,), predicted = unet_features(sd.unet, (block,), *inputs, with_noise_pred=True)
    for hook in hooks:
        hook.remove()
    assert nothing is None
    assert found.shape == (2, block_channels(block, sd.unet.config), 4, 8)
    assert torch.allclose(found.flatten(2).transpose(1, 2), seen[0], atol=1e-5)
    assert torch.equal(found, again)
    assert torch.allclose(predicted, velocity, atol=1e-5)


def test_half_precision_is_bfloat16(folder):
    assert half_precision(str(folder)) == half_precision("sd35-medium") == "bfloat16"
    assert half_precision("shapes") == half_precision("sdxl") == half_precision("sd21-base") == "float16"


def test_blocks_that_are_not_there_are_refused_with_those_that_are(sd):
    for feature in ("up1", "block4", "all"):
        with pytest.raises(ValueError, match="must be among block0, block1, block2, block3"):
            parse_feature(feature, sd.unet.config)
    assert parse_feature("block1+block2", sd.unet.config) == ("block1", "block2")


def test_noising_is_the_variance_preserving_form_of_the_flow():
    scheduler = FlowScheduler(shift=3.0)
    x, noise, timesteps = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 250, 999])
    noisy = scheduler.add_noise(x, noise, timesteps)
    sigma = (timesteps / 1000)[:, None, None, None]
    for k, timestep in enumerate(timesteps):
        expected = scheduler.scale_model_input(((1 - sigma) * x + sigma * noise)[k], timestep)
        assert torch.allclose(noisy[k], expected, atol=1e-6)
    alpha = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
    assert torch.allclose(noisy, alpha * x + (1 - alpha**2).sqrt() * noise, atol=1e-5)


def test_the_score_s_gradient_is_its_slope(folder, monkeypatch):
    sd = load_stable_diffusion(str(folder))
    torch.manual_seed(0)
    scorer = Scorer(DiscriminativeAdapter(ADAPTER).double().eval(), ("block2",))
    sd.unet.double()
    conditioning, timestep = sd.condition(["a red circle"]).map(torch.Tensor.double), torch.tensor(500.0)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    z = initial_noise([0], sd.latent_shape()).double()
    _, gradient = score_gradient(sd.unet, scorer, z, timestep, conditioning)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ends = [matching_score(sd.unet, scorer, z + h * direction, timestep, conditioning) for h in (1e-3, -1e-3)]
    # the transformer's norms of queries and keys are in float32
    assert ((ends[0] - ends[1]) / 2e-3).item() == pytest.approx((gradient * direction).sum().item(), rel=2e-3)


@pytest.mark.parametrize("target", ["latent", "conditional", "noise"])
def test_a_correction_raises_the_score(folder, target):
    sd = load_stable_diffusion(str(folder))
    torch.manual_seed(0)
    artist = Artist(sd, Scorer(DiscriminativeAdapter(ADAPTER).eval(), ("block2",)))
    plain = Sampling(3.0, num_inference_steps=6)
    corrected = plain.changed(correction_norm=0.05, correction_target=target)
    drawn = [artist.draw(PROMPTS, [0, 1], sampling, trace=True) for sampling in (plain, corrected)]
    scores = [np.array([[record["score"] for record in one.trace] for one in row]) for row in drawn]
    assert np.allclose(scores[0][:, 0], scores[1][:, 0], atol=1e-5)  # read before the first move
    assert not np.array_equal(drawn[0][0].image, drawn[1][0].image)
    if target == "latent":
        assert (scores[1][:, -1] > scores[0][:, -1]).all()


def test_a_candidate_is_what_its_seed_draws(folder):
    sd = load_stable_diffusion(str(folder))
    torch.manual_seed(0)
    artist = Artist(sd, Scorer(DiscriminativeAdapter(ADAPTER).eval(), ("block2",)))
    plain = Sampling(3.0, num_inference_steps=6)
    (kept,) = artist.draw(PROMPTS[:1], [0], plain.changed(candidates=3, choose_at=(0.5,)))
    (alone,) = artist.draw(PROMPTS[:1], [kept.seed], plain)
    assert np.abs(kept.image.astype(int) - alone.image).max() <= 1


def test_probe_tune_correct_and_choose_from_the_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [
        *(f"model.name={folder}", "model.feature=block2", "model.rec_text_encoder=clip", "data.kind=shapes"),
        *("adapter.hidden_dim=32", "adapter.nheads=4", "adapter.dim_feedforward=32", "adapter.dropout=0"),
        *("adapter.num_queries_itm=2", "adapter.num_queries_rec=4", "data.num_samples=8", "data.num_workers=0"),
        *("optim.mixed_precision=no", "optim.batch_size=2", "optim.warmup_steps=0", "checkpoints.every=2"),
        *("validation.num_samples=2", "validation.timesteps=[500]", "samples.every=-1"),
    ]
    probe, tune = (str(RECIPES / f"{stage}.yaml") for stage in ("probe", "tune"))
    assert train_probe.main([probe, *settings, "--dry-run"]) == 0
    assert train_probe.main([probe, *settings, "run_name=probe", "optim.steps=2"]) == 0
    assert train_probe.main([probe, *settings, "run_name=probe", "optim.steps=4", "resume=true"]) == 0
    start = ["init_from=outputs/probe", "lora.rank=2", "model.gradient_checkpointing=true"]
    assert train_tune.main([tune, *settings, *start, "run_name=tune", "optim.steps=2"]) == 0
    assert load_checkpoint(tmp_path / "outputs/tune").config.t5 is False
    words = ["--model", str(folder), "--prompt", PROMPTS[0], "--n_samples", "2", "--ddim_steps", "4", "--device", "cpu"]
    for name, more in {
        "plain": ["--dpt", "none"],
        "corrected": ["--dpt", "outputs/tune", "--correction_norm", "0.05", "--correction_target", "latent"],
        "chosen": ["--dpt", "outputs/tune", "--candidates", "2", "--choose_at", "0.5", "--correction_factor", "0"],
    }.items():
        assert txt2img.main([*words, *more, "--outdir", name]) == 0, capsys.readouterr().err
        assert len(read_metadata(tmp_path / name)) == 2
    files = [sorted((tmp_path / name / "samples").glob("*.png")) for name in ("plain", "corrected")]
    plain, corrected = (np.stack([Image.open(file) for file in row]).astype(int) for row in files)
    assert np.abs(plain - corrected).max() > 2


@pytest.mark.parametrize("blocks", [(), ("block1",)])
def test_a_tuned_lora_draws_alike_in_the_stock_pipeline(folder, tmp_path, blocks):
    sd = load_stable_diffusion(str(folder))
    add_lora(sd.unet, rank=2, alpha=2.0, blocks=blocks)
    torch.manual_seed(0)
    state = {name: torch.randn_like(value) * 0.2 for name, value in lora_state(sd.unet).items()}
    reached = {name.rsplit(".lora_", 1)[0] for name in state}
    assert {name.split(".")[1] for name in reached} == ({"1"} if blocks else set("0123"))
    assert any("add_q_proj" in name for name in reached)
    config = DPTConfig(str(folder), "block2", -1, ADAPTER, lora_rank=2, lora_alpha=2.0)
    save_checkpoint(DPTCheckpoint(config, DiscriminativeAdapter(ADAPTER), state), tmp_path / "dpt")
    sd = load_stable_diffusion(str(folder))
    load_checkpoint(tmp_path / "dpt").attach(sd)
    (ours,) = Artist(sd).draw(PROMPTS[:1], [0], Sampling(5.0, num_inference_steps=4))
    (plain,) = Artist(load_stable_diffusion(str(folder))).draw(PROMPTS[:1], [0], Sampling(5.0, num_inference_steps=4))
    stock = stock_of(folder)
    stock.load_lora_weights(tmp_path / "dpt/lora")
    options = {"guidance_scale": 5.0, "num_inference_steps": 4, "output_type": "latent"}
    expected = stock(PROMPTS[0], latents=initial_noise([0], sd.latent_shape()), **options).images[0]
    assert (ours.latents - expected).abs().max() < 1e-4
    assert (ours.latents - plain.latents).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parity"], "parity is not for flow matching"),
        (["--scheduler", "dpm++"], "scheduler 'dpm++' is not for flow matching"),
        (["--H", "72"], "H is 72; it must be a positive multiple of 16"),
        (["--attend_and_excite"], "Attend-and-Excite reads the attention of a U-Net"),
    ],
)
def test_what_the_family_has_not_is_refused(folder, tmp_path, capsys, more, message):
    words = ["--model", str(folder), "--dpt", "none", "--prompt", "a red star", "--ddim_steps", "2", "--device", "cpu"]
    assert txt2img.main([*words, *more, "--outdir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_lacks_something_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model/text_encoder_2")
    with pytest.raises(ValueError, match="lacks the folder text_encoder_2 of Stable Diffusion 3"):
        load_stable_diffusion(str(tmp_path / "model"))


def test_a_model_that_is_not_fetched_says_where_its_licence_is(capsys):
    words = ["--model", "sd35-medium", "--local-files-only", "--dpt", "none", "--prompt", "star"]
    assert txt2img.main(words) == 2
    page = "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"
    assert f"its licence accepted at {page}" in capsys.readouterr().err
