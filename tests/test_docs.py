"""The documentation: links and paths lead somewhere, commands parse, examples run, pages keep their size."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dpt.base_models import CKPT_FOLDER, DPT_WEIGHTS, MODELS, config_beside, recommended
from dpt.command_line import ArgumentParser
from dpt.config import load_config
from dpt.evaluation.flags import BLIP_FOLDER, OPEN_CLIP_FOLDER
from dpt.sampling_flags import sampling_of
from dpt.training.settings import TrainConfig, check_stage
from dpt.typed_yaml import config_keys

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = [page for page in PAGES if page.parent.name != "log"]  # the log has commands of the past, too
MOST_COLUMNS = 9
MOST_LINES = {"README.md": 150, "docs/results.md": 90}
USERS_WEIGHTS = [OPEN_CLIP_FOLDER, BLIP_FOLDER, *DPT_WEIGHTS.values(), *(CKPT_FOLDER / name for name in MODELS)]
"""Weights that users put under ckpt."""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """A page's parts in order, as (kind, text): prose, indented, or the language of a fenced block."""
    lines, parts, at = page.read_text().splitlines(), [], 0
    while at < len(lines):
        if fence := re.match(r"```(\w*)$", lines[at]):
            kind, stop = fence[1] or "text", lines.index("```", at + 1)
            body, at = lines[at + 1 : stop], stop + 1
        else:
            indented = lines[at].startswith("    ") and (not at or not lines[at - 1].strip())
            kind, stop = "indented" if indented else "prose", at + 1
            while stop < len(lines) and not lines[stop].startswith("```"):
                starts = lines[stop].startswith("    ") and not lines[stop - 1].strip()
                if starts if kind == "prose" else lines[stop].strip() and not lines[stop].startswith("    "):
                    break
                stop += 1
            body, at = lines[at:stop], stop
        parts.append((kind, "\n".join(body)))
    return parts


def prose_of(page: Path) -> str:
    return "\n".join(text for kind, text in blocks(page) if kind == "prose")


def spans(text: str) -> list[str]:
    """What stands between single backticks."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


@cache
def anchors(page: Path) -> list[str]:
    """The anchors of a page's headings, by GitHub's rule."""
    found = []
    for heading in re.findall(r"^#+ +(.+)$", prose_of(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{count}" if (count := found.count(slug)) else slug)
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_and_anchors_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose_of(page))
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"https?://", link):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert ROOT in target.parents, link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_headings_are_an_outline(page):
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose_of(page), re.MULTILINE)]
    assert page.read_text().startswith("# ")
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_and_tables_can_be_read(page):
    columns = 0
    for line in prose_of(page).splitlines():
        cells = len(re.split(r"(?<!\\)\|", line.strip())) - 2 if line.strip().startswith("|") else 0
        assert cells <= MOST_COLUMNS, line[:100]
        assert not cells or not columns or cells == columns, line[:100]
        columns = cells
    if page in GUIDES:
        assert len(page.read_text().splitlines()) <= MOST_LINES.get(name_of(page), 200)


def test_the_method_figure_is_small():
    assert (ROOT / "docs/method.png").stat().st_size < 150_000


def test_every_page_is_reached_from_the_readme():
    reached, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        reached.add(page)
        links = (link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)))
        found = {(page.parent / link).resolve() for link in links if link.endswith(".md")}
        todo += sorted(found - reached)
    assert set(PAGES) <= reached


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_names_in_backticks_are_there(page):
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("outputs", ".git"))
    for span in spans(prose_of(page)):
        for path in re.findall(rf"(?:^|[ =])((?:{folders})/[\w./-]*|\w+\.(?:py|md|toml|txt))(?=$|[ ,:])", span):
            weights = any((ROOT / path).is_relative_to(place) for place in USERS_WEIGHTS)
            ours = "/" in path or (ROOT / path).exists() or span != path
            there = [ROOT / path, *(ROOT / "dpt").rglob(path), *(ROOT / "configs").rglob(path)]
            convert = span.startswith("python ")  # its output is checked with the commands
            assert weights or convert or not ours or any(one.exists() for one in there), span
        if match := re.fullmatch(r"(dpt(?:\.\w+)+)", span):
            assert is_ours(match[1]), span
        if re.fullmatch(r"test_\w+", span):
            assert f"def {span}(" in text_of_tests() or Path("tests", f"{span}.py").exists(), span


def is_ours(dotted: str) -> bool:
    """Whether a dotted name is a module of the package, or a name that stands in one."""
    parts = dotted.split(".")
    for depth in range(len(parts), 0, -1):
        for file in (ROOT.joinpath(*parts[:depth]).with_suffix(".py"), ROOT.joinpath(*parts[:depth], "__init__.py")):
            if file.exists():
                return all(re.search(rf"\b{name}\b", file.read_text()) for name in parts[depth:])
    return False


@cache
def text_of_tests() -> str:
    return "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))


def test_every_setting_that_the_documentation_names_exists():
    known = config_keys(TrainConfig)
    sections = {key.split(".")[0] for key in known if "." in key}
    named = set()
    for path in (*PAGES, *Path("configs").glob("*/*.yaml")):
        text = path.read_text()
        named |= {
            m
            for m in re.findall(r"\b([a-z_]+(?:\.[a-z0-9_]+)+)(?==|`)", text)
            if m.split(".")[0] in sections and not m.endswith(".py")
        }
    assert len(named) > 30
    assert sorted(named - set(known)) == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_placeholder_is_left(page):
    assert re.findall(r"@[A-Z]+@", page.read_text()) == []


# Commands

COMMAND = re.compile(r"(?:accelerate launch |(?:\.venv/bin/)?python )")


@cache
def commands(page: Path) -> list[list[str]]:
    """The words of the page's commands, in order; a command may go over several lines."""
    found = []
    for kind, text in blocks(page):
        if kind == "prose":  # in a sentence, a script's name with nothing behind it is no command
            found += [words for span in spans(text) if COMMAND.match(span) and len(words := shlex.split(span)) > 3]
            continue
        lines = iter([] if kind == "python" else text.splitlines())
        for line in lines:
            if not COMMAND.match(command := line.strip()):
                continue
            while command.endswith("\\") or command.count('"') % 2:
                command = command.removesuffix("\\") + " " + next(lines).strip()
            found.append(shlex.split(command, comments=True))
    return [words for words in found if "pytest" not in words]


