import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import evaluate
import train_probe
from dpt.backbones.loading import load_stable_diffusion
from dpt.checkpoint.checkpoint import LORA_FILE, DPTCheckpoint, load_checkpoint, save_checkpoint
from dpt.config import load_config
from dpt.evaluation.experiment import published_table
from dpt.evaluation.flags import METRICS
from dpt.evaluation.measure_itm import denoising_matches
from dpt.evaluation.plan import Experiment, arms_of, run_settings
from dpt.evaluation.probes import Measured, summary
from dpt.lora import load_external_lora
from dpt.shapes.samples import ShapesSamples
from dpt.tasks.itm import wins
from dpt.training.settings import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(autouse=True)
def _from_repository_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, shapes_dpt):
    """A probe and two controls of it, with random adapters."""
    root = tmp_path_factory.mktemp("probes")
    for name, control in (("probe", "none"), ("random", "random_unet"), ("blind", "text_blind")):
        checkpoint = load_checkpoint(shapes_dpt)
        checkpoint.config.control, checkpoint.config.lora_rank = control, 0
        save_checkpoint(DPTCheckpoint(checkpoint.config, checkpoint.adapter, {}), root / name)
    return [str(root / name) for name in ("probe", "random", "blind")]


def command(task, folders, output, *more):
    common = ["--config", "configs/shapes/probe.yaml", "--num_samples", "6", "--timesteps", "100", "--output"]
    places = [str(output), "--set", f"data.cache_folder={output}/cache", "optim.mixed_precision=no"]
    return [task, *folders, *common, *places, *more]


def test_itm_with_selectivity_and_the_baseline_without_an_adapter(folders, tmp_path):
    output = tmp_path / "out"
    assert evaluate.main(command("itm", folders, output, "--negatives", "mined", "edited", "--zero_shot")) == 0
    result = json.loads((output / "itm.json").read_text())
    assert {"mined", "edited"} < set(result)
    assert any(name.startswith("edited: ") for name in result)
    rows = result["mined"]
    assert set(rows) == {"probe", "random", "blind", "denoising error"}
    best = max(rows[name]["text"]["t500"][0] for name in ("random", "blind"))
    assert rows["probe"]["text selectivity"]["t500"][0] == pytest.approx(rows["probe"]["text"]["t500"][0] - best)
    assert "text selectivity" not in rows["random"]
    assert rows["blind"]["text"]["mean"][0] == 0.5  # it cannot tell, and says so
    assert "| blind | text_blind |" in (output / "itm.md").read_text()


