"""Files that are damaged, or somebody else's: one line, exit code 2, and nothing lost."""

import hashlib
import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

import evaluate
from dpt.evaluation.arms import load_arms
from dpt.evaluation.pack import read_packed
from dpt.evaluation.probes import read_kept
from dpt.evaluation.prompts import load_prompt_set
from dpt.images import append_metadata, read_image, read_metadata

PROMPTS = ("a red circle", "a blue star")
ARM = "configs/shapes/arms.yaml:base"


@pytest.fixture(autouse=True)
def _from_repository_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture
def arm(tmp_path):
    """A whole arm's folder, as `generate`, `align` and `quality` leave it."""
    folder = tmp_path / "out/base"
    (folder / "samples").mkdir(parents=True)
    settings = load_arms(ARM)[0].settings() | {"weights": "0" * 16}
    (folder / "arm.json").write_text(json.dumps(settings))
    records, verdicts = [], []
    for number, prompt in enumerate(PROMPTS):
        for seed in (0, 1):
            file = f"samples/{number:05d}_{seed:06d}_0.png"
            Image.new("RGB", (128, 128), (255, 255, 250 + 2 * number + seed)).save(folder / file)
            digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
            picture = {"file": file, "prompt": prompt, "seed": seed, "category": "single", "number": number}
            cost = {"seconds": 1.0, "whole_passes": 40.0, "truncated_passes": 0.0, "peak_mb": 9.0}
            records.append(picture | {"noise_seed": 1000 * number + seed} | cost)
            verdict = {"label": "correct" if seed else "malformed", "reason": "", "objects": []}
            verdicts.append({"file": file, "sha256": digest, "scorer": "x"} | verdict)
    write_lines(folder / "metadata.jsonl", records)
    write_lines(folder / "oracle.jsonl", verdicts)
    (folder / "quality.json").write_text(json.dumps({"frechet": 1.0, "pictures": "x"}))
    return folder


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def change_line(path, change, n=1):
    """Updates the line's record; a value of ... leaves its key out."""
    lines = path.read_text().splitlines()
    record = json.loads(lines[n]) | change
    lines[n] = json.dumps({key: value for key, value in record.items() if value is not ...})
    path.write_text("\n".join(lines) + "\n")


def command(name, folder):
    words = {
        "generate": ["--arms", ARM, "--prompts", "shapes:val", "--outdir", str(folder.parent)],
        "align": [str(folder), "--metrics", "oracle"],
        "quality": [str(folder)],
        "pack": [str(folder), "--output", str(folder.parent / "packed.json")],
        "table": [str(folder), "--output", str(folder.parent / "tables")],
        "report": [str(folder), "--output", str(folder.parent / "page.html")],
    }
    return [name, *words[name]]


