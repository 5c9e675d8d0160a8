import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from dpt.evaluation.align import score, score_lines
from dpt.evaluation.arms import Arm, load_arms
from dpt.evaluation.frechet import frechet_distance, render_prompt, spread
from dpt.evaluation.judges import Judge
from dpt.evaluation.pack import read_arm, read_packed
from dpt.evaluation.prompts import load_prompt_set
from dpt.evaluation.table import plot_arms
from dpt.images import read_metadata
from dpt.metrics import bootstrap_interval, bootstrap_p, crossed_bootstrap, holm
from dpt.shapes.oracle import judge

FEW = ["--per_category", "1", "--seeds", "0", "1", "--batch_size", "5", "--set", "num_inference_steps=2"]


@pytest.fixture(autouse=True)
def _from_repository_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def write_arms(folder, **arms):
    folder.mkdir(parents=True, exist_ok=True)
    for name, settings in arms.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"num_inference_steps": 2} | settings))
    return [str(folder / f"{name}.yaml") for name in arms]


def code(words):
    """The exit code, also where a flag's is argparse's."""
    try:
        return evaluate.main(words)
    except SystemExit as stop:
        return stop.code


def generate(arms, outdir, *more):
    return evaluate.main(["generate", "--arms", *arms, "--prompts", "shapes:val", "--outdir", str(outdir), *FEW, *more])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, shapes_dpt, request):
    """Two arms, the second of two training seeds, drawn and judged."""
    root = tmp_path_factory.mktemp("evaluation")
    for seed in (0, 1):
        shutil.copytree(shapes_dpt, root / f"weights/{seed}")
    dpt = str(root / "weights/{seed}")
    arms = write_arms(root / "arms", base={}, own={"dpt": dpt, "train_seeds": [0, 1], "correction_norm": 0.01})
    assert generate(arms, root / "out") == 0
    folders = [str(root / "out" / name) for name in ("base", "own/0", "own/1")]
    assert evaluate.main(["align", *folders, "--metrics", "oracle", "shapes-clip"]) == 0
    return root, arms, folders


def test_pictures_carry_what_they_are_and_cost(drawn):
    root, _, _ = drawn
    records = read_metadata(root / "out/base")
    assert len(records) == 7 * 2
    assert {record["category"] for record in records} >= {"single", "unseen"}
    assert {record["seed"] for record in records} == {0, 1}
    assert all(record["whole_passes"] == 4 and record["truncated_passes"] == 0 for record in records)
    corrected = read_metadata(root / "out/own/0")
    assert all(record["whole_passes"] == 4 and record["truncated_passes"] == 2 for record in corrected)
    image = Image.open(root / "out/base" / records[0]["file"])
    assert (image.text["prompt"], image.text["seed"]) == (records[0]["prompt"], str(records[0]["seed"]))
    settings = json.loads((root / "out/own/1/arm.json").read_text())
    assert settings["correction_norm"] == 0.01
    assert len(settings["weights"]) == 16


def test_nothing_is_drawn_twice_and_settings_are_not_mixed(drawn, capsys):
    root, arms, _ = drawn
    record = read_metadata(root / "out/base")[3]
    lost = root / "out/base" / record["file"]
    before = lost.read_bytes()
    lost.unlink()
    capsys.readouterr()
    assert generate(arms[:1], root / "out") == 0
    assert json.loads(capsys.readouterr().out)["base"] == {"pictures": 14, "new": 1}
    pixels = [np.array(Image.open(root / "out/base" / r["file"])) for r in read_metadata(root / "out/base")]
    lost.write_bytes(before)
    assert np.abs(pixels[-1].astype(int) - np.array(Image.open(lost))).max() <= 2
    assert generate(arms[:1], root / "out", "guidance_scale=2") == 2
    assert "guidance_scale 7.5 (now 2.0)" in capsys.readouterr().err
    settings = root / "out/base/arm.json"
    content = settings.read_text()
    settings.write_text(json.dumps({k: v for k, v in json.loads(content).items() if k != "parity"}))  # an older one
    assert generate(arms[:1], root / "out", "parity=true") == 2
    assert "parity False (now True)" in capsys.readouterr().err
    assert generate(arms[:1], root / "out") == 0
    settings.write_text(content)


