"""Own trajectories: drawing, judging, reading, and learning to rank them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import train_probe
import txt2img
from dpt.backbones.loading import load_stable_diffusion
from dpt.base_models import recommended
from dpt.checkpoint.checkpoint import load_checkpoint
from dpt.data.__main__ import main
from dpt.data.trajectories import RankedPrompts, read_shards
from dpt.drawing import Artist
from dpt.files import read_json_lines
from dpt.sampling import initial_noise
from dpt.tasks.ranking import ranking_loss
from tests.evaluation.test_scorers import save_tiny_blip

PROMPTS = [f"a {color} circle" for color in ("red", "blue", "green", "black", "purple", "cyan", "orange", "yellow")]
PROMPTS += ["two red squares", "a large blue star"]  # the tenth is held out
SETTINGS = {
    "model": "shapes",
    "noises": 2,
    "num_inference_steps": 2,
    "steps": "[0, 1]",
    "scorer": "shapes-clip",
    "prompts_per_shard": 4,
}


def draw(folder, prompts, **changes):
    words = [f"{key}={value}" for key, value in (SETTINGS | {"prompts": prompts} | changes).items()]
    config = folder.parent / "config.yaml"
    config.write_text(f"output: {folder}\n")
    return main(["trajectories", str(config), *words])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp("drawn") / "trajectories"
    assert draw(folder, prompts) == 0
    return folder


@pytest.fixture
def folder(drawn, tmp_path):
    """One that may be changed."""
    return Path(shutil.copytree(drawn, tmp_path / "trajectories"))


def read(folder, scorer="shapes-clip", **options):
    sd = load_stable_diffusion("shapes")
    return RankedPrompts(folder, scorer, model="shapes", latent_shape=sd.latent_shape(), **options)


def test_latents_are_those_that_the_artist_draws_from(drawn):
    (shard, *_), sd = read_shards(drawn), load_stable_diffusion("shapes")
    tensors, prompt = load_file(drawn / shard.file), shard.prompts[1]
    assert tensors["latents"].shape[:3] == (4, 2, 2)
    noise = initial_noise(prompt.seeds, sd.latent_shape())
    assert torch.equal(tensors["latents"][1, :, 0], noise.half())
    sampling = recommended("shapes").changed(num_inference_steps=2)
    drawings = Artist(sd).draw([prompt.text] * 2, prompt.seeds, sampling)
    final = torch.stack([drawing.latents for drawing in drawings])
    assert torch.allclose(tensors["final"][1].float(), final, atol=2e-3)  # half precision
    assert len({seed for shard in read_shards(drawn) for p in shard.prompts for seed in p.seeds}) == 2 * len(PROMPTS)


def test_a_killed_run_goes_on(drawn, folder, prompts):
    lines = (folder / "shards.jsonl").read_text().splitlines(keepends=True)
    labels = (folder / "labels_shapes-clip.jsonl").read_text()
    (folder / "shards.jsonl").write_text("".join(lines[:-1]) + lines[-1][:40])
    (folder / "labels_shapes-clip.jsonl").write_text(labels[:-90])
    assert draw(folder, prompts) == 0
    assert (folder / "shards.jsonl").read_text() == "".join(lines)
    again = [json.loads(line) for line in (folder / "labels_shapes-clip.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in labels.splitlines()]
    assert [(row["prompt"], row["seed"]) for row in again] == [(row["prompt"], row["seed"]) for row in before]
    assert [row["value"] for row in again] == pytest.approx([row["value"] for row in before], abs=1e-3)
    assert (folder / "00002.safetensors").read_bytes() == (drawn / "00002.safetensors").read_bytes()


def test_a_full_disk_is_one_line_and_loses_nothing(folder, prompts, capsys, monkeypatch):
    lines = (folder / "shards.jsonl").read_text().splitlines(keepends=True)
    (folder / "shards.jsonl").write_text(lines[0])

    def full(tensors, path):
        path.write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("dpt.data.draw_trajectories.save_file", full)
    assert draw(folder, prompts) == 2
    assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]
    assert (folder / "shards.jsonl").read_text() == lines[0]
    assert not list(folder.glob("*.tmp"))


def test_values_by_another_judge_are_refused(folder, prompts, capsys):
    path = folder / "labels_shapes-clip.jsonl"
    swap(path, '"judge": "shapes-clip ', '"judge": "shapes-clip 0')
    assert draw(folder, prompts) == 2
    assert "holds values by shapes-clip 0" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("scorer", ["oracel", "nowhere.jsonl"])
def test_a_scorer_that_is_none_is_named_before_anything_is_drawn(tmp_path, prompts, capsys, scorer):
    assert draw(tmp_path / "new", prompts, scorer=scorer) == 2
    assert scorer in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_values_of_one_s_own(folder, prompts):
    assert draw(folder, prompts, pictures="true", scorer="none") == 0
    names = sorted(path.name for path in (folder / "pictures").iterdir())
    assert len(names) == 2 * len(PROMPTS)
    mine = folder.parent / "mine.jsonl"
    mine.write_text("".join(json.dumps({"picture": name, "value": k}) + "\n" for k, name in enumerate(names)))
    assert draw(folder, prompts, scorer=mine) == 0
    ranked = read(folder, "mine")
    assert ranked.at(0, 0).values.tolist() == [0, 1]
    assert len(ranked) + len(read(folder, "mine", held_out=True)) == len(PROMPTS)


def test_held_out_prompts_are_not_trained_on(drawn):
    texts = [{prompt.text for prompt in read(drawn, held_out=held_out).prompts} for held_out in (False, True)]
    assert not texts[0] & texts[1]
    assert texts[1] == {PROMPTS[9]}
    assert len(read(drawn, num_prompts=5)) == 5


def test_ranking_loss_is_the_mean_over_pairs():
    scores = torch.tensor([[0.1, 0.4, 0.3], [0.2, 0.2, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    values = torch.tensor([[1.0, 0.0, 0.5], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    loss = ranking_loss(scores, values, torch.tensor(10.0))
    pairs = [[(0, 1), (0, 2), (2, 1)], [(0, 1), (0, 2)]]
    each = [
        np.mean([np.log1p(np.exp(10 * (row[b] - row[a]))) for a, b in own])
        for own, row in zip(pairs, scores.detach().numpy(), strict=False)
    ]
    assert loss.item() == pytest.approx(np.mean(each), rel=1e-5)
    loss.backward()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 1]
    assert not scores.grad[2].any()  # all are as good
    assert ranking_loss(scores, torch.ones(3, 3), torch.tensor(1.0)) == 0


def train(folder, drawn, *overrides):
    words = [
        *("adapter.hidden_dim=32", "adapter.nheads=4", "adapter.dim_feedforward=32", "optim.mixed_precision=no"),
        *("optim.steps=4", "checkpoints.every=2", "validation.every=2", "validation.num_samples=4", "log_every=1"),
        *("optim.warmup_steps=0", "optim.schedule=constant", "data.prompts_per_step=3", "data.labels=shapes-clip"),
        *(f"output_folder={folder}", f"data.trajectories={drawn}", "adapter.normalize_features=true"),
    ]
    return train_probe.main(["configs/shapes/verifier.yaml", *words, *overrides])


def metrics(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_a_verifier_is_trained_and_goes_on(tmp_path, drawn):
    assert train(tmp_path / "whole", drawn) == 0
    assert train(tmp_path / "cut", drawn, "optim.steps=2") == 0
    assert train(tmp_path / "cut", drawn, "resume=true") == 0
    whole, cut = (load_checkpoint(tmp_path / name / "run").adapter.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    assert whole["feature_std"].min() > 0
    assert whole["feature_std"].max() != 1
    figures = [row for row in metrics(tmp_path / "whole") if "rank_auc" in row]
    assert {"rank_auc_low", "rank_auc_step_0", "rank_auc_step_1"} <= figures[-1].keys()
    best = load_checkpoint(tmp_path / "whole/run/best").adapter.state_dict()
    at = max(figures, key=lambda row: row["rank_auc"])["step"]
    kept = load_checkpoint(tmp_path / f"whole/run/checkpoints/step_{at:07d}").adapter.state_dict()
    assert all(torch.equal(value, best[name]) for name, value in kept.items())


@pytest.mark.slow
def test_stable_diffusion_from_prompts_to_a_chosen_picture(tmp_path, golden, prompts):
    """configs/sd21's commands, on a small random model of the same classes and a small random BLIP."""
    save_tiny_blip(tmp_path / "tiny-blip")
    words = [
        f"model={golden / 'sd21'}",
        f"prompts={prompts}",
        f"output={tmp_path / 'own'}",
        f"blip={tmp_path / 'tiny-blip'}",
    ]
    words += ["num_inference_steps=3", "steps=[0, 2]", "noises=2", "dtype=float32"]
    assert main(["trajectories", "configs/sd21/trajectories.yaml", *words]) == 0
    labels = tmp_path / "own/labels_blip.jsonl"
    rows = read_json_lines(labels, dict)
    assert len(rows) == 2 * len(PROMPTS)
    # the small model's pictures are all grey
    labels.write_text("".join(json.dumps(row | {"value": row["value"] + k}) + "\n" for k, row in enumerate(rows)))
    words = [f"model.name={golden / 'sd21'}", f"model.rec_text_encoder={golden / 'roberta'}", "optim.steps=2"]
    words += ["optim.mixed_precision=no", "validation.every=1", f"data.trajectories={tmp_path / 'own'}"]
    words += [f"output_folder={tmp_path}", "run_name=verifier", "adapter.dim_feedforward=32", "data.prompts_per_step=2"]
    assert train_probe.main(["configs/sd21/verifier.yaml", *words]) == 0
    words = ["--model", golden / "sd21", "--dpt", tmp_path / "verifier/best", "--outdir", tmp_path / "pictures"]
    words += [
        "--prompt",
        "a red dog",
        "--candidates",
        "4",
        "--choose_at",
        "0.25",
        "--ddim_steps",
        "4",
        "--n_samples",
        "1",
    ]
    assert txt2img.main([str(word) for word in words]) == 0
    (record,) = read_json_lines(tmp_path / "pictures/metadata.jsonl", dict)
    assert [one["steps"] for one in record["candidates"]].count(1) == 3


