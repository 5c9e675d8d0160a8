import json
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import dpt
from dpt.backbones.blocks import block_channels
from dpt.backbones.loading import load_stable_diffusion
from dpt.checkpoint.__main__ import main
from dpt.checkpoint.checkpoint import DPTCheckpoint, describe, load_checkpoint, save_checkpoint
from dpt.config import save_config
from dpt.lora import load_lora, lora_key


@pytest.fixture(scope="module")
def small(golden):
    """What the shapes of the golden adapter do not tell."""
    options = json.loads((golden / "adapter_up1.args.json").read_text())
    return {"num_queries_itm": options["num_queries_matching"], "nheads": options["nheads"]}


@pytest.fixture(scope="module")
def flags(small):
    return ["--num_queries_itm", str(small["num_queries_itm"]), "--nheads", str(small["nheads"])]


@pytest.fixture
def released(golden, small):
    return load_checkpoint(golden / "stage2_pytorch_model.bin", **small)


def test_golden_released_layout_is_read_to_the_last_tensor(golden, released, small):
    from_folder = load_checkpoint(golden / "accelerate_state", **small)
    keys = json.loads((golden / "stage2_pytorch_model.keys.json").read_text())
    assert len(released.lora) == sum(key.startswith("unet.") for key in keys) > 0
    assert len(released.adapter.state_dict()) == sum(not key.startswith("unet.") for key in keys)
    from_safetensors = load_checkpoint(golden / "stage2_pytorch_model.safetensors", **small)
    for other in (from_folder, from_safetensors):
        assert released.lora.keys() == other.lora.keys()
        assert all(torch.equal(value, other.lora[name]) for name, value in released.lora.items())
        for name, value in released.adapter.state_dict().items():
            assert torch.equal(value, other.adapter.state_dict()[name]), name
    rank = next(value.shape[0] for name, value in released.lora.items() if ".lora_A." in name)
    assert (released.config.lora_rank, released.config.lora_alpha, released.config.feature) == (
        rank,
        float(rank),
        "up1",
    )
    assert "LoRA" in describe(released)


def test_golden_lora_outputs(golden):
    import numpy as np

    from dpt.backbones.blocks import parse_feature
    from dpt.backbones.conditioning import Conditioning
    from dpt.backbones.features import denoiser_features

    arrays = {k: torch.from_numpy(v) for k, v in np.load(golden / "lora_unet.npz").items()}
    unet = load_stable_diffusion(str(golden / "sd21")).denoiser
    inputs = (arrays["latent"], arrays["t"], arrays["context"])
    assert torch.allclose(unet(*inputs).sample, arrays["noise_pred_base"], rtol=1e-5, atol=1e-5)
    for file in ("lora_only.bin", "lora_only.safetensors"):
        state = torch.load(golden / file, weights_only=True) if file.endswith("bin") else load_file(golden / file)
        state = {lora_key(k): v for k, v in state.items()}
        rank = next(v.shape[0] for k, v in state.items() if ".lora_A." in k)
        load_lora(unet, state, alpha=rank)
        blocks = parse_feature("all", unet.config)
        texts = Conditioning(inputs[2])
        features, noise_pred = denoiser_features(unet, blocks, *inputs[:2], texts, with_noise_pred=True)
        scale = arrays["noise_pred"].abs().max()
        assert torch.allclose(noise_pred, arrays["noise_pred"], rtol=1e-5, atol=1e-5 * scale)
        for block, feature in zip(blocks, features, strict=True):
            expected = arrays["feat_" + block.replace("down", "bottom")]
            assert torch.allclose(feature, expected, rtol=1e-5, atol=1e-5 * expected.abs().max()), block
            (alone,), _ = denoiser_features(unet, (block,), *inputs[:2], Conditioning(inputs[2]))
            assert torch.equal(alone, feature)


