"""LoRA of other methods, in the layouts that people have: loaded as stock diffusers loads it, or named."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from dpt.backbones.loading import load_stable_diffusion
from dpt.lora import load_external_lora, remove_lora

UNET_ENDS, TEXT_ENDS = ("to_q", "to_k", "to_v", "to_out.0"), ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(scope="module")
def sd(golden):
    return load_stable_diffusion(str(golden / "sd21"))


@pytest.fixture(scope="module")
def lora(sd):
    """Random matrices of rank 4 for every attention of U-Net and text encoder, in diffusers' names."""
    generator, state = torch.Generator().manual_seed(0), {}
    for part, model, ends in (("unet", sd.denoiser, UNET_ENDS), ("text_encoder", sd.text_encoder, TEXT_ENDS)):
        for name, module in model.named_modules():
            if name.endswith(ends):
                state[f"{part}.{name}.lora_A.weight"] = torch.randn(4, module.in_features, generator=generator) * 0.3
                state[f"{part}.{name}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=generator) * 0.3
    return state


@pytest.fixture
def load(sd):
    """Loads a file into the model; returns what was said."""
    notes = []

    def loaded(path):
        load_external_lora(sd, path, notes.append)
        return notes

    yield loaded
    for model in (sd.denoiser, sd.text_encoder):
        remove_lora(model)


def unet_part(lora):
    return {key.removeprefix("unet."): value for key, value in lora.items() if key.startswith("unet.")}


def text_part(lora):
    return {key.removeprefix("text_encoder."): value for key, value in lora.items() if key.startswith("text")}


def kohya(lora, alpha=2.0):
    state = {}
    for key, value in lora.items():
        part, name = key.split(".", 1)
        name, half = name.rsplit(".lora_", 1)
        name = ("lora_unet_" if part == "unet" else "lora_te_text_model_") + name.replace(".", "_")
        state[f"{name}.lora_{'down' if half[0] == 'A' else 'up'}.weight"] = value
        state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def processors(lora):
    """The old attention processors' names."""
    state = {}
    for key, value in lora.items():
        name, half = key.removesuffix(".weight").rsplit(".lora_", 1)
        attention, projection = name.replace(".to_out.0", ".to_out").rsplit(".", 1)
        state[f"{attention}.processor.{projection}_lora.{'down' if half == 'A' else 'up'}.weight"] = value
    return state


def lists(lora, ends):
    """GORS's layout: up and down by turns, without names."""
    names = dict.fromkeys(key.rsplit(".lora_", 1)[0] for key in lora)
    assert all(name.endswith(ends) for name in names)
    return [lora[f"{name}.lora_{half}.weight"].half() for name in names for half in "BA"]


def latents(golden, unet, text_encoder):
    pipe = StableDiffusionPipeline.from_pretrained(
        golden / "sd21", safety_checker=None, unet=unet, text_encoder=text_encoder
    )
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return pipe("a red cube", latents=noise, num_inference_steps=2, output_type="latent").images


def stock(golden, path):
    pipe = StableDiffusionPipeline.from_pretrained(golden / "sd21", safety_checker=None)
    pipe.load_lora_weights(path)
    return latents(golden, pipe.unet, pipe.text_encoder)


def with_text_model(lora):
    """As files of older libraries have it."""
    return {key.replace("text_encoder.", "text_encoder.text_model."): value for key, value in lora.items()}


@pytest.mark.parametrize("layout", [dict, with_text_model, kohya])
def test_both_parts_are_loaded_as_stock_diffusers_does(golden, tmp_path, sd, lora, load, layout):
    save_file(layout(lora), tmp_path / "lora.safetensors")
    plain = latents(golden, sd.denoiser, sd.text_encoder)
    assert not load(tmp_path / "lora.safetensors")
    ours = latents(golden, sd.denoiser, sd.text_encoder)
    assert torch.equal(ours, stock(golden, tmp_path / "lora.safetensors"))
    save_file({k: v for k, v in layout(lora).items() if "unet" in k}, tmp_path / "unet.safetensors")
    load(tmp_path / "unet.safetensors")
    assert (latents(golden, sd.denoiser, sd.text_encoder) - ours).abs().max() > 0.1  # the text encoder's part counts
    for model in (sd.denoiser, sd.text_encoder):
        remove_lora(model)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(latents(golden, sd.denoiser, sd.text_encoder), plain)


def test_metadata_is_kept_as_stock_diffusers_keeps_it(golden, tmp_path, sd, lora, load):
    scale = {"r": 4, "lora_alpha": 1.0}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_part(lora), text_part(lora), unet_lora_adapter_metadata=scale | {"lora_dropout": 0.5},
        text_encoder_lora_adapter_metadata=scale,
    )  # fmt: skip
    load(tmp_path)
    ours = latents(golden, sd.denoiser, sd.text_encoder)
    assert torch.equal(ours, latents(golden, sd.denoiser, sd.text_encoder))  # no dropout
    save_file({k: v / 2 for k, v in lora.items()}, tmp_path / "scaled.safetensors")  # A and B: scale 1 / 4
    load(tmp_path / "scaled.safetensors")
    assert torch.equal(ours, latents(golden, sd.denoiser, sd.text_encoder))


