import json
import shutil

import pytest
import torch
from PIL import Image

import train_probe
import train_tune
from dpt.checkpoint.checkpoint import load_checkpoint
from dpt.data.__main__ import main as data_main

SCRIPTS = {"probe": train_probe.main, "tune": train_tune.main}


@pytest.fixture(autouse=True)
def _from_repository_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def run(stage, tree, folder, *overrides):
    settings = [
        "optim.mixed_precision=no",
        "adapter.hidden_dim=32",
        "adapter.nheads=4",
        "adapter.dim_feedforward=32",
        "optim.batch_size=4",
        "optim.steps=2",
        "validation.num_samples=4",
        "validation.timesteps=[300]",
        "samples.every=-1",
        "log_every=1",
    ]
    data = ["data.kind=coco", f"data.root={tree}", "data.num_samples=null", f"output_folder={folder}"]
    settings += ["init_from=new"] if stage == "tune" else []
    return SCRIPTS[stage]([f"configs/shapes/{stage}.yaml", *settings, *data, *overrides])


def metrics(folder):
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [{k: v for k, v in r.items() if k.startswith("loss")} for r in metrics(folder)]


@pytest.mark.parametrize("stage", ["probe", "tune"])
def test_a_tree_is_trained_on(coco_tree, tmp_path, stage):
    assert run(stage, coco_tree, tmp_path) == 0
    first, _, figures = metrics(tmp_path)
    assert {"loss_itm_i2t", "loss_ce", "loss_contrastive_align", "lr", "samples_per_second"} <= first.keys()
    assert {"itm_text", "itm_image_mean_high", "rec_refcoco_precision_at_1", "rec_refcocog_giou_precision_at_10"} <= (
        figures.keys()
    )
    assert bool(load_checkpoint(tmp_path / "run/checkpoints/step_0000002").lora) == (stage == "tune")


def test_reading_processes_change_nothing(coco_tree, tmp_path):
    assert run("probe", coco_tree, tmp_path / "a") == 0
    assert run("probe", coco_tree, tmp_path / "b", "data.num_workers=2") == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.slow
def test_cached_latents_stand_for_images(coco_tree, tmp_path):
    output = coco_tree.parent / "train2014_shapes"
    images = ["--images", str(coco_tree / "train2014"), "--output", str(output)]
    assert data_main(["cache-latents", "--model", "shapes", *images]) == 0
    assert run("probe", coco_tree, tmp_path / "pixels") == 0
    tree = tmp_path / "data"
    shutil.copytree(coco_tree, tree)
    content = json.loads((tree / "annotations/finetune_refall_train.json").read_text())
    for image in content["images"]:
        (tree / "train2014" / image["file_name"]).write_bytes(b"")  # not looked at
    assert run("probe", tree, tmp_path / "latents", f"data.latents={output}") == 0
    for a, b in zip(losses(tmp_path / "pixels"), losses(tmp_path / "latents"), strict=True):
        assert b == pytest.approx(a, rel=0.02, abs=0.02)


