"""`evaluate.py experiment`: trains what a comparison needs, draws its arms, judges and tabulates them.

    python evaluate.py experiment configs/shapes/experiment.yaml --prompts shapes:val

The file names training runs, each with its seeds, and arms that use them. Whatever is finished is left as it is, a run
that was killed goes on: give the same command again. --only restricts both to some names; --steps to some of train,
draw, table. Pictures go to FOLDER/<prompt set>/<arm>, tables beside them.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from dpt.checkpoint import checkpoints
from dpt.config import TrainConfig, load_config
from dpt.engine import Trainer
from dpt.evaluation import align, generate, quality, table
from dpt.evaluation.arms import load_arms

STEPS = ("train", "draw", "table")


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
class Experiment:
    """Runs in the order in which they are trained, arms in the order of the table."""

    folder: str = "outputs/experiment"
    runs: dict[str, Run] = field(default_factory=dict)
    arms: list[str] = field(default_factory=list)
    """files of `dpt.evaluation.arms`"""
    against: str = "base"
    """the arm that others are compared with"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommand's flags."""
    parser.add_argument("config", type=Path, help="a YAML file: what differs from the defaults of `Experiment`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--prompts", default="shapes:val", help="a prompt set (default: shapes:val)")
    parser.add_argument("--per_category", type=int, help="only the first so many prompts a category")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of the noise (default: 0 1 2 3)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="names of runs and arms")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--against", help="instead of the file's")


def run(args: argparse.Namespace) -> dict:
    """Does what is left to do of the chosen steps; returns the table's rows, if it is made.

    Raises:
        ValueError: a file or name that cannot be used.
    """
    experiment = load_config(Experiment, args.config, args.overrides)
    arms = {arm.name: (path, arm) for path, arm in zip(experiment.arms, load_arms(experiment.arms), strict=True)}
    if unknown := set(args.only or ()) - experiment.runs.keys() - arms.keys():
        raise ValueError(f"--only names {sorted(unknown)[0]!r}; there are {', '.join([*experiment.runs, *arms])}")
    chosen = [name for name in arms if not args.only or name in args.only]
    if "train" in args.steps:
        for name, settings in experiment.runs.items():
            if not args.only or name in args.only:
                train(name, settings, experiment.folder)
    root = Path(experiment.folder) / args.prompts.replace(":", "-").replace("/", "-")
    folders = [root / one.name for name in chosen for one in arms[name][1].each_seed()]
    if "draw" in args.steps and chosen:
        drawn = argparse.Namespace(**vars(args) | {"outdir": root, "set": []})
        generate.run(argparse.Namespace(**vars(drawn) | {"arms": [arms[name][0] for name in chosen]}))
        align.run(argparse.Namespace(folders=folders, metrics=["oracle", "shapes-clip"], batch_size=64))
        quality.run(argparse.Namespace(folders=folders))
    if "table" not in args.steps or not chosen:
        return {}
    against = args.against or experiment.against
    return table.run(
        argparse.Namespace(
            folders=folders,
            against=against if against in chosen else None,
            categories=None,
            by=["correct"],
            output=root / "tables",
        )
    )


def train(name: str, settings: Run, folder: str) -> None:
    """Trains the runs `FOLDER/<name>-<seed>` that are not finished."""
    for seed in settings.seeds:
        filled = [text.format(seed=seed, folder=folder) for text in settings.settings]
        places = [f"run_name={name}-{seed}", f"output_folder={folder}", f"seed={seed}", "resume=true"]
        config = load_config(TrainConfig, settings.config, [*filled, *places])
        newest = checkpoints(Path(folder) / config.run_name)
        if not newest or int(newest[0].name.removeprefix("step_")) < config.optim.steps:
            Trainer(config, settings.stage).train()
