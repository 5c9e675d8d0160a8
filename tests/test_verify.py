import json

import numpy as np
import pytest
from PIL import Image

from dpt.base_models import CKPT_FOLDER
from dpt.shapes.scenes import IMAGE_SIZE, render
from dpt.shapes.world import ShapesWorld
from dpt.verify.__main__ import main
from dpt.verify.checks import CHECKS

SMALL = ["--num_pairs", "8", "--steps", "2", "--device", "cpu"]


def verify(tmp_path, weights, *arguments):
    code = main(["--dpt", str(weights), "--outdir", str(tmp_path / "out"), *SMALL, *arguments])
    return code, json.loads((tmp_path / "out/report.json").read_text())["checks"]


@pytest.mark.slow
def test_runs_end_to_end_on_shapes(tmp_path, shapes_dpt):
    """The adapter is random here: ITM and REC may fail, and its queries nearly tie, so that half precision may follow
    another one. Everything else must pass."""
    code, checks = verify(tmp_path, shapes_dpt, "--model", "shapes")
    assert set(checks) == set(CHECKS)
    must_pass = set(CHECKS) - {"itm", "rec", "cost", "half_precision"}
    assert checks["half_precision"]["mean_pixel_difference"] < 8
    assert checks["half_precision"]["gradient_cosine"] > 0.8
    assert all(checks[name]["passed"] for name in must_pass), checks
    assert 0 <= checks["itm"]["accuracy"] <= 1
    assert code == (0 if all(check["passed"] for check in checks.values()) else 1)
    assert Image.open(tmp_path / "out/pictures.png").size[0] > 400


def make_coco(root):
    world = ShapesWorld("val", seed=8)
    for folder in ("annotations", "val2014", "train2014"):
        (root / folder).mkdir(parents=True)
    images, captions, referred, boxes = [], [], [], []
    for i in range(4):
        example = world[i]
        for folder in ("val2014", "train2014"):
            Image.fromarray(render(example.scene)).save(root / folder / f"{i}.png")
        expression = example.expressions[0]
        entry = {"file_name": f"{i}.png", "id": i, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        images.append(entry)
        captions.append({"image_id": i, "caption": example.caption})
        referred.append(entry | {"caption": expression.text, "dataset_name": "refcoco", "original_id": i})
        cx, cy, w, h = example.scene.boxes()[expression.index] * IMAGE_SIZE
        box = [float(v) for v in (cx - w / 2, cy - h / 2, w, h)]
        boxes.append({"image_id": i, "bbox": box, "tokens_positive": [list(expression.span)]})
    (root / "annotations/captions_val2014.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (root / "annotations/finetune_refcoco_val.json").write_text(json.dumps({"images": referred, "annotations": boxes}))


@pytest.mark.slow
def test_reads_the_user_s_coco_tree(tmp_path, shapes_dpt):
    make_coco(tmp_path / "coco")
    model = ["--model", str(CKPT_FOLDER / "shapes"), "--coco", str(tmp_path / "coco")]
    _, checks = verify(tmp_path, shapes_dpt, *model)
    assert (checks["itm"]["pairs"], checks["rec"]["expressions"]) == (4, 4)


def test_boxes_and_spans_of_a_rec_file(tmp_path):
    from dpt.data.coco import load_captions, load_pixels
    from dpt.data.refcoco import load_expressions

    make_coco(tmp_path)
    world = ShapesWorld("val", seed=8)
    referred = load_expressions(tmp_path / "annotations/finetune_refcoco_val.json", tmp_path / "train2014")
    for i, entry in enumerate(referred):
        expression = world[i].expressions[0]
        assert entry.expression == expression.text
        assert entry.tokens_positive == ((expression.span,),)
        assert np.allclose(entry.boxes[0], world[i].scene.boxes()[expression.index])
        assert load_pixels(entry.path, 64).shape == (3, 64, 64)
    captions = load_captions(tmp_path / "annotations/captions_val2014.json", tmp_path / "val2014")
    assert [c.caption for c in captions] == [world[i].caption for i in range(4)]
    (tmp_path / "html.json").write_text("<html>")
    for content in ("<html>", '{"images": 3}', "[]"):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=r"bad\.json"):
            load_captions(tmp_path / "bad.json", tmp_path)
    with pytest.raises(ValueError, match=r"html\.json cannot be read as an image"):
        load_pixels(tmp_path / "html.json", 8)


def test_a_coco_folder_that_is_not_there(tmp_path, capsys):
    coco = ["--coco", str(tmp_path / "none")]
    assert main(["--model", "shapes", "--dpt", str(tmp_path), "--outdir", str(tmp_path), *coco]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_bad_weights_are_one_line(tmp_path, capsys):
    assert main(["--model", "shapes", "--dpt", str(tmp_path / "none"), "--outdir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--num_pairs", "0"), ("--num_pairs", "1"), ("--steps", "0"), ("--steps", "501"), ("--steps", "x")],
)
def test_numbers_out_of_range(capsys, flag, value):
    with pytest.raises(SystemExit, match="2"):
        main(["--dpt", "x", flag, value])
    error = capsys.readouterr().err
    assert f"{flag}: '{value}'; it must be a whole number at least" in error
    assert error.count("\n") == 1


def test_weights_of_text_are_one_line(tmp_path, capsys):
    (tmp_path / "weights.txt").write_text("hello\n")
    arguments = ["--model", "shapes", "--dpt", str(tmp_path / "weights.txt"), "--outdir", str(tmp_path)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "weights.txt is no readable weights file" in error
    assert error.count("\n") == 1