def fails(words, capsys, *parts):
    """Whether a command is refused in one line that holds the parts."""
    try:
        code = evaluate.main(words)
    except SystemExit as stop:
        code = stop.code
    _, *errors = capsys.readouterr().err.split("error: ")  # a progress bar may stand before it
    assert (code, len(errors)) == (2, 1), errors
    (error,) = errors
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    return True


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": None}, "file: expected str, got null"),
        ({"file": 7}, "file: expected str, got int"),
        ({"file": ...}, "missing required field file"),
        ({"prompt": ["a"]}, "prompt: expected str, got array"),
        ({"prompt": 7}, "prompt: expected str, got int"),
        ({"prompt": None}, "prompt: expected str, got null"),
        ({"prompt": ...}, "missing required field prompt"),
        ({"seed": ...}, "missing required field seed"),
        ({"seed": "0"}, "seed: expected int, got str"),
        ({"seed": [0]}, "seed: expected int, got array"),
        ({"seed": None}, "seed: expected int, got null"),
        ({"category": ["a"]}, "category: expected str, got array"),
        ({"category": None}, "category: expected str, got null"),
        ({"categories": "ab"}, "categories: expected array, got str"),
        ({"seconds": "1"}, "seconds: expected float, got str"),
        ({"seconds": None}, "seconds: expected float, got null"),
        ({"scores": 3}, "scores: expected array, got int"),
        ({"prompt": "\ud800"}, ""),
        ('{"file": "a", "prompt": "b", "seed": 0, "x": ' + "[" * 100_000, "nested too deeply"),
        ("[]", "expected object, got array"),
        ("garbage", "malformed"),
    ],
)
def test_a_manifest_s_bad_line_is_named_by_every_command(arm, capsys, change, message):
    path = arm / "metadata.jsonl"
    if isinstance(change, dict):
        change_line(path, change)
    else:
        path.write_text(path.read_text() + change + "\n")
    before = contents(arm.parent)
    line = "line 2" if isinstance(change, dict) else "line 5"
    for name in ("generate", "align", "quality", "pack", "table", "report"):
        assert fails(command(name, arm), capsys, f"{path}, {line}: ", message)
    assert contents(arm.parent) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": ["a"]}, "line 2: file: expected str, got array"),
        ({"sha256": ...}, "line 2: object is missing required field sha256"),
        ({"label": "fine"}, "line 2: label: Invalid enum value 'fine'"),
        ({"objects": [["red circle", 0.5]]}, "line 2: objects[0]: expected array of length 5"),
        ({"cosine": "high"}, "record 2: cosine: expected a number, got 'high'"),
        ({"cosine": None}, "record 2: cosine: expected a number, got None"),
        ('{"file": "a", "sha256": "b", "x": ' + "[" * 100_000, "line 5: nested too deeply"),
        ("[" * 100_000, "line 5: expected object, got array"),
        ('{"file": 7}', "line 5: file: expected str, got int"),
    ],
)
def test_a_bad_score_is_named(arm, capsys, change, message):
    path = arm / "oracle.jsonl"
    if isinstance(change, dict):
        change_line(path, change)
    else:
        path.write_text(path.read_text() + change)
    for name in ("align", "pack", "table", "report"):
        assert fails(command(name, arm), capsys, str(path), message)


@pytest.mark.parametrize("content", ["null", "[]", "7", '{"model": []}', "{", "[" * 100_000])
def test_bad_settings_of_an_arm_are_named(arm, capsys, content):
    (arm / "arm.json").write_text(content)
    for name in ("generate", "pack"):
        assert fails(command(name, arm), capsys, str(arm / "arm.json"))
    assert (arm / "arm.json").read_text() == content


@pytest.mark.parametrize(
    "content", ["null", "[]", "7", '{"frechet": null, "pictures": "x"}', '{"frechet": "1", "pictures": "x"}', "{}"]
)
def test_a_bad_quality_is_named(arm, capsys, content):
    (arm / "quality.json").write_text(content)
    for name in ("quality", "table", "pack"):
        assert fails(command(name, arm), capsys, str(arm / "quality.json"))


def test_records_end_with_a_line_feed_alone(arm, capsys):
    change_line(arm / "metadata.jsonl", {"prompt": "a red\u2028circle"})
    lines = (arm / "metadata.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    (arm / "metadata.jsonl").write_text(
        "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8"
    )
    assert len(read_metadata(arm)) == 4
    assert evaluate.main(command("table", arm)) == 0
    (arm.parent / "prompts.txt").write_text("a red\u2028circle\na\x85b\r\n\n c \n", "utf-8")
    found = [prompt.text for prompt in load_prompt_set(str(arm.parent / "prompts.txt"))]
    assert found == ["a red\u2028circle", "a\x85b", "c"]


def test_a_record_that_a_kill_cut_short_gives_way_to_the_next(tmp_path):
    path = tmp_path / "metadata.jsonl"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    record = {"file": "a.png", "prompt": "é\u2028", "seed": 0}
    line = json.dumps(record, ensure_ascii=False).encode()
    for end in range(len(line)):
        path.write_bytes(line + b"\n" + line[:end])
        assert len(read_metadata(tmp_path)) == 1
        append_metadata(tmp_path, record)
        assert path.read_bytes() == (line + b"\n") * 2
    path.write_bytes(line)  # whole but for its end
    append_metadata(tmp_path, record)
    assert path.read_bytes() == (line + b"\n") * 2
    path.write_bytes(b"somebody's notes")
    append_metadata(tmp_path, record)
    assert path.read_bytes() == b"somebody's notes\n" + line + b"\n"


