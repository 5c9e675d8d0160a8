"""`evaluate.py worth`: areas against gains, from synthetic choices and arms."""

import json

import numpy as np
import pytest
from PIL import Image

import evaluate
from dpt.evaluation.align import file_hashes
from dpt.evaluation.arms import SETTINGS_FILE, Arm
from dpt.evaluation.worth import fit
from dpt.files import append_line, write_text
from dpt.images import append_metadata, read_metadata

STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)


@pytest.fixture
def choices(tmp_path):
    """40 prompts of four candidates; adapter k's score is the value times its strength, in noise."""
    rng = np.random.default_rng(0)
    for prompt in range(40):
        for seed, value in enumerate(rng.permutation([0.0, 0.0, 1.0, 1.0])):
            scores = {f"adapter-{s:g}": [0.0, s * value + rng.normal()] for s in STRENGTHS} | {"cfg norm": [1.0, 1.0]}
            record = {"prompt": f"p{prompt}", "category": "size", "seed": seed, "value": value, "scores": scores}
            append_line(tmp_path / "candidates.jsonl", record | {"settings": "same"})
    return tmp_path


def test_adapters_that_rank_better_gain_more_by_choosing(choices, capsys):
    words = ["worth", str(choices), "--choose_at", "1", "--output", str(choices / "worth.png")]
    assert evaluate.main(words) == 0
    found = json.loads((choices / "worth.json").read_text())
    areas = [row["area"][0] for row in found["verifiers"].values()]
    gains = [row["choosing"][0] for row in found["verifiers"].values()]
    assert list(found["verifiers"]) == [f"adapter-{s:g}" for s in STRENGTHS]
    assert areas[-1] == 1
    assert gains[-1] == pytest.approx(100 / 3, abs=12)  # pairs of one right and one wrong picture: two of three
    fitted = found["fits"]["choosing"]
    assert fitted["slope"] > 0
    assert fitted["interval"][0] > 0
    assert fitted["p"] < 0.05
    assert (choices / "worth.png").stat().st_size > 10_000
    assert evaluate.main(words) == 0  # its own files may be replaced
    (choices / "worth.json").write_text("{}")
    capsys.readouterr()
    assert evaluate.main(words) == 2
    assert "is not of this command" in capsys.readouterr().err


def test_accuracies_that_predict_gains_are_fitted(choices, capsys):
    names = [f"adapter-{s:g}" for s in STRENGTHS]
    for number, name in enumerate([None, *names]):
        folder = choices / "arms" / f"v{number}"
        (folder / "samples").mkdir(parents=True)
        write_text(folder / SETTINGS_FILE, json.dumps(Arm(dpt=name).settings()))
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "samples/0.png")
        append_metadata(folder, {"file": "samples/0.png", "prompt": "p", "category": "size", "seed": 0, "number": 0})
        digest = file_hashes(folder, read_metadata(folder))["samples/0.png"]
        line = {"file": "samples/0.png", "sha256": digest, "label": "correct" if number > 2 else "malformed"}
        append_line(folder / "oracle.jsonl", line)
    arms = sorted(str(folder) for folder in (choices / "arms").iterdir())
    rising = {f"v{number}": {"text": {"t500": [0.5 + 0.05 * number, 0, 1]}} for number in range(1, 7)}
    write_text(choices / "itm.json", json.dumps({"mined": rising}))
    words = ["worth", str(choices), "--choose_at", "1", "--arms", *arms, "--against", "v0"]
    words += ["--measured", str(choices / "itm.json"), "--output", str(choices / "worth.png")]
    assert evaluate.main(words) == 0
    fits = json.loads((choices / "worth.json").read_text())["fits"]
    assert set(fits) == {"choosing", "gradient", "choosing by mined text", "gradient by mined text"}
    assert fits["gradient by mined text"]["correlation"] > 0.7
    write_text(choices / "itm.json", json.dumps({"mined": {"v1": rising["v1"]}}))
    capsys.readouterr()
    assert evaluate.main(words) == 2
    assert "has nothing of v2; measure checkpoints under the names of the arms" in capsys.readouterr().err


def test_no_line_is_seen_where_there_is_none():
    rng = np.random.default_rng(1)
    found = fit(rng.random(24), rng.random(24))
    assert found["interval"][0] < 0 < found["interval"][1]
    assert found["p"] > 0.05


def test_bad_input_is_one_line(choices, capsys):
    output = ["--output", str(choices / "worth.png")]
    for words, message in (
        ([str(choices), "--candidates", "5"], "--candidates is 5; the prompts have 4"),
        ([str(choices / "nowhere")], "nowhere"),
        ([str(choices), "--arms", str(choices / "nothing")], "nothing"),
    ):
        assert evaluate.main(["worth", *words, *output]) == 2
        assert message in capsys.readouterr().err
    line = json.loads((choices / "candidates.jsonl").read_text().splitlines()[0])
    (choices / "few").mkdir()
    append_line(choices / "few/candidates.jsonl", line | {"scores": {"one": [0.0, 1.0]}})
    assert evaluate.main(["worth", str(choices / "few"), *output]) == 2
    assert "1 adapters were asked" in capsys.readouterr().err
