import json

import numpy as np
import pytest
import torch
from PIL import Image

from dpt.data.coco import load_pixels
from dpt.data.coco_samples import CocoSamples, mirror
from dpt.data.collate import Sample
from dpt.data.flip import can_mirror, mirror_text
from dpt.data.hard_negative_files import ItmNegatives, write_items, write_tsv
from dpt.data.refcoco import load_expressions


def samples(tree, **options):
    expressions = load_expressions(tree / "annotations/finetune_refall_train.json", tree / "train2014")
    return CocoSamples(
        tree / "train2014", 64, expressions=expressions, negatives=ItmNegatives(tree / "itm/train"), **options
    )


def test_samples_of_a_tree(coco_tree):
    train = samples(coco_tree)
    items = train.negatives
    for index in range(len(train)):
        sample = train.get(index, 0)
        expression = train.expressions[index]
        assert sample.images.shape == (3, 3, 64, 64)
        assert -1 <= sample.images.min() < sample.images.max() <= 1
        assert (sample.id, sample.expression) == (expression.id, expression.expression)
        ((begin, end),) = sample.tokens_positive[0]
        assert sample.expression[begin:end].startswith("the ")
        own = [items.item(i) for i in items.texts_of[expression.path.name]]
        assert sample.captions[0] in [item.title for item in own]
        (item,) = [item for item in own if item.title == sample.captions[0]]
        assert sample.captions[1] in item.neg_captions
        assert sample.captions[2] not in [item.title for item in own]
    first, again, later = train.get(0, 0), samples(coco_tree).get(0, 0), [train.get(0, epoch) for epoch in range(1, 9)]
    assert torch.equal(first.images, again.images)
    assert first.captions == again.captions
    assert len({sample.captions for sample in later}) > 1


def test_boxes_keep_their_place_when_the_aspect_does_not(coco_tree):
    """The box of a referred object holds pixels that differ from the background at its corners."""
    train = samples(coco_tree)
    for index in range(len(train)):
        sample = train.get(index, 0)
        cx, cy, w, h = (sample.boxes[0] * 64).tolist()
        inside = sample.images[0][
            :, round(cy - h / 4) : round(cy + h / 4) + 1, round(cx - w / 4) : round(cx + w / 4) + 1
        ]
        background = sample.images[0][:, 0, 0][:, None, None]
        assert (inside - background).abs().amax() > 0.4


def test_both_layouts_of_negatives_hold_the_same(coco_tree, tmp_path):
    folder = ItmNegatives(coco_tree / "itm/train")
    items = {i: folder.item(i) for i in folder.ids}
    write_tsv(tmp_path / "again.tsv", items)
    table = ItmNegatives(tmp_path / "again.tsv")
    assert table.texts_of == folder.texts_of
    assert all(table.item(i) == items[i] for i in folder.ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"neg_caption": "__import__('os')"}, "is no item of hard negatives"),
        (lambda row: row | {"neg_image": "['a.jpg'"}, "is no item of hard negatives"),
        (lambda row: row | {"neg_image": "[]"}, "is no list of strings"),
        (lambda row: {k: v for k, v in row.items() if k != "title"}, "title"),
    ],
)
def test_broken_items_are_named(coco_tree, tmp_path, change, message):
    folder = ItmNegatives(coco_tree / "itm/train")
    write_items(tmp_path / "itm", {i: folder.item(i) for i in folder.ids})
    path = tmp_path / "itm/00003.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message) as error:
        ItmNegatives(tmp_path / "itm").item(3)
    assert "00003.json" in str(error.value)


def test_other_settings(coco_tree, tmp_path):
    table = ItmNegatives(coco_tree / "itm/val.tsv")
    captions = CocoSamples(coco_tree / "val2014", 64, negatives=table)
    sample = captions.get(2, 0)
    assert (len(captions), sample.id, sample.expression, len(sample.boxes)) == (12, 2, "", 0)
    expressions = load_expressions(coco_tree / "annotations/finetune_refcoco_val.json", coco_tree / "train2014")
    alone = CocoSamples(coco_tree / "train2014", 64, expressions=expressions).get(0, 0)
    assert alone.images.shape == (1, 3, 64, 64)
    assert alone.captions == ("", "", "")
    with pytest.raises(ValueError, match="no samples"):
        CocoSamples(coco_tree / "val2014", 64, expressions=expressions, negatives=table)
    with pytest.raises(ValueError, match="cannot be mirrored"):
        samples(coco_tree, latents=object(), flip=True)