def test_an_epoch_goes_once_over_the_prompts(tmp_path, drawn):
    assert train(tmp_path, drawn, "optim.epochs=2", "data.prompts_per_step=4") == 0
    assert max(row["step"] for row in metrics(tmp_path)) == 5  # twice nine prompts, four a step


def test_patience_ends_a_run(tmp_path, drawn):
    words = ["optim.lr=0", "optim.steps=20", "validation.every=1", "validation.patience=2"]
    assert train(tmp_path, drawn, *words) == 0
    assert max(row["step"] for row in metrics(tmp_path)) == 3  # the first is the best, and two are no better
    assert max(path.name for path in tmp_path.glob("*/checkpoints/step_*")) == "step_0000003"  # of the last step too


def test_trajectories_beside_the_paper_s_losses(tmp_path, drawn):
    words = ["data.kind=shapes", "data.num_samples=6", "optim.batch_size=2", f"data.cache_folder={tmp_path / 'cache'}"]
    words += ["loss.itm_every=2", "loss.auxiliary=true", "adapter.dec_layers=2", "adapter.value_positions=true"]
    assert train(tmp_path, drawn, *words, "validation.timesteps=[500]", "validation.every=4") == 0
    steps = [row for row in metrics(tmp_path) if "loss_rank" in row]
    assert ["loss_itm_i2t" in row for row in steps] == [True, False, True, False]
    assert all("loss_ce" in row for row in steps)
    assert all(row["total"] > row["loss_rank"] for row in steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "[0, 2]"}, "steps names step 2; 2 steps are 0 to 1"),
        ({"steps": "[1]"}, "holds trajectories of steps [0, 1] (now [1])"),
        ({"noises": 3}, "holds trajectories of noises 2 (now 3)"),
        ({"guidance_scale": 2}, "guidance_scale 5.0 (now 2.0)"),
        ({"scorer": "nobody"}, "scorer is 'nobody'; it must be oracle"),
        ({"scorer": "none.jsonl"}, "none.jsonl cannot be read"),
        ({"noises": 1}, "noises is 1"),
        ({"steps": "[]"}, "steps is []"),
        ({"prompts": "shapes:val", "excluded": "[shapes:val]"}, "are in shapes:val, which is evaluated on"),
        ({"model": "sd21-base"}, "sd21-base"),
    ],
)
def test_bad_settings_are_one_line(folder, prompts, capsys, change, message):
    before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
    assert draw(folder, **({"prompts": prompts} | change)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


def test_settings_may_stand_before_and_behind_flags(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: shapes\n")
    words = ["trajectories", str(tmp_path / "config.yaml"), "seed=1", "--device", "cpu"]
    assert main([*words, "noises=1"]) == 2
    assert "noises is 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*words, "noises=2", "--noises"])
    assert "unrecognized arguments: --noises" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "00001.safetensors").write_bytes(b"x"), "differs from its checksum"),
        (lambda f: (f / "00001.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "trajectories.json").unlink(), "holds no trajectories.json"),
        (lambda f: (f / "labels_shapes-clip.jsonl").unlink(), "has values by no scorer yet"),
        (lambda f: cut(f / "labels_shapes-clip.jsonl", 3), "has no value for seed"),
        (lambda f: replace_values(f, "1.0"), "equal within every prompt"),
        (lambda f: replace_values(f, "1e999"), "value"),
        (lambda f: swap(f / "trajectories.json", '"shapes"', '"sd15"'), "holds trajectories of sd15"),
    ],
)
def test_bad_folders_are_one_line(tmp_path, folder, capsys, spoil, message):
    spoil(folder)
    assert train(tmp_path / "runs", folder) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_settings_that_exclude_each_other(tmp_path, drawn, capsys):
    for words, message in (
        (["data.trajectories=null"], "data.trajectories is missing"),
        (["loss.weights.rank=0"], "nothing would be trained"),
        (["control=text_blind"], "controls are of the paper's losses"),
        (["validation.best=null", "validation.patience=2"], "validation.best"),
        (["validation.best=nothing"], "validation.best is 'nothing'; the figures are rank_auc"),
    ):
        assert train(tmp_path / message.split()[0], drawn, *words) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def cut(path, lines):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


def swap(path, old, new):
    path.write_text(path.read_text().replace(old, new))


def replace_values(folder, value):
    path = folder / "labels_shapes-clip.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(
        "".join(json.dumps(row | {"value": 0}).replace('"value": 0', f'"value": {value}') + "\n" for row in rows)
    )