@pytest.mark.parametrize(
    "name", ["holiday.jpg", "samples/a red circle_000000.png", "samples/00000.png", "metadata.jsonl"]
)
def test_a_folder_that_is_no_arm_s_is_refused_untouched(tmp_path, capsys, name):
    place = tmp_path / "out/base" / name
    place.parent.mkdir(parents=True)
    place.write_bytes(b"somebody's")
    assert fails(
        command("generate", tmp_path / "out/base"), capsys, f"{tmp_path}/out/base is no arm's: it has no arm.json"
    )
    assert contents(tmp_path) == {place: b"somebody's"}


def test_a_file_in_an_arm_s_place_is_refused(tmp_path, capsys):
    (tmp_path / "base").write_text("x")
    assert fails(command("generate", tmp_path / "base"), capsys, "base is no folder; choose another --outdir")


def test_settings_are_compared_before_weights_are_loaded(arm, capsys, monkeypatch):
    monkeypatch.setattr("dpt.drawing.load_stable_diffusion", None)
    words = [*command("generate", arm), "--set", "guidance_scale=2"]
    assert fails(words, capsys, "holds pictures of other settings: guidance_scale 5.0 (now 2.0)")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width, height):
    """A PNG that says it is so large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD_PICTURES = {
    "3.6 Gpx": png_of(60_000, 60_000),
    "100 Mpx, of which Pillow only warns": png_of(10_000, 10_000),
    "ppm": b"P6 100000 100000 255\n",
    "tiff": b"II*\0\x08\0\0\0" + struct.pack("<H" + 2 * "HHII", 2, 256, 4, 1, 65535, 257, 4, 1, 65535) + bytes(4),
    "no data": png_of(128, 128),
    "broken chunk": png_of(128, 128)[:40] + b"\0" * 20,
    "text": b"no picture",
    "empty": b"",
}


@pytest.mark.parametrize("content", BAD_PICTURES.values(), ids=BAD_PICTURES.keys())
def test_bad_pictures_are_one_line(arm, capsys, content):
    path = arm / "samples/00000_000001_0.png"
    path.write_bytes(content)
    assert fails(command("align", arm), capsys, f"{path} cannot be read as an image")
    assert fails([*command("report", arm), "--seeds", "1"], capsys, f"{path} cannot be read as an image")
    if b"IHDR" not in content or len(content) > 1000:
        assert fails([*command("report", arm), "--figures", str(path)], capsys, f"{path} is no picture")


def test_sixteen_bits_of_grey_are_no_white(tmp_path):
    Image.new("I;16", (4, 4), 0x8000).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png") == 0x80).all()


def packed(arm):
    assert evaluate.main(command("pack", arm)) == 0
    return arm.parent / "packed.json"


@pytest.mark.parametrize(
    ("n", "change", "message"),
    [
        (0, {"categories": None}, "line 1: categories: expected object, got null"),
        (0, {"categories": ["a"]}, "line 1: categories: expected object, got array"),
        (0, {"categories": {"a red circle": 1}}, "line 1: categories"),
        (0, {"categories": {}}, "line 1: categories lack 'a blue star'"),
        (0, {"pictures": "ab"}, "line 1: pictures: expected array, got str"),
        (0, {"pictures": [["a", "b"]]}, "line 1: pictures"),
        (0, {"pictures": ...}, "line 1: object is missing required field pictures"),
        (1, {"arm": 7}, "line 2: arm: expected str, got int"),
        (1, {"arm": None}, "line 2: arm: expected str, got null"),
        (1, {"costs": None}, "line 2: costs: expected object, got null"),
        (1, {"costs": [1]}, "line 2: costs: expected object, got array"),
        (1, {"costs": {"seconds": "1"}}, "line 2: costs"),
        (1, {"settings": 3}, "line 2: settings: expected object, got int"),
        (1, {"figures": {"correct": "01"}}, "line 2: figures: correct has 2 values, of 4 pictures"),
        (1, {"figures": {"correct": "01x1"}}, "line 2: figures: correct is no string of 0 and 1"),
        (1, {"figures": {"correct": [1, 2, 3, None]}}, "line 2: figures"),
    ],
)
def test_bad_packed_figures_are_named(arm, tmp_path, capsys, n, change, message):
    path = packed(arm)
    capsys.readouterr()
    change_line(path, change, n)
    before = path.read_bytes()
    named = (f"{path} cannot be read as what evaluate.py pack writes", message)
    assert fails(["table", str(path), "--output", str(tmp_path / "t")], capsys, *named)
    assert fails(["pareto", str(path), "--output", str(tmp_path / "p.png")], capsys, *named)
    assert fails(command("pack", arm), capsys, *named)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]\n", "[" * 100_000, "null", "text"])
def test_bad_files_of_packed_figures(tmp_path, capsys, content):
    (tmp_path / "packed.json").write_text(content)
    assert fails(
        ["table", str(tmp_path / "packed.json"), "--output", str(tmp_path)], capsys, "packed.json cannot be read"
    )


ROWS = {"arms": {"base": {"prompts": 2, "correct": [0.5, 0.4, 0.6]}}}
BY = {"base": {"single": {"prompts": 2, "mean": [0.5, 0.4, 0.6]}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "missing required field arms"),
        ("[]", "expected object, got array"),
        ('{"arms": ' + "[" * 100_000, "nested too deeply"),
        ({"arms": {}}, "arms holds no arm"),
        ({"arms": {"base": {"correct": [0.5, "x", 0.6]}}}, "arms: "),
        ({"arms": {"base": {"correct": [0.5]}}}, "arms: "),
        ({"arms": {"base": None}}, "arms: "),
        (ROWS | {"correct by category": {}}, "correct by category holds no arm"),
        (ROWS | {"correct by category": {"base": {"single": {}}}}, "correct by category: "),
        (ROWS | {"correct by category": BY | {"own": {}}}, "correct by category: arms of different categories"),
    ],
)
def test_bad_tables_are_named_and_stay(arm, tmp_path, capsys, content, message):
    path = tmp_path / "out/tables/table.json"
    path.parent.mkdir()
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    before = contents(tmp_path)
    assert fails([*command("report", arm), "--tables", str(path)], capsys, f"--tables {path} is no table.json", message)
    assert fails(command("table", arm), capsys, f"{path} is not of this command")
    assert contents(tmp_path) == before


def test_results_take_no_other_file_s_place(arm, tmp_path, capsys):
    others = {name: tmp_path / name for name in ("p.json", "q.png", "page.html", "packed.json", "t/table.md", "d/x")}
    for path in others.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text("somebody's")
    file = packed(arm)
    before = contents(tmp_path)
    for name, given in (("p.png", file), ("q.png", file), ("d", file), ("x.txt", file), ("x.json", file)):
        assert fails(["pareto", str(given), "--output", str(tmp_path / name)], capsys, "output")
    beside = file.with_suffix(".png")  # whose numbers would take the place of the figures themselves
    assert fails(["pareto", str(file), "--output", str(beside)], capsys, f"{file} is not of this command")
    assert fails(["report", str(arm), "--output", str(others["page.html"])], capsys, "no page of evaluate.py report")
    assert fails(["pack", str(arm), "--output", str(others["packed.json"])], capsys, "cannot be read")
    assert fails(["table", str(arm), "--output", str(tmp_path / "t")], capsys, "table.md is there")
    assert contents(tmp_path) == before
    for words in (["table", str(arm), "--output", str(tmp_path / "new")], command("report", arm)):
        assert evaluate.main(words) == evaluate.main(words) == 0  # their own are written anew
    words = ["pareto", str(file), "--output", str(tmp_path / "new/p.png")]
    assert evaluate.main(words) == evaluate.main(words) == 0


@pytest.mark.parametrize(
    "content", ["{}x", "[]", '{"a": {"b": {"c": {"t500": [1, 2]}}}}', '{"a": {"b": 3}}', "[" * 100_000]
)
def test_bad_measurements_of_probes_are_named(arm, tmp_path, capsys, content):
    (tmp_path / "itm.json").write_text(content)
    words = [*command("report", arm), "--probes", str(tmp_path / "itm.json")]
    assert fails(words, capsys, f"--probes {tmp_path}/itm.json is no itm.json or rec.json")
    words = ["itm", "x", "--config", "configs/shapes/probe.yaml", "--output", str(tmp_path)]
    assert fails(words, capsys, "itm.json is not of this command")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"captions": 7}]', "[0].captions: expected str, got int"),
        ('[{"captions": null}]', "[0].captions: expected str, got null"),
        ('[{"caption": "a"}, {}]', "entry 1 has neither captions nor caption"),
        ('{"captions": "a"}', "expected array, got object"),
        ('[{"captions": "\\ud800"}]', ""),
        ('[{"x": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_bad_prompts_are_named(tmp_path, content, message):
    (tmp_path / "part.json").write_text(content)
    with pytest.raises(ValueError, match=r"part\.json is no part of COCO-NSS1K: ") as error:
        load_prompt_set(f"nss1k:{tmp_path}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["align", "x", "--metrics", "oracle", "--batch_size", "0"],
        ["report", "x", "--output", "y", "--seeds", "-1"],
        ["report", "x", "--output", "y", "--per_category", "0"],
        ["itm", "x", "--config", "c", "--output", "y", "--num_samples", "0"],
        ["rec", "x", "--config", "c", "--output", "y", "--num_samples", "1000000000000"],
        ["itm", "x", "--config", "c", "--output", "y", "--timesteps", "-1"],
        ["probe-map", "c", "--output", "y", "--num_samples", "0"],
        ["probe-map", "c", "--output", "y", "--timesteps", "x"],
        ["experiment", "c", "--batch_size", "0"],
    ],
)
def test_number_flags_have_ranges(capsys, words):
    assert fails(words, capsys, f"argument {words[-2]}: {words[-1]!r}; it must be a whole number")


@pytest.mark.parametrize("content", [b"garbage", b"", b"PK\x03\x04 cut"])
def test_garbage_is_no_weights_of_a_scorer(arm, tmp_path, capsys, content):
    (tmp_path / "clip.pt").write_bytes(content)
    words = [
        "align",
        str(arm),
        "--metrics",
        "clip",
        "--clip_model",
        "ViT-B-32",
        "--clip_weights",
        str(tmp_path / "clip.pt"),
    ]
    assert fails(words, capsys, "does not hold weights of ViT-B-32")


ITM = {"id": 1, "timestep": 500, "index": 0, "text": 1.0, "image": 0.5, "kind": ""}
REC = {"id": 1, "timestep": 500, "index": 0, "surest": [0.5, 0.1, 0.2, 0.3, 0.4]}
REC |= {f"{name}_at_{k}": True for name in ("precision", "giou_precision") for k in (1, 5, 10)}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("itm", {}, None),
        ("rec", {}, None),
        ("itm", {"timestep": ...}, "missing required field timestep"),
        ("itm", {"text": "yes"}, "text: expected float, got str"),
        ("itm", {"text": ...}, "missing required field text"),
        ("itm", {"timestep": 100}, "records: mined: a sample lacks a timestep"),
        ("rec", {"surest": [1]}, "surest: expected array of length 5"),
        ("rec", {"precision_at_1": ...}, "missing required field precision_at_1"),
        ("rec", {"index": "a"}, "index: expected int, got str"),
        ("itm", "[]", "expected object, got array"),
        ("itm", "{}", "missing required field identity"),
        ("itm", '{"identity": {}, "records": {"": [1]}}', "expected object, got int"),
    ],
)
def test_bad_records_of_probes_are_named(tmp_path, task, change, message):
    path, record, more = (
        tmp_path / "records.json",
        ITM if task == "itm" else REC,
        {} if isinstance(change, str) else change,
    )
    rows = [{key: value for key, value in (record | row).items() if value is not ...} for row in ({"id": 0}, more)]
    whole = {"identity": {"timesteps": [500]}, "records": {"mined": rows}}
    path.write_text(change if isinstance(change, str) else json.dumps(whole))
    if message is None:
        assert read_kept(path, task).records["mined"][1]["id"] == 1
        return
    with pytest.raises(ValueError, match="remove the file, and it is measured again") as error:
        read_kept(path, task)
    assert f"{path}: " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["shapes-val", "shapes-test", "shapes-test-15"])
def test_committed_figures_can_be_read(name):
    assert all(arm["values"] and arm["costs"] for arm in read_packed(Path(f"docs/{name}.json")).values())
