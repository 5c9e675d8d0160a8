"""Ranges of numbers, stated once beside the setting that they bound: `steps: int = bounded(50, at_least=1)`."""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class Bounds:
    """An interval of finite numbers; None: no limit on that side."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            isinstance(value, Real)
            and -math.inf < value < math.inf  # `math.isfinite` takes no integer beyond 1e308
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

    def check(self, name: str, value: float, *, whole: bool = False) -> None:
        """Raises ValueError naming what is out of bounds, its value and the bounds.

        Args:
            whole: whether it must be a whole number.
        """
        if value not in self or (whole and (isinstance(value, bool) or not isinstance(value, Integral))):
            words = str(self).replace("a finite number", "a whole number") if whole else str(self)
            raise ValueError(f"{name} is {value if isinstance(value, Real) else repr(value)}; it must be {words}")


def bounded(default, **limits: float):
    """A dataclass field with bounds. They hold for each entry of a list; None passes where it is the default."""
    metadata = {"bounds": Bounds(**limits)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def one_of(default: str, *choices: str):
    """A dataclass field that holds one of some words."""
    return field(default=default, metadata={"choices": choices})


def check_bounds(settings, prefix: str = "") -> None:
    """Checks the fields of a dataclass and of dataclasses in it; called in its `__post_init__`.

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
                    bounds.check(name, one, whole=entry.type in (int, int | None, list[int]))
