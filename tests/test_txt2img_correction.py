import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import dpt
import txt2img
from dpt.adapter.adapter import DiscriminativeAdapter
from dpt.backbones.blocks import block_channels
from dpt.backbones.loading import load_stable_diffusion
from dpt.base_models import CKPT_FOLDER
from dpt.checkpoint.checkpoint import DPTCheckpoint, load_checkpoint, save_checkpoint
from dpt.checkpoint.released import adapter_key
from dpt.config import AdapterConfig, DPTConfig
from dpt.images import read_metadata

BASE = ["--model", "shapes", "--ddim_steps", "4", "--n_samples", "1", "--skip_grid", "--prompt", "a red circle"]


def draw(outdir, *arguments):
    try:
        return txt2img.main([*BASE, "--outdir", str(outdir), *arguments])
    except SystemExit as stop:  # argparse's, of flags that cannot be
        return stop.code


def picture(outdir):
    (record,) = read_metadata(outdir)
    return np.array(Image.open(outdir / record["file"])).astype(int)


@pytest.fixture
def weights(shapes_dpt):
    return ["--dpt", str(shapes_dpt)]


def test_the_first_line_says_weights_and_factor(tmp_path, capsys, weights):
    assert draw(tmp_path, *weights, "--dry-run") == 0
    said_first, first = capsys.readouterr().out.splitlines()[:2]
    assert said_first == "1 prompt(s) x 1 = 1 picture(s)"
    assert weights[1] in first
    assert "self-correction norm 0.012 (latent)" in first  # chosen for shapes
    for given, said in {
        "--correction_factor 0.5": "factor 0.5 (conditional)",
        "--correction_norm 0.1": "norm 0.1 (latent)",
        "--correction_target conditional": "norm 0.012 (conditional)",
        "--parity": "factor 0.5 (conditional)",
    }.items():
        assert draw(tmp_path, *weights, *given.split(), "--dry-run") == 0
        assert f"self-correction {said}" in capsys.readouterr().out.splitlines()[1]
    assert draw(tmp_path, "--dpt", "none", "--dry-run") == 0
    assert "without DPT weights" in capsys.readouterr().out.splitlines()[1]


def test_weights_that_belong_to_the_model_are_the_default(tmp_path, capsys, monkeypatch, shapes_dpt):
    monkeypatch.setitem(txt2img.DPT_WEIGHTS, "shapes", shapes_dpt)
    assert draw(tmp_path, "--dry-run") == 0
    assert "self-correction norm 0.012" in capsys.readouterr().out.splitlines()[1]
    shutil.copytree(shapes_dpt, tmp_path / "sd21")
    config = tmp_path / "sd21/config.yaml"
    config.write_text(config.read_text().replace("base_model: shapes", "base_model: sd21-base"))
    monkeypatch.setitem(txt2img.DPT_WEIGHTS, "sd21-base", tmp_path / "sd21")
    corrections = {str(CKPT_FOLDER / "shapes"): "norm 0.012", "stabilityai/stable-diffusion-2-1-base": "factor 0.5"}
    for name, said in corrections.items():
        assert draw(tmp_path, "--dry-run", "--model", name) == 0
        assert f"self-correction {said}" in capsys.readouterr().out.splitlines()[1]
    assert draw(tmp_path, "--dry-run", "--model", "someone/else") == 0
    assert "without DPT weights" in capsys.readouterr().out.splitlines()[1]


def test_golden_released_file_is_drawn_with(tmp_path, golden):
    """A `pytorch_model.bin` of the released layout, with the released number of queries and heads."""
    sd = load_stable_diffusion(str(golden / "sd21"))
    config = AdapterConfig(
        in_channels=[block_channels("up1", sd.denoiser.config)],
        hidden_dim=32,
        dim_feedforward=64,
        text_dim=sd.text_encoder.config.hidden_size,
    )
    ours = DiscriminativeAdapter(config).state_dict()
    keys = json.loads((golden / "stage2_pytorch_model.keys.json").read_text())
    state = torch.load(golden / "stage2_pytorch_model.bin", weights_only=True)
    state |= {key: ours[adapter_key(key)].clone() for key in keys if not key.startswith("unet.")}
    torch.save(state, tmp_path / "pytorch_model.bin")
    base = ["--model", str(golden / "sd21"), "--ddim_steps", "2", "--n_samples", "1", "--prompt", "a red cube"]
    for name, flags in (("parity", ["--parity"]), ("own", []), ("none", ["--correction_factor", "0"])):
        assert txt2img.main([*base, "--outdir", str(tmp_path / name), "--dpt", str(tmp_path), *flags]) == 0
    drawn = [picture(tmp_path / name) for name in ("parity", "own", "none")]
    assert (drawn[0] != drawn[1]).any()
    (record,) = read_metadata(tmp_path / "own")
    assert record["dpt_source"] == str(tmp_path / "pytorch_model.bin")


