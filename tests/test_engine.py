import json

import pytest
import torch

import train_probe
import train_tune
from dpt.checkpoint import load_checkpoint
from dpt.data.loader import step_indices
from dpt.engine import learning_rate_factor

TINY = {
    "probe": "configs/shapes/probe.yaml",
    "tune": "configs/shapes/tune.yaml",
}
COMMON = [
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
    return SCRIPTS[stage]([TINY[stage], *COMMON, *places, *overrides])


def weights(folder, step):
    checkpoint = load_checkpoint(folder / f"run/checkpoints/step_{step:07d}")
    return checkpoint.adapter.state_dict() | checkpoint.lora


def metrics(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", ["probe", "tune"])
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
    assert run("probe", tmp_path, cache, "optim.steps=4") == 0
    damaged = tmp_path / "run/checkpoints/step_0000004/adapter.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    reference = weights(tmp_path, 2)
    assert run("probe", tmp_path, cache, "resume=true", "optim.steps=2") == 0
    assert "step_0000004 is damaged and passed over" in capsys.readouterr().out
    assert torch.equal(weights(tmp_path, 2)["query_embed.weight"], reference["query_embed.weight"])


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


def test_gradient_accumulation_equals_the_joint_batch(tmp_path, cache):
    """Contrastive alignment is left out: as in the reference it sums over padding, which depends on the batch."""
    exact = ["adapter.dropout=0", "optim.steps=2", "optim.warmup_steps=0", "loss.weights.contrastive_align=0"]
    assert run("probe", tmp_path / "joint", cache, *exact) == 0
    parts = ["optim.batch_size=2", "optim.gradient_accumulation_steps=2"]
    assert run("probe", tmp_path / "parts", cache, *exact, *parts) == 0
    joint, accumulated = metrics(tmp_path / "joint")[0], metrics(tmp_path / "parts")[0]
    for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_itm_i2t", "loss_itm_t2i", "total"):
        assert accumulated[name] == pytest.approx(joint[name], rel=1e-5), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "did you mean optim.lr?"),
        (["optim.steps=many"], "optim.steps"),
        (["optim.steps=0"], "optim.steps is 0"),
        (["model.feature=up9"], "feature is 'up9'"),
        (["init_from=nowhere"], "nowhere holds neither"),
        (["model.name=/nowhere"], "/nowhere"),
        (["data.negatives=best"], "data.negatives is 'best'"),
        (["noise.first_timestep=10", "noise.last_timestep=5"], "they need 0 <= first <= last"),
        (["lora.blocks=[down3]"], "there is no attention in them"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, cache, capsys, overrides, message):
    assert run("tune", tmp_path, cache, *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_an_existing_run_is_refused(tmp_path, cache, capsys):
    assert run("probe", tmp_path, cache, "optim.steps=1") == 0
    assert run("probe", tmp_path, cache, "optim.steps=1") == 2
    assert "pass resume=true" in capsys.readouterr().err


def test_a_non_finite_loss_stops_or_is_skipped(tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setattr("dpt.model.itm_loss", lambda *a: {"loss_itm_i2t": a[0].sum() * float("nan")})
    assert run("probe", tmp_path / "a", cache) == 2
    error = capsys.readouterr().err
    assert "step 0: a loss is not finite" in error
    assert "samples [" in error
    assert run("probe", tmp_path / "b", cache, "on_nan=skip", "optim.steps=2") == 0
    assert metrics(tmp_path / "b")[0]["skipped_steps"] == 1


def test_dry_run_trains_nothing(tmp_path, cache, capsys):
    assert run("probe", tmp_path, cache, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "4 samples x 1 accumulated = 4 a process and step; 6 steps" in out
    assert "GiB" in out
    assert not (tmp_path / "run").exists()


def test_schedules_and_data_order():
    cosine = [learning_rate_factor(k, steps=10, warmup_steps=2, schedule="cosine") for k in range(10)]
    assert cosine[:3] == [0.5, 1.0, 1.0]
    assert cosine[6] == pytest.approx(0.5)
    assert learning_rate_factor(6, steps=10, warmup_steps=2, schedule="linear") == 0.5
    assert learning_rate_factor(9, steps=10, warmup_steps=2, schedule="constant") == 1
    pairs = [pair for step in range(5) for pair in step_indices(step, count=4, num_samples=10, seed=0)]
    assert sorted(i for i, epoch in pairs if epoch == 0) == list(range(10))
    assert sorted(i for i, epoch in pairs if epoch == 1) == list(range(10))
    assert [i for i, epoch in pairs if epoch == 0] != [i for i, epoch in pairs if epoch == 1]
