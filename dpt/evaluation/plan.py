"""An experiment's file: runs, measurements, arms, and the commands that it stands for. Imports nothing heavy."""

import argparse
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from dpt.bounds import bounded, check_bounds, one_of
from dpt.config import load_config
from dpt.evaluation.arms import Arm, check_names, check_seeds, load_arms
from dpt.evaluation.flags import METRICS, STEPS
from dpt.results import LOG

SOURCES = ("paper", "reference code", "our choice", "not verified")
SCRIPTS = Path(__file__).resolve().parents[2]
PUBLISHED = SCRIPTS / "configs/tables/published.yaml"


@dataclass
class Run:
    """Training runs that differ in their seed alone; settings may hold "{seed}", "{folder}" and "{data}"."""

    stage: str = one_of("tune", "probe", "tune")
    config: str = "configs/shapes/tune.yaml"
    settings: list[str] = field(default_factory=list)
    """key=value"""
    seeds: list[int] = bounded([0], at_least=0)

    def __post_init__(self):
        check_bounds(self, "runs: ")


@dataclass
class MeasureSettings:
    """Checkpoints measured by `itm` and `rec`, controls beside probes."""

    config: str = "configs/shapes/probe.yaml"
    settings: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    """"{folder}" is filled in"""
    negatives: list[str] = field(default_factory=list)
    """shapes: mined, edited"""
    split: str = one_of("val", "val", "test")
    num_samples: int = bounded(500, at_least=1, at_most=1_000_000)
    zero_shot: bool = True

    def __post_init__(self):
        check_bounds(self, "measure.")
        if not self.checkpoints:
            raise ValueError("measure.checkpoints is empty; name some, or leave measure out")
        if unknown := set(self.negatives) - {"mined", "edited"}:
            raise ValueError(f"measure.negatives names {min(unknown)!r}; there are mined and edited")


@dataclass
class Experiment:
    """Runs in the order in which they are trained, arms in the order of the table."""

    folder: str = "outputs/experiment"
    """folder of pictures, tables and training runs"""
    data: str = "DATA"
    """what "{data}" stands for in settings and prompts: the folder of users' files"""
    runs: dict[str, Run] = field(default_factory=dict)
    measure: MeasureSettings | None = None
    arms: list[str] = field(default_factory=list)
    """files of `dpt.evaluation.arms`, or FILE:NAME"""
    more_arms: dict[str, Arm] = field(default_factory=dict)
    """by name, in this file"""
    weights: dict[str, str] = field(default_factory=dict)
    """beginnings of the arms' `dpt` and `lora` -> what takes their place, such as "{folder}/" for weights that this
    experiment trains; the first that fits holds, and the rest of the path stays"""
    prompts: str = "shapes:val"
    """a prompt set of `dpt.evaluation.prompts`"""
    per_category: int | None = bounded(None, at_least=1)
    """only the first so many prompts a category; they have folders of their own"""
    packed: str | None = None
    """a file of `evaluate.py pack`: its arms are not drawn but tabled from there. Settings must be the same, and its
    pictures may be more; weights are not compared. Their runs are trained all the same: choose --steps draw table"""
    image_seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3])
    metrics: list[str] = field(default_factory=lambda: ["oracle", "shapes-clip"])
    quality: bool = True
    """shapes: the quality guard"""
    compbench: bool = False
    """name pictures as T2I-CompBench's own scorers expect"""
    against: str = "base"
    """the arm that others are compared with"""
    by: list[str] = field(default_factory=lambda: ["correct"])
    """figures shown by category"""
    protocol: dict[str, str] = field(default_factory=dict)
    """part of the protocol -> its source, one of `SOURCES`"""
    published: str = ""
    """a table of configs/tables/published.yaml to show beside"""

    def __post_init__(self):
        check_bounds(self)
        check_seeds(self.image_seeds, "image_seeds")
        if unknown := set(self.metrics) - set(METRICS):
            raise ValueError(f"metrics names {sorted(unknown)[0]!r}; there are {', '.join(METRICS)}")
        if self.published:
            published(self.published)
        if untrained := [name for name, one in self.runs.items() if not one.seeds]:
            raise ValueError(f"runs.{untrained[0]}.seeds is empty; leave the run out, or name seeds")
        for name, source in self.protocol.items():
            if source not in SOURCES:
                raise ValueError(f"protocol: {name} is of {source!r}; sources are {', '.join(SOURCES)}")

    def filled(self, text: str, seed: int | str = "{seed}") -> str:
        """A text with "{folder}", "{data}" and "{seed}" replaced."""
        return text.replace("{folder}", self.folder).replace("{data}", self.data).replace("{seed}", str(seed))