def test_every_flag_changes_the_picture_and_is_recorded(tmp_path, weights):
    strong = [*weights, "--correction_norm", "0.1"]
    variants = {
        "none": ["--dpt", "none"],
        "lora": [*weights, "--correction_factor", "0"],
        "factor": [*weights, "--correction_factor", "500"],
        "norm": strong,
        "target": [*strong, "--correction_target", "conditional"],
        "start": [*strong, "--correction_start", "0.5"],
        "stop": [*strong, "--correction_stop", "0.5"],
        "parity": [*weights, "--correction_factor", "500", "--parity"],
    }
    pictures = {}
    for name, flags in variants.items():
        assert draw(tmp_path / name, *flags) == 0
        pictures[name] = picture(tmp_path / name)
    names = list(pictures)
    for k, a in enumerate(names):
        for b in names[:k]:
            assert (pictures[a] != pictures[b]).any(), (a, b)
    (record,) = read_metadata(tmp_path / "target")
    settings = record["settings"]
    assert (settings["correction_norm"], settings["correction_target"]) == (0.1, "conditional")
    assert len(record["settings"]["dpt"]) == 16
    assert record["dpt_source"] == weights[1]
    chunks = Image.open(tmp_path / "target" / record["file"]).text
    assert (chunks["dpt_source"], chunks["model"]) == (weights[1], "shapes")
    assert chunks["weights"] == record["settings"]["weights"]
    (record,) = read_metadata(tmp_path / "lora")
    assert record["settings"]["correction_factor"] == 0
    assert record["settings"]["correction_norm"] is None


