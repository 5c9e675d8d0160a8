"""Arms: what is compared. An arm is a YAML file that says which weights draw, and how.

A file in configs/shapes/arms names what differs from these defaults; `dpt` and `lora` may hold "{seed}", the training
seed, and then stand for one set of weights for each of `train_seeds`, and "{folder}", that of the training runs.
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from dpt.bounds import bounded, check_bounds, one_of
from dpt.config import differences, load_config
from dpt.files import read_json
from dpt.sampling import CORRECTION_DIRECTIONS, CORRECTION_TARGETS, CorrectionSettings

SETTINGS_FILE = "arm.json"
Settings = dict[str, str | bool | int | float | None]
"""an arm's `settings`, and the fingerprint of its `weights`"""


@dataclass
class Arm:
    """Weights and sampling; the defaults are the paper's sampling without self-correction."""

    name: str = ""
    """by default the file's"""
    about: str = ""
    """a few words for tables"""
    against: str | None = None
    """the arm that a table compares it with, if not with the table's own"""
    model: str = "shapes"
    dpt: str | None = None
    """adapter and LoRA: anything that `load_checkpoint` reads"""
    lora: str | None = None
    """instead: a LoRA in diffusers' format, such as another method's"""
    train_seeds: list[int] = bounded([0], at_least=0)
    """of the weights, where `dpt` or `lora` holds {seed}"""
    guidance_scale: float = bounded(7.5, at_least=0, below=1000)
    num_inference_steps: int = bounded(50, at_least=1, at_most=500)
    correction_factor: float = 0.0
    correction_norm: float | None = None
    correction_target: str = one_of("conditional", *CORRECTION_TARGETS)
    correction_start: float = 0.0
    correction_stop: float = 1.0
    correction_direction: str = one_of("gradient", *CORRECTION_DIRECTIONS)
    """as a control: random, a step of the gradient's length anywhere"""
    correct_for_another: bool = False
    """as a control: follow another prompt's score"""
    untrained_adapter: bool = False
    """as a control: an adapter of random weights"""
    best_of: int = bounded(1, at_least=1, at_most=1000)
    """draw so many pictures from different noise and keep the one of highest matching score"""
    attend_and_excite: bool = False
    """instead of self-correction; see `dpt.evaluation.rivals`"""
    attention_resolution: int | None = bounded(None, at_least=1)
    """side of the attention maps that it reads; by default a quarter of the latent's"""
    attention_step: float | None = bounded(None, above=0)
    """how far it moves the latent; by default 20, its authors' for Stable Diffusion"""
    parity: bool = False
    """end the sampling as the reference does"""
    dtype: str = one_of("float32", "float32", "float16", "bfloat16")

    def __post_init__(self):
        check_bounds(self)
        if not self.train_seeds or len(set(self.train_seeds)) < len(self.train_seeds):
            raise ValueError(f"train_seeds is {self.train_seeds}; it must hold different seeds, at least one")
        if self.dpt and self.lora:
            raise ValueError("dpt and lora exclude each other: an arm has one set of weights")
        if self.name and not re.fullmatch(r"\w[\w.+-]*(/\d+)?", self.name):
            raise ValueError(f"name is {self.name!r}; it names a folder: letters, digits and . _ + - alone")
        corrects = self.correction.active  # checks its settings too
        if self.attend_and_excite and corrects:
            raise ValueError("attend_and_excite and self-correction exclude each other")
        if not self.dpt and (self.best_of > 1 or corrects):
            raise ValueError("dpt is missing: correcting oneself and choosing by score need an adapter")
        plain = CorrectionSettings(factor=self.correction_factor)
        if self.parity and (self.attend_and_excite or self.correction != plain):
            raise ValueError("parity is set; the reference's sampling has no other correction than correction_factor's")
        controls = {
            "correction_direction": self.correction_direction != "gradient",
            "correct_for_another": self.correct_for_another,
            "untrained_adapter": self.untrained_adapter,
        }
        for name, is_set in controls.items():
            if is_set and not corrects:
                raise ValueError(f"{name} is set; it is a control of self-correction, which is off")
        for name in ("attention_resolution", "attention_step"):
            if getattr(self, name) is not None and not self.attend_and_excite:
                raise ValueError(f"{name} is set; it is for attend_and_excite, which is off")

    @property
    def correction(self) -> CorrectionSettings:
        """Its self-correction."""
        return CorrectionSettings(
            factor=self.correction_factor,
            norm=self.correction_norm,
            target=self.correction_target,
            start=self.correction_start,
            stop=self.correction_stop,
            direction=self.correction_direction,
        )

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
        """What a picture depends on, but for weights: all fields that are no labels."""
        return {k: v for k, v in asdict(self).items() if k not in ("name", "about", "against", "train_seeds")}


def read_settings(folder: Path) -> Settings:
    """What an arm's folder says that its pictures depend on. Raises ValueError naming file and key."""
    return read_json(folder / SETTINGS_FILE, Settings)


def differing_settings(before: dict, now: dict) -> list[str]:
    """What differs between two arms' `settings` (and further keys), in words; a key added since has its default."""
    return differences({entry.name: entry.default for entry in fields(Arm) if before} | before, now)


def load_arm(path: Path, overrides: list[str] = ()) -> Arm:
    """Reads an arm's file.

    Raises:
        ValueError: unreadable, an unknown key or a value that cannot be; the file is named.
    """
    try:
        arm = load_config(Arm, path, list(overrides))
    except ValueError as error:
        raise ValueError(f"arm {path}: {error}") from error
    return arm if arm.name else replace(arm, name=Path(path).stem)


def check_names(arms: list[Arm]) -> dict[str, Arm]:
    """The arms by name. Raises ValueError where two have one."""
    found = {}
    for arm in arms:
        if arm.name in found:
            raise ValueError(f"two arms are named {arm.name!r}; names must differ")
        found[arm.name] = arm
    return found


def folder_name(folder: Path) -> str:
    """What an arm's folder is called: its own name, after its arm's where it is of one training seed."""
    return f"{folder.parent.name}/{folder.name}" if folder.name.isdigit() else folder.name
