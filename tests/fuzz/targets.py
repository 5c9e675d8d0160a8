"""What can be spoilt: files of every reader, number flags and settings of every command, words in place of others.

Flags are found by walking the commands' parsers, settings by walking their dataclasses; so what is added is tried too.
"""

import argparse
import importlib
import inspect
import math
import random
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin

from dpt.bounds import Bounds
from dpt.config import DPTConfig
from dpt.evaluation.arms import Arm
from dpt.evaluation.plan import Experiment
from dpt.shapes.settings import PretrainConfig
from dpt.training.settings import TrainConfig
from tests.fuzz import damage
from tests.fuzz.commands import COMMANDS, Spoil, Target
from tests.fuzz.readers import of_files

# Flags

FAR = ("0", "-1", "1000000000", str(2**63), "-0.5", "1e30")
NO_NUMBER = ("nan", "inf", "-inf", "1e400", "text", "", "1.5.2", "0x10")
WORDS = ("", "a\0b", "x" * 5000, "\udcff", "~nobody/x", "a\nb", "$x^{", "../..", "\u2028")
DEVICES = ("bogus", "meta", "cuda:9", "cuda", "", "xpu:-1", "cpu:7")
MODULES = dict.fromkeys(command.module for command in COMMANDS.values())
NO_WORDS = ("--output", "--outdir", "--record", "--work", "--folder", "--leak_free")  # a place of their own, below


def parser_of(module: str) -> argparse.ArgumentParser:
    """The parser that a command builds, caught when it begins to parse."""
    caught = []

    class Caught(Exception):
        pass

    def catch(self, *args, **kwargs):
        caught.append(self)
        raise Caught

    original = argparse.ArgumentParser.parse_known_args
    argparse.ArgumentParser.parse_known_args = catch
    try:
        importlib.import_module(module).main([])
    except Caught:
        return caught[0]
    finally:
        argparse.ArgumentParser.parse_known_args = original
    raise AssertionError(f"{module} parses no arguments")


def actions(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.Action]]:
    """Every flag, with the command and subcommand that it belongs to."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, command in action.choices.items():
                yield from actions(command, f"{name} {word}")
        else:
            yield name, action


def of_flags() -> Iterator[Target]:
    """Every number flag of every command, and words and devices in place of other flags' values."""
    for module in MODULES:
        for name, action in actions(parser_of(module), module.removesuffix(".__main__")):
            if not action.option_strings or action.nargs == 0:
                continue
            command = _of_parser(name)
            flag = max(action.option_strings, key=len)
            if kind := _number_kind(action.type):
                for values in (FAR, NO_NUMBER):
                    spoil = _flag(flag, kind, values, _bounds(action.type), only_refused=COMMANDS[command].blocks)
                    yield Target(flag, command, spoil, number=True)
            elif not COMMANDS[command].blocks and not action.choices and flag not in NO_WORDS:
                yield Target(flag, command, _word(flag, DEVICES if flag == "--device" else WORDS))


def _of_parser(name: str) -> str:
    """The command that tries a parser's flags: that of its name, else the first whose name begins so."""
    found = [command for command in COMMANDS if command == name or command.startswith(f"{name},")]
    if not found:
        raise AssertionError(f"tests/fuzz/targets.py has no command for the parser of {name}")
    return next((command for command in found if "dry run" in command), found[0])


def _number_kind(of: object) -> type | None:
    """int or float, where a flag's type is one of them or `dpt.command_line.number` of one."""
    if of in (int, float):
        return of
    kind = inspect.getclosurevars(of).nonlocals.get("kind") if inspect.isfunction(of) else None
    return kind if kind in (int, float) else None


def _bounds(of: object) -> Bounds | None:
    return inspect.getclosurevars(of).nonlocals.get("bounds") if inspect.isfunction(of) else None


def _flag(flag: str, kind: type, values: tuple[str, ...], bounds: Bounds | None, *, only_refused: bool) -> Spoil:
    chosen = [text for text in values if not only_refused or out_of_range(kind, text, bounds)]

    def spoil(folder: Path, rng: random.Random):
        text = rng.choice(chosen)
        return f"{flag}={text}", out_of_range(kind, text, bounds), [f"{flag}={text}"]

    return spoil


def out_of_range(kind: type, text: str, bounds: Bounds | None) -> bool | None:
    """True where the text is no number of the flag, or one that it must refuse: without bounds, any below zero."""
    try:
        value = kind(text)
    except ValueError:
        return True
    if not math.isfinite(value):
        return True
    return (value not in bounds if bounds else value < 0) or None


def _word(flag: str, words: tuple[str, ...]) -> Spoil:
    def spoil(folder: Path, rng: random.Random):
        word = rng.choice(words)
        return f"{flag}={word[:30]!r}", None, [f"{flag}={word}"]

    return spoil


# Settings

VALUES = (
    "-1",
    "0",
    "1000000000",
    str(2**63),
    ".nan",
    ".inf",
    "-.inf",
    "text",
    "[]",
    "{}",
    "[-1]",
    "null",
    "1e400",
    "[[[",
)
NEGATIVE = {"samples.every", "itm_layer"}  # have a meaning below zero, where their bounds do not say so
SETTINGS = {
    ("train_probe, dry run", "train_tune, dry run"): (TrainConfig, ()),
    ("dpt.shapes.pretrain",): (PretrainConfig, ()),
    ("evaluate generate",): (Arm, ("--set",)),
    ("evaluate experiment",): (Experiment, ()),
}
PLACES = {"folder", "output", "output_folder", "cache_folder", "stages"}  # where a command writes, and whether at all


