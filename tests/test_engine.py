import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import train_probe
import train_tune
from dpt.backbones.loading import load_stable_diffusion
from dpt.checkpoint.checkpoint import load_checkpoint
from dpt.config import CONTROLS, load_config
from dpt.data.loader import step_indices
from dpt.lora import lora_state
from dpt.model import DPT
from dpt.training.settings import OptimSettings, TrainConfig
from dpt.training.trainer import Trainer, learning_rate_factor, make_accelerator, schedule_stretch

TINY = {
    "probe": "configs/shapes/probe.yaml",
    "tune": "configs/shapes/tune.yaml",
}
COMMON = [
    "optim.mixed_precision=no",
    "adapter.hidden_dim=32",
    "adapter.nheads=4",
    "adapter.dim_feedforward=32",
    "data.num_samples=12",
    "validation.num_samples=8",
    "optim.batch_size=4",
    "optim.steps=6",
    "optim.warmup_steps=2",
    "checkpoints.every=2",
    "validation.every=3",
    "validation.timesteps=[500]",
    "samples.every=-1",
    "log_every=1",
]
SCRIPTS = {"probe": train_probe.main, "tune": train_tune.main}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _from_repository_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def run(stage, folder, cache, *overrides):
    places = [f"output_folder={folder}", f"data.cache_folder={cache}"]
    start = ["init_from=new"] if stage == "tune" else []
    return SCRIPTS[stage]([TINY[stage], *COMMON, *places, *start, *overrides])


def weights(folder, step):
    checkpoint = load_checkpoint(folder / f"run/checkpoints/step_{step:07d}")
    # files are memory-mapped, and some tests damage them
    return {name: value.clone() for name, value in (checkpoint.adapter.state_dict() | checkpoint.lora).items()}


def metrics(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["probe", pytest.param("tune", marks=pytest.mark.slow)])
def test_a_run_and_its_resumption_are_equal(tmp_path, cache, stage):
    assert run(stage, tmp_path / "whole", cache) == 0
    assert run(stage, tmp_path / "cut", cache, "checkpoints.keep=1", "optim.steps=4", "optim.schedule=constant") == 0
    assert run(stage, tmp_path / "again", cache, "optim.schedule=constant") == 0
    assert run(stage, tmp_path / "cut", cache, "resume=true", "optim.schedule=constant") == 0
    whole, cut = weights(tmp_path / "again", 6), weights(tmp_path / "cut", 6)
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name
    losses = [
        [{k: v for k, v in r.items() if k.startswith(("loss", "total", "itm", "rec"))} for r in metrics(folder)]
        for folder in (tmp_path / "again", tmp_path / "cut")
    ]
    assert losses[0][-3:] == losses[1][-3:]
    moved = [name for name, value in weights(tmp_path / "whole", 2).items() if not torch.equal(value, whole[name])]
    assert len(moved) > 0.9 * len(whole)
    assert any(".lora_" in name for name in whole) == (stage == "tune")
    kept = sorted(path.name for path in (tmp_path / "again/run/checkpoints").iterdir())
    assert kept == ["step_0000002", "step_0000004", "step_0000006"]


def test_tune_starts_from_a_probe(tmp_path, cache):
    assert run("probe", tmp_path / "probe", cache, "optim.steps=2") == 0
    start = tmp_path / "probe/run/checkpoints/step_0000002"
    assert run("tune", tmp_path / "tune", cache, f"init_from={start}", "optim.steps=1", "optim.lr=1e-12") == 0
    before, after = load_checkpoint(start), load_checkpoint(tmp_path / "tune/run/checkpoints/step_0000001")
    assert torch.allclose(before.adapter.itm_head.logit_scale, after.adapter.itm_head.logit_scale, atol=1e-6)
    assert torch.allclose(before.adapter.query_embed.weight, after.adapter.query_embed.weight, atol=1e-6)
    assert not before.lora
    assert after.lora


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, cache, capsys):
    assert run("probe", tmp_path, cache, "optim.steps=4", "checkpoints.keep=2") == 0
    reference = weights(tmp_path, 4)
    folder = tmp_path / "run/checkpoints"
    damaged = folder / "step_0000004/adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    (folder / ".step_0000006-killed").mkdir()
    assert run("probe", tmp_path, cache, "resume=true", "optim.steps=4", "checkpoints.keep=2") == 0
    assert "step_0000004 is damaged and passed over" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["damaged_step_0000004", "step_0000002", "step_0000004"]
    assert all(torch.equal(value, reference[name]) for name, value in weights(tmp_path, 4).items())
    for path in folder.glob("step_*/adapter.safetensors"):
        path.write_bytes(b"")
    assert run("probe", tmp_path, cache, "resume=true", "optim.steps=4") == 2
    assert "none of the 2 checkpoints" in capsys.readouterr().err
    assert metrics(tmp_path)


