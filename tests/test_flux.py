"""FLUX.1, small and random: equal to the stock pipeline, and everything else from the command line."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import train_probe
import train_tune
import txt2img
from dpt.adapter.adapter import DiscriminativeAdapter, Scorer
from dpt.backbones.architecture import architecture
from dpt.backbones.blocks import block_channels, parse_feature
from dpt.backbones.flow import variance_scale
from dpt.backbones.flux import Flux
from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.unet_features import unet_features
from dpt.base_models import CKPT_FOLDER, half_precision, recommended
from dpt.checkpoint.checkpoint import DPTCheckpoint, load_checkpoint, save_checkpoint
from dpt.config import AdapterConfig, DPTConfig
from dpt.drawing import Artist
from dpt.images import read_metadata
from dpt.lora import add_lora, lora_state
from dpt.matching_score import matching_score, score_gradient
from dpt.sampling import initial_noise
from dpt.settings import Sampling
from tests.flux_folder import TOKEN_WIDTH, WIDTH, make_flux

PROMPTS = ["a red circle", "two blue stars above a green square"]
ADAPTER = AdapterConfig(in_channels=[TOKEN_WIDTH], hidden_dim=32, nheads=4, text_dim=WIDTH, rec_text_dim=WIDTH)
RECIPES = CKPT_FOLDER.parent / "configs/flux"
SMALL = Sampling(1.0, num_inference_steps=4, height=64, width=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_flux(tmp_path_factory.mktemp("flux") / "model")


@pytest.fixture(scope="module")
def sd(folder):
    return load_stable_diffusion(str(folder))


def stock_latents(folder, sampling, *, guidance=3.5, length=512, lora=None):
    """Latents (2, C, h, w) of `PROMPTS` by the stock pipeline, from the noises of seeds 3 and 4."""
    stock = FluxPipeline.from_pretrained(folder)
    stock.set_progress_bar_config(disable=True)
    if lora:
        stock.load_lora_weights(lora)
    height, width = sampling.height, sampling.width
    noise = initial_noise([3, 4], (16, height // 8, width // 8))
    packed = FluxPipeline._pack_latents(noise, *noise.shape)
    drawn = stock(
        PROMPTS,
        negative_prompt=[sampling.negative_prompt] * 2,
        true_cfg_scale=sampling.guidance_scale,
        guidance_scale=guidance,
        latents=packed,
        num_inference_steps=sampling.num_inference_steps,
        height=height,
        width=width,
        max_sequence_length=length,
        output_type="latent",
    ).images
    return FluxPipeline._unpack_latents(drawn, height, width, 8)


def our_latents(sd, sampling):
    return torch.stack([drawn.latents for drawn in Artist(sd).draw(PROMPTS, [3, 4], sampling)])


def test_a_folder_says_what_it_is(folder, sd):
    assert isinstance(sd, Flux)
    assert (sd.default_size, sd.latent_shape(64, 96), sd.pooled_width) == (1024, (16, 8, 12), WIDTH)
    assert list(sd.parts) == ["text_encoder", "text_encoder_2", "vae", "transformer"]
    known = architecture(str(folder))
    config, width, others = known.config, known.pooled_width, known.other_weights
    assert (config.num_layers, config.num_single_layers, width) == (2, 2, WIDTH)
    assert others == sum(p.numel() for n, part in sd.parts.items() if n != "transformer" for p in part.parameters())
    with pytest.raises(ValueError, match="H is 72; it must be a positive multiple of 16"):
        sd.latent_shape(72, 128)


@pytest.mark.parametrize("negative", ["", "a yellow cross"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("size", [(64, 64), (64, 192)])
def test_latents_equal_the_stock_pipeline(folder, sd, guidance_scale, negative, size):
    own = {"guidance_scale": guidance_scale, "height": size[0], "width": size[1]}
    sampling = SMALL.changed(negative_prompt=negative, **own)
    assert (our_latents(sd, sampling) - stock_latents(folder, sampling)).abs().max() < 1e-4


def test_the_distilled_guidance_is_an_input(folder, sd):
    sampling = SMALL.changed(distilled_guidance=1.5)
    ours = our_latents(sd, sampling)
    assert (ours - stock_latents(folder, sampling, guidance=1.5)).abs().max() < 1e-4
    assert (ours - our_latents(sd, SMALL)).abs().max() > 1e-3


def test_a_model_that_takes_no_guidance_draws_as_the_stock_pipeline(tmp_path):
    folder = make_flux(tmp_path / "model", distilled=False)
    sd = load_stable_diffusion(str(folder))
    expected = stock_latents(folder, SMALL, length=256)
    assert (our_latents(sd, SMALL) - expected).abs().max() < 1e-4
    with pytest.raises(ValueError, match="distilled_guidance is 2; this model takes none as an input"):
        our_latents(sd, SMALL.changed(distilled_guidance=2.0))


@pytest.mark.parametrize("block", ["block0", "block1", "single0", "single1"])
def test_features_equal_a_hook_s_capture_and_stop_there(sd, block):
    conditioning, seen, run = sd.condition(PROMPTS), [], []
    z, timestep = initial_noise([0, 1], sd.latent_shape(64, 96)), torch.tensor(500.0)
    blocks = [*sd.unet.transformer_blocks, *sd.unet.single_transformer_blocks]
    number = ["block0", "block1", "single0", "single1"].index(block)
    hook = blocks[number].register_forward_hook(lambda module, args, output: seen.append(output[-1]))
    with torch.no_grad():
        velocity = sd.unet(
            FluxPipeline._pack_latents(z, *z.shape),
            conditioning.encoder_hidden_states,
            conditioning.pooled_prompt_embeds,
            timestep.expand(2) / 1000,
            FluxPipeline._prepare_latent_image_ids(2, 4, 6, "cpu", torch.float32),
            torch.zeros(conditioning.encoder_hidden_states.shape[1], 3),
            conditioning.further["guidance"],
            return_dict=False,
        )[0]
        hook.remove()
        hooks = [one.register_forward_hook(lambda *_, k=k: run.append(k)) for k, one in enumerate(blocks)]
        inputs = z / variance_scale(timestep), timestep, conditioning
        (found,), nothing = unet_features(sd.unet, (block,), *inputs)
        assert run == list(range(number + 1))
        (again,), predicted = unet_features(sd.unet, (block,), *inputs, with_noise_pred=True)
    for hook in hooks:
        hook.remove()
    assert nothing is None
    assert found.shape == (2, block_channels(block, sd.unet.config), 4, 6)
    assert torch.allclose(found.flatten(2).transpose(1, 2), seen[0], atol=1e-5)
    assert torch.equal(found, again)
    assert torch.allclose(predicted, FluxPipeline._unpack_latents(velocity, 64, 96, 8), atol=1e-5)


def test_blocks_that_are_not_there_are_refused_with_those_that_are(sd):
    for feature in ("up1", "block2", "all"):
        with pytest.raises(ValueError, match="must be among block0, block1, single0, single1"):
            parse_feature(feature, sd.unet.config)
    assert parse_feature("block1+single0", sd.unet.config) == ("block1", "single0")


def test_it_draws_by_its_own_settings(folder):
    assert recommended(str(folder)) == recommended("flux-dev") == Sampling(1.0, num_inference_steps=28)
    assert recommended("flux-schnell").num_inference_steps == 4
    assert half_precision(str(folder)) == half_precision("black-forest-labs/FLUX.1-schnell") == "bfloat16"


def test_the_score_s_gradient_is_its_slope(folder, monkeypatch):
    sd = load_stable_diffusion(str(folder))
    torch.manual_seed(0)
    scorer = Scorer(DiscriminativeAdapter(ADAPTER).double().eval(), ("single0",))
    sd.unet.double()
    conditioning, timestep = sd.condition(["a red circle"]).map(torch.Tensor.double), torch.tensor(500.0)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    z = initial_noise([0], sd.latent_shape(64, 96)).double()
    _, gradient = score_gradient(sd.unet, scorer, z, timestep, conditioning)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ends = [matching_score(sd.unet, scorer, z + h * direction, timestep, conditioning) for h in (1e-4, -1e-4)]
    assert ((ends[0] - ends[1]) / 2e-4).item() == pytest.approx((gradient * direction).sum().item(), rel=2e-3)


@pytest.mark.parametrize("target", ["latent", "conditional", "noise"])
def test_a_correction_raises_the_score(folder, target):
    sd = load_stable_diffusion(str(folder))
    torch.manual_seed(0)
    artist = Artist(sd, Scorer(DiscriminativeAdapter(ADAPTER).eval(), ("single0",)))
    corrected = SMALL.changed(correction_norm=0.05, correction_target=target)
    drawn = [artist.draw(PROMPTS, [0, 1], sampling, trace=True) for sampling in (SMALL, corrected)]
    scores = [np.array([[record["score"] for record in one.trace] for one in row]) for row in drawn]
    assert np.allclose(scores[0][:, 0], scores[1][:, 0], atol=1e-5)  # read before the first move
    assert not np.array_equal(drawn[0][0].image, drawn[1][0].image)
    if target == "latent":
        assert (scores[1][:, -1] > scores[0][:, -1]).all()


def test_a_candidate_is_what_its_seed_draws(sd):
    torch.manual_seed(0)
    artist = Artist(sd, Scorer(DiscriminativeAdapter(ADAPTER).eval(), ("block1",)))
    (kept,) = artist.draw(PROMPTS[:1], [0], SMALL.changed(candidates=3, choose_at=(0.5,)))
    (alone,) = artist.draw(PROMPTS[:1], [kept.seed], SMALL)
    assert np.abs(kept.image.astype(int) - alone.image).max() <= 1


def test_probe_tune_correct_and_choose_from_the_command_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Flux, "default_size", 128)
    settings = [
        *(f"model.name={folder}", "model.feature=single0", "model.rec_text_encoder=clip", "data.kind=shapes"),
        *("adapter.hidden_dim=32", "adapter.nheads=4", "adapter.dim_feedforward=32", "adapter.dropout=0"),
        *("adapter.num_queries_itm=2", "adapter.num_queries_rec=4", "data.num_samples=8", "data.num_workers=0"),
        *("optim.mixed_precision=no", "optim.batch_size=2", "optim.warmup_steps=0", "checkpoints.every=2"),
        *("validation.num_samples=2", "validation.timesteps=[500]", "samples.every=-1"),
    ]
    probe, tune = (str(RECIPES / f"{stage}.yaml") for stage in ("probe", "tune"))
    assert train_probe.main([probe, *settings, "--dry-run"]) == 0
    assert train_probe.main([probe, *settings, "run_name=probe", "optim.steps=2"]) == 0
    assert train_probe.main([probe, *settings, "run_name=probe", "optim.steps=4", "resume=true"]) == 0
    start = [
        "init_from=outputs/probe",
        "lora.rank=2",
        "model.gradient_checkpointing=true",
        "optim.gradient_accumulation_steps=1",
    ]
    assert train_tune.main([tune, *settings, *start, "run_name=tune", "optim.steps=2"]) == 0
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


@pytest.mark.parametrize("blocks", [(), ("block1", "single0")])
def test_a_tuned_lora_draws_alike_in_the_stock_pipeline(folder, tmp_path, blocks):
    sd = load_stable_diffusion(str(folder))
    plain = our_latents(sd, SMALL)
    add_lora(sd.unet, rank=2, alpha=2.0, blocks=blocks)
    torch.manual_seed(0)
    state = {name: torch.randn_like(value) * 0.2 for name, value in lora_state(sd.unet).items()}
    reached = {".".join(name.split(".")[:2]) for name in state}
    all_blocks = {f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in (0, 1)}
    assert reached == ({"transformer_blocks.1", "single_transformer_blocks.0"} if blocks else all_blocks)
    assert any("add_q_proj" in name for name in state)
    config = DPTConfig(str(folder), "block1", -1, ADAPTER, lora_rank=2, lora_alpha=2.0)
    save_checkpoint(DPTCheckpoint(config, DiscriminativeAdapter(ADAPTER), state), tmp_path / "dpt")
    sd = load_stable_diffusion(str(folder))
    load_checkpoint(tmp_path / "dpt").attach(sd)
    ours = our_latents(sd, SMALL)
    assert (ours - stock_latents(folder, SMALL, lora=tmp_path / "dpt/lora")).abs().max() < 1e-4
    assert (ours - plain).abs().max() > 1e-3


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
    assert txt2img.main(["--H", "64", "--W", "64", *words, *more, "--outdir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_lacks_something_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model/text_encoder_2")
    with pytest.raises(ValueError, match="lacks the folder text_encoder_2 of FLUX"):
        load_stable_diffusion(str(tmp_path / "model"))


def test_a_folder_whose_t5_lacks_something_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "words")
    shutil.rmtree(tmp_path / "words/tokenizer_2")
    with pytest.raises(ValueError, match="tokenizer_2"):
        load_stable_diffusion(str(tmp_path / "words"))
    shutil.copytree(folder, tmp_path / "weights")
    path = tmp_path / "weights/text_encoder_2/model.safetensors"
    state = load_file(path)
    state.pop("encoder.block.0.layer.0.SelfAttention.k.weight")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder_2: its weights have no .*SelfAttention.k.weight"):
        load_stable_diffusion(str(tmp_path / "weights"))


def test_t5_reads_more_of_a_prompt_than_clip(sd):
    assert sd.truncated_part("a red circle and " * 30) == ""
    assert sd.truncated_part("a red circle and " * 300)


def test_noisy_latents_can_be_read_beside_a_prediction(sd):
    z = initial_noise([0], sd.latent_shape(64, 96))
    with torch.no_grad():
        inputs = sd.unet, ("latents",), z, torch.tensor(500.0), sd.condition(PROMPTS[:1])
        (found,), velocity = unet_features(*inputs, with_noise_pred=True)
    assert torch.equal(found, z)
    assert velocity.shape == z.shape


def test_several_blocks_in_one_word_are_no_block_of_lora(sd):
    with pytest.raises(ValueError, match=r"'block0.block1' is no single block"):
        add_lora(sd.unet, rank=2, alpha=2.0, blocks=("block0+block1",))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "flux-dev", "--H", "1032"], "H is 1032; it must be a positive multiple of 16"),
        (["--model", "sd3-medium", "--scheduler", "dpm++"], "scheduler 'dpm++' is not for flow matching"),
        (["--model", "flux-schnell", "--distilled_guidance", "2"], "distilled_guidance is 2; flux-schnell takes none"),
        (["--model", "shapes", "--no_t5"], "no_t5 is set; shapes is not Stable Diffusion 3"),
    ],
)
def test_a_dry_run_refuses_what_drawing_would(words, message, capsys):
    assert txt2img.main([*words, "--prompt", "a star", "--dpt", "none", "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_fetched_says_where_its_licence_is(capsys):
    words = ["--model", "flux-dev", "--local-files-only", "--dpt", "none", "--prompt", "star"]
    assert txt2img.main(words) == 2
    assert "its licence accepted at https://huggingface.co/black-forest-labs/FLUX.1-dev" in capsys.readouterr().err