def test_diffusion_itm_s_file_has_no_prefix(golden, tmp_path, sd, lora, load):
    torch.save(processors(unet_part(lora)), tmp_path / "pytorch_lora_weights.bin")
    torch.save({}, tmp_path / "scheduler.bin")
    assert not load(tmp_path)
    ours = latents(golden, sd.denoiser, sd.text_encoder)
    save_file({k: v for k, v in lora.items() if k.startswith("unet.")}, tmp_path / "named.safetensors")
    assert torch.equal(ours, stock(golden, tmp_path / "named.safetensors"))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_peft_folder(golden, tmp_path, sd, lora, load, part):
    own = {key: value for key, value in lora.items() if key.startswith(part)}
    save_file(
        {f"base_model.model.{k.split('.', 1)[1]}": v for k, v in own.items()}, tmp_path / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"], "lora_dropout": 0.1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), "utf-8-sig")
    load(tmp_path)
    ours = latents(golden, sd.denoiser, sd.text_encoder)
    (tmp_path / "other").mkdir()
    save_file(kohya(own, alpha=8.0), tmp_path / "other/kohya.safetensors")
    load(tmp_path / "other")
    assert torch.equal(ours, latents(golden, sd.denoiser, sd.text_encoder))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(ValueError, match=r"adapter_config\.json: peft_type is 'LOHA'"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    assert "alpha is taken to be its rank" in load(tmp_path)[0]


def test_gors_s_lists_have_no_names(golden, tmp_path, sd, lora, load):
    torch.save(lists(unet_part(lora), UNET_ENDS), tmp_path / "lora_weight.pt")
    assert "lora_weight.text_encoder.pt is not there" in load(tmp_path / "lora_weight.pt")[0]
    torch.save(lists(text_part(lora), TEXT_ENDS), tmp_path / "lora_weight.text_encoder.pt")
    assert len(load(tmp_path)) == 1  # nothing more is said
    ours = latents(golden, sd.denoiser, sd.text_encoder)
    halves = {key: value.half().float() for key, value in lora.items()}
    save_file(halves, tmp_path / "named.safetensors")
    assert torch.equal(ours, stock(golden, tmp_path / "named.safetensors"))
    for damaged in (lists(unet_part(lora), UNET_ENDS)[:-2], lists(unet_part(lora), UNET_ENDS)[::-1], [1, "a"]):
        torch.save(damaged, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=r"lora .*bad\.pt"):
            load(tmp_path / "bad.pt")


def stranger(lora):
    return lora | {f"unet.mid_block.stranger.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}


def dora(lora):
    state = kohya(lora)
    return state | {
        k.replace("lora_up.weight", "dora_scale"): v[:1].clone() for k, v in state.items() if "lora_up" in k
    }


@pytest.mark.parametrize(
    ("layout", "said"), [(stranger, "unexpected keys .*mid_block.stranger"), (dora, "DoRA checkpoint")]
)
def test_what_diffusers_warns_of_is_said_in_one_line(golden, tmp_path, sd, lora, load, capfd, layout, said):
    state = layout({k: v for k, v in lora.items() if k.startswith("unet.")})
    save_file(state, tmp_path / "lora.safetensors")
    (note,) = load(tmp_path / "lora.safetensors")
    assert re.search(said, note)
    assert note.startswith("note: lora ")
    assert "\n" not in note
    assert capfd.readouterr() == ("", "")


def test_a_folder_of_two_files_says_which_is_read(tmp_path, lora, load):
    for name in ("a", "b"):
        save_file(lora, tmp_path / f"{name}.safetensors")
    (note,) = load(tmp_path)
    assert "holds a.safetensors, b.safetensors; a.safetensors is read" in note


def first(state, tensor):
    return state | {next(iter(state)): tensor}


METADATA = "lora_adapter_metadata"
DAMAGES = {
    "0-D": (lambda s: first(s, torch.tensor(0.0)), {}, "has 0 dimensions instead of 2"),
    "1-D": (lambda s: first(s, torch.zeros(4)), {}, "has 1 dimensions instead of 2"),
    "half": (lambda s: {k: v for k, v in s.items() if "lora_B" in k}, {}, "the other half of tensor unet"),
    "ranks": (lambda s: first(s, torch.zeros(3, 32)), {}, "is of rank 3, its half of 4"),
    "width": (lambda s: {k: torch.zeros(4, 7) if "_A" in k else v for k, v in s.items()}, {}, "does not fit"),
    "nothing": (lambda s: {"a": torch.zeros(1)}, {}, "holds no LoRA for a denoiser or text encoder, but a"),
    "strangers": (lambda s: {f"x.{k}": v for k, v in s.items()}, {}, "is for nothing; this model has unet"),
    "for XL": (lambda s: {k.replace("unet", "text_encoder_2"): v for k, v in s.items()}, {}, "is for text_encoder_2"),
    "lora_diffusion": (lambda s: {"unet:0:up": torch.zeros(1)}, {}, "pass its .pt files instead"),
    "kohya's half": (lambda s: {k: v for k, v in kohya(s).items() if "_up" not in k}, {}, "the other half of tensor"),
    "kohya alphas": (
        lambda s: {k: torch.zeros(2) if "alpha" in k else v for k, v in kohya(s).items()}, {}, "does not fit"
    ),
    "lokr": (lambda s: kohya(s) | {"lora_unet_x.lokr_w1": torch.zeros(2, 2)}, {}, "does not fit"),
    "metadata list": (dict, [1, 2], "lora_adapter_metadata: expected object, got array"),
    "metadata null": (dict, None, "lora_adapter_metadata: expected object, got null"),
    "metadata without part": (dict, {"r": 4}, "r is no setting of LoRA"),
    "metadata wrong keys": (dict, {"unet.rank": 4}, "unet.rank is no setting of LoRA"),
    "metadata of text": (dict, {"unet.r": "four"}, "unet: r: expected int, got str"),
    "metadata huge": (dict, {"unet.r": 10**9}, "say rank 1000000000; its tensors have 4"),
    "metadata huge in a pattern": (dict, {"unet.rank_pattern": {"to_q": 10**9}}, "say rank 1000000000"),
    "metadata deep": (dict, None, "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_one_line(tmp_path, lora, load, name):
    damage, metadata, message = DAMAGES[name]
    state = damage({k: v for k, v in lora.items() if k.startswith("unet.")})
    raw = '{"unet.r": ' + "[" * 100_000 if name == "metadata deep" else json.dumps(metadata)
    save_file(
        state, tmp_path / "lora.safetensors", {METADATA: raw} if metadata or name.startswith("metadata") else None
    )
    with pytest.raises(ValueError, match="lora ") as caught:
        load(tmp_path / "lora.safetensors")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


class Harmful:
    def __reduce__(self):
        return (print, ("run!",))


@pytest.mark.parametrize("content", [{"x": Harmful()}, {"x": 3}, {1: torch.zeros(1)}, "text", [Harmful()]])
def test_pickles_of_anything_else_are_not_run(tmp_path, load, capsys, content):
    torch.save(content, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"lora\.bin"):
        load(tmp_path)
    assert "run!" not in capsys.readouterr().out


def test_what_is_not_there(tmp_path, load):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match=r"is not there|holds no \.safetensors"):
            load(path)