def test_our_folder_round_trips(golden, released, tmp_path):
    released.config.metrics = {"itm": 0.9}
    save_checkpoint(released, tmp_path / "dpt")
    names = {str(p.relative_to(tmp_path / "dpt")) for p in (tmp_path / "dpt").rglob("*") if p.is_file()}
    assert {"adapter.safetensors", "config.yaml", "lora/pytorch_lora_weights.safetensors", "README.md"} <= names
    for again in (load_checkpoint(tmp_path / "dpt"), DPTCheckpoint.from_pretrained(tmp_path / "dpt")):
        assert again.config == released.config
        assert all(torch.equal(v, again.lora[k]) for k, v in released.lora.items())
        state = again.adapter.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in released.adapter.state_dict().items())
    card = (tmp_path / "dpt/README.md").read_text()
    assert all(text in card for text in ("sd21-base", "up1", "apache-2.0", "| itm | 0.9 |"))
    with pytest.raises(ValueError, match="exists already"):
        save_checkpoint(released, tmp_path / "dpt")
    assert [p.name for p in tmp_path.iterdir()] == ["dpt"]


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_stock_diffusers_loads_our_lora(golden, released, tmp_path, alpha):
    released.config.lora_alpha = alpha
    save_checkpoint(released, tmp_path / "dpt")
    sd = load_stable_diffusion(str(golden / "sd21"))
    load_checkpoint(tmp_path / "dpt").attach(sd)
    pipe = StableDiffusionPipeline.from_pretrained(golden / "sd21", safety_checker=None)
    pipe.load_lora_weights(tmp_path / "dpt/lora")
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, 32))
    with torch.no_grad():
        ours, stock = sd.denoiser(*inputs).sample, pipe.unet(*inputs).sample
    assert torch.allclose(ours, stock, atol=1e-5)
    plain = load_stable_diffusion(str(golden / "sd21")).denoiser(*inputs).sample
    assert not torch.allclose(ours, plain, atol=1e-3)


def test_attaching_replaces_and_freezes(golden, released):
    sd = load_stable_diffusion(str(golden / "sd21"))
    for _ in range(2):
        assert released.attach(sd).blocks == ("up1",)
    parameters = [*sd.denoiser.parameters(), *released.adapter.parameters()]
    assert not any(p.requires_grad for p in parameters)
    assert not released.adapter.training


def test_other_models_are_refused_with_both_numbers(golden, released):
    sd = load_stable_diffusion(str(golden / "sd21"))
    released.config.feature = "up3"
    reads, has = released.config.adapter.in_channels[0], block_channels("up3", sd.denoiser.config)
    with pytest.raises(ValueError, match=rf"reads \[{reads}\] channels at up3; .* has \[{has}\]"):
        released.attach(sd)
    released.config.feature, released.config.adapter.text_dim = "up1", 999
    with pytest.raises(ValueError, match=rf"width 999; .* has {sd.text_encoder.config.hidden_size}"):
        released.attach(sd)


def test_weights_of_another_named_model_are_refused_with_both_numbers(released):
    sd = load_stable_diffusion("shapes")
    with pytest.raises(ValueError, match=r"reads \[\d+\] channels at up1; shapes has \[\d+\]"):
        released.attach(sd)
    released.config.adapter.in_channels = [sd.denoiser.config.block_out_channels[-2]]
    with pytest.raises(ValueError, match=r"texts of width \d+; shapes has \d+"):
        released.attach(sd)
    released.config.adapter.text_dim = sd.text_encoder.config.hidden_size
    with pytest.raises(ValueError, match="was made for sd21-base; the model here is shapes"):
        released.attach(sd)


def test_lora_for_another_unet_is_refused(released):
    unet = load_stable_diffusion("shapes").denoiser
    with pytest.raises(ValueError, match=r"is for width \d+; this denoiser's .* has \d+|has no module"):
        load_lora(unet, released.lora, alpha=4)