def test_crowds_and_empty_boxes_are_left_out_and_boxes_cut_to_the_image(coco_tree, tmp_path):
    content = json.loads((coco_tree / "annotations/finetune_refcoco_val.json").read_text())
    box = {"image_id": content["images"][0]["id"], "tokens_positive": [[0, 3]], "iscrowd": 0}
    content["annotations"] = [
        box | {"bbox": [0, 0, 10, 10], "iscrowd": 1},
        box | {"bbox": [5, 5, 0, 10]},
        box | {"bbox": [-10, 0, 170, 60]},
    ]
    path = tmp_path / "finetune_x.json"
    path.write_text(json.dumps(content))
    first = load_expressions(path, coco_tree)[0]
    np.testing.assert_allclose(first.boxes, [[0.5, 0.25, 1, 0.5]])
    assert first.tokens_positive == (((0, 3),),)


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("the star left of the cross", "the star right of the cross"),
        ("Left-most man, RIGHT hand", "Right-most man, LEFT hand"),
        ("rightmost bottle", "leftmost bottle"),
        ("a bright leftover", "a bright leftover"),
    ],
)
def test_sides_are_swapped(text, swapped):
    assert mirror_text(text)[0] == swapped
    assert mirror_text(mirror_text(text)[0])[0] == text


def test_a_mirrored_sample_is_true_of_the_mirrored_image():
    text = "the left dog to the right of the tree on the left"
    spans = [(0, 12), (29, 37)]
    assert [text[b:e] for b, e in spans] == ["the left dog", "the tree"]
    sample = Sample(
        0, torch.rand(3, 3, 8, 8), ("left", "no", "right"), text, torch.tensor([[0.2, 0.5, 0.1, 0.3]]), [spans]
    )
    seen = mirror(sample)
    assert [seen.expression[b:e] for b, e in seen.tokens_positive[0]] == ["the right dog", "the tree"]
    assert seen.captions == ("right", "no", "left")
    assert torch.allclose(seen.boxes, torch.tensor([[0.8, 0.5, 0.1, 0.3]]))
    assert torch.equal(seen.images[..., 0], sample.images[..., -1])
    twice = mirror(seen)
    assert (twice.expression, twice.tokens_positive) == (text, [spans])
    assert not can_mirror("the man right behind the dog")
    assert can_mirror("the man on the right")


def test_flips_happen_to_about_half_and_only_when_asked(coco_tree):
    plain, flipped = samples(coco_tree), samples(coco_tree, flip=True)
    mirrored = 0
    for epoch in range(6):
        for index in range(len(plain)):
            a, b = plain.get(index, epoch), flipped.get(index, epoch)
            if not torch.equal(a.images, b.images):
                assert torch.equal(a.images.flip(-1), b.images)
                assert torch.allclose(b.boxes[:, 0], 1 - a.boxes[:, 0])
                mirrored += 1
    assert 0.3 < mirrored / (6 * len(plain)) < 0.7


def test_pixels_of_odd_images(tmp_path):
    """Palette, alpha, EXIF rotation and one pixel: all become upright RGB."""
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:10] = (255, 0, 0)
    image = Image.fromarray(picture)
    image.convert("P").save(tmp_path / "palette.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    image.rotate(180).save(tmp_path / "turned.png", exif=turned)
    for name in ("palette", "alpha", "turned"):
        pixels = load_pixels(tmp_path / f"{name}.png", 16)
        assert pixels.shape == (3, 16, 16)
        assert pixels[0, :6].min() > 0.9
        assert pixels[0, 10:].max() < -0.9
    Image.new("L", (1, 1), 255).save(tmp_path / "one.png")
    assert load_pixels(tmp_path / "one.png", 16).min() == 1


def test_an_item_of_another_image_is_refused(coco_tree, tmp_path):
    folder = ItmNegatives(coco_tree / "itm/train")
    items = {i: folder.item(i) for i in folder.ids}
    write_items(tmp_path / "itm", items)
    index = json.loads((tmp_path / "itm/imgname2txtid.json").read_text())
    names = list(index)
    swapped = dict(zip(names, [index[n] for n in reversed(names)], strict=True))
    (tmp_path / "itm/imgname2txtid.json").write_text(json.dumps(swapped))
    expressions = load_expressions(coco_tree / "annotations/finetune_refall_train.json", coco_tree / "train2014")
    mixed = CocoSamples(coco_tree / "train2014", 64, expressions=expressions, negatives=ItmNegatives(tmp_path / "itm"))
    with pytest.raises(ValueError, match="but is of COCO_train2014"):
        mixed.get(0, 0)