def test_another_run_is_not_resumed(tmp_path, cache, capsys):
    assert run("probe", tmp_path, cache, "optim.steps=2") == 0
    assert run("tune", tmp_path, cache, "resume=true") == 2
    assert "is a probe; resume it with train_probe.py" in capsys.readouterr().err
    assert run("probe", tmp_path, cache, "resume=true", "seed=3") == 2
    assert "seed 42 (now 3)" in capsys.readouterr().err
    path = tmp_path / "run/config.yaml"  # as runs older than these settings have it
    lines = path.read_text().splitlines(keepends=True)
    older = [line for line in lines if "latent_sample" not in line and "schedule_length" not in line]
    assert len(older) == len(lines) - 2
    path.write_text("".join(older))
    assert run("probe", tmp_path, cache, "resume=true", "optim.steps=3", "checkpoints.every=1") == 0


def test_a_run_that_failed_to_start_leaves_its_name_free(tmp_path, cache):
    assert run("probe", tmp_path, cache, "model.feature=up9") == 2
    assert run("probe", tmp_path, cache, "optim.steps=1") == 0


@pytest.mark.slow
def test_options_do_something(tmp_path, cache):
    assert run("tune", tmp_path / "base", cache, "optim.steps=1") == 0
    base = metrics(tmp_path / "base")[0]
    variants = {
        "loss.snr_gamma=0.01": "loss_denoise",
        "loss.normalize_positive_map=false": "loss_ce",
        "loss.eos_coef=0.5": "loss_ce",
        "loss.temperature=0.2": "loss_contrastive_align",
        "noise.offset=0.3": "loss_denoise",
        "noise.last_timestep=50": "loss_denoise",
        "model.feature=mid": "loss_itm_i2t",
        "seed=7": "loss_itm_i2t",
        "loss.align_to_padding=true": "loss_contrastive_align",
        "loss.cost_bbox=0": "loss_bbox",
        "data.negatives=mined": "loss_itm_t2i",
        "adapter.position_embedding=learned": "loss_itm_i2t",
    }
    for k, (override, name) in enumerate(variants.items()):
        assert run("tune", tmp_path / str(k), cache, "optim.steps=1", override) == 0
        assert metrics(tmp_path / str(k))[0][name] != pytest.approx(base[name], rel=1e-6), override
    assert run("tune", tmp_path / "off", cache, "optim.steps=1", "loss.weights.denoise=0") == 0
    assert "loss_denoise" not in metrics(tmp_path / "off")[0]
    blocks = "lora.blocks=[down0,up1]"
    assert run("tune", tmp_path / "blocks", cache, "optim.steps=1", blocks, "lora.rank=2", "lora.alpha=8") == 0
    checkpoint = load_checkpoint(tmp_path / "blocks/run/checkpoints/step_0000001")
    assert {key.split(".attentions")[0] for key in checkpoint.lora} == {"down_blocks.0", "up_blocks.1"}
    assert (checkpoint.config.lora_rank, checkpoint.config.lora_alpha) == (2, 8.0)


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_loss(tmp_path, cache):
    assert run("tune", tmp_path / "a", cache, "optim.steps=2") == 0
    assert run("tune", tmp_path / "b", cache, "optim.steps=2", "model.gradient_checkpointing=true") == 0
    for plain, checkpointed in zip(metrics(tmp_path / "a")[:2], metrics(tmp_path / "b")[:2], strict=True):
        for name in [name for name in plain if name.startswith("loss")]:
            assert checkpointed[name] == pytest.approx(plain[name], rel=1e-4), name