def test_what_is_measured_is_not_measured_again(folders, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    assert evaluate.main(command("itm", folders[:1], output)) == 0
    before = (output / "itm.json").read_text()
    with monkeypatch.context() as patch:
        patch.setattr("dpt.evaluation.probes.measure", None)
        assert evaluate.main(command("itm", folders[:1], output)) == 0
    assert (output / "itm.json").read_text() == before
    assert evaluate.main(command("itm", folders[:1], output, "--split", "test")) == 0  # other samples are
    first, second = (json.loads(path.read_text())["records"] for path in sorted(output.glob("records/*.json")))
    assert [r["kind"] for r in first[""]] != [r["kind"] for r in second[""]]
    assert evaluate.main(command("itm", [*folders[:1], *folders[:1]], output)) == 2
    assert "two checkpoints are named 'probe'" in capsys.readouterr().err


def test_rec_with_boxes_drawn(folders, tmp_path):
    output = tmp_path / "out"
    assert evaluate.main(command("rec", folders[:2], output)) == 0
    row = json.loads((output / "rec.json").read_text())["shapes"]["probe"]
    values = [row[f"precision_at_{k}"]["mean"][0] for k in (1, 5, 10)]
    assert values == sorted(values)
    assert "precision_at_1 selectivity" in row
    assert (output / "rec_probe_shapes.png").exists()


@pytest.mark.parametrize("task", ["itm", "rec"])
def test_trajectories_are_nothing_to_measure_on(task, folders, tmp_path, capsys):
    call = command(task, folders[:1], tmp_path / "out", "data={kind: trajectories, trajectories: x}")
    assert evaluate.main(call) == 2
    assert "data.kind is trajectories" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_selectivity_is_paired_by_sample():
    def measured(name, control, hits):
        rows = [{"id": k, "timestep": t, "text": float(hit)} for k, hit in enumerate(hits) for t in (100, 500)]
        return Measured(name, control, {"s": rows})

    hits = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.5
    better = hits.clone()
    better[:20] = True
    found = summary([measured("probe", "none", better), measured("c", "x", hits)], ["text"], [100])["s"]["probe"]
    gain = (better.float() - hits.float()).mean().item()
    mean, low, high = found["text selectivity"]["mean"]
    assert mean == pytest.approx(gain, abs=1e-6)
    assert high - low < found["text"]["mean"][2] - found["text"]["mean"][1]


@pytest.mark.slow
def test_denoising_tells_captions_of_a_trained_model(tmp_path):
    sd = load_stable_diffusion("shapes")
    samples = ShapesSamples(sd, tmp_path, num_samples=40, split="val")
    records = denoising_matches(sd, samples, [100, 300, 700], 40, 20)
    assert len(records) == 40 * 4
    together = [r["text"] for r in records if r["timestep"] == 100]
    assert sum(together) / 40 > 0.65  # chance 0.5
    assert wins(torch.tensor([1.0, 0.0, -1.0])).tolist() == [1, 0.5, 0]


def test_kinds_left_out_are_not_trained_on(tmp_path):
    sd = load_stable_diffusion("shapes")
    plain = ShapesSamples(sd, tmp_path, num_samples=30)
    some = ShapesSamples(sd, tmp_path, num_samples=30, leave_out=("attribute", "count"))
    kinds = {plain.get(k, 0).negative_kind for k in range(30)}
    assert "attribute" in kinds
    assert {some.get(k, 0).negative_kind for k in range(30)} == kinds - {"attribute", "count"}


@pytest.mark.slow
def test_an_experiment_from_training_to_table(tmp_path, capsys):
    tiny = [
        "optim.steps=2",
        "optim.batch_size=2",
        "data.num_samples=8",
        "validation.num_samples=2",
        "validation.timesteps=[500]",
        "samples.every=-1",
        "optim.mixed_precision=no",
        f"data.cache_folder={tmp_path}/cache",
    ]
    runs = {
        "probe": {"stage": "probe", "config": "configs/shapes/probe.yaml", "settings": tiny},
        "dpt": {"settings": [*tiny, "init_from={folder}/probe-0"], "seeds": [0, 1]},
    }
    (tmp_path / "base.yaml").write_text("num_inference_steps: 2\n")
    arm = {"dpt": "{folder}/dpt-{seed}", "train_seeds": [0, 1], "num_inference_steps": 2}
    experiment = {
        "folder": f"{tmp_path}/out",
        "runs": runs,
        "arms": [f"{tmp_path}/base.yaml"],
        "more_arms": {"dpt": arm},
        "measure": {"checkpoints": ["{folder}/probe-0"], "num_samples": 2, "zero_shot": False, "settings": tiny},
        "protocol": {"2 steps": "our choice"},
        "published": "compbench",
    }
    config = tmp_path / "experiment.yaml"
    config.write_text(json.dumps(experiment))
    call = ["experiment", str(config), "image_seeds=[0, 1]", "per_category=1"]
    results = tmp_path / "results.md"
    assert evaluate.main([*call, "--jobs", "2", "--record", str(results)]) == 0
    recorded = results.read_text()
    assert "<!-- begin experiment experiment image_seeds=[0, 1] per_category=1 -->" in recorded
    assert "precision_at_1" in recorded
    assert "GORS on it" in recorded
    table = json.loads((tmp_path / "out/tables/experiment/shapes-val-1/table.json").read_text())
    assert table["arms"]["dpt"]["training_seeds"] == 2
    assert "correct_difference" in table["arms"]["dpt"]
    text = (tmp_path / "out/tables/experiment/shapes-val-1/table.md").read_text()
    assert "| 2 steps | our choice |" in text
    assert "| GORS on it | 0.6603 |" in text
    assert "left empty: DPT (its paper)" in text
    assert (tmp_path / "out/tables/experiment/val/itm.json").exists()
    assert (tmp_path / "out/tables/experiment/val/rec.json").exists()
    assert load_checkpoint(tmp_path / "out/dpt-1").lora
    log = (tmp_path / "out/dpt-1/log.txt").read_text()
    assert evaluate.main(call) == 0  # nothing is left to do
    assert (tmp_path / "out/dpt-1/log.txt").read_text() == log
    assert evaluate.main([*call, "runs.dpt.settings=[init_from=new, optim.steps=2]", "--steps", "train"]) == 2
    error = capsys.readouterr().err
    assert "dpt-0 is there, trained with " in error
    assert "data.num_samples 8 (now 10000)" in error
    assert "/out/probe-0 (now new)" in error
    assert evaluate.main([*call, "--only", "nobody"]) == 2
    assert "there are probe, dpt, base" in capsys.readouterr().err
    capsys.readouterr()
    assert evaluate.main([*call, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("train_tune.py" in line for line in lines) == 2
    assert lines[-1].startswith("accelerate launch evaluate.py experiment")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["against=nobody"], "against is 'nobody'; the arms are base"),
        (["metrics=[beauty]"], "metrics names 'beauty'"),
        (["metrics=[clip]"], "--metrics clip needs weights"),
        (["published=nowhere"], "published is 'nowhere'"),
        (["per_category=0"], "per_category is 0"),
        (["image_seeds=[]"], "image_seeds is []"),
        (["runs.probe.seeds=[]"], "runs.probe.seeds is empty"),
        (["--jobs", "0"], "argument --jobs: '0'; it must be a whole number at least 1"),
        (["--batch_size", "x"], "argument --batch_size: 'x'"),
        (["measure.num_samples=0"], "measure.num_samples is 0"),
        (["runs.probe.seeds=[-1]"], "seeds is -1"),
        (["more_arms={a: {train_seeds: []}}"], "train_seeds is []"),
        (["--record", "tests"], "--record is tests, a folder"),
        (["protocol={x: rumour}"], "sources are paper"),
        (["more_arms={base: {}}"], "two arms are named 'base'"),
        (["arms=[]", "more_arms={a: {best_of: 2}}", "against=a"], "dpt is missing"),
    ],
)
def test_bad_experiments_are_one_line_before_anything_is_trained(tmp_path, capsys, changes, message):
    (tmp_path / "e.yaml").write_text("runs: {probe: {stage: probe}}\narms: [configs/shapes/arms.yaml:base]\n")
    try:
        code = evaluate.main(["experiment", str(tmp_path / "e.yaml"), f"folder={tmp_path}", *changes])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "probe-0").exists()


