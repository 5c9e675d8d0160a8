import json

import numpy as np
import pytest
from PIL import Image

from dpt.backbones.loading import load_stable_diffusion
from dpt.sampling_settings import Sampling
from dpt.shapes import label, labelled_pictures
from dpt.shapes.oracle import LABELS
from dpt.shapes.quality import main
from dpt.shapes.quality_tables import judge_prompts, shares
from dpt.shapes.scenes import IMAGE_SIZE


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Three pictures with their verdicts, as pretraining leaves them."""
    folder = tmp_path_factory.mktemp("samples") / "step_0000001"
    sd = load_stable_diffusion("shapes")
    prompts = {"single": ("a red circle", "a blue star"), "numeracy": ("two green stars",)}
    return folder, judge_prompts(sd, prompts, sampling=Sampling(guidance_scale=5, num_inference_steps=2), folder=folder)


def test_pictures_and_their_verdicts_are_kept(drawn):
    folder, records = drawn
    kept = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert kept == records
    assert [(r["category"], r["prompt"], r["seed"]) for r in records][2] == ("numeracy", "two green stars", 2000)
    assert Image.open(folder / "0002.png").size == (IMAGE_SIZE, IMAGE_SIZE)
    assert sum(share[0] for share in shares(records).values()) == pytest.approx(1)


def test_labels_by_eye(drawn, tmp_path, capsys):
    folder, records = drawn
    where = ["--folder", str(tmp_path / "labelled")]
    assert label.main(["collect", str(folder), "--count", "9", *where]) == 2
    assert "holds 3 pictures; 9 are wanted" in capsys.readouterr().err
    assert label.main(["collect", str(folder), "--count", "3", *where]) == 0
    assert label.main(["sheets", str(tmp_path / "pages"), *where]) == 0
    assert Image.open(tmp_path / "pages/page_00.png").width > 500
    path = tmp_path / "labelled/labels.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row["label"] is None and "reason" not in row for row in rows)
    verdicts = {r["prompt"]: r["label"] for r in records}
    for row in rows[1:]:
        row["label"] = verdicts[row["prompt"]]
    rows[0]["label"] = next(name for name in LABELS if name != verdicts[rows[0]["prompt"]])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong, counts = labelled_pictures.agreement(tmp_path / "labelled")
    assert [w["index"] for w in wrong] == [0]
    assert sum(counts.values()) == 3
    kept = {row["prompt"]: row["image"] for row in labelled_pictures.load_labelled(tmp_path / "labelled")}
    for k, record in enumerate(records):
        assert (kept[record["prompt"]] == np.array(Image.open(folder / f"{k:04d}.png"))).all()


def test_sections_say_their_command(tmp_path, capsys):
    arguments = ["oracle", "--renders", "20", "--round_trips", "10", "--record", str(tmp_path / "r.md")]
    assert main(arguments) == 0
    text = (tmp_path / "r.md").read_text()
    assert f"`python -m dpt.shapes.quality {' '.join(arguments)}`" in text
    assert "| hard-negative scenes judged misaligned | 20 |" in text
    run = tmp_path / "run"
    run.mkdir()
    records = [{"step": k, "loss_denoise": 0.1} for k in (10, 20)]
    records[1] |= {"val_loss": 0.2, "val_loss_unweighted": 0.1} | dict.fromkeys(LABELS, 1 / 3)
    (run / "unet.metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["curve", "--run", str(run), "--record", str(tmp_path / "r.md")]) == 0
    assert "| 20 | 0.2000 | 0.1000 | 33 | 33 | 33 |" in (tmp_path / "r.md").read_text()
    assert Image.open(tmp_path / "pretraining.png").width > 500
    capsys.readouterr()
    assert main(["curve", "--run", str(tmp_path / "none"), "--record", str(tmp_path / "r.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "line 1: expected object, got array"),
        ('{"category": "single", "prompt": 7, "seed": 0, "label": "correct", "reason": ""}', "line 1: prompt"),
        ('{"prompt": "a red circle"}', "line 1: object is missing required field"),
        ("[" * 100_000, "line 1: "),
    ],
)
def test_bad_verdicts_and_labels_are_one_line(tmp_path, capsys, content, message):
    (tmp_path / "verdicts.jsonl").write_text(content + "\n")
    (tmp_path / "labels.jsonl").write_text(content + "\n")
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)).save(tmp_path / "pictures.png")
    collect = ["collect", str(tmp_path), "--count", "1", "--folder", str(tmp_path / "set")]
    sheets = ["sheets", str(tmp_path / "pages"), "--folder", str(tmp_path)]
    for words, name in ((collect, "verdicts"), (sheets, "labels")):
        assert label.main(words) == 2
        error = capsys.readouterr().err
        assert f"{name}.jsonl, {message}" in error
        assert error.count("\n") == 1


def test_labels_and_pages_take_no_other_file_s_place(drawn, tmp_path, capsys):
    folder, _ = drawn
    (tmp_path / "pictures.png").write_bytes(b"x")
    assert label.main(["collect", str(folder), "--count", "3", "--folder", str(tmp_path)]) == 2
    assert "pictures.png exists already" in capsys.readouterr().err
    assert label.main(["sheets", str(tmp_path)]) == 2
    assert "pictures.png, which is no page" in capsys.readouterr().err
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"x"]


def test_more_labels_than_pictures_are_named(tmp_path, capsys):
    line = json.dumps({"stage": "s", "category": "single", "prompt": "a", "seed": 0, "label": None})
    (tmp_path / "labels.jsonl").write_text(f"{line}\n{line}\n")
    Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE)).save(tmp_path / "pictures.png")
    assert label.main(["sheets", str(tmp_path / "pages"), "--folder", str(tmp_path)]) == 2
    assert "has 1 pictures, labels.jsonl 2 lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("7\n", "line 1: expected object, got int"),
        ('{"step": 1, "val_loss": "x"}\n', "line 1: "),
        ('{"step": 1, "val_loss": 1}\n', "step 1 lacks correct"),
    ],
)
def test_bad_curves_are_one_line(tmp_path, capsys, content, message):
    (tmp_path / "unet.metrics.jsonl").write_text(content)
    assert main(["curve", "--run", str(tmp_path), "--record", str(tmp_path / "r.md")]) == 2
    error = capsys.readouterr().err
    assert "unet.metrics.jsonl" in error
    assert message in error
    assert error.count("\n") == 1


def test_a_figure_takes_no_other_s_place(tmp_path, capsys):
    record = {"step": 1, "loss": 0.1, "val_loss": 0.2, "val_loss_unweighted": 0.1} | dict.fromkeys(LABELS, 0.3)
    (tmp_path / "unet.metrics.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "pretraining.png").write_bytes(b"mine")
    assert main(["curve", "--run", str(tmp_path), "--record", str(tmp_path / "r.md")]) == 2
    assert "pretraining.png is there" in capsys.readouterr().err
    assert (tmp_path / "pretraining.png").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (main, ["oracle", "--renders", "0"]),
        (main, ["oracle", "--round_trips", "x"]),
        (main, ["base", "--guidance", "nan"]),
        (main, ["base", "--prompts_for_guidance", "0"]),
        (main, ["base", "--seeds", "1001"]),
        (label.main, ["collect", "x", "--count", "0"]),
    ],
)
def test_number_flags_have_ranges(capsys, command, words):
    with pytest.raises(SystemExit) as stop:
        command(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert f"argument {words[-2]}: {words[-1]!r}; it must be a" in error
