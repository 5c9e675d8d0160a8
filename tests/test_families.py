"""Stable Diffusion XL, Stable Diffusion 3 and FLUX.1, small and random: the same of each, and then what is its own.

Drawing equals the stock pipelines, features equal a hook's capture, the score's gradient is its slope, and
everything is done from the command line.
"""

import json
import multiprocessing
import shutil
import time

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import dpt
import evaluate
import train_probe
import train_tune
import txt2img
from dpt.adapter.adapter import DiscriminativeAdapter, Scorer
from dpt.backbones import diffusion_transformer, unet
from dpt.backbones.architecture import architecture
from dpt.backbones.blocks import block_channels, block_names, block_prefix, is_transformer, parse_feature
from dpt.backbones.features import denoiser_features
from dpt.backbones.flow import FlowScheduler, variance_scale
from dpt.backbones.flux import Flux
from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.stable_diffusion import weights_fingerprint
from dpt.base_models import CKPT_FOLDER, default_dtype, recommended
from dpt.checkpoint.checkpoint import DPTCheckpoint, load_checkpoint, save_checkpoint
from dpt.config import AdapterConfig, DPTConfig
from dpt.drawing import Artist
from dpt.images import read_metadata
from dpt.lora import add_lora, load_external_lora, lora_state
from dpt.matching_score import matching_score, score_gradient
from dpt.sampling import initial_noise
from dpt.sampling_settings import Sampling
from dpt.verify.__main__ import main as verify
from dpt.verify.stock import stock_latents
from tests.families import FAMILIES, PROJECTION, WIDTH, make_flux, make_sd3

PROMPTS = ["a red circle", "two blue stars above a green square"]
ROOT = CKPT_FOLDER.parent
FLOWS = ("sd3", "flux")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: family.make(tmp_path_factory.mktemp(name) / "model") for name, family in FAMILIES.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture
def family(name):
    return FAMILIES[name]


@pytest.fixture(scope="module")
def folder(folders, name):
    return folders[name]


@pytest.fixture(scope="module")
def loaded(folder):
    return load_stable_diffusion(str(folder))


@pytest.fixture
def sd(folder):
    """A model that a test may change."""
    return load_stable_diffusion(str(folder))


def small(family, **given):
    return Sampling(family.guidance_scale, num_inference_steps=4, height=64, width=96).changed(**given)


def adapter_config(sd, block):
    sizes = {"in_channels": [block_channels(block, sd.denoiser.config)], "text_dim": sd.pooled_width}
    return AdapterConfig(hidden_dim=32, nheads=4, rec_text_dim=WIDTH, **sizes)


def artist_of(sd, family):
    """With an untrained adapter."""
    torch.manual_seed(0)
    return Artist(sd, Scorer(DiscriminativeAdapter(adapter_config(sd, family.probed)).eval(), (family.probed,)))


def our_latents(artist, sampling):
    return torch.stack([drawn.latents for drawn in artist.draw(PROMPTS, [3, 4], sampling)])


def stock(sd, sampling, **more):
    return stock_latents(sd, PROMPTS, initial_noise([3, 4], sd.latent_shape(sampling.height, sampling.width)), sampling,
                         **more)  # fmt: skip