class Parsed(BaseException):
    """What a command's real parser made of its words, in place of running it."""

    def __init__(self, args):
        self.args_ = args


def parse(words: list[str], monkeypatch):
    """(script, its parsed arguments); None for --help. A bad argument ends in SystemExit."""
    words = words[2:] if words[0] == "accelerate" else words[1:]
    script, words = (words[1], words[2:]) if words[0] == "-m" else (words[0].removesuffix(".py"), words[1:])
    module = importlib.import_module(f"{script}.__main__" if (ROOT / script.replace(".", "/")).is_dir() else script)
    real = ArgumentParser.parse_args

    def parse_and_stop(parser, args=None, namespace=None):
        raise Parsed(real(parser, args, namespace))

    with monkeypatch.context() as patched:
        patched.setattr(ArgumentParser, "parse_args", parse_and_stop)
        patched.setattr(sys, "argv", [script, *words])
        try:
            code = module.main(words)
        except Parsed as parsed:
            return script, parsed.args_
        except SystemExit as stop:
            code = stop.code
    assert code in (0, None), f"{shlex.join(words)} ends with exit code {code}"
    return script, None


def check_settings(script: str, args) -> None:
    """Reads the config that the command names with its overrides, or builds its `Sampling`; raises ValueError."""
    if script == "txt2img":
        weights = Path(args.dpt) if args.dpt and Path(args.dpt).exists() else DPT_WEIGHTS.get(args.model)
        sampling_of(args, recommended(args.model, config_beside(weights) if weights else None))
    elif script in ("train_probe", "train_tune"):
        config = load_config(TrainConfig, args.config, args.overrides)
        check_stage(config, script.removeprefix("train_"), sys.maxsize, goes_on=config.resume)
    elif script == "dpt.shapes.pretrain":
        from dpt.shapes.settings import PretrainConfig

        load_config(PretrainConfig, args.config, args.overrides)
    elif script == "dpt.data" and hasattr(args, "overrides"):
        from dpt.data.draw_trajectories import TrajectorySettings

        load_config(TrajectorySettings, args.config, args.overrides)
    elif script == "evaluate" and args.command == "experiment":
        from dpt.evaluation.plan import Experiment

        load_config(Experiment, args.config, args.overrides)
    elif script == "evaluate" and args.command in ("itm", "rec", "probe-map"):
        load_config(TrainConfig, args.config, args.set if args.command != "probe-map" else args.overrides)
    elif script == "evaluate" and args.command == "generate":
        from dpt.evaluation.arms import load_arms

        assert all(load_arms(place) for place in args.arms)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_taken_by_their_scripts(page, monkeypatch):
    for words in commands(page):
        script, args = parse(words, monkeypatch)
        if args is not None:
            check_settings(script, args)


