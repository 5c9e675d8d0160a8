"""`evaluate.py experiment`: from training to tables, by one file.

    python evaluate.py experiment configs/shapes/experiment.yaml
    python evaluate.py experiment configs/tables/compbench.yaml --dry-run          # the commands that it stands for

The file names training runs, each with its seeds, checkpoints to measure as discriminators, arms to draw, and how they
are scored. Whatever is finished is left as it is, a run that was killed goes on: give the same command again. --only
restricts it to some names of runs and arms, --steps to some of train, measure, draw, table. Pictures go to
FOLDER/<prompt set>/<arm>, tables to FOLDER/<prompt set>/tables, measurements to FOLDER/{itm,rec}.
"""

import argparse
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from dpt.checkpoint import checkpoints
from dpt.config import TrainConfig, load_config
from dpt.engine import Trainer
from dpt.evaluation import align, generate, itm, quality, rec, table
from dpt.evaluation.arms import Arm, load_arms

STEPS = ("train", "measure", "draw", "table")
SOURCES = ("paper", "reference code", "our choice")
PUBLISHED = Path(__file__).resolve().parents[2] / "configs/tables/published.yaml"


@dataclass
class Run:
    """Training runs that differ in their seed alone; "{seed}" and "{folder}" in settings are filled in."""

    stage: str = "tune"
    """probe or tune"""
    config: str = "configs/shapes/tune.yaml"
    settings: list[str] = field(default_factory=list)
    """key=value"""
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass
class Measurement:
    """Checkpoints measured by `itm` and `rec`, controls beside probes."""

    config: str = "configs/shapes/probe.yaml"
    settings: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    """"{folder}" is filled in"""
    negatives: list[str] = field(default_factory=list)
    """shapes: mined, edited"""
    split: str = "val"
    num_samples: int = 500
    zero_shot: bool = True


@dataclass
class Experiment:
    """Runs in the order in which they are trained, arms in the order of the table."""

    folder: str = "outputs/experiment"
    runs: dict[str, Run] = field(default_factory=dict)
    measure: Measurement | None = None
    arms: list[str] = field(default_factory=list)
    """files of `dpt.evaluation.arms`"""
    more_arms: dict[str, Arm] = field(default_factory=dict)
    """by name, in this file"""
    prompts: str = "shapes:val"
    """a prompt set of `dpt.evaluation.prompts`"""
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
    """what the protocol consists of -> its source: paper, reference code or our choice"""
    published: str = ""
    """a table of configs/tables/published.yaml to show beside"""

    def __post_init__(self):
        for name, source in self.protocol.items():
            if source not in SOURCES:
                raise ValueError(f"protocol: {name} is of {source!r}; sources are {', '.join(SOURCES)}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("config", type=Path, help="a YAML file: what differs from the defaults of `Experiment`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--per_category", type=int, help="only the first so many prompts a category")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="names of runs and arms")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--dry-run", action="store_true", help="print the commands that it stands for, and stop")


def run(args: argparse.Namespace) -> dict:
    """Does what is left to do of the chosen steps; returns the table's rows, if it is made.

    Raises:
        ValueError: a file or name that cannot be used.
    """
    experiment = load_config(Experiment, args.config, args.overrides)
    arms = {arm.name: arm for arm in load_arms(experiment.arms)}
    arms |= {name: replace(arm, name=name) for name, arm in experiment.more_arms.items()}
    if unknown := set(args.only or ()) - experiment.runs.keys() - arms.keys():
        raise ValueError(f"--only names {sorted(unknown)[0]!r}; there are {', '.join([*experiment.runs, *arms])}")
    runs = {name: one for name, one in experiment.runs.items() if not args.only or name in args.only}
    arms = {name: arm for name, arm in arms.items() if not args.only or name in args.only}
    if args.dry_run:
        print("\n".join(commands(experiment, runs, list(arms), args.config)))
        return {}
    if "train" in args.steps:
        for name, settings in runs.items():
            train(name, settings, experiment.folder)
    if "measure" in args.steps and experiment.measure and not args.only:
        measure(experiment.measure, experiment.folder)
    root = Path(experiment.folder) / experiment.prompts.replace(":", "-").replace("/", "-")
    folders = [root / one.name for arm in arms.values() for one in arm.each_seed()]
    if "draw" in args.steps and arms:
        generate.draw_arms(
            list(arms.values()),
            experiment.prompts,
            experiment.image_seeds,
            root,
            per_category=args.per_category,
            batch_size=args.batch_size,
            compbench=experiment.compbench,
        )
        scoring = argparse.ArgumentParser()
        align.add_arguments(scoring)
        align.run(scoring.parse_args([*map(str, folders), "--metrics", *experiment.metrics]))
        if experiment.quality:
            quality.run(argparse.Namespace(folders=folders))
    if "table" not in args.steps or not arms:
        return {}
    rows = table.run(
        argparse.Namespace(
            folders=folders,
            against=experiment.against if experiment.against in arms else None,
            categories=None,
            by=experiment.by,
            output=root / "tables",
        )
    )
    notes = protocol_table(experiment.protocol) + published_table(experiment.published)
    with (root / "tables/table.md").open("a") as file:
        file.write(notes)
    print(notes)
    return rows


