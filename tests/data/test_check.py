import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from dpt.data.__main__ import main
from dpt.data.check import check_images


@pytest.fixture
def tree(coco_tree, tmp_path):
    shutil.copytree(coco_tree, tmp_path / "data")
    return tmp_path / "data"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_good_tree_has_no_errors(tree, capsys):
    assert main(["check", str(tree)]) == 0
    out = capsys.readouterr().out
    assert "finetune_refall_train.json" in out
    assert "itm/train" in out
    assert "val.tsv" in out
    assert all("no errors" in line for line in out.splitlines() if "leakage" not in line)
    assert "leakage: 1 of the 1 images of finetune_refcoco_val.json are in captions_train2014.json" in out


def test_images_lie_up_to_two_folders_down(tree, capsys):
    (tree / "coco").mkdir()
    (tree / "train2014").rename(tree / "coco/train2014")
    assert main(["check", str(tree)]) == 0
    assert "missing" not in capsys.readouterr().out


def annotation(tree, change):
    edit(tree / "annotations/finetune_refall_train.json", lambda content: change(content))


DAMAGE = {
    "missing or unreadable image": lambda t: (t / "train2014/COCO_train2014_000000000002.jpg").unlink(),
    "unreadable image": lambda t: (t / "train2014/COCO_train2014_000000000002.jpg").write_text("<html>"),
    "truncated image": lambda t: (lambda p: p.write_bytes(p.read_bytes()[:-200]))(
        t / "train2014/COCO_train2014_000000000002.jpg"
    ),
    "image of another size": lambda t: Image.new("RGB", (9, 9)).save(t / "train2014/COCO_train2014_000000000002.jpg"),
    "box outside its image": lambda t: annotation(t, lambda c: c["annotations"][0].update(bbox=[100, 5, 100, 5])),
    "span outside its expression": lambda t: annotation(
        t, lambda c: c["annotations"][0].update(tokens_positive=[[0, 900]])
    ),
    "duplicate image id": lambda t: annotation(t, lambda c: c["images"].append(c["images"][0])),
    "duplicate annotation id": lambda t: annotation(t, lambda c: c["annotations"].append(c["annotations"][0])),
    "annotation of an unknown image": lambda t: annotation(t, lambda c: c["annotations"][0].update(image_id=5)),
    "unreadable file": lambda t: (t / "annotations/captions_val2014.json").write_text("<!doctype html>"),
    "negative equal to the positive": lambda t: edit(
        t / "itm/train/00000.json", lambda c: c.update(neg_caption=repr([c["title"]]))
    ),
    "duplicate text id": lambda t: edit(
        t / "itm/train/imgname2txtid.json", lambda c: c[next(iter(c))].append(c[next(iter(c))][0])
    ),
    "item listed for another image": lambda t: edit(
        t / "itm/train/00000.json", lambda c: c.update(filepath="COCO_train2014_000000000002.jpg")
    ),
    "empty caption": lambda t: edit(
        t / "annotations/captions_val2014.json", lambda c: c["annotations"][0].update(caption=" ")
    ),
    "unreadable item": lambda t: (t / "itm/train/00000.json").write_text('{"title": '),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_kind_of_damage_is_found(tree, capsys, kind):
    DAMAGE[kind](tree)
    assert main(["check", str(tree)]) == 1
    assert f"    {kind}: " in capsys.readouterr().out


def test_damage_inside_an_image_is_found_by_decoding(tree, capsys):
    path = tree / "train2014/extra.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:3000] + b"damage" + content[3006:])
    assert main(["check", str(tree)]) == 0
    capsys.readouterr()
    assert main(["check", str(tree), "--decode"]) == 1
    assert "unreadable image: 1" in capsys.readouterr().out


def test_images_that_exif_turns(tree):
    path = tree / "train2014/turned.jpg"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30)).save(path, exif=turned)
    _, sizes = check_images([path])
    assert sizes["turned.jpg"] == (30, 40)


def test_a_leak_free_list(tree, capsys):
    annotation(
        tree,
        lambda c: c["images"].append(c["images"][0] | {"id": 7, "file_name": "COCO_train2014_000000000008.jpg"}),
    )
    target = tree / "annotations/finetune_leakfree_train.json"
    assert main(["check", str(tree), "--leak_free", str(target)]) == 0
    out = capsys.readouterr().out
    assert "leakage: 1 of the 1 images of finetune_refcoco_val.json are in finetune_refall_train.json" in out
    assert "leakage: 1 of the 1 images of finetune_refcoco_val.json are in itm/train" in out
    assert "1 left out" in out
    names = {image["file_name"] for image in json.loads(target.read_text())["images"]}
    assert "COCO_train2014_000000000008.jpg" not in names
    assert main(["check", str(tree)]) == 0
    out = capsys.readouterr().out
    assert "leakage: none of the 1 images of finetune_refcoco_val.json are in finetune_leakfree_train.json" in out


def test_damaged_latents_are_found(tree, capsys):
    output = tree / "train2014_shapes"
    images = ["--images", str(tree / "train2014"), "--output", str(output)]
    assert main(["cache-latents", "--model", "shapes", *images]) == 0
    next(output.glob("*.npy")).write_bytes(b"")
    assert main(["check", str(tree)]) == 1
    assert "damaged latents: 1" in capsys.readouterr().out


def test_what_training_expects_and_is_not_there_is_listed(tree, capsys):
    (tree / "itm/val.tsv").unlink()
    assert main(["check", str(tree)]) == 0
    out = capsys.readouterr().out
    assert str(tree / "itm/val.tsv") in out
    assert f"    {tree / 'itm/train'}" not in out


def test_nothing_there(tmp_path, capsys):
    for root, message in ((tmp_path / "no", "is no folder"), (tmp_path, "holds no images")):
        assert main(["check", str(root)]) == 2
        assert message in capsys.readouterr().err


def test_headers_of_10_000_images_take_less_than_a_minute(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.jpg", quality=75)
    for k in range(1, 500):
        shutil.copy(tmp_path / "0.jpg", tmp_path / f"{k}.jpg")
    began = time.process_time()
    findings, sizes = check_images(sorted(tmp_path.iterdir()))
    assert not findings.errors
    assert len(sizes) == 500
    assert (time.process_time() - began) * 20 < 60