def test_only_own_pictures_without_a_record_are_moved_aside(drawn, tmp_path, capsys):
    root, arms, _ = drawn
    folder = tmp_path / "base"
    shutil.copytree(root / "out/base", folder)
    lines = (folder / "metadata.jsonl").read_text().split("\n")
    (folder / "metadata.jsonl").write_text("\n".join(lines[1:]))
    lost = json.loads(lines[0])["file"]
    others = [
        "holiday.png",
        "samples/00000_000000_9.png",
        "samples/a red circle_000001.png",
        "samples/.x.tmp",
        "x/a.png",
    ]
    (folder / "x").mkdir()
    for name in others:
        Image.new("RGB", (8, 8)).save(folder / name, "PNG")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".png", ".tmp")}
    assert generate(arms[:1], tmp_path) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["base"] == {"pictures": 14, "new": 1}
    assert f"{folder}: 1 pictures without a record are now in {folder}/unrecorded-0" in captured.err
    assert (folder / "unrecorded-0" / lost).read_bytes() == before.pop(folder / lost)
    assert (folder / lost).exists()  # drawn again
    assert all(path.read_bytes() == content for path, content in before.items())
    assert generate(arms[:1], tmp_path) == 0
    assert not (folder / "unrecorded-1").exists()
    assert evaluate.main(["align", str(folder), "--metrics", "oracle"]) == 0
    note = "2 pictures are passed over, such as samples/00000_000000_9.png: they have no record in metadata.jsonl"
    assert note in capsys.readouterr().err