def train(name: str, settings: Run, folder: str) -> None:
    """Trains the runs `FOLDER/<name>-<seed>` that are not finished."""
    for seed in settings.seeds:
        config = load_config(TrainConfig, settings.config, [*run_settings(name, settings, folder, seed), "resume=true"])
        newest = checkpoints(Path(folder) / config.run_name)
        if not newest or int(newest[0].name.removeprefix("step_")) < config.optim.steps:
            Trainer(config, settings.stage).train()


def run_settings(name: str, settings: Run, folder: str, seed: int) -> list[str]:
    """The run's settings as the training script takes them."""
    filled = [text.replace("{seed}", str(seed)).replace("{folder}", folder) for text in settings.settings]
    return [f"run_name={name}-{seed}", f"output_folder={folder}", f"seed={seed}", *filled]


def measure(settings: Measurement, folder: str) -> None:
    """`itm` and `rec` of the checkpoints."""
    for task, module in (("itm", itm), ("rec", rec)):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        module.run(parser.parse_args(_measure_words(settings, folder, task)))


def _measure_words(settings: Measurement, folder: str, task: str) -> list[str]:
    words = [path.replace("{folder}", folder) for path in settings.checkpoints]
    words += ["--config", settings.config, "--split", settings.split, "--num_samples", str(settings.num_samples)]
    words += ["--output", f"{folder}/{task}"]
    if task == "itm":
        words += ["--negatives", *settings.negatives] * bool(settings.negatives)
        words += ["--zero_shot"] * settings.zero_shot
    return words + ["--set", *settings.settings] * bool(settings.settings)


def commands(experiment: Experiment, runs: dict[str, Run], arms: list[str], path: Path) -> list[str]:
    """The shell commands that the experiment stands for, in order."""
    lines = []
    for name, one in runs.items():
        for seed in one.seeds:
            words = ["accelerate", "launch", f"train_{one.stage}.py", one.config]
            lines.append(shlex.join([*words, *run_settings(name, one, experiment.folder, seed)]))
    if experiment.measure:
        for task in ("itm", "rec"):
            words = _measure_words(experiment.measure, experiment.folder, task)
            lines.append(shlex.join(["python", "evaluate.py", task, *words]))
    if arms:
        words = ["accelerate", "launch", "evaluate.py", "experiment", str(path), "--steps", "draw", "table"]
        lines.append(shlex.join(words))
    return lines


def protocol_table(protocol: dict[str, str]) -> str:
    """Markdown: what the protocol consists of, and where that comes from."""
    return "\n" + table.markdown(["protocol", "source"], [list(pair) for pair in protocol.items()]) if protocol else ""


def published_table(name: str) -> str:
    """Markdown: published figures, with their source; a table without any says so.

    Raises:
        ValueError: no such table.
    """
    if not name:
        return ""
    known = yaml.safe_load(PUBLISHED.read_text())
    if name not in known:
        raise ValueError(f"published is {name!r}; {PUBLISHED} has {', '.join(known)}")
    entry = known[name]
    columns = entry["columns"]
    cells = [
        [arm, *("" if row.get(column) is None else f"{row[column]:g}" for column in columns)]
        for arm, row in entry["rows"].items()
    ]
    missing = [arm for arm, row in entry["rows"].items() if not any(row.get(column) is not None for column in columns)]
    note = f"Not known here, so left empty: {', '.join(missing)}.\n" if missing else ""
    return f"\nPublished ({entry['source']}):\n\n{table.markdown(['arm', *columns], cells)}{note}"
