"""`evaluate.py experiment`: from training to tables, by one file.

    python evaluate.py experiment configs/shapes/experiment.yaml
    python evaluate.py experiment configs/tables/compbench.yaml data=DATA --dry-run    # the commands it stands for

The file names training runs, each with its seeds, checkpoints to measure as discriminators, arms to draw, and how they
are scored. Whatever is finished is left as it is, a run that was killed goes on: give the same command again. --only
restricts it to some names of runs and arms, --steps to some of train, measure, draw, table. Pictures go to
FOLDER/<prompt set>/<arm>, tables to FOLDER/tables/<this file's name>/<prompt set>, measurements to
FOLDER/tables/<this file's name>/<split>. With several GPUs give the commands that --dry-run prints: only drawing is
shared by processes here.
"""

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from dpt.bounds import ArgumentParser, bounded, check_bounds
from dpt.checkpoint import checkpoints
from dpt.config import TrainConfig, check_finished, load_config
from dpt.engine import STAGES
from dpt.evaluation import align, generate, itm, quality, rec, scorers, table
from dpt.evaluation.arms import Arm, check_names, differing_settings, load_arms
from dpt.evaluation.figures import read_arm, read_packed
from dpt.evaluation.flags import FLAGS, STEPS, add_align
from dpt.evaluation.prompts import load_prompt_set
from dpt.files import read_text
from dpt.results import record_section

SOURCES = ("paper", "reference code", "our choice", "not verified")
SCRIPTS = Path(__file__).resolve().parents[2]
PUBLISHED = SCRIPTS / "configs/tables/published.yaml"


@dataclass
class Run:
    """Training runs that differ in their seed alone; settings may hold "{seed}", "{folder}" and "{data}"."""

    stage: str = "tune"
    """probe or tune"""
    config: str = "configs/shapes/tune.yaml"
    settings: list[str] = field(default_factory=list)
    """key=value"""
    seeds: list[int] = bounded([0], at_least=0)

    def __post_init__(self):
        check_bounds(self, "runs: ")


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
    num_samples: int = bounded(500, at_least=1, at_most=1_000_000)
    zero_shot: bool = True

    def __post_init__(self):
        check_bounds(self, "measure.")


@dataclass
class Experiment:
    """Runs in the order in which they are trained, arms in the order of the table."""

    folder: str = "outputs/experiment"
    """for pictures and tables, and for training runs"""
    data: str = "DATA"
    """what "{data}" stands for in settings and prompts: the folder of users' files"""
    runs: dict[str, Run] = field(default_factory=dict)
    measure: Measurement | None = None
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
    """a file of `evaluate.py pack`: its arms are not drawn but tabled from there. Settings, prompts and seeds must be
    the same; weights are not compared. What is in it is trained all the same: choose --steps draw table"""
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
    """what the protocol consists of -> its source: one of `SOURCES`"""
    published: str = ""
    """a table of configs/tables/published.yaml to show beside"""

    def __post_init__(self):
        check_bounds(self)
        generate.check_seeds(self.image_seeds, "image_seeds")
        if unknown := set(self.metrics) - scorers.METRICS.keys():
            raise ValueError(f"metrics names {sorted(unknown)[0]!r}; there are {', '.join(scorers.METRICS)}")
        published_table(self.published)
        if untrained := [name for name, one in self.runs.items() if not one.seeds]:
            raise ValueError(f"runs.{untrained[0]}.seeds is empty; leave the run out, or name seeds")
        for name, source in self.protocol.items():
            if source not in SOURCES:
                raise ValueError(f"protocol: {name} is of {source!r}; sources are {', '.join(SOURCES)}")