def test_compbench_s_numbers_run_on_over_a_category_s_prompts(tmp_path, capsys):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    (prompts / "color_val.txt").write_text("a red circle\na blue star\na red cross\n")
    (prompts / "shape_val.txt").write_text("a green square\na red circle\n")
    few = ["--prompts", f"compbench:{prompts}", "--compbench", "--outdir", str(tmp_path), "--seeds"]
    words = ["generate", "--arms", *write_arms(tmp_path, base={"num_inference_steps": 1}), *few]
    assert evaluate.main([*words, "2", "0"]) == 0
    assert "1 prompts, such as 'a red circle', are drawn for the first of their cat" in capsys.readouterr().err
    names = {path.parent.parent.name: [] for path in (tmp_path / "base").glob("*/samples/*.png")}
    for path in sorted((tmp_path / "base").glob("*/samples/*.png"), key=lambda path: path.stem[-6:]):
        names[path.parent.parent.name].append(path.stem)
    assert names == {
        "color": [
            f"a {name}_{k:06d}" for k, name in enumerate(["red circle"] * 2 + ["blue star"] * 2 + ["red cross"] * 2)
        ],
        "shape": ["a green square_000000", "a green square_000001"],
    }
    assert Image.open(tmp_path / "base/color/samples/a blue star_000002.png").text["seed"] == "2"
    capsys.readouterr()
    assert evaluate.main([*words, "2", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["base"]["new"] == 0
    assert evaluate.main([*words, "0", "2"]) == 2  # names would change places
    assert "choose another folder" in capsys.readouterr().err
    layouts = {"run on over the prompts": tmp_path / "base/color", "begin anew with each prompt": tmp_path / "old"}
    old = tmp_path / "old/samples"  # as evaluate.py once named them
    old.mkdir(parents=True)
    for k, name in enumerate(names["color"]):
        shutil.copy(tmp_path / f"base/color/samples/{name}.png", old / f"{name[:-7]}_{k % 2:06d}.png")
    Image.new("RGB", (8, 8)).save(old / "grid-0000.png")
    values = []
    for said, folder in layouts.items():
        assert evaluate.main(["align", str(folder), "--metrics", "oracle"]) == 0
        assert f"{folder}: file numbers {said}" in (error := capsys.readouterr().err)
        assert ("1 pictures are passed over, such as samples/grid-0000.png" in error) == (folder.name == "old")
        values.append(read_arm(folder)["values"])
    assert values[0] == values[1]
    assert values[0].keys() == {(f"a {name}", k) for name in ("red circle", "blue star", "red cross") for k in (0, 1)}


def test_parity_ends_the_sampling_otherwise(drawn, tmp_path):
    root, arms, _ = drawn
    assert generate(arms[:1], tmp_path, "parity=true") == 0
    name = read_metadata(root / "out/base")[0]["file"]
    ours, theirs = (np.array(Image.open(f / "base" / name)).astype(int) for f in (root / "out", tmp_path))
    assert (ours != theirs).mean() > 0.01  # noise of the last timestep
    assert np.abs(ours - theirs).max() < 50


@pytest.mark.slow
def test_a_kill_loses_what_is_being_drawn_alone(drawn, tmp_path, capsys):
    root, arms, _ = drawn
    words = [
        "generate",
        "--arms",
        arms[0],
        "--prompts",
        "shapes:val",
        *FEW,
        "--batch_size",
        "1",
        "--outdir",
        str(tmp_path),
    ]
    with (tmp_path / "errors.txt").open("w") as errors:
        child = subprocess.Popen([sys.executable, "evaluate.py", *words], stderr=errors)
    while len(read_metadata(tmp_path / "base")) < 3:
        assert child.poll() is None, (tmp_path / "errors.txt").read_text()[-3000:]
        time.sleep(0.01)
    child.kill()
    child.wait()
    before = {
        record["file"]: (tmp_path / "base" / record["file"]).read_bytes() for record in read_metadata(tmp_path / "base")
    }
    assert len(before) < 14
    unrecorded = tmp_path / "base/samples/00000_000000_7.png"  # killed before its record
    shutil.copy(tmp_path / "base" / next(iter(before)), unrecorded)
    with (tmp_path / "base/metadata.jsonl").open("a") as file:
        file.write('{"file": "samp')  # a record cut short
    capsys.readouterr()
    assert evaluate.main(words) == 0
    assert json.loads(capsys.readouterr().out)["base"] == {"pictures": 14, "new": 14 - len(before)}
    records = read_metadata(tmp_path / "base")
    assert len(records) == len(list((tmp_path / "base/samples").iterdir())) == 14
    assert (tmp_path / "base/unrecorded-0/samples/00000_000000_7.png").exists()
    assert all((tmp_path / "base" / name).read_bytes() == content for name, content in before.items())
    for record in records:
        ours, theirs = (np.array(Image.open(f / "base" / record["file"])).astype(int) for f in (tmp_path, root / "out"))
        assert np.abs(ours - theirs).max() <= 2


@pytest.mark.slow
def test_two_processes_share_the_drawing(drawn, tmp_path):
    root, arms, _ = drawn
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    words = ["--arms", arms[0], "--prompts", "shapes:val", "--outdir", str(tmp_path), *FEW]
    done = subprocess.run([*launch, "evaluate.py", "generate", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, shared = (
        {(r["prompt"], r["seed"]): r for r in read_metadata(path / "base")} for path in (root / "out", tmp_path)
    )
    assert len(read_metadata(tmp_path / "base")) == len(shared) == 14  # none twice
    assert alone.keys() == shared.keys()
    for key, record in shared.items():
        ours, theirs = (
            np.array(Image.open(folder / r["file"])).astype(int)
            for folder, r in ((tmp_path / "base", record), (root / "out/base", alone[key]))
        )
        assert np.abs(ours - theirs).max() <= 2


def test_scores_are_kept_by_file_and_hash(drawn, capsys):
    root, _, folders = drawn
    assert {"label", "reason", "sha256"} <= score_lines(root / "out/base/oracle.jsonl")[0].keys()
    assert evaluate.main(["align", folders[0], "--metrics", "oracle"]) == 0
    path = root / "out/base" / read_metadata(root / "out/base")[0]["file"]
    content = path.read_bytes()
    Image.new("RGB", (128, 128), "white").save(path)
    capsys.readouterr()
    assert evaluate.main(["align", folders[0], "--metrics", "oracle"]) == 0
    assert json.loads(capsys.readouterr().out)[folders[0]] == {"oracle": 1}
    path.write_bytes(content[:200])
    assert evaluate.main(["align", folders[0], "--metrics", "oracle"]) == 2
    assert f"{path} cannot be read as an image" in capsys.readouterr().err
    path.write_bytes(content)


def test_a_table_of_arms(drawn, tmp_path, capsys):
    _, _, folders = drawn
    command = ["table", *folders, "--against", "base", "--output", str(tmp_path)]
    assert evaluate.main(command) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["arms"]
    assert set(rows) == {"base", "own"}
    assert rows["own"]["training_seeds"] == 2
    assert rows["own"]["truncated_passes"] == 2
    for row in rows.values():
        assert sum(row[label][0] for label in ("correct", "misaligned", "malformed")) == pytest.approx(1)
    difference = rows["own"]["cosine"][0] - rows["base"]["cosine"][0]
    assert rows["own"]["cosine_difference"][0] == pytest.approx(difference)
    assert rows["own"]["prompts"] == 6
    text = (tmp_path / "table.md").read_text()
    assert text.count("\n") == 6
    assert text.endswith("all categories but `unseen`.\n")
    assert r"training\_seeds" in (tmp_path / "table.tex").read_text()
    assert (tmp_path / "table.png").exists()
    assert evaluate.main([*command[:-1], str(tmp_path / "all"), "--categories", "unseen"]) == 0
    assert evaluate.main([*command, "--against", "nobody"]) == 2
    assert "the arms are base, own" in capsys.readouterr().err


def test_the_figure_of_a_table():
    own = {"prompts": 6, "against": "base", "correct": (0.5, 0.4, 0.7), "correct_difference": (0.1, -0.1, 0.2)}
    left, right = plot_arms({"base": {"prompts": 6, "correct": (0.4, 0.3, 0.5)}, "own": own}).axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["base", "own"]
    assert [point.lines[0].get_xdata().item() for point in left.containers] == [40, 50]
    assert [point.lines[0].get_xdata().item() for point in right.containers] == [10]
    (interval,) = right.containers[0].lines[2][0].get_segments()
    assert interval == pytest.approx(np.array([[-10, 1], [20, 1]]))
    assert [text.get_text() for text in right.texts] == ["to base"]


def test_packed_figures_stand_for_their_pictures(drawn, tmp_path, capsys):
    _, _, folders = drawn
    packed = tmp_path / "packed.json"
    assert evaluate.main(["pack", *folders[:2], "--output", str(packed)]) == 0
    assert evaluate.main(["pack", folders[2], "--output", str(packed)]) == 0  # adds to it
    tables = []
    for name, given in (("packed", [str(packed)]), ("mixed", [*folders[:1], str(packed)]), ("folders", folders)):
        code = evaluate.main(["table", *given, "--against", "base", "--output", str(tmp_path / name)])
        assert code == (2 if name == "mixed" else 0)  # base is there twice
        if not code:
            tables.append(json.loads((tmp_path / name / "table.json").read_text())["arms"])
    assert "two arms are named 'base'" in capsys.readouterr().err
    of_packed, of_folders = (table["own"] for table in tables)
    assert of_packed["correct_difference"] == of_folders["correct_difference"]
    assert of_packed["cosine"] == pytest.approx(of_folders["cosine"], abs=1e-3)
    assert of_packed["seconds"] == of_folders["seconds"]
    assert evaluate.main(["pack", str(packed), "--only", "own", "--seeds", "1", "--output", str(tmp_path / "own")]) == 0
    some = read_packed(tmp_path / "own")
    assert set(some) == {"own/0", "own/1"}
    assert {seed for arm in some.values() for _, seed in arm["values"]} == {1}
    assert evaluate.main(["pack", str(packed), "--only", "nobody", "--output", str(tmp_path / "none")]) == 2
    assert "--only names nobody; there is none of them" in capsys.readouterr().err
    experiment = {
        "folder": str(tmp_path / "experiment"),
        "more_arms": {"base": {"num_inference_steps": 2}},
        "image_seeds": [0, 1],
        "per_category": 1,
        "packed": str(packed),
    }
    config = tmp_path / "experiment.yaml"
    config.write_text(json.dumps(experiment))
    assert evaluate.main(["experiment", str(config)]) == 0
    assert not (tmp_path / "experiment/shapes-val-1").exists()  # nothing was drawn
    assert (tmp_path / "experiment/tables/experiment/shapes-val-1/table.md").exists()
    assert evaluate.main(["experiment", str(config), "more_arms.base.num_inference_steps=3"]) == 2
    assert "base was drawn with num_inference_steps 2 (now 3)" in capsys.readouterr().err
    assert evaluate.main(["experiment", str(config), "image_seeds=[0]"]) == 0  # some of its pictures
    capsys.readouterr()
    assert evaluate.main(["experiment", str(config), "image_seeds=[0,2]"]) == 2
    assert "of other prompts or image_seeds" in capsys.readouterr().err
    assert evaluate.main(["experiment", str(config), f"packed={tmp_path}/none.json"]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    assert evaluate.main(["experiment", str(config), "--only", "base", "--record", str(tmp_path / "r.md")]) == 2
    assert "leave out --only" in capsys.readouterr().err
    assert evaluate.main(["pareto", str(packed), "--ceiling", "base", "--output", str(tmp_path / "p.png")]) == 0
    assert evaluate.main(["pareto", str(packed), "--ceiling", "nobody", "--output", str(tmp_path / "p.png")]) == 2
    assert "the arms are base, own/0, own/1" in capsys.readouterr().err
    foreign = [json.loads(line) for line in packed.read_text().splitlines()]
    foreign[1]["settings"] = {}  # pictures of others
    packed.write_text("".join(json.dumps(line) + "\n" for line in foreign))
    assert evaluate.main(["experiment", str(config)]) == 2
    assert "base was drawn with model None (now shapes)" in capsys.readouterr().err
    packed.write_text("{}")
    assert evaluate.main(["table", str(packed), "--output", str(tmp_path)]) == 2
    assert f"{packed} cannot be read" in capsys.readouterr().err


def test_figures_by_category_with_holms_correction(drawn, tmp_path, capsys):
    _, _, folders = drawn
    command = ["table", *folders, "--against", "base", "--output", str(tmp_path), "--by", "cosine"]
    assert evaluate.main(command) == 0
    rows = json.loads((tmp_path / "table.json").read_text())["cosine by category"]
    assert len(rows["base"]) == 7
    assert "difference" not in rows["base"]["single"]
    difference = rows["own"]["single"]["mean"][0] - rows["base"]["single"]["mean"][0]
    assert rows["own"]["single"]["difference"][0] == pytest.approx(difference)
    assert all(0 < row["p_holm"] <= 1 for row in rows["own"].values())
    assert "p = " in (tmp_path / "table.md").read_text()
    assert evaluate.main([*command, "--by", "beauty"]) == 2
    assert "--by names 'beauty'" in capsys.readouterr().err
    assert evaluate.main([*command[:-2], "--categories", "sizes"]) == 2
    assert "--categories names 'sizes'" in capsys.readouterr().err


def test_correctness_against_passes(drawn, tmp_path):
    _, _, folders = drawn
    output = tmp_path / "pareto.png"
    assert evaluate.main(["pareto", *folders[:2], "--ceiling", "base", "--output", str(output)]) == 0
    points = json.loads(output.with_suffix(".json").read_text())
    assert list(points) == ["base", "own/0", "best of 1 by the oracle", "best of 2 by the oracle"]
    assert points["own/0"]["passes"] == 6  # two steps of two halves, two truncated passes
    alone, best = (points[f"best of {n} by the oracle"] for n in (1, 2))
    assert (alone["passes"], best["passes"]) == (4, 8)
    assert alone["correct"][0] <= best["correct"][0]
    assert output.exists()


def test_holms_correction_and_bootstrap_p():
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({}) == {}
    rng = np.random.default_rng(0)
    values, prompts = rng.random((1, 40)), np.arange(40)
    assert bootstrap_p(values, prompts, values + 0.5) < 0.001
    assert bootstrap_p(values, prompts, values[:, ::-1]) > 0.5
    assert bootstrap_p(values[:, :1], prompts[:1], values[:, :1] + 0.5) == 1  # one prompt says nothing


def test_the_quality_guard_tells_renders_from_worse(drawn, tmp_path):
    _, _, folders = drawn
    assert evaluate.main(["quality", folders[0]]) == 0
    path = Path(folders[0]) / "quality.json"
    assert json.loads(path.read_text())["frechet"] > 0
    written = path.stat().st_mtime_ns
    assert evaluate.main(["quality", folders[0]]) == 0
    assert path.stat().st_mtime_ns == written  # not measured again
    assert evaluate.main(["table", folders[0], "--output", str(tmp_path)]) == 0
    assert "frechet" in (tmp_path / "table.md").read_text()


def test_frechet_distance_and_spread():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3))
    assert frechet_distance(a, b) < 0.02
    scaled = b * [1, 2, 1] + [0, 0, 3]
    assert frechet_distance(a, scaled) == pytest.approx(9 + (2 - 1) ** 2, rel=0.1)  # of independent Gaussians
    rows, prompts = np.array([[0.0], [2.0], [5.0], [5.0]]), ("a", "a", "b", "b")
    assert spread(rows, prompts) == 1
    with pytest.raises(ValueError, match="at least two"):
        frechet_distance(a[:1], b)
    truth = [render_prompt("a red circle", k) for k in range(3)]
    assert all(judge(picture, "a red circle").label == "correct" for picture in truth)
    assert (truth[0] != truth[1]).any()


@pytest.mark.slow
def test_controls_and_best_of_change_the_pictures(tmp_path, shapes_dpt):
    own = {"dpt": str(shapes_dpt), "correction_norm": 0.1}
    arms = {
        "gradient": own,
        "random": own | {"correction_direction": "random"},
        "another": own | {"correct_for_another": True},
        "untrained": own | {"untrained_adapter": True},
        "best": {"dpt": str(shapes_dpt), "best_of": 2},
        "plain": {"dpt": str(shapes_dpt)},
        "external": {"lora": str(shapes_dpt / "lora")},
        "bf16": {"dpt": str(shapes_dpt), "dtype": "bfloat16"},
    }
    few = ["--prompts", "shapes:val", "--per_category", "1", "--seeds", "3", "--outdir", str(tmp_path / "out")]
    assert evaluate.main(["generate", "--arms", *write_arms(tmp_path, **arms), *few]) == 0
    pictures = {}
    for name in arms:
        records = sorted(read_metadata(tmp_path / "out" / name), key=lambda r: r["number"])
        pictures[name] = np.stack([Image.open(tmp_path / "out" / name / r["file"]) for r in records]).astype(int)
    assert (pictures["external"] == pictures["plain"]).all()  # the same LoRA, read as another method's
    del pictures["external"]
    names = list(pictures)
    for k, a in enumerate(names):
        assert all((pictures[a] != pictures[b]).any() for b in names[:k]), a
    assert read_metadata(tmp_path / "out/best")[0]["whole_passes"] == 8


@pytest.mark.slow
def test_step_and_maps_of_attend_and_excite_change_the_picture(tmp_path):
    arms = {
        "plain": {},
        "attend": {"attend_and_excite": True},
        "step": {"attend_and_excite": True, "attention_step": 2},
        "maps": {"attend_and_excite": True, "attention_resolution": 8},
    }
    (tmp_path / "prompts.txt").write_text("a red circle and a blue square\n")
    words = ["--prompts", str(tmp_path / "prompts.txt"), "--seeds", "3", "--outdir", str(tmp_path / "out")]
    assert evaluate.main(["generate", "--arms", *write_arms(tmp_path, **arms), *words]) == 0
    (files,) = zip(*[sorted((tmp_path / "out" / name / "samples").iterdir()) for name in arms], strict=True)
    assert len({np.array(Image.open(file)).tobytes() for file in files}) == len(arms)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {"name": "x"}, "b": {"name": "x"}}, "two arms are named 'x'"),
        ({"a": {"guidance": 3}}, "did you mean guidance_scale?"),
        ({"a": {"best_of": 0}}, "best_of is 0"),
        ({"a": {"guidance_scale": float("nan")}}, "guidance_scale is nan"),
        ({"a": {"name": "../a"}}, "name is '../a'"),
        ({"a": {"best_of": 2}}, "dpt is missing"),
        ({"a": {"correction_norm": 0.1}}, "dpt is missing"),
        ({"a": {"correction_direction": "up"}}, "correction_direction is 'up'"),
        ({"a": {"correction_norm": -1}}, "correction_norm is -1"),
        ({"a": {"untrained_adapter": True}}, "untrained_adapter is set"),
        ({"a": {"attention_resolution": 4}}, "attention_resolution is set"),
        (
            {"a": {"attention_step": 5, "attend_and_excite": True, "attention_resolution": 0}},
            "attention_resolution is 0",
        ),
        ({"a": {"attention_step": -5, "attend_and_excite": True}}, "attention_step is -5"),
        ({"a": {"attention_step": 5}}, "attention_step is set"),
        ({"a": {"parity": True, "dpt": "x", "correction_norm": 0.1}}, "parity is the reference's sampling"),
        ({"a": {"train_seeds": []}}, "train_seeds is []"),
        ({"a": {"train_seeds": [1, 1]}}, "train_seeds is [1, 1]"),
        ({"a": {"train_seeds": [-1]}}, "train_seeds is -1"),
        ({"a": {"best_of": 10**9}}, "best_of is 1000000000"),
        ({"a": {"dpt": "nowhere"}}, "nowhere is not there"),
        ({"a": {"lora": "nowhere"}}, "lora nowhere is not there"),
    ],
)
def test_bad_arms_are_one_line(tmp_path, capsys, arms, message):
    assert generate(write_arms(tmp_path, **arms), tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "0", "0"], "--seeds is [0, 0]"),
        (["--seeds", "-1"], "argument --seeds: '-1'; it must be a whole number at least 0 and below 1000"),
        (["--seeds", "1000"], "argument --seeds: '1000'"),
        (["--batch_size", "0"], "argument --batch_size: '0'"),
        (["--per_category", "0"], "argument --per_category: '0'"),
    ],
)
def test_bad_flags_of_a_drawing_are_one_line(tmp_path, capsys, words, message):
    words = ["--prompts", "shapes:val", "--outdir", str(tmp_path / "out"), *words]
    assert code(["generate", "--arms", *write_arms(tmp_path, base={}), *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_bad_folders_are_one_line(tmp_path, capsys):
    assert evaluate.main(["align", str(tmp_path / "empty"), "--metrics", "oracle"]) == 2
    assert "empty is not there" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert evaluate.main(["align", str(tmp_path / "empty"), "--metrics", "oracle"]) == 2
    assert "holds no pictures" in capsys.readouterr().err
    assert evaluate.main(["table", str(tmp_path / "empty"), "--output", str(tmp_path)]) == 2
    assert "holds no pictures" in capsys.readouterr().err
    Image.new("RGB", (128, 128), "white").save(tmp_path / "empty/a red circle_000000.png")
    assert evaluate.main(["table", str(tmp_path / "empty"), "--output", str(tmp_path)]) == 2
    assert "holds no scores" in capsys.readouterr().err


def test_bad_pictures_and_scores_are_one_line(drawn, tmp_path, capsys):
    root, _, _ = drawn
    folder = tmp_path / "base"
    shutil.copytree(root / "out/base", folder)
    name = read_metadata(folder)[4]["file"]
    (folder / name).unlink()
    assert evaluate.main(["align", str(folder), "--metrics", "oracle"]) == 2
    assert f"1 pictures are missing, such as {name}; generate them again" in capsys.readouterr().err
    shutil.copy(root / "out/base" / name, folder / name)
    judge_of_nothing = Judge("oracle", "no number", lambda images, prompts: [{"score": float("nan")} for _ in images])
    with pytest.raises(ValueError, match=f"{folder}.*oracle gives no number for score"):
        score(folder, judge_of_nothing, 8)


def test_prompt_sets(tmp_path):
    whole = load_prompt_set("shapes:test")
    assert len(whole) == 620
    assert [p for p in whole if p in load_prompt_set("shapes:test", per_category=2)] == load_prompt_set(
        "shapes:test", per_category=2
    )
    with pytest.raises(ValueError, match="per_category is 0"):
        load_prompt_set("shapes:test", per_category=0)
    (tmp_path / "five_category.json").write_text(json.dumps([{"captions": "a dog", "img_id": 1}]))
    (tmp_path / "only_numeral.json").write_text(json.dumps([{"caption": "two dogs"}]))
    found = [(*p.categories, p.text) for p in load_prompt_set(f"nss1k:{tmp_path}")]
    assert found == [("five_category", "a dog"), ("only_numeral", "two dogs")]
    (tmp_path / "part.json").write_text(json.dumps([{"caption": "two dogs"}]))
    assert [p.categories for p in load_prompt_set(f"nss1k:{tmp_path}")][1] == ("only_numeral", "part")
    (tmp_path / "part.json").unlink()
    (tmp_path / "color_val.txt").write_text("a red dog\n\na blue cat\n")
    (tmp_path / "shape_val.txt").write_text("a round box\n")
    found = [(p.number, *p.categories, p.text) for p in load_prompt_set(f"compbench:{tmp_path}")]
    assert found == [(0, "color", "a red dog"), (1, "color", "a blue cat"), (2, "shape", "a round box")]
    (tmp_path / "cc500.txt").write_text("".join(f"a red dog and blue cat {k}\n" for k in range(500)))
    categories = [p.categories[0] for p in load_prompt_set(f"cc500:{tmp_path / 'cc500.txt'}")]
    assert (categories.count("conjunction"), categories.count("other")) == (446, 54)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "bad.json").write_text('[{"text": 3}]')
    for name, message in (
        (f"abc6k:{tmp_path / 'latin.txt'}", "as UTF-8 text"),
        (f"nss1k:{tmp_path / 'bad.json'}", "is no part of COCO-NSS1K"),
        ("shapes:vla", "shapes:train, shapes:val and shapes:test"),
        (f"compbench:{tmp_path / 'none'}", "holds no"),
        (str(tmp_path / "none.txt"), "none.txt cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompt_set(name)


def test_a_crossed_bootstrap_is_as_wide_as_what_varies():
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(50), 4)
    values = rng.normal(size=(1, 50)).repeat(4, 1)
    mean, low, high = crossed_bootstrap(values, prompts)
    plain = bootstrap_interval(values[0], prompts)
    assert mean == pytest.approx(plain[0])
    assert (high - low) == pytest.approx(plain[2] - plain[1], rel=0.1)
    seeds = values + 5 * rng.normal(size=(6, 1))  # training seeds that differ widen it
    assert np.diff(crossed_bootstrap(seeds, prompts)[1:]) > 3 * (high - low)
    mean, low, high = crossed_bootstrap(values + 0.3, prompts, values)  # the same prompts cancel
    assert (mean, low, high) == pytest.approx((0.3, 0.3, 0.3))
    with pytest.raises(ValueError, match="one column a prompt"):
        crossed_bootstrap(values, prompts[:-1])


@pytest.mark.parametrize("kind", ["dpt", "lora"])
def test_an_arm_stands_for_one_set_of_weights_a_training_seed(kind):
    arm = Arm(name="own", **{kind: "{folder}/own-{seed}"}, train_seeds=[3, 5])
    assert [(one.name, getattr(one, kind)) for one in arm.each_seed("runs")] == [
        ("own/3", "runs/own-3"),
        ("own/5", "runs/own-5"),
    ]
    (single,) = Arm(name="own", **{kind: "{folder}/weights"}).each_seed("runs")
    assert (single.name, getattr(single, kind)) == ("own", "runs/weights")
    assert Arm(name="base").each_seed("runs") == [Arm(name="base")]


def test_a_file_of_several_arms_gives_all_or_one_by_name(tmp_path):
    place = tmp_path / "arms.yaml"
    place.write_text("arms:\n  base: &base {guidance_scale: 5}\n  plain-7.5: {<<: *base, dtype: bfloat16}\n")
    assert [(arm.name, arm.dtype) for arm in load_arms(place)] == [("base", "float32"), ("plain-7.5", "bfloat16")]
    (one,) = load_arms(f"{place}:plain-7.5", ["guidance_scale=2"])
    assert (one.name, one.guidance_scale, one.dtype) == ("plain-7.5", 2, "bfloat16")
    with pytest.raises(ValueError, match="there is no arm 'own'; the arms are base, plain"):
        load_arms(f"{place}:own")
