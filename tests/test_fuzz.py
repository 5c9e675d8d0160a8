"""A few dozen cases of the fuzz, and that it sees what it is there to see. All of it: python -m tests.fuzz"""

import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from dpt.bounds import Bounds
from tests.fuzz import __main__ as fuzz
from tests.fuzz import damage
from tests.fuzz.case import Result, changes, judge, run_case, snapshot
from tests.fuzz.commands import COMMANDS, Command, Target
from tests.fuzz.inputs import MAKERS
from tests.fuzz.readers import of_files
from tests.fuzz.targets import MODULES, all_targets, out_of_range, refused_setting

QUICK = ("txt2img", "evaluate experiment", "dpt.checkpoint inspect", "dpt.data check", "train_probe, dry run")
CASES = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def targets():
    return all_targets(0)


@pytest.fixture(autouse=True)
def _from_repository_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize("number", range(CASES))
def test_bad_input_is_one_line_and_nothing_is_lost(root, targets, number):
    quick = [target for target in targets if target.command in QUICK]
    result = run_case(quick, 0, len(QUICK) + number, root)  # the first ones are undamaged
    assert result.problems == [], fuzz.summary([vars(result)], 0)


def test_every_command_and_every_reader_is_tried(targets):
    assert {target.command for target in targets} == set(COMMANDS)
    assert {name for command in COMMANDS.values() for name in command.copies} <= set(MAKERS)
    assert len({target.command for target in of_files()}) > 30
    assert sum(target.number for target in targets) > 80
    assert {COMMANDS[target.command].module for target in targets if target.number} >= set(MODULES) - {
        *("train_probe", "train_tune"),  # have settings
        "dpt.shapes.pretrain",
    }


def test_cases_are_the_seed_s(root, targets):
    assert [t.name for t in all_targets(0)] == [t.name for t in targets]
    assert [t.name for t in all_targets(1)] != [t.name for t in targets]
    number = next(k for k, target in enumerate(targets) if target.number and target.command == "txt2img")
    first, again = (run_case(targets, 0, number, root) for _ in range(2))
    assert (first.what, first.words[:-1]) == (again.what, again.words[:-1])


def test_what_is_wrong_is_seen(root, capfd, monkeypatch):
    """A stand-in for a command that does all that it must not."""

    def spoil(folder, rng):
        (folder / "mine.txt").write_text("mine")
        return "nothing", False, []

    def main(argv):
        print("something", file=sys.stderr)
        (Path(argv[0]) / "mine.txt").unlink()
        damage.marker(Path(argv[0])).write_text("")
        raise KeyError("prompt")

    module = ModuleType("bad")
    module.main = main
    monkeypatch.setitem(sys.modules, "bad", module)
    monkeypatch.setitem(COMMANDS, "bad", Command("bad", ("{here}",)))
    found = run_case([Target("x", "bad", spoil)], 0, 0, root).problems
    assert found[0].startswith("traceback: KeyError: 'prompt' (test_fuzz.py:")
    assert found[1:] == ["lost: mine.txt", "pickled code was run"]
    assert capfd.readouterr().err == ""  # what it prints is kept apart


@pytest.mark.parametrize(
    ("code", "refused", "written", "problem"),
    [
        (2, True, "error: --steps is 0\n", None),
        (2, None, "draw: 100%|###| 2/2 [00:01<00:00, 2.00it/s]\nnote: x\nerror: a\n", None),
        (0, None, "", None),
        (0, True, "", "exit code 0, expected 2"),
        (2, False, "error: a\n", "exit code 2, expected 0"),
        (1, None, "", "exit code 1, expected 0 or 2"),
        (2, True, "error: a\nb\n", "not one line of error: ['error: a', 'b']"),
        (2, True, "usage: x\nx: error: y\n", "not one line of error: ['usage: x', 'x: error: y']"),
        (0, None, "Traceback (most recent call last):\n  x\nKeyError: 7\n", "a traceback is printed: KeyError: 7"),
    ],
)
def test_exit_codes_and_lines(code, refused, written, problem):
    result = Result(0, "txt2img", "x", exit_code=code)
    assert judge(COMMANDS["txt2img"], result, refused, written) == ([problem] if problem else [])


def test_the_user_s_files(tmp_path):
    command = COMMANDS["evaluate align"]
    path = tmp_path / "drawn/base/oracle.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("a\n")
    (tmp_path / "picture.png").write_text("x")
    before = snapshot(tmp_path)
    path.write_text("a\nb\n")
    (tmp_path / "new.txt").write_text("")
    assert changes(command, before, snapshot(tmp_path)) == []
    path.write_text("")
    (tmp_path / "picture.png").write_text("y")
    (tmp_path / "aside.png").write_text("x")  # not what this command is there for
    assert sorted(changes(command, before, snapshot(tmp_path))) == [
        "changed: drawn/base/oracle.jsonl",
        "changed: picture.png",
    ]
    path.write_text("a\n")
    moving = replace(command, changes=("~picture.png",))
    assert changes(moving, before, snapshot(tmp_path)) == []
    (tmp_path / "aside.png").unlink()
    assert changes(moving, before, snapshot(tmp_path)) == ["changed: picture.png"]


@pytest.mark.parametrize(
    ("kind", "text", "bounds", "refused"),
    [
        (int, "1.5", None, True),
        (int, "-1", None, True),
        (int, "-1", Bounds(at_least=-1), None),
        (int, "0", Bounds(at_least=1), True),
        (float, "nan", None, True),
        (float, "0", None, None),
    ],
)
def test_which_numbers_have_to_be_refused(kind, text, bounds, refused):
    assert out_of_range(kind, text, bounds) is refused


def test_which_settings_have_to_be_refused():
    assert refused_setting("optim.steps", int, ".nan", None)
    assert refused_setting("optim.steps", int, "-1", Bounds(at_least=0))
    assert not refused_setting("samples.every", int, "-1", None)
    assert not refused_setting("run_name", None, "-1", None)


def test_a_field_of_a_document_is_damaged_and_no_other(tmp_path):
    path, rng = tmp_path / "a.json", random.Random(0)
    seen = set()
    for _ in range(200):
        path.write_text('{"images": [{"id": 1, "file_name": "a.jpg"}], "x": 3}')
        what, refused = damage.of_json("images.*.file_name:str")(path, rng, folder=tmp_path)
        seen.add(what)
        assert '"id": 1' in path.read_text()
        assert '"x": 3' in path.read_text()
        assert refused is True or any(word in what for word in ("text", "U+2028", "outside"))
    assert len(seen) == len(damage.VALUES)


@pytest.mark.slow
def test_a_child_that_takes_too_much_is_ended(tmp_path, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    child, number = fuzz.Child(0, tmp_path), list(COMMANDS).index("dpt.verify")  # undamaged cases come first
    monkeypatch.setattr(fuzz, "SECONDS", 0)
    late = child.run(number)
    assert late["problems"] == ["it took more than 0 s"]
    assert late["command"] == "dpt.verify"
    assert child.spent
    monkeypatch.setattr(fuzz, "MEMORY", 0)
    monkeypatch.setattr(fuzz, "SECONDS", 60)
    child = fuzz.Child(0, tmp_path)
    assert "of memory" in child.run(number)["problems"][0]
    assert f"--case {number}: dpt.verify: nothing: nothing is wrong\n    it took more than 0 s" in fuzz.summary(
        [late], 0
    )