def test_trace_shows_both_arms(tmp_path, weights):
    assert draw(tmp_path, *weights, "--trace", "--correction_norm", "0.05", "--correction_stop", "0.5") == 0
    (image,) = json.loads((tmp_path / "trace-0000.json").read_text())
    assert (image["prompt"], image["seed"]) == ("a red circle", 42)
    assert len(image["corrected"]["score"]) == len(image["uncorrected"]["score"]) == 4
    assert image["corrected"]["relative_length"] == pytest.approx([0.05, 0.05, 0, 0], abs=1e-4)
    assert image["uncorrected"]["length"] == [0, 0, 0, 0]
    assert image["corrected"]["score"][0] == pytest.approx(image["uncorrected"]["score"][0], abs=1e-5)
    assert Image.open(tmp_path / "trace-0000.png").size[0] > 200
    traced = picture(tmp_path)
    assert draw(tmp_path / "plain", *weights, "--correction_norm", "0.05", "--correction_stop", "0.5") == 0
    assert (traced == picture(tmp_path / "plain")).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dpt", "nowhere"], "--dpt nowhere is not there"),
        (["--dpt", "none", "--correction_factor", "0.5"], "need an adapter: pass --dpt PATH"),
        (["--dpt", "none", "--trace"], "need an adapter"),
        (["--dpt", "tests"], "holds neither config.yaml"),
        (
            ["--correction_start", "0.8", "--correction_stop", "0.2"],
            "correction_start and correction_stop are 0.8 and 0.2",
        ),
        (["--correction_norm", "-1"], "--correction_norm: '-1'; it must be a number at least 0"),
        (["--correction_factor", "-1"], "--correction_factor: '-1'; it must be a number at least 0"),
        (["--correction_start", "-0.1"], "--correction_start: '-0.1'; it must be a number at least 0 and at most 1"),
        (["--dpt", "nobody/none-such", "--local-files-only"], "nobody/none-such is neither a path here nor"),
        (["--parity", "--correction_norm", "0.1"], "parity is the reference's sampling"),
        (["--parity", "--correction_target", "latent"], "parity is the reference's sampling"),
        (["--correction_factor", "nan"], "--correction_factor: 'nan'; it must be a number"),
    ],
)
def test_bad_input(tmp_path, capsys, weights, flags, message, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    assert draw(tmp_path, *([] if "--dpt" in flags else weights), *flags) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_a_trace_of_prompts_that_matplotlib_would_read_as_formulas(tmp_path, weights):
    prompt = ["--prompt", "a $circle", "--prompt", "$\\frac{", "--prompt", "一个圆"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw(tmp_path, *weights, "--trace", "--ddim_steps", "1", *prompt) == 0
    traces = json.loads((tmp_path / "trace-0000.json").read_text())
    assert [trace["prompt"] for trace in traces] == ["a red circle", "a $circle", "$\\frac{", "一个圆"]
    assert (tmp_path / "trace-0000.png").exists()


def test_a_length_of_0_may_have_a_target(tmp_path, weights):
    assert draw(tmp_path, *weights, "--correction_norm", "0", "--correction_target", "latent", "--dry-run") == 0


def test_a_trace_s_data_are_written_before_its_figure(tmp_path, weights, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("no figure")

    monkeypatch.setattr("dpt.score_traces.Figure", fail)
    assert draw(tmp_path, *weights, "--trace", "--ddim_steps", "1") == 2
    assert json.loads((tmp_path / "trace-0000.json").read_text())


def test_weights_from_the_hub(tmp_path, capsys, shapes_dpt, monkeypatch):
    hub = ["--dpt", "somebody/shapes-dpt"]
    assert draw(tmp_path, *hub, "--dry-run") == 0  # nothing is fetched
    assert "DPT weights somebody/shapes-dpt" in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(shapes_dpt))
    assert draw(tmp_path, *hub, "--ddim_steps", "1") == 0
    assert read_metadata(tmp_path)[0]["dpt_source"] == str(shapes_dpt)


def test_a_non_finite_score_stops_or_is_skipped(tmp_path, capsys, weights, monkeypatch):
    monkeypatch.setattr("dpt.matching_score.itm_score", lambda *a: a[0].sum((1, 2)) * float("nan"))
    assert draw(tmp_path, *weights) == 2
    assert "not finite at step 0" in capsys.readouterr().err
    assert draw(tmp_path, *weights, "--on_nan", "skip") == 0
    assert picture(tmp_path).std() > 0


def test_another_method_s_lora(tmp_path, shapes_dpt, capsys):
    common = ["--model", "shapes", "--prompt", "a red circle", "--n_samples", "1", "--ddim_steps", "2", "--skip_grid"]
    for name, more in (
        ("base", ["--dpt", "none"]),
        ("lora", ["--lora", str(shapes_dpt / "lora")]),
        ("dpt", ["--dpt", str(shapes_dpt), "--correction_factor", "0"]),
    ):
        assert txt2img.main([*common, *more, "--outdir", str(tmp_path / name)]) == 0
    pictures = {path.parts[-3]: path.read_bytes() for path in tmp_path.glob("*/samples/*.png")}
    pixels = {name: np.array(Image.open(next((tmp_path / name / "samples").glob("*.png")))) for name in pictures}
    assert (pixels["lora"] == pixels["dpt"]).all()
    assert (pixels["lora"] != pixels["base"]).any()
    assert f"LoRA {shapes_dpt / 'lora'}, without DPT weights" in capsys.readouterr().out
    assert [read_metadata(tmp_path / name)[0]["lora"] for name in ("base", "lora")] == [None, str(shapes_dpt / "lora")]
    both = ["--lora", str(shapes_dpt / "lora"), "--outdir", str(tmp_path / "both"), "--dpt", str(shapes_dpt)]
    for more in ([], ["--dry-run"]):
        assert txt2img.main([*common, *both, *more]) == 2
        assert f"{shapes_dpt} has a LoRA too" in capsys.readouterr().err


def test_a_folder_of_another_pipeline_of_the_same_family_takes_the_adapter(tmp_path, shapes_dpt):
    dpt.SelfCorrectionPipeline.from_pretrained(CKPT_FOLDER / "shapes").save_pretrained(tmp_path / "model")
    words = ["--prompt", "a red circle", "--n_samples", "1", "--ddim_steps", "2", "--outdir", str(tmp_path / "out")]
    assert txt2img.main(["--model", str(tmp_path / "model"), "--dpt", str(shapes_dpt), *words]) == 0


def test_an_adapter_chooses_among_another_lora_s_pictures(tmp_path, shapes_dpt):
    tuned = load_checkpoint(shapes_dpt)
    alone = replace(tuned.config, lora_rank=DPTConfig.lora_rank, lora_alpha=DPTConfig.lora_alpha)
    save_checkpoint(DPTCheckpoint(alone, tuned.adapter, {}), tmp_path / "adapter")
    common = ["--model", "shapes", "--prompt", "a red circle", "--n_samples", "1", "--ddim_steps", "4", "--skip_grid"]
    common += ["--lora", str(shapes_dpt / "lora")]
    chosen = ["--dpt", str(tmp_path / "adapter"), "--candidates", "3", "--correction_factor", "0"]
    assert txt2img.main([*common, *chosen, "--outdir", str(tmp_path / "chosen")]) == 0
    (record,) = read_metadata(tmp_path / "chosen")
    again = ["--seed", str(record["kept_seed"]), "--outdir", str(tmp_path / "alone")]
    assert txt2img.main([*common, *again]) == 0
    assert np.abs(picture(tmp_path / "chosen").astype(int) - picture(tmp_path / "alone")).max() <= 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "self-correction norm 0.012 (latent)"),
        (["--parity"], "self-correction factor 0.5 (conditional)"),
        (["--correction_factor", "3"], "self-correction factor 3 (conditional)"),
        (["--correction_factor", "0"], "no self-correction"),
        (["--candidates", "2"], "the best of 2 noises, chosen at 0.25 of the steps and self-correction norm 0.012"),
        (["--attend_and_excite"], "Attend-and-Excite"),
    ],
)
def test_the_committed_weights_recommend_a_sampling(tmp_path, capsys, flags, words):
    weights = ["--dpt", str(CKPT_FOLDER / "shapes-dpt")]
    assert draw(tmp_path, *weights, *flags, "--dry-run") == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "verifier, the best of 2 noises, chosen at 0.25 of the steps\n"),
        (["--candidates", "1"], "verifier, no self-correction\n"),
        (["--candidates", "4", "--choose_at", "0.4"], "the best of 4 noises, chosen at 0.4 of the steps\n"),
        (["--correction_norm", "0.01"], "chosen at 0.25 of the steps and self-correction norm 0.01 (conditional)\n"),
        (["--parity"], "self-correction factor 0.5 (conditional)\n"),
    ],
)
def test_the_embedded_model_chooses_early_by_default(tmp_path, capsys, flags, words):
    assert draw(tmp_path, *flags, "--dry-run") == 0
    assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--candidates", "1", "--choose_at", "0.25"], "candidates is 1; choosing needs at least 2"),
        (["--attention_step", "5"], "attention_step is set; it is for attend_and_excite"),
        (
            ["--correction_start", "0.9", "--correction_stop", "0.1"],
            "correction_start and correction_stop are 0.9 and 0.1",
        ),
        (["--H", "100"], "H is 100; it must be a positive multiple of 8"),
        (["--candidates", "2", "--seed", str(2**62 - 1)], "seeds would go beyond 2**62"),
        (["--lora", "nowhere"], "--lora nowhere is not there"),
    ],
)
def test_bad_input_beside_a_recommended_sampling(tmp_path, capsys, flags, message):
    assert draw(tmp_path, *flags, "--dry-run") == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_nothing_is_added_to_somebody_else_s_metadata(tmp_path, capsys):
    (tmp_path / "metadata.jsonl").write_text("hello\n")
    assert draw(tmp_path, "--dpt", "none", "--ddim_steps", "1") == 2
    assert "metadata.jsonl, line 1" in capsys.readouterr().err
    assert (tmp_path / "metadata.jsonl").read_text() == "hello\n"