def test_commands_are_found():
    counts = {name_of(page): len(commands(page)) for page in PAGES}
    assert counts["README.md"] >= 14
    assert counts["docs/drawing.md"] >= 14
    assert counts["docs/training.md"] >= 14
    assert counts["docs/evaluating.md"] >= 20
    assert counts["docs/log/tuning.md"] >= 6


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_what_a_command_reads_was_made_before_or_is_committed(page):
    """A newcomer can give a page's commands in their order: other files are placeholders in capitals."""
    made = set()
    for words in commands(page):
        for before, word in zip(["", *words], words, strict=False):
            path = word.split("=")[-1] if "=" in word else word
            if before.startswith("--out") or before == "--record":
                made.add(path)
            elif word.startswith("run_name="):
                made.add(f"outputs/{path}")
            elif path.startswith("outputs/") and not any(path.startswith(one) for one in made):
                raise AssertionError(f"{path} in {shlex.join(words)}: nothing on the page makes it")
            elif path.startswith("ckpt/") and "convert" not in words:
                users = any(Path(path).resolve().is_relative_to(place) for place in USERS_WEIGHTS)
                assert users or Path(path).exists(), path
            elif path.startswith(("configs/", "docs/", "dpt/")):
                assert Path(path.split(".yaml:")[0] + ".yaml" * (".yaml:" in path)).exists(), (
                    path
                )  # FILE:NAME is an arm
        if "dpt.shapes.pretrain" in words:
            made.add("outputs/shapes-pretrain")


def test_what_make_is_asked_for_is_in_the_makefile():
    targets = re.findall(r"^(\w+):", Path("Makefile").read_text(), re.MULTILINE)
    asked = [name for page in PAGES for name in re.findall(r"^ +make (\w+)", page.read_text(), re.MULTILINE)]
    assert {"demo", "test"} <= set(asked) <= set(targets)


# Examples

EXAMPLES = [
    (page, text)
    for page in (ROOT / "README.md", ROOT / "docs/drawing.md", ROOT / "docs/extending.md")
    for kind, text in blocks(page)
    if kind == "python"
]


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize(("page", "text"), EXAMPLES, ids=[name_of(page) for page, _ in EXAMPLES])
def test_examples_run(page, text, tmp_path, monkeypatch):
    from PIL import Image

    from dpt import base_models

    monkeypatch.setattr(base_models, "MODELS", dict(base_models.MODELS))
    for module in ("loading", "architecture"):
        monkeypatch.setattr(f"dpt.backbones.{module}.MODELS", base_models.MODELS)
    (tmp_path / "ckpt").symlink_to(CKPT_FOLDER)
    monkeypatch.chdir(tmp_path)
    exec(compile(text.replace("FOLDER", "ckpt/shapes"), name_of(page), "exec"), {"__name__": "__main__"})
    (picture,) = tmp_path.glob("*.png")
    assert Image.open(picture).size == (128, 128)


@pytest.mark.slow
def test_the_example_of_a_head_is_trained(tmp_path):
    for name in ("dpt", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_probe.py", tmp_path)
    (tmp_path / "ckpt").symlink_to(CKPT_FOLDER)
    page = ROOT / "docs/extending.md"
    code, patch = (next(text for kind, text in blocks(page) if kind == wanted) for wanted in ("py", "diff"))
    (tmp_path / "dpt/tasks/count.py").write_text(f"{code}\n")
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=f"{patch}\n", text=True, check=True)
    tiny = ["optim.steps=2", "optim.batch_size=2", "data.num_samples=8", "validation.num_samples=2", "samples.every=-1"]
    command = next(text for kind, text in blocks(page) if "adapter.heads=" in text and kind == "indented").split()
    subprocess.run([sys.executable, *command[1:], *tiny], cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, check=True)
    run = tmp_path / "outputs/counting"
    figures = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_count", "count_right"} <= set().union(*figures)
    assert any(
        name.startswith("count_head.") for name in load_file(run / "checkpoints/step_0000002/adapter.safetensors")
    )