SEARCHES = ("length", "balance", "deep", "quirks", "sweep")


@pytest.mark.parametrize(
    "path",
    [
        *CONFIGS.glob("tables/*.yaml"),
        *(CONFIGS / f"shapes/{name}.yaml" for name in ("experiment", "committed", *SEARCHES)),
    ],
)
def test_every_table_s_config_can_be_read(path):
    if path.name == "published.yaml":
        for entry in yaml.safe_load(path.read_text()):
            assert "|" in published_table(entry)
        return
    experiment = load_config(Experiment, path)
    arms = arms_of(experiment)
    assert experiment.against in arms or not arms
    assert all(arm.against in {None, *arms} for arm in arms.values())
    trained = {f"{name}-{seed}" for name, one in experiment.runs.items() for seed in one.seeds}
    for arm in arms.values():
        for one in arm.each_seed("X"):
            for weights in (one.dpt or "", one.lora or ""):
                assert not weights.startswith("X/") or weights.split("/")[1] in trained
    assert all(metric in METRICS for metric in experiment.metrics)
    for name, one in experiment.runs.items():
        for seed in one.seeds:
            load_config(TrainConfig, one.config, run_settings(name, one, experiment, seed))
    twins = re.findall(r"configs/tables/shapes_\w+\.yaml", path.read_text())
    assert path.parent.name == "shapes" or path.name.startswith("shapes_") or twins
    assert all(Path(twin).exists() for twin in twins)


