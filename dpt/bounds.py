"""Ranges of numbers, stated once beside the flag or the setting that they bound.

add("--steps", type=number(int, at_least=1, at_most=500), ...)          # a flag
steps: int = bounded(50, at_least=1, at_most=500)                       # a field of a dataclass
"""

import argparse
import math
import sys
from dataclasses import dataclass, field, fields, is_dataclass


@dataclass(frozen=True)
class Bounds:
    """An interval of finite numbers; None: no limit on that side."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            -math.inf < value < math.inf  # `math.isfinite` takes no integer beyond 1e308
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        parts = [
            f"{name.replace('_', ' ')} {limit:,}" if limit >= 10_000 else f"{name.replace('_', ' ')} {limit:g}"
            for name, limit in vars(self).items()
            if limit is not None
        ]
        return f"a finite number{' ' if parts else ''}{' and '.join(parts)}"

    def check(self, name: str, value: float) -> None:
        """Raises ValueError naming what is out of bounds, its value and the bounds."""
        if value not in self:
            raise ValueError(f"{name} is {value}; it must be {self}")


def number(kind: type, **limits: float):
    """An argparse type: an int or float within `Bounds(**limits)`."""
    bounds = Bounds(**limits)

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or value not in bounds:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r}; it must be {str(bounds).replace('a finite number', noun)}")
        return value

    return parse


def device(text: str) -> str:
    """An argparse type: a device of this machine to compute on."""
    import torch  # not at the top: whoever asks for --help need not wait for it

    try:
        found = torch.device(text)
        if found.type == "cpu":
            return text
        backend = torch.accelerator.current_accelerator()
        there = torch.accelerator.device_count() if backend and backend.type == found.type else 0
        if (found.index or 0) < there:
            return text
        reason = f"this machine has {there} devices of that kind"
    except RuntimeError:
        reason = "there is no such kind of device"
    raise argparse.ArgumentTypeError(f"{text!r}; {reason}: cpu, cuda, cuda:1 or mps, where they are there")


def bounded(default, **limits: float):
    """A dataclass field with bounds. A list's hold for each entry; None passes where it is the default."""
    metadata = {"bounds": Bounds(**limits)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(default: str, *choices: str):
    """A dataclass field that holds one of some words."""
    return field(default=default, metadata={"choices": choices})


def check_bounds(settings, prefix: str = "") -> None:
    """Checks the fields of a dataclass, and of those that it consists of; called in its `__post_init__`.

    Fields are made with `bounded` and `one_of`; others are not looked at.

    Raises:
        ValueError: a value out of bounds; its field is named behind `prefix`.
    """
    for entry in fields(settings):
        value, name = getattr(settings, entry.name), prefix + entry.name
        if is_dataclass(value):
            check_bounds(value, f"{name}.")
        choices, bounds = entry.metadata.get("choices"), entry.metadata.get("bounds")
        if choices and value not in choices:
            raise ValueError(f"{name} is {value!r}; it must be {', '.join(choices[:-1])} or {choices[-1]}")
        if bounds:
            for one in value if isinstance(value, list) else [value]:
                if one is not None or entry.default is not None:
                    bounds.check(name, one)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser, which says what is wrong in one line; flags cannot be abbreviated."""

    def __init__(self, *args, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        options.setdefault("allow_abbrev", False)
        super().__init__(*args, **options)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """The arguments; of a command with `overrides`, settings (key=value) may stand behind flags too."""
        found, rest = self.parse_known_args(args, namespace)
        if "overrides" in found:
            found.overrides += [word for word in rest if not word.startswith("-")]
            rest = [word for word in rest if word.startswith("-")]
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found

    def error(self, message: str):
        """Ends the program with exit code 2 and one line."""
        self.exit(2, f"error: {message} ({self.prog} --help lists every flag)\n")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a CPU or an accelerator."""
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's
    return known or any(text in str(error) for text in ("can't allocate memory", "out of memory"))


def fail(error: object) -> int:
    """Prints one line of an error for a person, and returns the exit code of bad input, 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
