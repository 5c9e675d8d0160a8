"""Arms: the weights and settings that tables compare.

A YAML file holds one arm, or several by name under `arms`; configs/shapes/arms.yaml holds those of the embedded model.
"FILE:NAME" is one of several. An arm names the settings that differ from the defaults below. Its `dpt` and `lora` may
hold "{folder}", the folder of the training runs, and "{seed}", the training seed: then they stand for one set of
weights for each of `train_seeds`.
"""

import argparse
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import msgspec

from dpt.base_models import DTYPE_NAMES
from dpt.bounds import bounded, one_of
from dpt.config import differences
from dpt.evaluation.flags import SEEDS_APART
from dpt.files import in_words, read_json, read_text
from dpt.sampling_settings import Sampling, values
from dpt.typed_yaml import read_document, read_override

SETTINGS_FILE = "arm.json"
Settings = dict[str, str | bool | int | float | None]
"""an arm's `settings`, and the fingerprint of its `weights`"""


@dataclass(frozen=True)
class Arm(Sampling):
    """Weights and sampling; the defaults are the paper's sampling without self-correction."""

    name: str = ""
    """by default what the file calls it"""
    about: str = ""
    """a few words for tables"""
    against: str | None = None
    """the arm that a table compares it with, if not with the table's own"""
    model: str = "shapes"
    dpt: str | None = None
    """adapter and LoRA: anything that `load_checkpoint` reads"""
    lora: str | None = None
    """another method's LoRA, in place of `dpt` or beside an adapter without one"""
    train_seeds: list[int] = bounded([0], at_least=0)
    """seeds of the trainings that made the weights; each takes the place of {seed} in `dpt` or `lora`"""
    correction_direction: str = one_of("gradient", "gradient", "random")
    """as a control: random, a step of the gradient's length anywhere"""
    correct_for_another: bool = False
    """as a control: follow another prompt's score"""
    untrained_adapter: bool = False
    """as a control: an adapter of random weights"""
    best_of: int = bounded(1, at_least=1, at_most=1000)
    """draw so many pictures and keep the one whose matching score, noised anew, is highest; see also `candidates`"""
    dtype: str = one_of("float32", *DTYPE_NAMES)

    def __post_init__(self):
        super().__post_init__()
        if not self.train_seeds or len(set(self.train_seeds)) < len(self.train_seeds):
            raise ValueError(f"train_seeds is {self.train_seeds}; it must hold different seeds, at least one")
        if self.name and not re.fullmatch(r"\w[\w.+-]*(/\d+)?", self.name):
            raise ValueError(f"name is {self.name!r}; it names a folder: letters, digits and . _ + - alone")
        if not self.dpt and (self.best_of > 1 or self.needs_adapter):
            raise ValueError("dpt is missing: self-correction and choosing by score need an adapter")
        if self.best_of > 1 and self.candidates > 1:
            raise ValueError("best_of and candidates exclude each other: set one of them")
        if self.correct_for_another and (self.correction_target == "noise" or self.correct_candidates):
            raise ValueError("correct_for_another goes with neither correction_target noise nor correct_candidates")
        controls = {
            "correction_direction": self.correction_direction != "gradient",
            "correct_for_another": self.correct_for_another,
            "untrained_adapter": self.untrained_adapter,
        }
        for name, is_set in controls.items():
            if is_set and not self.corrects:
                raise ValueError(f"{name} is set; it is a control of self-correction, which is off")

    @property
    def sampling(self) -> Sampling:
        """The sampling settings of the arm."""
        return Sampling(**values(self))

    def each_seed(self, folder: str = "") -> list["Arm"]:
        """One arm for each set of weights, its name followed by the training seed where there are several.

        Args:
            folder: what "{folder}" in `dpt` and `lora` stands for.
        """
        paths = {name: path.replace("{folder}", folder) for name in ("dpt", "lora") if (path := getattr(self, name))}
        if not any("{seed}" in path for path in paths.values()):
            return [replace(self, **paths)]
        return [
            replace(
                self,
                name=f"{self.name}/{seed}",
                train_seeds=[seed],
                **{name: path.replace("{seed}", str(seed)) for name, path in paths.items()},
            )
            for seed in self.train_seeds
        ]

    def settings(self) -> dict:
        """The settings that a picture depends on, by name: all fields but the labels."""
        labels = ("name", "about", "against", "train_seeds")
        sampling = [entry.name for entry in fields(Sampling)]
        own = [entry.name for entry in fields(self) if entry.name not in (*labels, *sampling)]
        return {name: getattr(self, name) for name in own + sampling} | {"choose_at": str(list(self.choose_at))}