def published(name: str) -> dict:
    """A table of published figures. Raises ValueError where there is none of that name."""
    known = yaml.safe_load(PUBLISHED.read_text())
    if name not in known:
        raise ValueError(f"published is {name!r}; {PUBLISHED} has {', '.join(known)}")
    return known[name]


def arms_of(experiment: Experiment) -> dict[str, Arm]:
    """All its arms by name. Raises ValueError where a file cannot be read, or two arms have one name."""
    arms = [arm for place in experiment.arms for arm in load_arms(place)]
    arms += [replace(arm, name=name) for name, arm in experiment.more_arms.items()]
    return check_names([_with_own_weights(arm, experiment.weights) for arm in arms])


def _with_own_weights(arm: Arm, weights: dict[str, str]) -> Arm:
    path = arm.dpt or arm.lora or ""
    for beginning, own in weights.items():
        if path.startswith(beginning):
            # own weights hold adapter and LoRA: they take a LoRA's place, but not that of one beside an adapter
            return replace(arm, dpt=own + path.removeprefix(beginning), lora=arm.lora if arm.dpt else None)
    return arm


def check(args: argparse.Namespace) -> bool:
    """Loads the experiment into `args`, with those of its runs and arms that --only leaves, by name.

    Returns:
        Whether there is anything to do: --dry-run prints the commands alone.

    Raises:
        ValueError: a file or name that cannot be used, or flags that do not go together.
    """
    experiment = load_config(Experiment, args.config, args.overrides)
    arms = arms_of(experiment)
    if unknown := set(args.only or ()) - experiment.runs.keys() - arms.keys():
        raise ValueError(f"--only names {sorted(unknown)[0]!r}; there are {', '.join([*experiment.runs, *arms])}")
    if arms and experiment.against not in arms:
        raise ValueError(f"against is {experiment.against!r}; the arms are {', '.join(arms)}")
    if args.record not in (None, LOG) and args.record.is_dir():
        raise ValueError(f"--record is {args.record}, a folder; name a file")
    if args.record and (args.only or set(args.steps) != set(STEPS)):
        raise ValueError("--record puts all of an experiment's tables into one page: leave out --only and --steps")
    args.experiment = experiment
    args.runs = {name: run for name, run in experiment.runs.items() if not args.only or name in args.only}
    args.arms = {name: arm for name, arm in arms.items() if not args.only or name in args.only}
    args.tables = Path(experiment.folder) / "tables" / args.config.stem
    if args.dry_run:
        print("\n".join(commands(args)))
    return not args.dry_run


def run_settings(name: str, run: Run, experiment: Experiment, seed: int) -> list[str]:
    """The run's settings as the training script takes them."""
    places = [f"run_name={name}-{seed}", f"output_folder={experiment.folder}", f"seed={seed}"]
    return [*places, *(experiment.filled(text, seed) for text in run.settings)]


def measuring(task: str, experiment: Experiment, output: Path) -> dict:
    """The flags of `evaluate.py itm` or `rec`, the task, by name."""
    measure = experiment.measure
    options = {"checkpoints": [experiment.filled(path) for path in measure.checkpoints], "config": measure.config}
    options |= {"split": measure.split, "num_samples": measure.num_samples, "output": str(output)}
    if task == "itm":
        options |= {"negatives": measure.negatives, "zero_shot": measure.zero_shot}
    return options | {"set": [experiment.filled(text) for text in measure.settings]}


def commands(args: argparse.Namespace) -> list[str]:
    """The shell commands that the experiment stands for, in order."""
    lines, experiment = [], args.experiment
    for name, run in args.runs.items():
        for seed in run.seeds:
            words = ["accelerate", "launch", f"train_{run.stage}.py", run.config]
            lines.append([*words, *run_settings(name, run, experiment, seed)])
    for task in ("itm", "rec") if experiment.measure and not args.only else ():
        options = measuring(task, experiment, args.tables / experiment.measure.split)
        lines.append(["python", "evaluate.py", task, *options.pop("checkpoints"), *_words(options)])
    if args.arms:
        words = ["accelerate", "launch", "evaluate.py", "experiment", str(args.config), *args.overrides]
        words += _words({"only": args.only or [], "batch_size": args.batch_size})
        lines.append([*words, "--steps", "draw", "table"])
    return [shlex.join(line) for line in lines]


def _words(options: dict) -> list[str]:
    """Flags as they are typed; what is empty or false is left out."""
    words = []
    for name, value in options.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, values)] if value not in (False, []) else []
    return words