DAMAGES = ["missing", "left over", "misshapen", "unknown", "half a LoRA", "a projection", "another rank", "1-D LoRA"]
DAMAGES += ["0-D", "1-D"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_released_files_name_the_tensor(golden, tmp_path, capsys, damage, flags):
    state = torch.load(golden / "stage2_pytorch_model.bin", weights_only=True)
    lora = next(key for key in state if key.startswith("unet.") and ".down." in key)
    up = lora.replace(".down.weight", ".up.weight")
    if damage == "missing":
        del state["query_embed.weight"]
    elif damage == "left over":
        state["transformer.encoder.layers.0.norm9.weight"] = torch.zeros(1)
    elif damage == "misshapen":
        state["class_embed.bias"] = torch.zeros(3)
    elif damage == "unknown":
        state["surprise"] = torch.zeros(1)
    elif damage == "half a LoRA":
        del state[lora]
    elif damage == "a projection":
        for part in ("down", "up"):
            del state[lora.rsplit("to_", 1)[0] + f"to_v_lora.{part}.weight"]
    elif damage == "another rank":
        state[up] = torch.zeros(len(state[up]), 3)
    elif damage == "1-D LoRA":
        state[lora] = torch.zeros(4)
    elif damage == "0-D":
        state["query_embed.weight"] = torch.tensor(0.0)
    else:
        state["input_proj.weight"] = torch.zeros(4)
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert main(["inspect", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err
    expected = {
        "missing": "query_embed.weight",
        "left over": "transformer.encoder_layers.0.norm9.weight is left over",
        "misshapen": "rec_head.class_embed.bias is (3,) instead of (256,)",
        "unknown": "surprise",
        "half a LoRA": lora_key(lora).split(".lora_")[0],
        "a projection": lora_key(lora).rsplit(".to_", 1)[0] + ".to_v.lora_A.weight is missing",
        "another rank": lora_key(up),
        "1-D LoRA": f"{lora_key(lora)} has 1 dimensions instead of 2",
        "0-D": "query_embed.weight has 0 dimensions instead of 2",
        "1-D": "input_proj.weight has 1 dimensions instead of 4",
    }[damage]
    assert expected in error
    assert error.count("\n") == 1


class Harmful:
    def __reduce__(self):
        return (print, ("run!",))


def test_pickles_of_anything_but_tensors_are_refused(tmp_path, capsys):
    (tmp_path / "a.bin").write_bytes(pickle.dumps({"x": Harmful()}))
    torch.save({"x": Harmful()}, tmp_path / "b.bin")
    torch.save({"step": 3, "model": {"w": torch.zeros(1)}}, tmp_path / "c.bin")
    (tmp_path / "d.safetensors").write_bytes(b"not at all")
    (tmp_path / "e.bin").write_text("<!doctype html>")
    for name in "a.bin", "b.bin", "c.bin", "d.safetensors", "e.bin", "missing.bin":
        assert main(["inspect", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert name in captured.err
        assert captured.err.count("\n") == 1
        assert ("something other than" in captured.err) == (name[0] in "abc")
        assert ("neither a file of torch.save nor of safetensors" in captured.err) == (name[0] == "e")
        assert "run!" not in captured.out


def deep_pickle(path, depth=3_000_000):
    """Lists within lists, whose objects would take a thousand times the file, in the place of a state dict."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
        archive.writestr("archive/version", "3\n")


def stored_deep_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 1_500_000 + b".")


def larger_than_its_storage(path):
    torch.save({"x": torch.zeros(1).expand(10**12)}, path)


def damaged_zip(path):
    torch.save({"x": torch.zeros(1)}, path)
    path.write_bytes(path.read_bytes().replace(b"PK\x03\x04", b"PK\x03\x05", 1))


STRANGE = {
    "passwd": b"root:x:0:0:root:/root:/bin/bash\n",
    "text": b"hello, this is a text\n",
    **{f"begins with {c}": c.encode() + b" and then a text" for c in "(.]abqu}"},
    "yaml": b"adapter:\n  hidden_dim: 3\n",
    "a half of a header": b"\x80\x02}q",
    "empty": b"",
    "a pickle of stack errors": b"\x80\x02aaaa.",
    "a pickle without memo": b"\x80\x02h\x07.",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
    "a zip": None,
    "a None key": {None: torch.zeros(1)},
    "int keys": {1: torch.zeros(1)},
    "a tuple key": {(1, 2): torch.zeros(1)},
    "meta tensors": {"query_embed.weight": torch.zeros(2, 2, device="meta")},
    "a sparse tensor": {"query_embed.weight": torch.eye(2).to_sparse()},
    "a list": [torch.zeros(1)],
    "an integer tensor": {"query_embed.weight": torch.zeros(2, 2, dtype=torch.int64)},
    "a deep pickle": deep_pickle,
    "a stored deep pickle": stored_deep_pickle,
    "a damaged zip": damaged_zip,
    "a tensor larger than its storage": larger_than_its_storage,
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_released_file_is_one_line(tmp_path, capsys, name):
    path, content = tmp_path / "pytorch_model.bin", STRANGE[name]
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "a")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif callable(content):
        content(path)
    else:
        torch.save(content, path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["inspect", str(path)]) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert ("git lfs pull" in error) == (name == "a git-lfs pointer")
    path.rename(tmp_path / "model.safetensors")
    if name not in ("meta tensors", "an integer tensor"):
        assert main(["inspect", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_of_safetensors_alone(golden, tmp_path, small, released):
    shutil.copy(golden / "stage2_pytorch_model.safetensors", tmp_path / "model.safetensors")
    assert load_checkpoint(tmp_path, **small).lora.keys() == released.lora.keys()


def test_weights_from_the_hub_s_cache(golden, tmp_path, small, released, monkeypatch, capsys):
    snapshot = tmp_path / "models--leigangqu--DPT-T2I/snapshots/0123"
    snapshot.mkdir(parents=True)
    shutil.copy(golden / "stage2_pytorch_model.bin", snapshot / "pytorch_model.bin")
    (tmp_path / "models--leigangqu--DPT-T2I/refs").mkdir()
    (tmp_path / "models--leigangqu--DPT-T2I/refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = load_checkpoint("leigangqu/DPT-T2I", local_files_only=True, **small)
    assert found.lora.keys() == released.lora.keys()
    assert found.released
    assert main(["inspect", "somebody/else", "--local-files-only"]) == 2
    error = capsys.readouterr().err
    assert "somebody/else is neither a path here nor to be had from the hub" in error
    assert error.count("\n") == 1


def test_weights_are_asked_of_the_hub(golden, small, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(golden / "accelerate_state")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_checkpoint("leigangqu/DPT-T2I", **small).released
    assert (asked["name"], asked["local_files_only"]) == ("leigangqu/DPT-T2I", False)
    assert {"pytorch_model.bin", "adapter.safetensors"} <= {*asked["allow_patterns"]}
    pipe = dpt.SelfCorrectionPipeline.from_pretrained(golden / "sd21", safety_checker=None)
    assert pipe.load_dpt("leigangqu/DPT-T2I", **small)._scorer.blocks == ("up1",)
    monkeypatch.chdir(golden.parent)
    with pytest.raises(ValueError, match="is not there"):  # a path beside what is here
        load_checkpoint(f"{golden.name}/dpt-v2.1")


def test_files_of_torch_s_older_format_are_read(golden, tmp_path, small, released):
    state = torch.load(golden / "stage2_pytorch_model.bin", weights_only=True)
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    again = load_checkpoint(tmp_path / "old.bin", **small)
    assert all(torch.equal(value, again.lora[name]) for name, value in released.lora.items())


def test_lora_of_all_attentions_is_asked_of_released_files(golden, released):
    released.lora = {name: value for name, value in released.lora.items() if not name.startswith("up_blocks.3")}
    with pytest.raises(ValueError, match=r"LoRA of \d+ attentions is missing, such as up_blocks.3"):
        released.attach(load_stable_diffusion(str(golden / "sd21")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--feature", "banana"], "feature is 'banana'"),
        (["--base_model", "banana"], "base_model is 'banana'"),
        (["--nheads", "3"], "nheads"),
    ],
)
def test_bad_settings_of_convert(golden, tmp_path, capsys, arguments, message):
    assert main(["convert", str(golden / "stage2_pytorch_model.bin"), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--nheads", "--num_queries_itm", "--fusion_size"])
@pytest.mark.parametrize("value", ["0", "-1", "1e9", "100000000"])
def test_numbers_out_of_range(capsys, flag, value):
    with pytest.raises(SystemExit, match="2"):
        main(["inspect", "x.bin", flag, value])
    assert f"{flag}: '{value}'; it must be a whole number at least 1" in capsys.readouterr().err


def test_converting_to_where_nothing_can_be_written(golden, tmp_path, capsys, flags):
    (tmp_path / "file").write_text("")
    assert main(["convert", str(golden / "stage2_pytorch_model.bin"), str(tmp_path / "file/out"), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_convert_and_inspect(golden, tmp_path, capsys, flags):
    assert main(["convert", str(golden / "stage2_pytorch_model.safetensors"), str(tmp_path / "out"), *flags]) == 0
    assert main(["inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    config = load_checkpoint(tmp_path / "out").config
    assert f"{config.adapter.num_queries_itm} ITM + {config.adapter.num_queries_rec} REC queries" in out
    assert f"rank {config.lora_rank}, alpha {config.lora_rank}" in out
    assert "up_blocks.1: 24 projections" in out


def test_a_config_that_does_not_fit_is_named(released, tmp_path, capsys):
    save_checkpoint(released, tmp_path / "dpt")
    adapter = released.config.adapter
    found = adapter.num_queries_rec
    released.config.adapter.num_queries_rec += 8
    save_config(released.config, tmp_path / "dpt/config.yaml")
    assert main(["inspect", str(tmp_path / "dpt")]) == 2
    expected = f"config.yaml: adapter.num_queries_rec is {found + 8}; adapter.safetensors is of {found}"
    assert expected in capsys.readouterr().err


CONFIG_VALUES = {
    "adapter.contrastive_dim": -1,
    "adapter.dim_feedforward": -1,
    "adapter.enc_layers": 10**7,
    "adapter.dec_layers": 10**7,
    "adapter.in_channels": [-1],
    "adapter.text_dim": -5,
    "adapter.hidden_dim": 2**40,
    "adapter.rec_text_dim": 2**40,
    "adapter.num_queries_itm": 10**9,
    "itm_layer": -99,
    "lora_rank": 10**9,
}


@pytest.mark.parametrize("field", CONFIG_VALUES)
def test_sizes_of_a_config_are_compared_before_memory_is_taken(released, tmp_path, capsys, monkeypatch, field):
    save_checkpoint(released, tmp_path / "dpt")
    config = yaml.safe_load((tmp_path / "dpt/config.yaml").read_text())
    *part, name = field.split(".")
    (config[part[0]] if part else config)[name] = CONFIG_VALUES[field]
    (tmp_path / "dpt/config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("dpt.checkpoint.checkpoint.DiscriminativeAdapter", None)
    if field == "lora_rank":
        monkeypatch.undo()
    assert main(["inspect", str(tmp_path / "dpt")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "config.yaml" in error
    assert name in error.replace("num_queries_rec", "num_queries_itm")


@pytest.mark.parametrize("damage", ["0-D", "B only", "another rank", "a stranger"])
def test_damaged_lora_of_ours_is_named(released, tmp_path, capsys, damage):
    save_checkpoint(released, tmp_path / "dpt")
    path = tmp_path / "dpt/lora/pytorch_lora_weights.safetensors"
    state = load_file(path)
    name = next(key for key in state if ".lora_A." in key)
    if damage == "0-D":
        state[name] = torch.tensor(1.0)
    elif damage == "B only":
        state = {key: value for key, value in state.items() if ".lora_B." in key}
        name = "lora_A.weight is missing"
    elif damage == "another rank":
        state = {k: v[:2] if ".lora_A." in k else v[:, :2].contiguous() for k, v in state.items()}
        name = "lora_rank is"
    else:
        state[name := "unet.conv_in.weight"] = torch.zeros(2, 2)
    save_file(state, path)
    assert main(["inspect", str(tmp_path / "dpt")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert name.removeprefix("unet.") in error


@pytest.mark.slow
def test_the_released_size_loads_converts_and_inspects_within_8_gb(golden, tmp_path, request):
    keys = golden / "stage2_pytorch_model.keys.json"
    command = [sys.executable, "-m", "tests.released_size", str(keys), str(tmp_path)]
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100 REC queries, text width 1024" in done.stdout
    assert "rank 4, alpha 4" in done.stdout
    assert float(done.stdout.splitlines()[-1]) < 8


def test_safetensors_of_the_released_layout(golden, tmp_path, small, released):
    state = load_file(golden / "stage2_pytorch_model.safetensors")
    save_file(state, tmp_path / "x.safetensors")
    assert load_checkpoint(tmp_path / "x.safetensors", **small).lora.keys() == released.lora.keys()