@pytest.mark.slow
def test_the_map_of_blocks_and_timesteps(tmp_path, capsys):
    tiny = ["optim.steps=2", "optim.batch_size=2", "data.num_samples=8", "checkpoints.every=1", "adapter.hidden_dim=32"]
    tiny += ["adapter.dim_feedforward=32", "validation.num_samples=1", f"data.cache_folder={tmp_path}/cache"]
    tiny += ["optim.mixed_precision=no"]  # accelerate has one precision a process
    output = tmp_path / "map"
    call = ["probe-map", "configs/shapes/probe_map.yaml", *tiny, "--num_samples", "4", "--timesteps", "100", "500"]
    asked = evaluate.make_parser().parse_args([*call, "--output", "x"])
    assert list(asked.controls) == ["constant_text", "empty_prompt"]
    call += ["--controls", "constant_text", "constant_text"]
    assert evaluate.main([*call, "--output", str(output), "--record", str(tmp_path / "results.md")]) == 0
    assert "--num_samples 4" in (tmp_path / "results.md").read_text()
    assert "| a constant vector for the pooled text |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "probe_map.png").exists()
    result = json.loads((output / "probe_map.json").read_text())
    assert list(result) == ["none", "constant_text"]
    assert list(result["none"]) == [*(f"down{i}" for i in range(4)), "mid", *(f"up{i}" for i in range(4))]
    cell = result["none"]["up1"]["500"]
    assert cell["selectivity"] == pytest.approx(cell["itm"][0] - result["constant_text"]["up1"]["500"]["itm"][0])
    assert (output / "probe_map.png").exists()
    alone = ["configs/shapes/probe_map.yaml", *tiny, f"output_folder={tmp_path}", "run_name=alone", "model.feature=up1"]
    assert train_probe.main(alone) == 0  # a probe of the map is a probe
    file = "checkpoints/step_0000002/adapter.safetensors"
    assert (output / "runs/none_up1" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    log = (output / "runs/none_up1/log.txt").read_text()
    assert evaluate.main([*call, "--output", str(output)]) == 0  # trained already
    assert (output / "runs/none_up1/log.txt").read_text() == log
    assert json.loads((output / "probe_map.json").read_text()) == result
    for setting, message in (
        ("optim.lr=0.1", "optim.lr 0.0005 (now 0.1)"),
        ("optim.epochs=1", "optim.epochs None (now 1"),
    ):
        assert evaluate.main([*call[:2], setting, *call[2:], "--output", str(output)]) == 2
        assert f"{output}/runs/none_down0 is there, trained with {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.feature=up2", "model.feature is up2; probe-map takes up1: all blocks are probed"),
        ("control=random_unet", "control is random_unet; probe-map takes none"),
        ("init_from=new", "init_from is new; probe-map takes None"),
        ("data.trajectories=x", "data.trajectories is x; probe-map takes None"),
        ("data={kind: trajectories, trajectories: x}", "data.kind is trajectories"),
    ],
)
def test_settings_that_a_map_does_not_take(tmp_path, capsys, setting, message):
    call = ["probe-map", "configs/shapes/probe_map.yaml", setting, "--output", str(tmp_path / "map")]
    assert evaluate.main(call) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "map").exists()


def test_what_shares_a_name_and_a_folder_is_the_same():
    """Runs and pictures of one folder are made once: another config's of the same name would be taken for its own."""
    runs, drawn = {}, {}
    for path in (*sorted(CONFIGS.glob("tables/shapes_*.yaml")), CONFIGS / "shapes/experiment.yaml"):
        experiment = load_config(Experiment, path)
        for name, one in experiment.runs.items():
            key = (experiment.folder, name)
            settings = run_settings(name, one, experiment, 0)
            assert runs.setdefault(key, (one.stage, one.config, settings)) == (one.stage, one.config, settings), key
        for arm in arms_of(experiment).values():
            for one in arm.each_seed(experiment.folder):
                key = (experiment.folder, experiment.prompts, experiment.per_category, one.name)
                value = (one.settings(), experiment.image_seeds)
                assert drawn.setdefault(key, value) == value, key


def test_the_committed_weights_are_there_and_fit():
    sd = load_stable_diffusion("shapes")
    experiment = load_config(Experiment, CONFIGS / "shapes/committed.yaml")
    arms = [one for arm in arms_of(experiment).values() for one in arm.each_seed() if one.dpt or one.lora]
    assert {arm.lora or arm.dpt for arm in arms} >= {"ckpt/shapes-dpt", "ckpt/shapes-dpt/seeds/dpt-5"}
    for arm in arms:
        if arm.dpt:
            load_checkpoint(arm.dpt).attach(sd)
        else:
            load_external_lora(sd, Path(arm.lora))
    own, first = (load_file(Path("ckpt/shapes-dpt") / folder / LORA_FILE) for folder in ("lora", "seeds/dpt-0"))
    assert own.keys() == first.keys()
    assert all(torch.equal(value, first[name]) for name, value in own.items())