def run(args: argparse.Namespace) -> dict:
    """Does what is left to do of the chosen steps; returns the table's rows, if it is made.

    Raises:
        ValueError: a file or name that cannot be used.
    """
    experiment = load_config(Experiment, args.config, args.overrides)
    runs, arms = chosen(experiment, args)
    if args.dry_run:
        print("\n".join(commands(experiment, runs, bool(arms), args)))
        return {}
    notes = protocol_table(experiment.protocol) + published_table(experiment.published)
    scoring = ArgumentParser()
    add_align(scoring)
    wanted = [one for arm in arms.values() for one in arm.each_seed(experiment.folder)]
    prompts = experiment.prompts.replace("{data}", experiment.data)
    packed = packed_arms(experiment, wanted, prompts)
    drawn = [one for one in wanted if one.name not in packed]
    label = prompts.replace(":", "-").replace("/", "-")
    label += f"-{experiment.per_category}" if experiment.per_category else ""
    root = Path(experiment.folder) / label
    tables = Path(experiment.folder) / "tables" / args.config.stem
    folders = [root / one.name for one in drawn]
    scores = scoring.parse_args([*map(str, folders), "--metrics", *experiment.metrics]) if folders else None
    if scores and "draw" in args.steps:
        for name in experiment.metrics:
            scorers.METRICS[name](scores)  # says what is missing before anything is trained
    if "train" in args.steps:
        for stage in STAGES:  # probes first: others start from them
            train({name: one for name, one in runs.items() if one.stage == stage}, experiment, jobs=args.jobs)
    if "measure" in args.steps and experiment.measure and not args.only:
        measure(experiment, tables / experiment.measure.split)
    if "draw" in args.steps and drawn:
        generate.draw_arms(
            drawn,
            prompts,
            experiment.image_seeds,
            root,
            per_category=experiment.per_category,
            batch_size=args.batch_size,
            compbench=experiment.compbench,
        )
    if not generate.process_state().is_main_process:
        return {}
    if "draw" in args.steps and drawn:
        align.run(scores)
        if experiment.quality:
            quality.run(argparse.Namespace(folders=folders))
    rows, output = {}, tables / (f"{label}-part" if args.only else label)
    if "table" in args.steps and wanted:
        rows = table.make_tables(
            {one.name: packed.get(one.name) or read_arm(root / one.name) for one in wanted},
            against=experiment.against if experiment.against in arms else None,
            against_of={name: arm.against for name, arm in arms.items() if arm.against in arms},
            by=experiment.by,
            notes=notes,
            output=output,
        )
    if args.record:
        split = tables / (experiment.measure or Measurement()).split
        record(args, [split / "itm.md", split / "rec.md", output / "table.md"], "" if wanted else notes)
    return rows


def chosen(experiment: Experiment, args: argparse.Namespace) -> tuple[dict[str, Run], dict[str, Arm]]:
    """Those of its runs and arms that --only leaves, by name.

    Raises:
        ValueError: names that are not there, or that do not go together.
    """
    arms = arms_of(experiment)
    if unknown := set(args.only or ()) - experiment.runs.keys() - arms.keys():
        raise ValueError(f"--only names {sorted(unknown)[0]!r}; there are {', '.join([*experiment.runs, *arms])}")
    if arms and experiment.against not in arms:
        raise ValueError(f"against is {experiment.against!r}; the arms are {', '.join(arms)}")
    if args.record and args.record.is_dir():
        raise ValueError(f"--record is {args.record}, a folder; name a file")
    if args.record and (args.only or set(args.steps) != set(STEPS)):
        raise ValueError(
            "--record puts all of an experiment's tables into docs/results.md: leave out --only and --steps"
        )
    runs = {name: one for name, one in experiment.runs.items() if not args.only or name in args.only}
    return runs, {name: arm for name, arm in arms.items() if not args.only or name in args.only}


def arms_of(experiment: Experiment) -> dict[str, Arm]:
    """All its arms by name. Raises ValueError where a file cannot be read, or two arms have one name."""
    arms = [arm for place in experiment.arms for arm in load_arms(place)]
    arms += [replace(arm, name=name) for name, arm in experiment.more_arms.items()]
    return check_names([_with_own_weights(arm, experiment.weights) for arm in arms])


def _with_own_weights(arm: Arm, weights: dict[str, str]) -> Arm:
    path = arm.dpt or arm.lora or ""
    for beginning, own in weights.items():
        if path.startswith(beginning):
            return replace(arm, dpt=own + path.removeprefix(beginning), lora=None)
    return arm


def packed_arms(experiment: Experiment, arms: list[Arm], prompt_set: str) -> dict[str, dict]:
    """Those of the arms that the experiment's `packed` holds.

    Raises:
        ValueError: a file that cannot be read, of other pictures, or an arm that was drawn with other settings.
    """
    path = experiment.packed
    if path is None:
        return {}
    found = read_packed(Path(path))
    kept = {arm.name: found[arm.name] for arm in arms if arm.name in found}
    prompts = load_prompt_set(prompt_set, per_category=experiment.per_category)
    pictures = {(prompt.text, seed) for prompt in prompts for seed in experiment.image_seeds}
    if any(one["values"].keys() != pictures for one in kept.values()):
        raise ValueError(f"packed is {path}, which is of other prompts or image_seeds; leave it out, or name another")
    for arm in (arm for arm in arms if arm.name in kept):
        if differing := differing_settings(kept[arm.name]["settings"], arm.settings()):
            raise ValueError(
                f"packed is {path}, for which {arm.name} was drawn with {', '.join(differing)}; leave it out"
            )
    return kept