def numbers_of(schema: type, prefix: str = "") -> Iterator[tuple[str, type | None, Bounds | None]]:
    """Every setting: its dotted key; int or float where it is a number or a list of numbers; its bounds."""
    for entry in fields(schema):
        key = prefix + entry.name
        if is_dataclass(entry.type):
            yield key, None, None
            yield from numbers_of(entry.type, f"{key}.")
        elif key not in PLACES:
            kinds = {entry.type, *get_args(entry.type)} & {int, float} if get_origin(entry.type) is not dict else ()
            yield key, next(iter(kinds), None), entry.metadata.get("bounds")


def of_settings() -> Iterator[Target]:
    """Every setting, given as key=value, and those of a checkpoint, which lie in its config.yaml."""
    for commands, (schema, before) in SETTINGS.items():
        for k, (key, kind, bounds) in enumerate(numbers_of(schema)):
            yield Target(key, commands[k % len(commands)], _setting(key, kind, bounds, before))
    for key, kind, bounds in numbers_of(DPTConfig):
        yield Target(f"config.yaml {key}", "dpt.checkpoint inspect", _in_yaml("dpt/config.yaml", key, kind, bounds))


def _setting(key: str, kind: type | None, bounds: Bounds | None, before: tuple[str, ...]) -> Spoil:
    def spoil(folder: Path, rng: random.Random):
        text = rng.choice(VALUES)
        refused = refused_setting(key, kind, text, bounds)
        if text == "[[[" and kind is None:
            refused = None  # a setting that is text is text as typed
        return f"{key}={text}", refused, [*before, f"{key}={text}"]

    return spoil


def _in_yaml(path: str, key: str, kind: type | None, bounds: Bounds | None) -> Spoil:
    def spoil(folder: Path, rng: random.Random):
        text = rng.choice(VALUES)
        description, _ = damage.of_yaml(key, text)(folder / path, rng, folder=folder)
        return description, refused_setting(key, kind, text, bounds), []

    return spoil


def refused_setting(key: str, kind: type | None, text: str, bounds: Bounds | None) -> bool | None:
    """True where no such setting can be of this value."""
    if text == "[[[":
        return True
    if kind is None:
        return None
    if text in (".nan", ".inf", "-.inf", "text", "{}", "1e400"):
        return True
    negative = text in ("-1", "[-1]") and (-1 not in bounds if bounds else key not in NEGATIVE)
    return negative or None


# Places

OUTPUTS = {
    "txt2img": ("--outdir", "folder"),
    "evaluate generate": ("--outdir", "folder"),
    "evaluate pack": ("--output", "file"),
    "evaluate table": ("--output", "folder"),
    "evaluate report": ("--output", "file"),
    "evaluate pareto": ("--output", "file"),
    "evaluate worth": ("--output", "file"),
    "evaluate overoptimization": ("--output", "file"),
    "evaluate rec": ("--output", "folder"),
    "dpt.verify": ("--outdir", "folder"),
    "dpt.data mine-negatives": ("--output", "folder"),
    "dpt.data cache-latents": ("--output", "folder"),
    "dpt.data check, leak_free": ("--leak_free", "file"),
    "dpt.shapes.label collect": ("--folder", "folder"),
    "dpt.shapes.quality": ("--record", "file"),
}


def of_places() -> Iterator[Target]:
    """Outputs whose place is somebody's file, or a folder with somebody's files."""
    for command, (flag, kind) in OUTPUTS.items():
        for place in ("file", "folder"):
            yield Target(f"{flag} is a {place}", command, _taken(flag, kind, place))


def _taken(flag: str, kind: str, place: str) -> Spoil:
    def spoil(folder: Path, rng: random.Random):
        taken = folder / "taken"
        if place == "folder":
            damage.foreign(".")(taken, rng, folder=folder)
        else:
            taken.write_text("mine")
        inside = taken / "x" if place == "file" and kind == "file" else taken
        return (
            f"{flag} is {'under ' if inside != taken else ''}a {place} of somebody's",
            (kind == "file" or place == "file") or None,
            [f"{flag}={inside}"],
        )

    return spoil


def undamaged() -> Iterator[Target]:
    """Every command on good input, without which the others would say nothing."""
    for command, one in COMMANDS.items():
        if not one.blocks:
            yield Target("nothing", command, lambda folder, rng: ("nothing is wrong", False, []))


def all_targets(seed: int) -> list[Target]:
    """Every target: commands without damage, number flags, one of each file of each command, then the others.

    The seed gives the order within these, so that few cases too cover all commands, number flags and readers.
    """
    rng = random.Random(seed)
    ahead, rest = list(undamaged()), []
    flags, files = list(of_flags()), list(of_files())
    for targets in (flags, files):
        rng.shuffle(targets)
    seen = set()
    for target in files:
        key = (target.command, target.name.split()[0])
        (rest if key in seen else ahead).append(target)
        seen.add(key)
    ahead += [flag for flag in flags if flag.number]
    rest += [*(flag for flag in flags if not flag.number), *of_settings(), *of_places()]
    rng.shuffle(rest)
    return [*ahead, *rest]
