"""`evaluate.py choose`: areas under the curve, simulated choices, and a run on the embedded model."""

import json

import numpy as np
import pytest

import evaluate
from dpt.choosing_rules import rounds
from dpt.evaluation.choose import area_within_prompts, cost, simulate
from dpt.files import append_line

WORDS = ["choose", "--prompts", "shapes:val", "--per_category", "1", "--candidates", "2", "--steps", "2"]
WORDS += ["--where", "0.5", "1", "--predicted", "shapes-clip"]


def test_area_within_prompts_counts_pairs_of_different_value():
    scores = np.array([[0.1, 0.2, 0.3, 0.3], [0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    values = np.array([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    # of the first: (0.2, 0.3 above 0.1) won, (0.3 against 0.3) tied, (0.2 against 0.3) lost; the second has one value
    assert area_within_prompts(scores, values).tolist() == [2.5 / 4, 0.5]


def test_a_choice_is_simulated_as_the_artist_makes_it():
    scores = np.array([[[0.9, 0.0], [0.1, 1.0], [0.5, 0.2], [0.4, 0.3]]])  # (1 prompt, 4 candidates, 2 steps)
    values = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert simulate(scores, values, 4, rounds(2, 4, (0.5,))).tolist() == [[1.0]]
    assert simulate(scores, values, 4, rounds(2, 4, (1.0,))).tolist() == [[2.0]]
    assert simulate(scores, values, 4, rounds(2, 4, (0.5, 1.0))).tolist() == [[3.0]]  # 0.9 and 0.5, then 0.2
    assert simulate(scores, values, 2, rounds(2, 2, (0.5,))).tolist() == [[1.0, 3.0]]
    assert cost(rounds(20, 4, (0.25,)), 4, 20) == 1.75
    assert cost(rounds(20, 8, (0.15, 0.4)), 8, 20) == (8 * 3 + 3 * 5 + 12) / 20
    assert cost(rounds(20, 2, (1.0,)), 2, 20) == 2


def test_a_run_writes_tables_and_goes_on(tmp_path, shapes_dpt, capsys):
    words = [*WORDS, "--dpt", str(shapes_dpt), "--outdir", str(tmp_path / "out")]
    assert evaluate.main([*words, "--record", str(tmp_path / "results.md")]) == 0
    lines = (tmp_path / "out/candidates.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 7
    record = json.loads(lines[0])
    assert {name: len(scores) for name, scores in record["scores"].items()} == {
        name: 2 for name in (str(shapes_dpt), "cfg norm", "predicted picture")
    }
    tables = json.loads((tmp_path / "out/choose.json").read_text())
    assert tables["prompts"] == 6  # unseen stands apart
    assert [row["cost"] for row in tables["grid"]] == [1.5, 2.0]
    for row in tables["grid"]:
        assert row["ceiling"][0] >= max(row[name][0] for name in (str(shapes_dpt), "random"))
    assert (tmp_path / "out/choose.png").stat().st_size > 10_000
    assert "begin choose" in (tmp_path / "results.md").read_text()
    assert evaluate.main(words) == 0  # nothing is drawn again
    assert (tmp_path / "out/candidates.jsonl").read_text().splitlines() == lines
    assert (tmp_path / "out/choose.md").read_text() in capsys.readouterr().out
    for other in (["--scale", "3"], ["--image_seed", "4"]):
        assert evaluate.main([*words, *other]) == 2
        assert "holds candidates of other settings" in capsys.readouterr().err
    assert {json.loads(line)["seed"] % 1000 for line in lines} == {0}
    append_line(tmp_path / "out/candidates.jsonl", record | {"scores": {"cfg norm": [1.0]}})
    assert evaluate.main(words) == 2
    assert "record 15: scores are not those of 2 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--candidates", "1"], "--candidates: '1'; it must be a whole number at least 2"),
        (["--where", "0"], "--where: '0'; it must be a number at most 1 and above 0"),
        (["--dpt", "nowhere"], "nowhere is not there"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--categories", "cats"], "--categories names cats"),
    ],
)
def test_bad_input_is_one_line(tmp_path, shapes_dpt, capsys, more, message):
    words = [*WORDS, "--dpt", str(shapes_dpt), "--outdir", str(tmp_path / "out"), *more]
    try:
        code = evaluate.main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err.split("error: ")[-1]
    assert message in error
    assert error.count("\n") == 1


def test_a_judge_of_degrees_is_shown_as_it_is(tmp_path, shapes_dpt):
    words = [*WORDS, "--dpt", str(shapes_dpt), "--outdir", str(tmp_path / "out"), "--scorer", "shapes-clip"]
    assert evaluate.main([*words, "--categories", "unseen"]) == 0
    table = (tmp_path / "out/choose.md").read_text()
    assert "Means of what the judge says" in table
    tables = json.loads((tmp_path / "out/choose.json").read_text())
    assert tables["prompts"] == 1
    assert f"{tables['grid'][0]['random'][0]:.3f} (" in table


def test_a_folder_of_somebody_else_is_refused(tmp_path, shapes_dpt, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert evaluate.main([*WORDS, "--dpt", str(shapes_dpt), "--outdir", str(tmp_path)]) == 2
    assert "choose an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