def record(args: argparse.Namespace, tables: list[Path], notes: str) -> None:
    """Puts those of the tables that there are into a section of docs/results.md, and notes behind them."""
    text = "\n".join(read_text(path) for path in tables if path.exists()) + notes
    name = " ".join(["experiment", args.config.stem, *args.overrides])
    record_section(args.record, name, shlex.join(["python", "evaluate.py", *args.words]), text)


def train(runs: dict[str, Run], experiment: Experiment, *, jobs: int = 1) -> None:
    """Trains the runs `<folder>/<name>-<seed>` that are not finished, a process each, `jobs` at once.

    Raises:
        ValueError: a finished run of other settings, or a run that failed; what it said stands above.
    """
    commands = []
    for name, one in runs.items():
        for seed in one.seeds:
            settings = [*run_settings(name, one, experiment, seed), "resume=true"]
            config = load_config(TrainConfig, one.config, settings)
            folder = Path(experiment.folder) / config.run_name
            newest = checkpoints(folder)
            if newest and int(newest[0].name.removeprefix("step_")) >= config.optim.steps:
                check_finished(config, load_config(TrainConfig, folder / "config.yaml"))
                continue
            if generate.process_state().num_processes > 1:
                raise ValueError(
                    f"{config.run_name} is not trained yet: train it by the commands that --dry-run prints"
                )
            commands.append([sys.executable, str(SCRIPTS / f"train_{one.stage}.py"), one.config, *settings])
    environment = os.environ.copy()
    if jobs > 1:  # more threads than cores slow each other down many times
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda command: subprocess.run(command, env=environment, check=False).returncode, commands)
        for command, code in zip(commands, done, strict=True):
            if code:
                pool.shutdown(cancel_futures=True)
                raise ValueError(f"a training failed: {shlex.join(command[1:])}")


def run_settings(name: str, one: Run, experiment: Experiment, seed: int) -> list[str]:
    """The run's settings as the training script takes them."""
    values = {"{seed}": str(seed), "{folder}": experiment.folder, "{data}": experiment.data}
    places = [f"run_name={name}-{seed}", f"output_folder={experiment.folder}", f"seed={seed}"]
    return [*places, *(_filled(text, values) for text in one.settings)]


def _filled(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(key, value)
    return text


def measure(experiment: Experiment, output: Path) -> None:
    """`itm` and `rec` of the checkpoints."""
    for task, module in (("itm", itm), ("rec", rec)):
        parser = ArgumentParser()
        FLAGS[task][1](parser)
        module.run(parser.parse_args(_measure_words(experiment, output, task)))


def _measure_words(experiment: Experiment, output: Path, task: str) -> list[str]:
    settings, values = experiment.measure, {"{folder}": experiment.folder, "{data}": experiment.data}
    words = [_filled(path, values) for path in settings.checkpoints]
    words += ["--config", settings.config, "--split", settings.split, "--num_samples", str(settings.num_samples)]
    words += ["--output", str(output)]
    if task == "itm":
        words += ["--negatives", *settings.negatives] * bool(settings.negatives)
        words += ["--zero_shot"] * settings.zero_shot
    return words + ["--set", *(_filled(text, values) for text in settings.settings)] * bool(settings.settings)


def commands(experiment: Experiment, runs: dict[str, Run], draws: bool, args: argparse.Namespace) -> list[str]:
    """The shell commands that the experiment stands for, in order."""
    lines = []
    for name, one in runs.items():
        for seed in one.seeds:
            words = ["accelerate", "launch", f"train_{one.stage}.py", one.config]
            lines.append(shlex.join([*words, *run_settings(name, one, experiment, seed)]))
    if experiment.measure and not args.only:
        output = Path(experiment.folder) / "tables" / args.config.stem / experiment.measure.split
        for task in ("itm", "rec"):
            words = _measure_words(experiment, output, task)
            lines.append(shlex.join(["python", "evaluate.py", task, *words]))
    if draws:
        words = ["accelerate", "launch", "evaluate.py", "experiment", str(args.config), *args.overrides]
        words += ["--only", *args.only] if args.only else []
        lines.append(shlex.join([*words, "--batch_size", str(args.batch_size), "--steps", "draw", "table"]))
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