def stock_pass(sd, noisy_latents, timestep, conditioning):
    """A prediction by the denoiser's own forward, of latents in the variance-preserving space."""
    context, pooled = conditioning.encoder_hidden_states, conditioning.pooled_prompt_embeds
    if hasattr(sd.denoiser, "down_blocks"):
        return sd.denoiser(noisy_latents, timestep, context, added_cond_kwargs=conditioning.further, return_dict=False)[
            0
        ]
    z = noisy_latents * variance_scale(timestep)
    if not isinstance(sd, Flux):
        return sd.denoiser(z, context, pooled, timestep.expand(len(z)), return_dict=False)[0]
    height, width = (side // 2 for side in z.shape[-2:])
    velocity = sd.denoiser(
        FluxPipeline._pack_latents(z, *z.shape),
        context,
        pooled,
        timestep.expand(len(z)) / 1000,
        FluxPipeline._prepare_latent_image_ids(len(z), height, width, "cpu", torch.float32),
        torch.zeros(context.shape[1], 3),
        conditioning.further["guidance"],
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(velocity, 2 * height, 2 * width, 1)


def test_a_folder_says_what_it_is(folder, family, loaded):
    assert isinstance(loaded, family.kind)
    known = architecture(str(folder))
    assert block_names(known.config) == block_names(loaded.denoiser.config)
    assert known.pooled_width == loaded.pooled_width
    *others, _ = loaded.parts.values()
    assert known.other_weights == sum(p.numel() for part in others for p in part.parameters())


@pytest.mark.parametrize("negative", ["", "a yellow cross"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("size", [(128, 128), (64, 192)])
def test_latents_equal_the_stock_pipeline(family, loaded, guidance_scale, negative, size):
    own = {"guidance_scale": guidance_scale, "negative_prompt": negative, "height": size[0], "width": size[1]}
    sampling = small(family, **own)
    assert (our_latents(Artist(loaded), sampling) - stock(loaded, sampling)).abs().max() < 1e-4


def test_pictures_equal_the_stock_pipeline(family, loaded):
    pipeline, sampling = loaded.stock_pipeline(), small(family)
    (ours,) = Artist(loaded).draw(PROMPTS[:1], [3], sampling)
    images, config = torch.rand(2, 3, 64, 64) * 2 - 1, pipeline.vae.config
    with torch.no_grad():
        decoded = pipeline.vae.decode(stock(loaded, sampling)[:1] / config.scaling_factor + (config.shift_factor or 0))
    pixels = ((decoded.sample / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0)
    assert np.abs(pixels.numpy() - ours.image.astype(int)).max() <= 1
    encoded = pipeline.vae.encode(images).latent_dist.mean - (config.shift_factor or 0)
    assert torch.allclose(loaded.encode_images(images), encoded * config.scaling_factor, atol=1e-5)


@pytest.mark.parametrize("state", ["plain", "LoRA", "gradient checkpointing"])
def test_features_equal_a_hook_s_capture_and_stop_there(sd, family, state):
    if state == "LoRA":
        torch.manual_seed(1)
        add_lora(sd.denoiser, rank=2, alpha=2.0)
        for parameter in (parameter for parameter in sd.denoiser.parameters() if parameter.requires_grad):
            torch.nn.init.normal_(parameter, std=0.2)
    if state == "gradient checkpointing":
        sd.denoiser.enable_gradient_checkpointing()
        sd.denoiser.train()
    kind = diffusion_transformer if is_transformer(sd.denoiser.config) else unet
    modules, first_is_map = kind.block_modules(sd.denoiser), kind is unet
    conditioning, timestep = sd.condition(PROMPTS), torch.tensor(500.0)
    z = initial_noise([0, 1], sd.latent_shape(64, 96)).requires_grad_()
    for block in family.blocks:
        seen, run = [], []
        hook = modules[block].register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
        whole = stock_pass(sd, z, timestep, conditioning)
        hook.remove()
        hooks = [m.register_forward_hook(lambda *_, b=b, run=run: run.append(b)) for b, m in modules.items()]
        (found,), nothing = denoiser_features(sd.denoiser, (block,), z, timestep, conditioning)
        for hook in hooks:
            hook.remove()
        (again,), predicted = denoiser_features(sd.denoiser, (block,), z, timestep, conditioning, with_noise_pred=True)
        assert nothing is None
        captured = seen[0]
        if isinstance(captured, tuple):  # of a U-Net the map is first, of a transformer its image tokens are last
            captured = captured[0 if first_is_map else -1]
        tokens = found if captured.ndim == 4 else found.flatten(2).transpose(1, 2)
        assert torch.equal(tokens, captured)
        assert torch.equal(found, again)
        assert torch.equal(predicted, whole)
        assert found.shape[1] == block_channels(block, sd.denoiser.config)
        if is_transformer(sd.denoiser.config):
            assert found.shape[2:] == (4, 6)
        names = list(modules)
        assert run == names[: names.index(block) + 1]
    assert torch.autograd.grad(found.square().sum(), z)[0].abs().max() > 0


def test_blocks_that_are_not_there_are_refused_with_those_that_are(family, loaded):
    for feature in family.no_block:
        with pytest.raises(ValueError, match=f"must be among {family.blocks[0]}, "):
            parse_feature(feature, loaded.denoiser.config)
    assert parse_feature("+".join(family.blocks[:2]), loaded.denoiser.config) == family.blocks[:2]


def test_the_score_s_gradient_is_its_slope(sd, family, monkeypatch):
    step, close = family.slope
    scorer = artist_of(sd, family).scorer
    scorer.adapter.double()
    sd.denoiser.double()
    conditioning, timestep = sd.condition(["a red circle"]).map(torch.Tensor.double), torch.tensor(500.0)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    z = initial_noise([0], sd.latent_shape(64, 96)).double()
    _, gradient = score_gradient(sd.denoiser, scorer, z, timestep, conditioning)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        ends = [matching_score(sd.denoiser, scorer, z + h * direction, timestep, conditioning) for h in (step, -step)]
    slope = (ends[0] - ends[1]).item() / (2 * step)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=close)


@pytest.mark.parametrize("target", ["latent", "conditional", "noise"])
def test_a_correction_raises_the_score(loaded, family, target):
    artist = artist_of(loaded, family)
    settings = small(family), small(family, correction_norm=0.05, correction_target=target)
    drawn = [artist.draw(PROMPTS, [0, 1], sampling, trace=True) for sampling in settings]
    scores = [np.array([[record["score"] for record in one.trace] for one in row]) for row in drawn]
    assert np.allclose(scores[0][:, 0], scores[1][:, 0], atol=1e-5)  # read before the first move
    assert not np.array_equal(drawn[0][0].image, drawn[1][0].image)
    if target == "latent":
        assert (scores[1][:, -1] > scores[0][:, -1]).all()


def test_a_candidate_is_what_its_seed_draws(loaded, family):
    artist = artist_of(loaded, family)
    (kept,) = artist.draw(PROMPTS[:1], [0], small(family, candidates=3, choose_at=(0.5,)))
    (alone,) = artist.draw(PROMPTS[:1], [kept.seed], small(family))
    assert np.abs(kept.image.astype(int) - alone.image).max() <= 1


def training(folder, family, tree, *more):
    return [
        *(f"model.name={folder}", f"model.feature={family.probed}", "model.rec_text_encoder=clip"),
        *("data.kind=coco", f"data.root={tree}", "data.num_samples=null", "data.num_workers=0"),
        *("adapter.hidden_dim=32", "adapter.nheads=4", "adapter.dim_feedforward=32", "adapter.dropout=0"),
        *("adapter.num_queries_itm=2", "adapter.num_queries_rec=4", "optim.mixed_precision=no", "optim.batch_size=2"),
        *("optim.warmup_steps=0", "optim.gradient_accumulation_steps=1", "checkpoints.every=5", "log_every=1"),
        *("validation.num_samples=2", "validation.timesteps=[500]", "validation.every=20", "samples.every=-1", *more),
    ]


@pytest.fixture(scope="module")
def tuned(folder, name, coco_tree, tmp_path_factory):
    """A folder in which outputs/probe and outputs/tune were trained for 20 steps each, from the command line."""
    family, where = FAMILIES[name], tmp_path_factory.mktemp("trained")
    probe, tune = (str(ROOT / f"configs/{family.recipes}/{stage}.yaml") for stage in ("probe", "tune"))
    settings = training(folder, family, coco_tree, f"output_folder={where}/outputs", "optim.steps=20")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Flux, "default_size", 128)
        assert train_probe.main([probe, *settings, "--dry-run"]) == 0
        assert train_probe.main([probe, *settings, "run_name=probe"]) == 0
        start = [f"init_from={where}/outputs/probe", "lora.rank=2", "model.gradient_checkpointing=true"]
        assert train_tune.main([tune, *settings, *start, "run_name=tune", "--dry-run"]) == 0
        assert train_tune.main([tune, *settings, *start, "run_name=tune"]) == 0
    assert load_checkpoint(where / "outputs/tune").config.t5 is {"sdxl": None, "sd3": False, "flux": True}[name]
    return where


@pytest.mark.slow
def test_correct_choose_and_evaluate_from_the_command_line(
    folder, family, coco_tree, tuned, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Flux, "default_size", 128)
    weights = str(tuned / "outputs/tune")
    words = ["--model", str(folder), "--prompt", PROMPTS[0], "--n_samples", "2", "--ddim_steps", "4", "--device", "cpu"]
    for where, more in {
        "plain": ["--dpt", "none"],
        "corrected": ["--dpt", weights, "--correction_norm", "0.05", "--correction_target", "latent"],
        "chosen": ["--dpt", weights, "--candidates", "2", "--choose_at", "0.5", "--correction_factor", "0"],
    }.items():
        assert txt2img.main([*words, *more, "--outdir", where]) == 0, capsys.readouterr().err
        assert len(read_metadata(tmp_path / where)) == 2
    files = [sorted((tmp_path / where / "samples").glob("*.png")) for where in ("plain", "corrected")]
    plain, corrected = (np.stack([Image.open(file) for file in row]).astype(int) for row in files)
    assert np.abs(plain - corrected).max() > 2
    arm = {"name": "own", "model": str(folder), "dpt": weights, "num_inference_steps": 2, "candidates": 2}
    (tmp_path / "arm.yaml").write_text(json.dumps(arm | {"correction_factor": 0, "choose_at": [0.5]}))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    own = ["--arms", "arm.yaml", "--prompts", "prompts.txt", "--outdir", "arms", "--seeds", "0"]
    assert evaluate.main(["generate", *own]) == 0, capsys.readouterr().err
    assert len(read_metadata(tmp_path / "arms/own")) == 2
    measured = ["--set", *training(folder, family, coco_tree), "--num_samples", "2", "--timesteps", "500"]
    config = str(ROOT / f"configs/{family.recipes}/probe.yaml")
    words = [str(tuned / "outputs/probe"), "--config", config, "--output", "itm", *measured]
    assert evaluate.main(["itm", *words]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on(folder, family, coco_tree, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(Flux, "default_size", 128)
    settings = training(folder, family, coco_tree, f"output_folder={tmp_path}", "optim.steps=20", "run_name=probe")
    words = [str(ROOT / f"configs/{family.recipes}/probe.yaml"), *settings]
    child = multiprocessing.get_context("fork").Process(target=train_probe.main, args=(words,))
    child.start()
    while not (tmp_path / "probe/checkpoints/step_0000005").exists():
        assert child.is_alive()
        time.sleep(0.05)
    child.kill()
    child.join()
    assert train_probe.main([*words, "resume=true"]) == 0
    rows = []
    for run in (tuned / "outputs/probe", tmp_path / "probe"):
        records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        rows.append({record["step"]: record["total"] for record in records if "total" in record})
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)


@pytest.mark.slow
def test_verify_compares_with_the_family_s_own_pipeline(folder, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(Flux, "default_size", 128)
    words = ["--model", str(folder), "--dpt", str(tuned / "outputs/tune"), "--outdir", str(tmp_path), "--device", "cpu"]
    assert verify([*words, "--num_pairs", "8", "--steps", "2"]) in (0, 1)
    checks = json.loads((tmp_path / "report.json").read_text())["checks"]
    assert checks["stock"]["passed"]
    assert checks["tensors"]["passed"]


def test_an_artist_is_loaded_from_python(folder, family, loaded, tmp_path):
    config = DPTConfig(str(folder), family.probed, -1, adapter_config(loaded, family.probed))
    save_checkpoint(DPTCheckpoint(config, artist_of(loaded, family).scorer.adapter, {}), tmp_path / "dpt")
    artist = dpt.Artist.load(str(folder), tmp_path / "dpt")
    corrected = artist.sampling.changed(num_inference_steps=2, height=64, width=64)
    assert corrected.corrects
    with pytest.raises(ValueError, match=r"is of .*Pipeline; .*dpt.Artist.load"):
        dpt.SelfCorrectionPipeline.from_pretrained(folder)
    (drawn,) = artist.draw(PROMPTS[:1], [0], corrected)
    (plain,) = dpt.Artist.load(str(folder)).draw(PROMPTS[:1], [0], corrected.without_correction())
    assert np.abs(drawn.image.astype(int) - plain.image).max() > 0


@pytest.mark.parametrize("restricted", [False, True])
def test_a_tuned_lora_draws_alike_in_the_stock_pipeline(folder, family, loaded, sd, tmp_path, restricted):
    sampling, blocks = small(family), family.in_lora if restricted else ()
    add_lora(sd.denoiser, rank=2, alpha=2.0, blocks=blocks)
    torch.manual_seed(0)
    state = {key: torch.randn_like(value) * 0.2 for key, value in lora_state(sd.denoiser).items()}
    prefixes = tuple(map(block_prefix, blocks or block_names(sd.denoiser.config)))
    assert all(key.startswith(prefixes) for key in state)
    assert all(any(key.startswith(prefix) for key in state) for prefix in map(block_prefix, family.in_lora))
    assert family.kind.__name__ == "StableDiffusionXL" or any("add_q_proj" in key for key in state)
    config = DPTConfig(str(folder), family.probed, -1, adapter_config(sd, family.probed), lora_rank=2, lora_alpha=2.0)
    save_checkpoint(DPTCheckpoint(config, DiscriminativeAdapter(config.adapter), state), tmp_path / "dpt")
    ours = our_latents(Artist.load(str(folder), tmp_path / "dpt"), sampling)
    expected = stock(load_stable_diffusion(str(folder)), sampling, lora=tmp_path / "dpt/lora")
    assert (ours - expected).abs().max() < 1e-4
    assert (ours - our_latents(Artist(loaded), sampling)).abs().max() > 1e-3


def random_lora(sd):
    """Rank 4 on the attentions of every part that stock pipelines put LoRA on, in diffusers' names."""
    generator, state = torch.Generator().manual_seed(0), {}
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    for part, model in sd.parts.items():
        if part == "vae" or "T5" in type(model).__name__:
            continue
        for key, module in model.named_modules():
            if key.endswith(ends) and isinstance(module, torch.nn.Linear):
                state[f"{part}.{key}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator) * 0.3
                state[f"{part}.{key}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator) * 0.3
    return state


def test_another_method_s_lora_draws_as_in_the_stock_pipeline(folder, family, loaded, sd, tmp_path):
    sampling = small(family)
    state, notes = random_lora(sd), []
    save_file(state, tmp_path / "lora.safetensors")
    load_external_lora(sd, tmp_path / "lora.safetensors", notes.append)
    assert notes == []
    ours = our_latents(Artist(sd), sampling)
    expected = stock(load_stable_diffusion(str(folder)), sampling, lora=tmp_path / "lora.safetensors")
    assert (ours - expected).abs().max() < 1e-4
    assert (ours - our_latents(Artist(loaded), sampling)).abs().max() > 1e-3
    of_text = {key: value for key, value in state.items() if key.startswith("text_encoder.")}
    save_file(of_text, tmp_path / "text.safetensors")
    load_external_lora(sd, tmp_path / "text.safetensors")
    assert not torch.equal(our_latents(Artist(sd), sampling), ours)
    other = "transformer" if "unet" in sd.parts else "unet"
    save_file({f"{other}.x.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"is for {other}; this model has"):
        load_external_lora(sd, tmp_path / "other.safetensors")


def test_lists_without_names_are_for_a_u_net(folders, tmp_path):
    torch.save([torch.zeros(4, 4)] * 2, tmp_path / "gors.pt")
    for name in FLOWS:
        with pytest.raises(ValueError, match="is a list of tensors for a U-Net"):
            load_external_lora(load_stable_diffusion(str(folders[name])), tmp_path / "gors.pt")


def test_flux_s_lora_is_not_taken_by_stable_diffusion_3(folders, tmp_path):
    save_file(random_lora(load_stable_diffusion(str(folders["flux"]))), tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match="does not fit this model: it is for FLUX"):
        load_external_lora(load_stable_diffusion(str(folders["sd3"])), tmp_path / "flux.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "two green stars"}, "it must be a list of texts"),
        ({"prompts": []}, "it must be a list of texts, at least one"),
        ({"seeds": [0]}, "seeds holds 1; 2 prompts need as many"),
        ({"seeds": [0, -1]}, "seeds holds -1; each must be a whole number"),
        ({"seeds": [0, 1.5]}, "seeds holds 1.5; each must be a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_arguments_of_an_artist_are_named(loaded, family, changes, message):
    given = {"prompts": PROMPTS, "seeds": np.array([0, 1]), "sampling": small(family, num_inference_steps=1)}
    with pytest.raises(ValueError, match=message):
        Artist(loaded).draw(**given | changes)
    assert len(Artist(loaded).draw(**given)) == 2
    with pytest.raises(ValueError, match="how is 'layers'; it must be model or sequential"):
        Artist(loaded).offload("layers", "cpu")


def test_kohya_s_lora_of_xl_reaches_both_text_encoders(folders, tmp_path):
    sd, state = load_stable_diffusion(str(folders["sdxl"])), {}
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1_text_model", "text_encoder_2": "lora_te2_text_model"}
    for key, value in random_lora(sd).items():
        part, rest = key.split(".", 1)
        rest, half = rest.removeprefix("text_model.").rsplit(".lora_", 1)
        name = f"{prefixes[part]}_{rest.replace('.', '_')}"
        state[f"{name}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = value
        state[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "kohya.safetensors")
    load_external_lora(sd, tmp_path / "kohya.safetensors")
    again = load_stable_diffusion(str(folders["sdxl"]))
    expected = stock(again, small(FAMILIES["sdxl"]), lora=tmp_path / "kohya.safetensors")
    assert (our_latents(Artist(sd), small(FAMILIES["sdxl"])) - expected).abs().max() < 1e-4
    assert all(getattr(sd.parts[part], "peft_config", None) for part in prefixes)


def test_a_folder_that_lacks_something_is_refused(folder, family, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model/text_encoder_2")
    with pytest.raises(ValueError, match=f"lacks the folder text_encoder_2 of {family.title}"):
        load_stable_diffusion(str(tmp_path / "model"))
    shutil.copytree(folder / "text_encoder_2", tmp_path / "model/text_encoder_2")
    shutil.move(tmp_path / "model/tokenizer_2", tmp_path / "words")
    with pytest.raises(ValueError, match="is not a complete Stable Diffusion folder"):
        load_stable_diffusion(str(tmp_path / "model"))
    shutil.move(tmp_path / "words", tmp_path / "model/tokenizer_2")
    path = tmp_path / "model/text_encoder_2/model.safetensors"
    state = load_file(path)
    state.pop(lacking := next(key for key in state if "k.weight" in key or "k_proj.weight" in key))
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"text_encoder_2: its weights have no {lacking}"):
        load_stable_diffusion(str(tmp_path / "model"))
    (tmp_path / "model/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match=r"StableDiffusionPipeline|lacks the folder unet"):
        load_stable_diffusion(str(tmp_path / "model"))


def test_an_adapter_of_another_family_is_refused(folder, shapes_dpt, tmp_path, capsys):
    words = ["--model", str(folder), "--prompt", "star", "--dpt", str(shapes_dpt), "--outdir", str(tmp_path / "out")]
    assert txt2img.main([*words, "--H", "64", "--W", "64"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--parity"], "parity is not for flow matching"),
        (["--scheduler", "dpm++"], "scheduler 'dpm++' is not for flow matching"),
        (["--H", "72"], "H is 72; it must be a positive multiple of 16"),
        (["--attend_and_excite"], "Attend-and-Excite reads the attention of a U-Net"),
    ],
)
def test_what_flow_matching_has_not_is_refused(folders, name, tmp_path, capsys, more, message):
    words = ["--model", str(folders[name]), "--dpt", "none", "--prompt", "a red star", "--ddim_steps", "2"]
    words += ["--device", "cpu", "--H", "64", "--W", "64", *more, "--outdir", str(tmp_path / "out")]
    assert txt2img.main(words) == 2
    assert message in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("model", "page"),
    [("sd35-medium", "stabilityai/stable-diffusion-3.5-medium"), ("flux-dev", "black-forest-labs/FLUX.1-dev")],
)
def test_a_model_that_is_not_fetched_says_where_its_licence_is(model, page, capsys):
    assert txt2img.main(["--model", model, "--local-files-only", "--dpt", "none", "--prompt", "star"]) == 2
    assert f"its licence accepted at https://huggingface.co/{page}" in capsys.readouterr().err


def test_half_precision_is_bfloat16_for_transformers(folders):
    transformers = (str(folders["sd3"]), "sd35-medium", str(folders["flux"]), "black-forest-labs/FLUX.1-schnell")
    assert {default_dtype(model, "cuda") for model in transformers} == {"bfloat16"}
    assert {default_dtype(model, "cuda") for model in ("shapes", "sdxl", "sd21-base")} == {"float16"}
    assert {default_dtype(model, "cpu") for model in (*transformers, "shapes")} == {"float32"}
    assert default_dtype("shapes", "cpu", elsewhere="bfloat16") == "bfloat16"


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


def test_flux_draws_with_its_authors_guidance_and_lengths(folders, tmp_path):
    sd = load_stable_diffusion(str(folders["flux"]))
    assert sd.condition(PROMPTS[:1]).further["guidance"].tolist() == [3.5]
    assert sd.encode_prompts(PROMPTS[:1])[0].shape[1] == 512
    schnell = load_stable_diffusion(str(make_flux(tmp_path / "model", distilled=False)))
    assert "guidance" not in schnell.condition(PROMPTS[:1]).further
    assert schnell.encode_prompts(PROMPTS[:1])[0].shape[1] == 256


def test_parts_and_schedulers_are_those_of_the_folder(folder, family, loaded):
    """`stock_latents` shares the model's parts; here they are compared with what diffusers loads itself."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family.recipes == "sd35" else {}
    own = family.kind.stock_class.from_pretrained(folder, **absent)
    assert weights_fingerprint(*loaded.parts.values()) == weights_fingerprint(
        *(own.components[n] for n in loaded.parts)
    )
    assert list(loaded.parts)[-1] == ("unet" if family.recipes == "sdxl" else "transformer")
    kept = ("beta_start", "beta_end", "beta_schedule", "prediction_type", "shift", "use_dynamic_shifting", "max_shift")
    for name in kept:
        assert loaded.scheduler.config.get(name) == own.scheduler.config.get(name)


def test_sizes_of_each_family(folders):
    xl, sd3, flux = (load_stable_diffusion(str(folders[name])) for name in FAMILIES)
    assert (xl.default_size, xl.latent_shape(), xl.pooled_width) == (128, (4, 16, 16), PROJECTION)
    assert (sd3.default_size, sd3.latent_shape(), sd3.pooled_width) == (128, (16, 16, 16), 2 * PROJECTION)
    assert (flux.default_size, flux.latent_shape(64, 96), flux.pooled_width) == (1024, (16, 8, 12), WIDTH)
    assert architecture("sdxl").config.cross_attention_dim == 2048
    assert recommended(str(folders["flux"])) == recommended("flux-dev") == Sampling(1.0, num_inference_steps=28)
    assert recommended("flux-schnell").num_inference_steps == 4


def test_t5_is_read_where_it_is(tmp_path):
    folder = make_sd3(tmp_path / "model", with_t5=True)
    sd = load_stable_diffusion(str(folder))
    expected = sd.stock_pipeline().encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
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
    adapter = adapter_config(whole, "block2")
    config = DPTConfig(str(folder), "block2", -1, adapter, t5=True)
    save_checkpoint(DPTCheckpoint(config, DiscriminativeAdapter(adapter), {}), tmp_path / "dpt")
    load_checkpoint(tmp_path / "dpt").attach(whole)
    with pytest.raises(ValueError, match="was made with T5: give the model its T5 back"):
        load_checkpoint(tmp_path / "dpt").attach(without)
    words = ["--model", str(folder), "--prompt", PROMPTS[0], "--ddim_steps", "2", "--device", "cpu", "--no_t5"]
    assert txt2img.main([*words, "--n_samples", "1", "--dpt", "none", "--outdir", str(tmp_path / "out")]) == 0
    assert txt2img.main([*words, "--dpt", str(tmp_path / "dpt"), "--outdir", str(tmp_path / "out")]) == 2
    assert "was made with T5" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no_t5 is set; shapes is not Stable Diffusion 3"):
        load_stable_diffusion("shapes", no_t5=True)


def test_the_distilled_guidance_is_an_input(folders, tmp_path):
    sd, sampling = load_stable_diffusion(str(folders["flux"])), small(FAMILIES["flux"], distilled_guidance=1.5)
    ours = our_latents(Artist(sd), sampling)
    assert (ours - stock(sd, sampling)).abs().max() < 1e-4
    assert (ours - our_latents(Artist(sd), small(FAMILIES["flux"]))).abs().max() > 1e-3
    schnell = load_stable_diffusion(str(make_flux(tmp_path / "model", distilled=False)))
    plain = small(FAMILIES["flux"])
    assert (our_latents(Artist(schnell), plain) - stock(schnell, plain)).abs().max() < 1e-4
    with pytest.raises(ValueError, match="distilled_guidance is 2; this model takes none as an input"):
        our_latents(Artist(schnell), small(FAMILIES["flux"], distilled_guidance=2.0))


def test_t5_reads_more_of_a_prompt_than_clip(folders):
    sd = load_stable_diffusion(str(folders["flux"]))
    assert sd.truncated_part("a red circle and " * 30) == ""
    assert sd.truncated_part("a red circle and " * 300)


def test_noisy_latents_can_be_read_beside_a_prediction(loaded):
    z = initial_noise([0], loaded.latent_shape(64, 96))
    with torch.no_grad():
        inputs = loaded.denoiser, ("latents",), z, torch.tensor(500.0), loaded.condition(PROMPTS[:1])
        (found,), predicted = denoiser_features(*inputs, with_noise_pred=True)
    assert torch.equal(found, z)
    assert predicted.shape == z.shape


def test_several_blocks_in_one_word_are_no_block_of_lora(loaded, family):
    joined = "+".join(family.blocks[:2])
    with pytest.raises(ValueError, match="is no single block"):
        add_lora(loaded.denoiser, rank=2, alpha=2.0, blocks=(joined,))
