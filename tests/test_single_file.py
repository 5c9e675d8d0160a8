"""Models in one file: what they draw, and what of them is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import txt2img
from dpt.backbones import loading, single_file
from dpt.backbones.architecture import architecture
from dpt.backbones.loading import load_stable_diffusion
from dpt.backbones.single_file import named_alike
from dpt.base_models import CKPT_FOLDER, pipeline_of, recommended
from dpt.images import read_metadata
from tests.single_file import save_single_file

SHAPES = CKPT_FOLDER / "shapes"
WORDS = ["--prompt", "a red circle", "--n_samples", "1", "--ddim_steps", "3", "--device", "cpu", "--dpt", "none"]


@pytest.fixture
def ckpt(tmp_path, monkeypatch):
    """A folder of weights that has the configs of sd15, which are those of the embedded model."""
    weights = shutil.ignore_patterns("*.safetensors", "clip")
    shutil.copytree(SHAPES, tmp_path / "ckpt/sd15", ignore=weights)
    monkeypatch.setattr(single_file, "CKPT_FOLDER", tmp_path / "ckpt")
    return tmp_path / "ckpt"


@pytest.fixture(params=["model.safetensors", "model.ckpt"])
def file(request, tmp_path):
    layers = json.loads((SHAPES / "unet/config.json").read_text())["layers_per_block"]
    levels = len(json.loads((SHAPES / "vae/config.json").read_text())["block_out_channels"])
    save_single_file(SHAPES, tmp_path / request.param, layers=layers, levels=levels)
    return tmp_path / request.param


def test_it_is_the_model_of_the_folder(file, ckpt, capfd):
    notices = []
    found, expected = load_stable_diffusion(str(file), notice=notices.append), load_stable_diffusion("shapes")
    for name, network in expected.parts.items():
        state = found.parts[name].state_dict()
        assert all(torch.equal(state[key], value) for key, value in network.state_dict().items()), name
    assert found.scheduler.config == expected.scheduler.config
    assert notices == [f"{file} is taken for a model like sd15; its configs are those of {ckpt / 'sd15'}"]
    assert capfd.readouterr() == ("", "")
    assert architecture(str(file)).config.block_out_channels == expected.denoiser.config.block_out_channels


def test_it_draws_from_the_command_line(file, ckpt, tmp_path):
    settings = []
    for name, model in {"file": str(file), "folder": str(SHAPES)}.items():
        words = [*WORDS, "--model", model, "--scale", "5", "--outdir", str(tmp_path / name)]
        assert txt2img.main(words) == 0
        settings.append(read_metadata(tmp_path / name)[0]["settings"])
    assert settings[0]["weights"] == settings[1]["weights"]
    assert settings[0]["height"] == settings[1]["height"] == 128


def test_without_its_configs_it_says_where_they_go(file, tmp_path, monkeypatch, capsys):
    for module in (single_file, loading):
        monkeypatch.setattr(module, "CKPT_FOLDER", tmp_path / "nothing")
    assert txt2img.main([*WORDS, "--model", str(file), "--local-files-only"]) == 2
    error = capsys.readouterr().err
    assert "its weights need the configs of sd15" in error
    assert f"into {tmp_path / 'nothing/sd15'}, or go online once" in error


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"model.diffusion_model.output_blocks.11.0.skip_connection.weight": (4, 4)}, "sd15"),
        ({"model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024)}, "sd21-base"),
        ({"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (4,)}, "sdxl"),
    ],
)
def test_kinds_are_told_apart(tensors, name, tmp_path):
    path = tmp_path / "model.safetensors"
    rest = {"model.diffusion_model.out.2.bias": (4,)}
    save_file({key: torch.zeros(shape) for key, shape in (tensors | rest).items()}, path)
    assert named_alike(path) == name
    if name == "sd21-base":
        assert named_alike(path.rename(tmp_path / "v2-1_768-ema.safetensors")) == "sd21"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_down_blocks_0.lora_up.weight": (4, 4)}, "holds no whole model"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)}, "holds a model of the kind inpainting"),
        (
            {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (4,)},
            "holds a model of the kind xl_refiner",
        ),
    ],
)
def test_other_files_are_refused(tensors, message, tmp_path, capsys):
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / "model.safetensors")
    assert txt2img.main([*WORDS, "--model", str(tmp_path / "model.safetensors")]) == 2
    assert message in capsys.readouterr().err


def test_its_family_is_that_of_its_tensors(tmp_path):
    (tmp_path / "flux-xl").mkdir()
    names = {
        "v1.safetensors": "model.diffusion_model.output_blocks.11.0.skip_connection.weight",
        "juggernaut.safetensors": "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
    }
    for file, name in names.items():
        tensors = {name: torch.zeros(4, 4), "model.diffusion_model.out.2.bias": torch.zeros(4)}
        save_file(tensors, tmp_path / "flux-xl" / file)
    found = [recommended(str(tmp_path / "flux-xl" / file)) for file in names]
    assert [sampling.guidance_scale for sampling in found] == [7.5, 5.0]


@pytest.mark.parametrize(
    ("hub_id", "pipeline"),
    [
        ("black-forest-labs/FLUX.1-dev", "FluxPipeline"),
        ("stabilityai/stable-diffusion-3.5-large", "StableDiffusion3Pipeline"),
        ("someone/dreamer-xl", "StableDiffusionXLPipeline"),
        ("someone/pixlart-sd15", "StableDiffusionPipeline"),
        ("flux-lovers/sd15-anime", "StableDiffusionPipeline"),
    ],
)
def test_hub_ids_say_their_family_by_whole_words(hub_id, pipeline):
    assert pipeline_of(hub_id) == pipeline


def test_a_file_without_a_text_encoder_is_refused(file, ckpt, tmp_path, capsys):
    if file.suffix == ".ckpt":
        return
    state = {name: value for name, value in load_file(file).items() if not name.startswith("cond_stage_model.")}
    save_file(state, tmp_path / "half.safetensors")
    assert txt2img.main([*WORDS, "--model", str(tmp_path / "half.safetensors")]) == 2
    assert "is not a complete model like sd15" in capsys.readouterr().err
    assert txt2img.main([*WORDS, "--model", str(file), "--variant", "fp16"]) == 2
    assert "variant is 'fp16'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_damaged_files_are_refused(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"x")
    assert txt2img.main([*WORDS, "--model", str(tmp_path / name)]) == 2
    assert "is no readable weights file" in capsys.readouterr().err