def test_flips_change_what_is_seen(coco_tree, tmp_path):
    assert run("probe", coco_tree, tmp_path / "a") == 0
    assert run("probe", coco_tree, tmp_path / "b", "data.flip=true") == 0
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_epochs_stand_for_steps(coco_tree, tmp_path):
    assert run("probe", coco_tree, tmp_path, "optim.epochs=1.5", "optim.batch_size=8") == 0
    log = (tmp_path / "run/log.txt").read_text()
    count = int(log.split(" samples, ")[0].split()[-1])
    assert metrics(tmp_path)[-1]["step"] == -(-3 * count // 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.root=null"], "data.root is missing"),
        (["data.root=/nowhere"], "/nowhere/train2014 does not exist"),
        (["data.itm=itm/other"], "data.itm: "),
        (["data.val_itm=itm/other.tsv"], "data.val_itm: "),
        (["data.latents=none"], "data.latents: "),
        (["data.latents=x", "data.flip=true"], "cached latents cannot be mirrored"),
        (["data.expressions=itm/val.tsv"], "is no valid JSON"),
        (["data.expressions=annotations/captions_val2014.json"], "is no REC annotation file"),
        (["data.num_samples=0"], "holds no expressions"),
        (["data.negatives=mined"], "the setting is for shapes"),
        (["loss.denoise_negatives=true"], "negatives of coco come without captions"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_2(coco_tree, tmp_path, capsys, overrides, message):
    assert run("probe", coco_tree, tmp_path, *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [("<!doctype html><title>404</title>", "is a web page"), ('{"images": [{"id": 1', "is no valid JSON")],
)
def test_an_annotation_file_that_is_none(coco_tree, tmp_path, capsys, content, message):
    broken = tmp_path / "finetune_broken.json"
    broken.write_text(content)
    assert run("probe", coco_tree, tmp_path, f"data.expressions={broken}") == 2
    assert f"{broken} {message}" in capsys.readouterr().err


def test_a_dry_run_names_missing_data(coco_tree, tmp_path, capsys):
    assert run("probe", coco_tree, tmp_path, "--dry-run") == 0
    assert "found" in capsys.readouterr().out
    assert run("probe", coco_tree, tmp_path, "data.itm=nowhere", "--dry-run") == 2
    out = capsys.readouterr()
    assert f"MISSING  {coco_tree / 'nowhere'}" in out.out
    assert "1 of these are missing" in out.err


@pytest.mark.parametrize("key", ["data.itm", "data.val_itm", "data.val_expressions"])
@pytest.mark.parametrize("content", ["<html>", "[]", '{"a.jpg": 3}', '{"a.jpg": ["1"]}', ""])
def test_other_files_that_are_none(coco_tree, tmp_path, capsys, key, content):
    broken = tmp_path / "broken"
    if key == "data.itm":
        broken.mkdir()
        (broken / "imgname2txtid.json").write_text(content)
    else:
        broken.write_text(content)
    value = f"[{broken}]" if key == "data.val_expressions" else broken
    assert run("probe", coco_tree, tmp_path, f"{key}={value}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert str(broken) in error


@pytest.mark.parametrize(
    "change",
    [{"bbox": [1, 2, 3]}, {"bbox": ["a", 2, 3, 4]}, {"tokens_positive": [[0, 1, 2]]}, {"tokens_positive": [[-3, 2]]}],
)
def test_boxes_and_spans_of_another_format(coco_tree, tmp_path, capsys, change):
    content = json.loads((coco_tree / "annotations/finetune_refall_train.json").read_text())
    content["annotations"][0].update(change)
    broken = tmp_path / "finetune_broken.json"
    broken.write_text(json.dumps(content))
    assert run("probe", coco_tree, tmp_path, f"data.expressions={broken}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(broken) in error
    assert f"expression {content['annotations'][0]['image_id']}" in error


def test_latents_of_the_posterior_are_trained_on(coco_tree, tmp_path, capsys):
    for name in ("mean", "posterior"):
        assert run("probe", coco_tree, tmp_path / name, f"data.latent_sample={name}", "optim.steps=1") == 0
    assert losses(tmp_path / "mean")[0] != losses(tmp_path / "posterior")[0]
    assert run("probe", coco_tree, tmp_path, "data.latent_sample=posterior", "data.latents=x") == 2
    assert "cached latents are as they are" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"bbox": [1, 2, float("nan"), 4]}, {"tokens_positive": [[0, 10**12]]}])
def test_nothing_is_trained_on_that_the_check_reports(coco_tree, tmp_path, capsys, change):
    content = json.loads((coco_tree / "annotations/finetune_refall_train.json").read_text())
    content["annotations"][0].update(change)
    broken = tmp_path / "finetune_broken.json"
    broken.write_text(json.dumps(content))
    assert run("probe", coco_tree, tmp_path, f"data.expressions={broken}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{broken} is no REC annotation file: expression {content['annotations'][0]['image_id']}: " in error


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(coco_tree, tmp_path, capsys, workers):
    tree = tmp_path / "data"
    shutil.copytree(coco_tree, tree)
    for path in (tree / "train2014").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert run("probe", tree, tmp_path / "out", f"data.num_workers={workers}") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert "cannot be read as an image" in error


@pytest.mark.slow
def test_odd_images_and_long_expressions_are_trained_on(coco_tree, tmp_path, capsys):
    """Palette, alpha, EXIF rotation, one pixel; an expression longer than the text encoder takes."""
    tree = tmp_path / "data"
    shutil.copytree(coco_tree, tree)
    paths = sorted((tree / "train2014").iterdir())
    Image.open(paths[0]).convert("P").save(paths[0], "PNG")
    Image.open(paths[1]).convert("RGBA").save(paths[1], "PNG")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(paths[2]).save(paths[2], exif=turned)
    Image.new("L", (1, 1)).save(paths[3])
    annotations = tree / "annotations/finetune_refall_train.json"
    content = json.loads(annotations.read_text())
    for image in content["images"]:
        image["caption"] += " and so on" * 100
    annotations.write_text(json.dumps(content))
    assert run("tune", tree, tmp_path / "out", "optim.epochs=1", "optim.steps=1") == 0
    assert "expressions are longer than the text encoder reads" in capsys.readouterr().out
    assert all(torch.tensor(list(r.values())).isfinite().all() for r in losses(tmp_path / "out"))
