import json

import numpy as np
import pytest
from PIL import Image

from dpt.shapes import label, quality
from dpt.shapes.quality import judge_prompts, main, shares
from dpt.shapes.scenes import IMAGE_SIZE
from dpt.stable_diffusion import load_stable_diffusion


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Three pictures with their verdicts, as pretraining leaves them."""
    folder = tmp_path_factory.mktemp("samples") / "step_0000001"
    sd = load_stable_diffusion("shapes")
    prompts = {"single": ("a red circle", "a blue star"), "numeracy": ("two green stars",)}
    return folder, judge_prompts(sd, prompts, num_inference_steps=2, folder=folder)


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
    rows[0]["label"] = next(name for name in quality.LABELS if name != verdicts[rows[0]["prompt"]])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong, counts = quality.agreement(tmp_path / "labelled")
    assert [w["index"] for w in wrong] == [0]
    assert sum(counts.values()) == 3
    kept = {row["prompt"]: row["image"] for row in quality.load_labelled(tmp_path / "labelled")}
    for k, record in enumerate(records):
        assert (kept[record["prompt"]] == np.array(Image.open(folder / f"{k:04d}.png"))).all()


def test_sections_say_their_command(tmp_path, capsys):
    arguments = ["oracle", "--renders", "20", "--round_trips", "10", "--output", str(tmp_path / "r.md")]
    assert main(arguments) == 0
    text = (tmp_path / "r.md").read_text()
    assert f"`python -m dpt.shapes.quality {' '.join(arguments)}`" in text
    assert "| hard-negative scenes judged misaligned | 20 |" in text
    run = tmp_path / "run"
    run.mkdir()
    records = [{"step": k, "loss_denoise": 0.1} for k in (10, 20)]
    records[1] |= {"val_loss": 0.2, "val_loss_unweighted": 0.1} | dict.fromkeys(quality.LABELS, 1 / 3)
    (run / "unet.metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["curve", "--run", str(run), "--output", str(tmp_path / "r.md")]) == 0
    assert "| 20 | 0.2000 | 0.1000 | 33 | 33 | 33 |" in (tmp_path / "r.md").read_text()
    assert Image.open(tmp_path / "pretraining.png").width > 500
    capsys.readouterr()
    assert main(["curve", "--run", str(tmp_path / "none"), "--output", str(tmp_path / "r.md")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
