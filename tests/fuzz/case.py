"""One case: a good input is copied and spoilt, a command is run on it in this process, and what it did is judged."""

import contextlib
import gc
import hashlib
import importlib
import io
import os
import random
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from tests.fuzz.commands import COMMANDS, Command, Target
from tests.fuzz.damage import marker
from tests.fuzz.inputs import given

PROGRESS = re.compile(r"\d+%\||\d+it \[|\d+/\d+ \[\d|\d(it|step)/s|\ds/(it|step)\b")
NOTE = re.compile(r"note: |warning: |checkpoint .* is damaged|.*Warning: |  \S")  # a warning's second line is its code


@dataclass
class Result:
    """What came of a case.

    Attributes:
        exit_code: None where it raised, or was ended from outside.
        problems: what is wrong with that, a line each; none: it passed.
    """

    number: int
    command: str
    target: str
    what: str = ""
    words: list[str] = field(default_factory=list)
    exit_code: int | None = None
    problems: list[str] = field(default_factory=list)


def case_of(targets: list[Target], number: int) -> Target:
    """The target of a case: each in turn."""
    return targets[number % len(targets)]


def run_case(targets: list[Target], seed: int, number: int, root: Path, *, begun=lambda result: None) -> Result:
    """Runs a case in a folder of its own under `root`, where good inputs are too.

    Args:
        begun: is told what the case is, before the command runs.
    """
    target, rng = case_of(targets, number), random.Random(f"{seed}/{number}")
    command, here = COMMANDS[target.command], root / f"case-{number}"
    result = Result(number, target.command, target.name)
    _remove(here)
    here.mkdir(parents=True)
    try:
        with _streams(here.with_suffix(".making")) as written:  # what makes good inputs is not what is judged
            for name in sorted(set(re.findall(r"\{base\}/(\w+)", " ".join(command.words)))):
                given(root, name)
            for name in command.copies:
                shutil.copytree(given(root, name), here / name)
    except RuntimeError as error:
        last = written[1].strip().splitlines()[-1:]
        result.problems.append(f"{error}: {' '.join(last)}")
        return result
    result.what, refused, more = target.spoil(here, rng)
    result.words = [word.format(base=root, here=here) for word in command.words] + more
    before, inputs = snapshot(here), stamps(root)
    begun(result)
    err = _run(command.module, result, here)
    result.problems += judge(command, result, refused, err)
    result.problems += changes(command, before, snapshot(here))
    if marker(here).exists():
        result.problems.append("pickled code was run")
    if stamps(root) != inputs:
        result.problems.append("a good input outside of the case's folder was changed")
    if not result.problems:
        _remove(here)
    return result


def _remove(here: Path) -> None:
    shutil.rmtree(here, ignore_errors=True)
    marker(here).unlink(missing_ok=True)


def _run(module: str, result: Result, here: Path) -> str:
    """Calls the command's `main` in the folder; returns what it wrote to stderr."""
    environment, place = dict(os.environ), Path.cwd()
    argv, sys.argv = sys.argv, [module, *result.words]
    os.chdir(here)
    try:
        with _streams(here.with_suffix(".streams")) as written:
            try:
                result.exit_code = importlib.import_module(module).main(list(result.words))
            except SystemExit as error:
                result.exit_code = error.code if isinstance(error.code, int) else 1
            except BaseException as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                text = " ".join(str(error).split())[:200]
                where = f"{Path(last.filename).name}:{last.lineno}"
                result.problems.append(f"traceback: {type(error).__name__}: {text} ({where})")
                if isinstance(error, KeyboardInterrupt):
                    raise
    finally:
        os.chdir(place)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(1)
        torch.set_default_device(None)
        plt.close("all")
        gc.collect()
    return written[1]


@contextlib.contextmanager
def _streams(path: Path) -> Iterator[list[str]]:
    """Sends what this process and its children write to files, and gives both texts when all is done."""
    written: list[str] = []
    files = [path.with_name(f"{path.name}.{n}") for n in (1, 2)]
    sys.stdout.flush(), sys.stderr.flush()
    saved, streams = [os.dup(1), os.dup(2)], (sys.stdout, sys.stderr)
    opened = [file.open("wb", buffering=0) for file in files]
    for number, file in enumerate(opened, 1):
        os.dup2(file.fileno(), number)
    sys.stdout = io.TextIOWrapper(io.FileIO(os.dup(1), "w"), "utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(os.dup(2), "w"), "utf-8", "backslashreplace", write_through=True)
    try:
        yield written
    finally:
        for number, descriptor in enumerate(saved, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdout, sys.stderr = streams
        for file, name in zip(opened, files, strict=True):
            file.close()
            written.append(name.read_text("utf-8", "replace"))
            name.unlink()


# What a command may do


def judge(command: Command, result: Result, refused: bool | None, err: str) -> list[str]:
    """What is wrong with an exit code, and with what was written beside it.

    Args:
        refused: whether the input has to be refused; False: it is good; None: either.
    """
    problems = []
    refusals = {1, 2} if command.reports else {2}
    allowed = set(command.good) if refused is False else refusals if refused else {*command.good, *refusals}
    code = result.exit_code
    if code is not None and code not in allowed:
        problems.append(f"exit code {code}, expected {' or '.join(map(str, sorted(allowed)))}")
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and not PROGRESS.search(line)]
    if any(line.startswith("Traceback") for line in lines) and code is not None:
        problems.append(f"a traceback is printed: {lines[-1][:200]}")
    elif code == 2:
        rest = [line for line in lines if not NOTE.match(line)]
        if len(rest) != 1 or not rest[0].startswith("error: "):
            problems.append(f"not one line of error: {rest[:4]}")
    return problems


def snapshot(folder: Path) -> dict[str, str]:
    """Hashes of all files in a folder; of folders, that they are there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(folder))] = f"{len(content)} {hashlib.sha256(content).hexdigest()}"
    return found


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of the good inputs' files."""
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith("case-")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def changes(command: Command, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Files of the user that are gone or differ, but for those that the command is there to change."""
    problems = []
    for name, content in before.items():
        if after.get(name) == content:
            continue
        how = {pattern[0]: pattern for pattern in command.changes if fnmatch(name, pattern.lstrip("+~"))}
        larger = name in after and int(after[name].split()[0]) > int(content.split()[0])
        aside = any(found == content for place, found in after.items() if place not in before)
        if not how or ("+" in how and not larger) or ("~" in how and not aside):
            problems.append(f"{'changed' if name in after else 'lost'}: {name}")
    return problems