def test_lora_alone_leaves_the_adapter(tmp_path, cache, capsys):
    assert run("tune", tmp_path / "none", cache, "lora.only=true") == 2
    assert "lora.only is true" in capsys.readouterr().err
    assert run("probe", tmp_path / "probe", cache, "optim.steps=1") == 0
    start = tmp_path / "probe/run/checkpoints/step_0000001"
    assert run("tune", tmp_path / "tune", cache, "lora.only=true", f"init_from={start}", "optim.steps=3") == 0
    before, after = load_checkpoint(start), load_checkpoint(tmp_path / "tune/run/checkpoints/step_0000003")
    for name, value in before.adapter.state_dict().items():
        assert torch.equal(value, after.adapter.state_dict()[name]), name
    assert any(value.any() for name, value in after.lora.items() if ".lora_B." in name)


def test_a_bare_no_is_no_mixed_precision():
    assert load_config(TrainConfig, TINY["probe"], ["optim.mixed_precision=no"]).optim.mixed_precision == "no"


def test_what_a_run_leaves_behind(tmp_path, cache):
    pictures = ["samples.every=1", "samples.num_inference_steps=2", "samples.prompts=[a red circle]"]
    assert run("probe", tmp_path, cache, "optim.steps=2", "tracker=tensorboard", *pictures) == 0
    folder = tmp_path / "run"
    log = (folder / "log.txt").read_text()
    for part in ("probe run from step 0", "torch 2.", "parameters to train", "12 samples, 2 steps", "done: "):
        assert part in log
    assert Image.open(folder / "curves.png").width > 500
    grids = [np.array(Image.open(folder / f"samples/step_000000{k}.png")) for k in (1, 2)]
    plain, corrected = [[grid[:, a:b] for grid in grids] for a, b in ((200, 584), (584, 968))]
    assert (plain[0] == plain[1]).all()  # the U-Net is frozen: the same prompts and seeds
    assert (corrected[0] != corrected[1]).any()
    assert list((folder / "dpt").glob("events*"))
    assert load_config(TrainConfig, folder / "config.yaml").optim.steps == 2


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, cache):
    """Stood for by a limit on the size of files, which a checkpoint exceeds."""
    assert run("probe", tmp_path, cache, "optim.steps=2") == 0
    good = weights(tmp_path, 2)
    more = [
        "optim.steps=4",
        "resume=true",
        *(f"{k}={v}" for k, v in (("output_folder", tmp_path), ("data.cache_folder", cache))),
    ]
    program = (
        "import resource, sys; import train_probe; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); sys.exit(train_probe.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, TINY["probe"], *COMMON, *more], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr[-2000:]
    error = done.stderr.strip().splitlines()[-1]
    assert "cannot be written to ([Errno 27] File too large)" in error
    assert "the last good checkpoint is" in error
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_0000002"]
    assert all(torch.equal(value, good[name]) for name, value in weights(tmp_path, 2).items())


@pytest.mark.slow
def test_processes_and_accumulation_equal_the_joint_batch(tmp_path, coco_tree):
    """Losses and gradients of a step, gloo on the CPU, dropout off; images have 0, 1 or 3 boxes."""
    tree = tmp_path / "data"
    shutil.copytree(coco_tree, tree)
    path = tree / "annotations/finetune_refall_train.json"
    content = json.loads(path.read_text())
    others = content["annotations"][1:]
    more = [others[0] | {"id": 900 + k, "bbox": [10 + 20 * k, 20, 30, 40]} for k in range(2)]
    path.write_text(json.dumps(content | {"annotations": others + more}))
    results = {}
    for name, processes, batch, accumulation in (("joint", 1, 8, 1), ("parts", 1, 2, 4), ("two", 2, 2, 2)):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        arguments = [TINY["tune"], *COMMON, f"output_folder={tmp_path / name}", "data.kind=coco", f"data.root={tree}"]
        arguments += ["init_from=new", "adapter.dropout=0", "optim.steps=1", f"optim.batch_size={batch}"]
        # images that are not of the model's world lose digits where there is little noise on them
        arguments += ["noise.first_timestep=500"]
        arguments += [f"optim.gradient_accumulation_steps={accumulation}", "data.num_samples=8"]
        done = subprocess.run(
            [*launch, "-m", "tests.gradients_of_a_step", str(tmp_path / f"{name}.pt"), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results[name] = torch.load(tmp_path / f"{name}.pt"), metrics(tmp_path / name)
    joint, figures = results["joint"]
    assert len(joint) > 100
    assert sum(gradient.square().sum() for gradient in joint.values()) == pytest.approx(1, abs=1e-3)  # clipped
    for gradients, same in (results["parts"], results["two"]):
        assert joint.keys() == gradients.keys()
        for name, gradient in joint.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-5)
        for name in [name for name in figures[0] if name.startswith("loss")]:
            assert same[0][name] == pytest.approx(figures[0][name], rel=1e-5), name
        for name in [name for name in figures[1] if name.startswith(("itm", "rec"))]:
            assert same[1][name] == pytest.approx(figures[1][name]), name


@pytest.mark.slow
def test_under_accelerate_launch(tmp_path, cache, request):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    settings = [*COMMON, f"output_folder={tmp_path}", f"data.cache_folder={cache}", "optim.steps=1"]
    done = subprocess.run(
        [*launch, "train_probe.py", TINY["probe"], *settings],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "probe run from step 0, 1 process(es)" in (tmp_path / "run/log.txt").read_text()
    assert metrics(tmp_path)[0]["step"] == 1


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path, cache):
    """A run that is killed at 20 random moments (mid-step, mid-accumulation, mid-save) ends as one that never is."""
    settings = [TINY["tune"], *COMMON, f"data.cache_folder={cache}", "optim.steps=40", "checkpoints.every=1"]
    settings += ["checkpoints.keep=2", "optim.gradient_accumulation_steps=2", "optim.batch_size=2"]
    settings += ["validation.every=20", "init_from=new", "optim.mixed_precision=bf16"]
    command = [sys.executable, "-m", "tests.killed_run", str(tmp_path), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["kills"] == 20
    whole, killed = weights(tmp_path / "whole", 40), weights(tmp_path / "killed", 40)
    assert whole.keys() == killed.keys()
    for name, value in whole.items():
        assert torch.equal(value, killed[name]), name
    timing = ("samples_per_second", "peak_memory_mb")
    records = [
        [{k: v for k, v in r.items() if k not in timing} for r in metrics(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert records[0] == records[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["optim.steps=many"], "optim.steps"),
        (["optim.steps=0"], "optim.steps is 0"),
        (["model.feature=up9"], "feature is 'up9'"),
        (["init_from=nowhere"], "nowhere is not there"),
        (["init_from=null"], "init_from is missing: tune starts from a probe"),
        (["model.name=/nowhere"], "/nowhere"),
        (["optim.mixed_precision=fp16"], "a CPU trains in bf16"),
        (["tracker=nothing"], "tracker 'nothing'"),
        (["noise.last_timestep=5000"], "noise.last_timestep is 5000; this model's last is 999"),
        (["data.kind=imagenet"], "data.kind is 'imagenet'"),
        (["validation.timesteps=[]"], "validation.timesteps is []"),
        (["validation.timesteps=[1500]"], "validation.timesteps is 1500; this model's last is 999"),
        (["optim.lr=-1"], "optim.lr is -1"),
        (["optim.epochs=0"], "optim.epochs is 0"),
        (["optim.betas=[0.9]"], "optim.betas is [0.9]"),
        (["lora.alpha=0"], "lora.alpha is 0"),
        (["adapter.dropout=2"], "dropout is 2"),
        (
            ["loss.weights={itm_i2t: 0, itm_t2i: 0, ce: 0, bbox: 0, giou: 0, contrastive_align: 0}"],
            "loss.weights are all 0",
        ),
        (["data.negatives=best"], "data.negatives is 'best'"),
        (["noise.first_timestep=10", "noise.last_timestep=5"], "they need 0 <= first <= last"),
        (["lora.blocks=[down3]"], "there is no attention in them"),
        (["lora.blocks=[up1,up9]"], "lora.blocks is 'up9'"),
        (["adapter.nheads=0"], "nheads is 0"),
        (["adapter.hidden_dim=0"], "hidden_dim is 0"),
        (["samples.num_inference_steps=0"], "samples.num_inference_steps is 0"),
        (["samples.num_images=0"], "samples.num_images is 0"),
        (["samples.every=0", "samples.prompts=[]"], "samples.prompts are 0"),
        (["samples.every=-7"], "samples.every is -7"),
        (["loss.temperature=0"], "loss.temperature is 0"),
        (["loss.snr_gamma=-1"], "loss.snr_gamma is -1"),
        (["loss.eos_coef=-1"], "loss.eos_coef is -1"),
        (["loss.cost_giou=-1"], "loss.cost_giou is -1"),
        (["optim.max_grad_norm=0"], "optim.max_grad_norm is 0"),
        (["optim.lr=nan"], "optim.lr is nan"),
        (["noise.offset=-1"], "noise.offset is -1"),
        (["seed=-1"], "seed is -1"),
        (["seed=${nope}"], "nope"),
        (["control=luck"], "control is 'luck'"),
        (["loss.denoise_negatives=true", "loss.weights.denoise=0"], "nothing would be denoised"),
        (["data.num_samples=1"], "random negatives need at least 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, cache, capsys, overrides, message):
    assert run("tune", tmp_path, cache, *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "keys and values are expected"),
        (b"optim: {lr: \xff}\n", "cannot be read"),
        (b"optim: {lr: 1", "cannot be read"),
        (b"optim: {lrr: 1}\n", "did you mean optim.lr?"),
        (b"optim: {steps: many}\n", "optim.steps"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, capsys, content, message):
    path = tmp_path / "bad.yaml"
    if content is not None:
        path.write_bytes(content)
    assert SCRIPTS["probe"]([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert message in error


@pytest.mark.parametrize(
    "setting", ["lora.rank=2", "lora.blocks=[up1]", "loss.snr_gamma=5", "loss.denoise_negatives=true"]
)
def test_settings_of_tune_are_refused_in_probe(tmp_path, cache, capsys, setting):
    assert run("probe", tmp_path, cache, setting) == 2
    assert "it is for tune" in capsys.readouterr().err


def test_an_existing_run_is_refused(tmp_path, cache, capsys):
    assert run("probe", tmp_path, cache, "optim.steps=1") == 0
    assert run("probe", tmp_path, cache, "optim.steps=1") == 2
    assert "pass resume=true" in capsys.readouterr().err
    for path in (tmp_path / "run/metrics.jsonl", *(tmp_path / "run/checkpoints").iterdir()):
        path.unlink() if path.is_file() else shutil.rmtree(path)  # as in its first steps
    assert run("probe", tmp_path, cache, "optim.steps=1") == 2


def test_old_checkpoints_are_removed(tmp_path, cache):
    assert run("probe", tmp_path, cache, "optim.steps=4", "checkpoints.keep=1") == 0
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_0000004"]


def test_tune_goes_on_without_naming_its_probe_again(tmp_path, cache, capsys):
    assert run("tune", tmp_path, cache, "optim.steps=1") == 0
    assert run("tune", tmp_path, cache, "optim.steps=2", "resume=true", "init_from=null") == 0
    assert run("tune", tmp_path / "none", cache, "resume=true", "init_from=null") == 2
    assert "init_from is missing" in capsys.readouterr().err


def test_another_start_is_not_resumed(tmp_path, cache, capsys):
    assert run("tune", tmp_path, cache, "optim.steps=1") == 0
    assert run("tune", tmp_path, cache, "resume=true", "init_from=ckpt/shapes-dpt/probe") == 2
    assert "init_from" in capsys.readouterr().err
    assert run("tune", tmp_path, cache, "resume=true", "init_from=null", "optim.steps=1") == 0
    assert "nothing is left to train: the run is at step 1, and 1 are asked for" in capsys.readouterr().out
    assert load_config(TrainConfig, tmp_path / "run/config.yaml").init_from == "new"


def test_a_run_from_a_lora_begins_with_it(tmp_path, cache):
    assert run("tune", tmp_path, cache, "optim.steps=1") == 0
    changes = ["run_name=more", f"init_from={tmp_path / 'run'}"]
    trainer = Trainer(load_config(TrainConfig, tmp_path / "run/config.yaml", changes), "tune")
    start, found = load_checkpoint(tmp_path / "run").lora, lora_state(trainer.sd.denoiser)
    assert found.keys() == start.keys()
    assert all(torch.equal(found[name].cpu(), tensor) for name, tensor in start.items())
    trained = [name for name, p in trainer.sd.denoiser.named_parameters() if p.requires_grad]
    assert len(trained) == len(start)


def test_an_interrupt_says_how_to_go_on(tmp_path, cache, capsys, monkeypatch):
    def interrupted(trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr("dpt.training.trainer.Trainer.train", interrupted)
    assert run("probe", tmp_path, cache) == 130
    assert "interrupted; the same command with resume=true goes on" in capsys.readouterr().err


def test_a_file_in_the_run_folder_s_place_is_named(tmp_path, cache, capsys):
    (tmp_path / "run").write_text("mine")
    assert run("probe", tmp_path, cache) == 2
    assert "is a file: choose another run_name" in capsys.readouterr().err


def test_another_joint_batch_is_not_resumed(tmp_path, cache, capsys):
    assert run("probe", tmp_path, cache, "optim.steps=1") == 0
    state = tmp_path / "run/checkpoints/step_0000001/training_state/state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"samples_per_step": 8}))
    assert run("probe", tmp_path, cache, "resume=true") == 2
    assert "trains on 8 samples a step, here it would on 4" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_joint_batch_in_other_parts_is_resumed(tmp_path, cache, capsys):
    """Four samples in one batch go on as two of two: the same run but for rounding, where there is no dropout."""
    other = ["optim.batch_size=2", "optim.gradient_accumulation_steps=2", "optim.schedule=constant"]
    for name in ("whole", "cut"):
        steps = 2 if name == "cut" else 3
        assert run("probe", tmp_path / name, cache, f"optim.steps={steps}", "optim.schedule=constant") == 0
    capsys.readouterr()
    assert run("probe", tmp_path / "cut", cache, "resume=true", "optim.steps=3", *other) == 0
    assert "the same 4 samples a step as before" in capsys.readouterr().out
    records = [[record for record in metrics(tmp_path / name) if "loss_ce" in record] for name in ("whole", "cut")]
    last = [{k: v for k, v in record[2].items() if k.startswith("loss")} for record in records]
    assert last[1] == pytest.approx(last[0], rel=1e-4)
    stretched = [*other, "optim.schedule_length=reference"]
    assert run("probe", tmp_path / "ref", cache, "optim.steps=1", *stretched) == 0
    assert run("probe", tmp_path / "ref", cache, "resume=true", *COMMON, *stretched[2:]) == 2
    assert "depends on processes and accumulation" in capsys.readouterr().err


def test_the_environment_changes_no_training(monkeypatch):
    """What `accelerate config` and launchers leave there: the config alone counts."""
    config = load_config(TrainConfig, TINY["probe"], ["optim.mixed_precision=no"])
    variables = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_USE_FSDP": "true",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    accelerator = make_accelerator(config)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend.value == "NO"
    assert accelerator.distributed_type.value == "NO"
    assert {name: os.environ[name] for name in variables} == variables


def test_pictures_that_a_kill_left_out_are_made_up_for(tmp_path, cache):
    pictures = ["samples.every=0", "samples.num_inference_steps=2", "samples.prompts=[a red circle]"]
    assert run("probe", tmp_path, cache, "optim.steps=1", *pictures) == 0
    grid = tmp_path / "run/samples/step_0000001.png"
    before = grid.read_bytes()
    grid.unlink()
    (tmp_path / "run/curves.png").unlink()
    assert run("probe", tmp_path, cache, "optim.steps=1", "resume=true", *pictures) == 0
    assert grid.read_bytes() == before
    assert (tmp_path / "run/curves.png").exists()


def test_lora_of_other_blocks_is_not_gone_on_from(tmp_path, cache, capsys):
    assert run("tune", tmp_path / "a", cache, "optim.steps=1", "lora.blocks=[up1]") == 0
    start = f"init_from={tmp_path / 'a/run'}"
    assert run("tune", tmp_path / "b", cache, "optim.steps=1", start, "lora.blocks=[down0]") == 2
    assert "lora.blocks" in capsys.readouterr().err
    assert run("tune", tmp_path / "c", cache, "optim.steps=1", start, "lora.blocks=[up1]") == 0


@pytest.mark.slow
def test_optimiser_settings_do_something(tmp_path, cache):
    """After two steps the weights differ from those of the defaults."""
    variants = {
        "base": [],
        "betas": ["optim.betas=[0.5,0.9]"],
        "decay": ["optim.weight_decay=10"],
        "clip": ["optim.max_grad_norm=0.001"],
        "warmup": ["optim.warmup_steps=2"],
        "schedule": ["optim.schedule=constant"],
        "loss": ["loss.weights.bbox=50"],
        "queries": ["adapter.num_queries_rec=5"],
        "feature": ["model.feature=all", "adapter.fusion_dim=16", "adapter.fusion_size=4"],
        "joined": ["model.feature=down1+up0"],
        "timestep": ["noise.first_timestep=500", "noise.last_timestep=500"],
        "costs": ["loss.cost_class=0", "loss.cost_giou=50"],
    }
    ends = {}
    for name, settings in variants.items():
        common = ["optim.steps=2", "optim.warmup_steps=0", "validation.every=9"]
        assert run("probe", tmp_path / name, cache, *common, *settings) == 0
        ends[name] = weights(tmp_path / name, 2)["rec_head.bbox_embed.4.weight"]
    for name, value in ends.items():
        assert name == "base" or not torch.equal(value, ends["base"]), name


@pytest.mark.slow
def test_sample_settings_do_something(tmp_path, cache):
    pictures = ["samples.every=0", "samples.num_inference_steps=2", "samples.prompts=[a red circle]"]
    grids = {}
    for name, settings in {
        "base": [],
        "num_images": ["samples.num_images=1"],
        "seed": ["samples.seed=9"],
        "guidance": ["samples.guidance_scale=1"],
        "factor": ["samples.correction_factor=500"],
    }.items():
        more = ["log_every=2", "validation.every=1"] if name == "seed" else []
        assert run("probe", tmp_path / name, cache, "optim.steps=2", *pictures, *settings, *more) == 0
        grids[name] = (tmp_path / name / "run/samples/step_0000002.png").read_bytes()
    assert len(set(grids.values())) == len(grids)
    assert sum("loss_ce" in record for record in metrics(tmp_path / "seed")) == 1
    assert sum("itm_text" in record for record in metrics(tmp_path / "seed")) == 2
    assert sum("loss_ce" in record for record in metrics(tmp_path / "base")) == 2


@pytest.mark.parametrize("what", ["a loss", "the gradient"])
def test_what_is_not_finite_stops_or_is_skipped(tmp_path, cache, capsys, monkeypatch, what):
    """The second step's features, or their gradients, are not finite."""
    forward, calls = DPT.features, []

    def damaged(self, batch, passes, *, with_full):
        maps, noise_pred = forward(self, batch, passes, with_full=with_full)
        calls.append(None)
        if len(calls) == 2:
            if what == "a loss":
                return [x * float("nan") for x in maps], noise_pred
            self.adapter.query_embed.weight.register_hook(lambda gradient: gradient * float("inf"))
        return maps, noise_pred

    monkeypatch.setattr(DPT, "features", damaged)
    assert run("probe", tmp_path / "a", cache) == 2
    error = capsys.readouterr().err
    assert f"step 1: {what} is not finite" in error
    assert "samples [" in error
    assert "stopped: " in (tmp_path / "a/run/log.txt").read_text()
    calls.clear()
    steps = 3 if what == "a loss" else 2  # the hook on the gradient stays
    settings = ["on_nan=skip", "checkpoints.every=1", "validation.every=10", f"optim.steps={steps}"]
    assert run("probe", tmp_path / "b", cache, *settings, "validation.num_samples=2") == 0
    assert metrics(tmp_path / "b")[1]["skipped_steps"] == 1
    before, skipped = weights(tmp_path / "b", 1), weights(tmp_path / "b", 2)
    assert all(torch.equal(value, skipped[name]) for name, value in before.items())
    if what == "a loss":
        assert not torch.equal(weights(tmp_path / "b", 3)["query_embed.weight"], before["query_embed.weight"])


def test_out_of_memory_says_what_to_lower(tmp_path, cache, capsys, monkeypatch):
    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("dpt.tasks.itm.itm_loss", exhausted)
    assert run("probe", tmp_path, cache) == 2
    assert "out of memory: lower optim.batch_size" in capsys.readouterr().err

    def broken(*args):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr("dpt.tasks.itm.itm_loss", broken)
    with pytest.raises(NotImplementedError):
        run("probe", tmp_path / "other", cache)


def test_dry_run_trains_nothing(tmp_path, cache, capsys):
    assert run("probe", tmp_path, cache, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "4 samples x 1 accumulated = 4 a process and step; 6 steps" in out
    assert "GiB" in out
    assert not (tmp_path / "run").exists()
    assert run("tune", tmp_path, cache, "init_from=nowhere", "--dry-run") == 2


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path, cache, capsys):
    assert run("probe", tmp_path, cache, "optim.steps=2", "checkpoints.every=1") == 0
    newest = load_checkpoint(tmp_path / "run")
    assert newest.source.endswith("step_0000002")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        load_checkpoint(tmp_path / "empty")


def test_resuming_nothing_is_said(tmp_path, cache, capsys):
    assert run("probe", tmp_path, cache, "optim.steps=1", "resume=true") == 0
    assert "has no checkpoint to go on from" in capsys.readouterr().out


def test_schedules_and_data_order():
    cosine = [learning_rate_factor(k, steps=10, warmup_steps=2, schedule="cosine") for k in range(10)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.5)
    assert learning_rate_factor(6, steps=10, warmup_steps=2, schedule="linear") == 0.5
    assert learning_rate_factor(9, steps=10, warmup_steps=2, schedule="constant") == 1
    assert learning_rate_factor(4, steps=2, warmup_steps=0, schedule="linear") == 0
    pairs = [pair for step in range(5) for pair in step_indices(step, count=4, num_samples=10, seed=0)]
    assert sorted(i for i, epoch in pairs if epoch == 0) == list(range(10))
    assert sorted(i for i, epoch in pairs if epoch == 1) == list(range(10))
    assert [i for i, epoch in pairs if epoch == 0] != [i for i, epoch in pairs if epoch == 1]


@pytest.mark.parametrize(("processes", "end"), [(1, 0.9619), (2, 0.8536), (4, 0.5), (8, 0)])
def test_a_schedule_of_the_reference_s_length(processes, end):
    """Its cosine with 8 accumulated batches: what is left of the rate at the end of training."""
    optim = OptimSettings(gradient_accumulation_steps=8, schedule_length="reference")
    stretch = schedule_stretch(optim, processes)
    limits = {"steps": 5000 * stretch, "warmup_steps": 0, "schedule": "cosine"}
    assert learning_rate_factor(5000, **limits) == pytest.approx(end, abs=1e-4)
    assert learning_rate_factor(2500, **limits) == pytest.approx((1 + np.cos(np.pi * processes / 16)) / 2)
    assert schedule_stretch(OptimSettings(gradient_accumulation_steps=8), processes) == 1


def test_lora_trained_on_denoising_alone(tmp_path, cache):
    """As a control: no adapter in it, and at the cost of a tune step the negative images are denoised too."""
    assert run("probe", tmp_path / "probe", cache, "optim.steps=1") == 0
    off = [f"loss.weights.{name}=0" for name in ("itm_i2t", "itm_t2i", "ce", "bbox", "giou", "contrastive_align")]
    settings = ["lora.only=true", f"init_from={tmp_path / 'probe/run'}", "optim.steps=1", *off]
    values = []
    for name, more in (("own", "false"), ("all", "true")):
        assert run("tune", tmp_path / name, cache, *settings, f"loss.denoise_negatives={more}") == 0
        record = metrics(tmp_path / name)[0]
        assert [key for key in record if key.startswith("loss")] == ["loss_denoise"]
        values.append(record["loss_denoise"])
    assert values[0] != values[1]


@pytest.mark.parametrize("control", [name for name in CONTROLS if name != "none"])
def test_controls_take_something_away(tmp_path, cache, capsys, control):
    assert run("probe", tmp_path, cache, "optim.steps=2", f"control={control}", "validation.every=2") == 0
    assert load_checkpoint(tmp_path / "run").config.control == control
    (figures,) = [record for record in metrics(tmp_path) if "itm_text" in record]
    if control == "text_blind":  # nothing tells the captions apart
        assert figures["itm_text"] == 0.5
    if control == "image_blind":
        assert figures["itm_image"] == 0.5
    with pytest.raises(ValueError, match="is for measuring alone"):
        load_checkpoint(tmp_path / "run").attach(load_stable_diffusion("shapes"))
    assert run("tune", tmp_path / "tune", cache, f"init_from={tmp_path / 'run'}") == 2
    assert f"is of control {control}; control is none" in capsys.readouterr().err


def test_the_noisy_latents_as_a_feature(tmp_path, cache):
    assert run("probe", tmp_path, cache, "optim.steps=1", "model.feature=latents") == 0
    assert load_checkpoint(tmp_path / "run").config.adapter.in_channels == [4]
