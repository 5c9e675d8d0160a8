"""What users' files get wrong: training and `dpt.data check` read them by the same code, so both say so, or neither."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpt.backbones.loading import load_stable_diffusion
from dpt.data.__main__ import main
from dpt.data.coco import base_name, image_path, load_captions, load_pixels, stable_id
from dpt.data.coco_samples import CocoSamples
from dpt.data.hard_negative_files import ItmNegatives, write_items
from dpt.data.latents import LatentFolder, check_manifest, manifest, verify_folder
from dpt.data.refcoco import load_expressions

EXPRESSIONS, INDEX = "annotations/finetune_refall_train.json", "itm/train/imgname2txtid.json"


@pytest.fixture
def tree(coco_tree, tmp_path):
    """A copy without its images, which the check then counts missing."""
    shutil.copytree(coco_tree, tmp_path / "data", ignore=shutil.ignore_patterns("*.jpg"))
    return tmp_path / "data"


def check(tree, capsys) -> tuple[int, str]:
    code = main(["check", str(tree)])
    return code, capsys.readouterr().out


def edit(path: Path, change) -> dict:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return content


def box(**fields):
    return lambda content: content["annotations"][1].update(fields)


def image(**fields):
    return lambda content: content["images"][1].update(fields)


BROKEN_RECORDS = {
    "NaN width": (box(bbox=[1, 2, float("nan"), 4]), "bbox[2]"),
    "NaN place": (box(bbox=[float("nan"), 2, 3, 4]), "bbox[0]"),
    "infinite": (box(bbox=[1, 2, 3, float("inf")]), "bbox[3]"),
    "minus infinity": (box(bbox=[float("-inf"), 2, 3, 4]), "bbox[0]"),
    "digits": (box(bbox=[10**400, 2, 3, 4]), "bbox[0]"),
    "far away": (box(bbox=[1, 2, 1e12, 4]), "bbox[2]"),
    "words in a box": (box(bbox=["a", 2, 3, 4]), "bbox[0]"),
    "box of three": (box(bbox=[1, 2, 3]), "bbox"),
    "no box": (box(bbox=None), "bbox"),
    "long span": (box(tokens_positive=[[0, 10**12]]), "tokens_positive[0][1]"),
    "endless span": (box(tokens_positive=[[0, float("inf")]]), "tokens_positive[0][1]"),
    "NaN span": (box(tokens_positive=[[float("nan"), 2]]), "tokens_positive[0][0]"),
    "negative span": (box(tokens_positive=[[-3, 2]]), "tokens_positive[0][0]"),
    "span of one": (box(tokens_positive=[5]), "tokens_positive[0]"),
    "backward span": (box(tokens_positive=[[7, 2]]), "tokens_positive"),
    "no spans": (box(tokens_positive=None), "tokens_positive"),
    "digits of a width": (image(width=10**400), "width"),
    "no width": (image(width=0), "width"),
    "NaN height": (image(height=float("nan")), "height"),
    "number for a name": (image(file_name=7), "file_name"),
    "null for a name": (image(file_name=None), "file_name"),
    "empty name": (image(file_name=""), "file_name"),
    "half a character": (image(caption="the \ud800 star"), "caption"),
    "list for a caption": (image(caption=["a"]), "caption"),
}


@pytest.mark.parametrize("kind", BROKEN_RECORDS)
def test_a_record_that_does_not_fit_is_named_with_its_id(tree, capsys, kind):
    change, field = BROKEN_RECORDS[kind]
    content = edit(tree / EXPRESSIONS, change)
    named = f"expression {content['images'][1]['id']}: {field}: "
    code, out = check(tree, capsys)
    assert code == 1
    assert f"unreadable record: 1: {named}" in out
    with pytest.raises(ValueError, match="is no REC annotation file") as error:
        load_expressions(tree / EXPRESSIONS, tree / "train2014")
    assert named in str(error.value)
    assert str(tree / EXPRESSIONS) in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"images": ' + "[" * 100_000, "nested too deeply"),
        ("null", "expected object, got null"),
        ('{"images": [], "annotations": {}}', "annotations: expected array, got object"),
        ('{"images": [3], "annotations": []}', r"images\[0\]: expected object, got int"),
        ('{"images": []}', "missing required field annotations"),
        ('{"images": [], "annotations": [], "info": %s}' % ("9" * 5000), "is no valid JSON|no REC|no expression"),
    ],
)
def test_a_file_of_another_form_is_one_line(tree, capsys, text, message):
    for path, read in ((EXPRESSIONS, load_expressions), ("annotations/captions_train2014.json", load_captions)):
        (tree / path).write_text(text)
        if "9999" not in text:
            with pytest.raises(ValueError, match=message):
                read(tree / path, tree)
            code, out = check(tree, capsys)
            assert (code, Path(path).name in out) == (1, True)
            assert "unreadable file: 1" in out
    (tree / "annotations/captions_train2014.json").write_text(text)
    where = ["--captions", str(tree / "annotations/captions_train2014.json"), "--images", str(tree)]
    assert main(["mine-negatives", *where, "--output", str(tree / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("field", "value"), [("caption", 7), ("caption", "\udfff"), ("image_id", [1]), ("image_id", 999)]
)
def test_captions_that_do_not_fit(tree, capsys, field, value):
    path = tree / "annotations/captions_train2014.json"
    edit(path, lambda content: content["annotations"][0].update({field: value}))
    with pytest.raises(ValueError, match=field):
        load_captions(path, tree / "train2014")
    assert ("unreadable record: 1: image" in check(tree, capsys)[1]) == (value != 999)


def test_ids_may_be_text(tree, capsys):
    """Of their own, or as text in one list and numbers in the other; the random numbers of a sample stay its own."""
    before = load_expressions(tree / EXPRESSIONS, tree)
    edit(tree / EXPRESSIONS, lambda c: [a.update(image_id=str(a["image_id"])) for a in c["annotations"]])
    again = load_expressions(tree / EXPRESSIONS, tree)
    assert [e.id for e in again] == [e.id for e in before]
    assert all(np.array_equal(a.boxes, b.boxes) and len(a.boxes) for a, b in zip(before, again, strict=True))
    rename = {key: f"img-{key}" for key in (e.id for e in before)}
    edit(tree / EXPRESSIONS, lambda c: [i.update(id=rename[i["id"]]) for i in c["images"]])
    edit(tree / EXPRESSIONS, lambda c: [a.update(image_id=rename[int(a["image_id"])]) for a in c["annotations"]])
    named = load_expressions(tree / EXPRESSIONS, tree)
    assert [e.id for e in named] == [stable_id(rename[e.id]) for e in before]
    assert len({e.id for e in named}) == len(named)
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(before, named, strict=True))
    assert "unreadable" not in check(tree, capsys)[1].replace("missing or unreadable image", "")
    assert (stable_id("img-64"), stable_id(64), stable_id("64")) == (59957891388878225, 64, 64)
    assert min(stable_id(-1), stable_id(2**70), stable_id("064")) > 64


def test_boxes_that_belong_to_no_expression_are_not_trained_without(tree, capsys):
    edit(tree / EXPRESSIONS, lambda c: [a.update(image_id=f"x{a['image_id']}") for a in c["annotations"]])
    with pytest.raises(
        ValueError, match=r"boxes of image_id x1000, and .* belong to no expression, and expression 1000"
    ):
        load_expressions(tree / EXPRESSIONS, tree)
    code, out = check(tree, capsys)
    assert code == 1
    assert "annotation of an unknown image" in out
    edit(tree / EXPRESSIONS, lambda c: c["annotations"].clear())
    with pytest.raises(ValueError, match="no expression has a box"):
        load_expressions(tree / EXPRESSIONS, tree)
    assert "no expression has a box: 1" in check(tree, capsys)[1]


def test_a_byte_order_mark_is_no_part_of_any_file(coco_tree, tmp_path, capsys):
    shutil.copytree(coco_tree, tmp_path / "data")
    for pattern in ("*.json", "*.tsv"):
        for path in (tmp_path / "data").rglob(pattern):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert main(["check", str(tmp_path / "data")]) == 0
    assert len(load_expressions(tmp_path / "data" / EXPRESSIONS, tmp_path)) > 8
    assert ItmNegatives(tmp_path / "data/itm/val.tsv").item(0) == ItmNegatives(coco_tree / "itm/val.tsv").item(0)


@pytest.mark.parametrize("prefix", ["train2014/", "train2014\\", "C:\\data\\train2014\\", "/old/place/"])
def test_a_file_name_may_have_folders_and_either_slash(coco_tree, tmp_path, capsys, prefix):
    tree = tmp_path / "data"
    shutil.copytree(coco_tree, tree)
    edit(tree / EXPRESSIONS, lambda c: [i.update(file_name=prefix + i["file_name"]) for i in c["images"]])
    items = ItmNegatives(coco_tree / "itm/train")
    edit(tree / INDEX, lambda c: [c.update({prefix + name: c.pop(name)}) for name in list(c)])
    for k in items.ids:
        names = repr([prefix + name for name in items.item(k).neg_images])
        edit(
            tree / f"itm/train/{k:05d}.json",
            lambda c, n=names: c.update(filepath=prefix + c["filepath"], neg_image=n),
        )
    assert main(["check", str(tree)]) == 0
    out = capsys.readouterr().out
    assert "are in finetune_refall_train.json" in out
    samples = [
        CocoSamples(
            root / "train2014",
            32,
            expressions=load_expressions(root / EXPRESSIONS, root / "train2014"),
            negatives=ItmNegatives(root / "itm/train"),
        ).get(0, 0)
        for root in (coco_tree, tree)
    ]
    assert torch.equal(samples[0].images, samples[1].images)
    assert samples[0].captions == samples[1].captions
    assert image_path(tree, "train2014\\COCO_train2014_000000000000.jpg").is_file()
    assert base_name("a\\b/c.jpg") == "c.jpg"


BROKEN_ITEMS = {
    "title list": {"title": ["a"]},
    "title of half a character": {"title": "a \ud800"},
    "filepath int": {"filepath": 3},
    "filepath list": {"filepath": ["a"]},
    "unary deep": {"neg_caption": "-" * 100_000 + "1"},
    "deep": {"neg_caption": "[" * 10_000 + "]" * 10_000},
    "sum": {"neg_image": "['a' + 'b']"},
    "numbers": {"neg_image": "[1, 2]"},
    "half a character": {"neg_caption": "['a', '\\ud800']"},
    "cut escape": {"neg_caption": "['\\x']"},
    "long": {"neg_caption": repr(["a" * 200_000])},
}


@pytest.mark.parametrize("kind", BROKEN_ITEMS)
def test_items_that_do_not_fit(tree, capsys, kind):
    path = tree / "itm/train/00003.json"
    edit(path, lambda content: content.update(BROKEN_ITEMS[kind]))
    with pytest.raises(ValueError, match=f"00003.json.*({next(iter(BROKEN_ITEMS[kind]))}|surrogate)"):
        ItmNegatives(tree / "itm/train").item(3)
    code, out = check(tree, capsys)
    assert code == 1
    assert "unreadable item: 1: " in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title\tfilepath\tneg_caption\nа\tb\tc\n", "lacks the columns neg_image"),
        ("title\tfilepath\tneg_caption\tneg_image\na\tb.jpg\n", "row 1: neg_caption is missing"),
        ("title\tfilepath\tneg_caption\tneg_image\na\t\t['c']\t['d']\n", "row 1: filepath is missing"),
        (
            "title\tfilepath\tneg_caption\tneg_image\na\tb.jpg\t" + "-" * 99_999 + "1\t['d']\n",
            "neg_caption: .* no list",
        ),
        ("", "lacks the columns"),
    ],
)
def test_tables_that_do_not_fit(tree, capsys, text, message):
    (tree / "itm/val.tsv").write_text(text)
    with pytest.raises(ValueError, match=f"val.tsv.*{message}"):
        ItmNegatives(tree / "itm/val.tsv").item(0)
    code, out = check(tree, capsys)
    assert code == 1
    assert "unreadable" in next(
        line for line in out.splitlines() if ("val.tsv" in line and "row" in line) or "lacks" in line
    )


@pytest.mark.parametrize("content", ['{"a.jpg": [-1]}', '{"a.jpg": [1.5]}', '{"": [1]}', "[" * 99_999, '{"a": {}}'])
def test_indices_that_do_not_fit(tree, content, capsys):
    (tree / INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"imgname2txtid\.json: "):
        ItmNegatives(tree / "itm/train")
    assert "unreadable file: 1" in check(tree, capsys)[1]


@pytest.fixture(scope="module")
def sd():
    return load_stable_diffusion("shapes")


@pytest.mark.parametrize(
    "text", ["[]", "null", '{"vae": null}', '{"vae": ["a"]}', '{"vae": 3}', "[" * 99_999, "<html>", '{"size": 128}']
)
def test_manifests_of_latents_that_do_not_fit(tree, sd, text, capsys):
    folder = tree / "latents"
    folder.mkdir()
    good = json.dumps({"model": "shapes", "vae": [0.1], "scaling_factor": 1.0, "size": 128, "shape": [4, 16, 16]})
    (folder / "latents.json").write_text(good[:-1] + ", " + text[1:] if text.startswith('{"vae') else text)
    with pytest.raises(ValueError, match=r"latents\.json: "):
        check_manifest(folder, manifest(sd, 128))
    where = ["--model", "shapes", "--images", str(tree / "train2014"), "--output", str(folder)]
    Image.new("RGB", (8, 8)).save(tree / "train2014/a.png")
    assert main(["cache-latents", *where]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert "unreadable file: 1: " in check(tree, capsys)[1]


@pytest.mark.parametrize("line", ["[]", '{"file": 3, "sha256": "a"}', '{"file": "a.npy"}', "[" * 99_999, "x"])
def test_checksums_that_do_not_fit(tree, line, capsys):
    folder = tree / "latents"
    folder.mkdir()
    (folder / "checksums_0_of_1.jsonl").write_text(f'{{"file": "/dev/zero", "sha256": "a"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"checksums_0_of_1\.jsonl, line 2"):
        verify_folder(folder)
    (folder / "checksums_0_of_1.jsonl").write_text('{"file": "/dev/zero", "sha256": "a"}\n{"file": "cut sh')
    assert verify_folder(folder) == ["/dev/zero in the checksums is no name of a file here"]


def test_latents_that_are_none(sd, tmp_path):
    np.save(tmp_path / "words.npy", np.array(["a"] * 1024))
    np.save(tmp_path / "nan.npy", np.full((4, 16, 16), np.nan, np.float16))
    np.savez(tmp_path / "many", a=np.ones((4, 16, 16)))
    (tmp_path / "many.npz").rename(tmp_path / "many.npy")
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4), }\n"
    (tmp_path / "huge.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head)
    for stem, message in {
        "words": "floats",
        "nan": "not finite",
        "many": "one array",
        "huge": "cannot be read",
    }.items():
        with pytest.raises(ValueError, match=rf"{stem}\.npy .*{message}"):
            LatentFolder(tmp_path, sd, 128).read(stem)


def test_sixteen_bits_of_grey_are_scaled_not_cut(tmp_path, capsys):
    ramp = np.linspace(0, 1, 64)[None].repeat(64, 0)
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray((ramp * 255).astype(np.uint8)).save(tmp_path / "8.png")
    assert Image.open(tmp_path / "16.png").mode.startswith("I")
    wide, plain = (load_pixels(tmp_path / f"{bits}.png", 64) for bits in (16, 8))
    torch.testing.assert_close(wide, plain, atol=0.01, rtol=0)
    (tmp_path / "data/images").mkdir(parents=True)
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "data/images/float.jpg", "TIFF")
    with pytest.raises(ValueError, match=r"float.jpg .* mode F, whose range is unknown"):
        load_pixels(tmp_path / "data/images/float.jpg", 64)
    assert "unreadable image: 1: float.jpg (its pixels are of mode F" in check(tmp_path / "data", capsys)[1]


def test_a_leak_free_list_of_a_broken_list_is_refused(tree, capsys):
    edit(tree / EXPRESSIONS, lambda content: content["images"][0].pop("file_name"))
    target = tree / "annotations/finetune_leakfree_train.json"
    assert main(["check", str(tree), "--leak_free", str(target)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "missing required field file_name" in error
    assert not target.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cache-latents", "--batch_size", "-1"], "--batch_size: '-1'; it must be a whole number at least 1"),
        (["cache-latents", "--size", "100000"], "at most 4096"),
        (["cache-latents", "--device", "bogus"], "--device 'bogus' is not usable here"),
        (["cache-latents", "--device", "meta"], "'meta'"),
        (["cache-latents", "--device", "cuda:9"], "'cuda:9'"),
        (["cache-latents", "--shard", "1/2/3"], "it must be K/N"),
        (["cache-latents", "--shard", "0/0"], "it must be K/N"),
        (["mine-negatives", "--block", "-1"], "--block: '-1'"),
        (["mine-negatives", "--num_texts", "1000000000"], "at most 1000"),
        (["mine-negatives", "--num_images", "0"], "--num_images: '0'"),
        (["mine-negatives", "--batch_size", "x"], "--batch_size: 'x'"),
        (["mine-negatives", "--device", "cuda:-1"], "'cuda:-1'"),
    ],
)
def test_flags_out_of_bounds_are_one_line(capsys, words, message):
    try:
        code = main([*words, "--images", "x", "--output", "y", *["--captions", "x"] * (words[0] == "mine-negatives")])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert message in error


def test_a_list_of_hard_negatives_is_written_as_it_is_read(tmp_path, coco_tree):
    items = ItmNegatives(coco_tree / "itm/train")
    odd = items.item(0).__class__('it\'s "so"\u2028', "a.jpg", ("it's", 'a "b"', "\\", "\n", "\u2028", ""), ("b.jpg",))
    write_items(tmp_path, {0: odd})
    assert ItmNegatives(tmp_path).item(0) == odd