def read_settings(folder: Path) -> Settings:
    """The settings in an arm's folder, on which its pictures depend. Raises ValueError naming file and key."""
    return read_json(folder / SETTINGS_FILE, Settings)


def differing_arms(before: dict, now: dict) -> list[str]:
    """Differences between two arms' `settings` (and further keys), as text; a key added since has its default."""
    return differences((Arm().settings() if before else {}) | before, now)


@dataclass(frozen=True)
class ArmFile(Arm):
    """The keys of a file: those of one arm, or `arms`."""

    arms: dict[str, Arm] = field(default_factory=dict)


def load_arms(place: str | Path, overrides: list[str] = ()) -> list[Arm]:
    """The arms of a file; of "FILE:NAME" the one of that name.

    Args:
        overrides: "key=value", for each of them.

    Raises:
        ValueError: the file cannot be read, lacks the arm, or holds an unknown key or value; the place is named.
    """
    path, name = str(place), None
    if ":" in path and not Path(path).exists():
        path, _, name = path.rpartition(":")
    try:
        document = read_document(read_text(path), ArmFile) or {}
        if not isinstance(document, dict):
            raise ValueError("keys and values are expected, not a list or a bare value")
        entries = msgspec.convert(document.get("arms", {Path(path).stem: document}), dict[str, dict])
        if name is not None and name not in entries:
            raise ValueError(f"there is no arm {name!r}; the arms are {', '.join(entries)}")
        chosen = entries if name is None else {name: entries[name]}
        return [_built(key, entry, overrides) for key, entry in chosen.items()]
    except (ValueError, msgspec.ValidationError) as error:
        raise ValueError(f"arm {place}: {in_words(str(error))}") from error


def _built(name: str, entry: dict, overrides: list[str]) -> Arm:
    settings = asdict(Arm()) | entry
    for override in overrides:
        settings |= read_override(override, Arm)
    arm = msgspec.convert(settings, Arm)
    return arm if arm.name else replace(arm, name=name)


def check(args: argparse.Namespace) -> bool:
    """Loads the arms of `generate` into `args`, by name. Returns True: there is something to do."""
    args.arms = check_names([arm for place in args.arms for arm in load_arms(place, args.set)])
    check_seeds(args.seeds, "--seeds")
    return True


def check_seeds(seeds: list[int], name: str) -> None:
    """Raises ValueError unless there are seeds, each once, below `SEEDS_APART`; `name` is what they are called."""
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < SEEDS_APART for seed in seeds):
        raise ValueError(f"{name} is {seeds}; it must hold different seeds from 0 to {SEEDS_APART - 1}")


def check_names(arms: list[Arm]) -> dict[str, Arm]:
    """The arms by name. Raises ValueError where two have one."""
    found = {}
    for arm in arms:
        if arm.name in found:
            raise ValueError(f"two arms are named {arm.name!r}; names must differ")
        found[arm.name] = arm
    return found


def folder_name(folder: Path) -> str:
    """The name of an arm's folder, behind the arm's where the folder is of one training seed."""
    return f"{folder.parent.name}/{folder.name}" if folder.name.isdigit() else folder.name
