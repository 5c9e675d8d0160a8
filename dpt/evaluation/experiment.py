"""`evaluate.py experiment`: from training to tables, by one file.

    python evaluate.py experiment configs/shapes/experiment.yaml
    python evaluate.py experiment configs/tables/compbench.yaml data=DATA --dry-run    # the commands it stands for

The file names training runs, each with its seeds, checkpoints to measure as discriminators, arms to draw, and how they
are scored. Finished parts are left as they are and a killed run goes on: give the same command again. --only
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
from pathlib import Path

from dpt.config import load_config
from dpt.evaluation import align, frechet, generate, measure_itm, measure_rec, plan, table
from dpt.evaluation.arms import Arm, differing_arms
from dpt.evaluation.judges import make_judge
from dpt.evaluation.pack import of_pictures, read_arm, read_packed
from dpt.evaluation.plan import Experiment, Run, run_settings
from dpt.evaluation.probes import Measurement
from dpt.evaluation.prompts import load_prompt_set
from dpt.files import read_text
from dpt.results import markdown_table, page_of, record_section
from dpt.training.run_folder import is_finished
from dpt.training.settings import TrainConfig


def run(args: argparse.Namespace) -> dict:
    """Runs the chosen steps as far as they are not done; returns the table's rows, if a table is made.

    Args:
        args: as `plan.check` leaves them.

    Raises:
        ValueError: a file or name that cannot be used.
    """
    experiment, steps = args.experiment, args.steps
    notes = protocol_table(experiment.protocol) + published_table(experiment.published)
    prompts = experiment.filled(experiment.prompts)
    label = prompts.replace(":", "-").replace("/", "-")
    label += f"-{experiment.per_category}" if experiment.per_category else ""
    root = Path(experiment.folder) / label
    wanted = [one for arm in args.arms.values() for one in arm.each_seed(experiment.folder)]
    packed = packed_arms(experiment, wanted, prompts)
    drawn = [one for one in wanted if one.name not in packed] if "draw" in steps else []
    judges = [make_judge(name) for name in experiment.metrics if drawn]  # what is missing is said before training
    if "train" in steps:
        for stage in ("probe", "tune"):  # others start from probes
            train({name: one for name, one in args.runs.items() if one.stage == stage}, experiment, jobs=args.jobs)
    if "measure" in steps and experiment.measure and not args.only:
        measure_checkpoints(experiment, args.tables / experiment.measure.split)
    if drawn:
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
    if drawn:
        folders = [root / one.name for one in drawn]
        align.score_folders(folders, judges)
        if experiment.quality:
            frechet.guard_folders(folders)
    rows, output = {}, args.tables / (f"{label}-part" if args.only else label)
    if "table" in steps and wanted:
        rows = table.make_tables(
            {one.name: packed.get(one.name) or read_arm(root / one.name) for one in wanted},
            against=experiment.against if experiment.against in args.arms else None,
            against_of={name: arm.against for name, arm in args.arms.items() if arm.against in args.arms},
            by=experiment.by,
            notes=notes,
            output=output,
        )
    if args.record:
        split = args.tables / (experiment.measure.split if experiment.measure else "val")
        record(args, [split / "itm.md", split / "rec.md", output / "table.md"], "" if wanted else notes)
    return rows


def packed_arms(experiment: Experiment, arms: list[Arm], prompt_set: str) -> dict[str, dict]:
    """Figures of those arms that the experiment's file `packed` holds, by name.

    Raises:
        ValueError: the file cannot be read or is of other pictures, or an arm was drawn with other settings.
    """
    path = experiment.packed
    if path is None:
        return {}
    found = read_packed(Path(path))
    kept = {arm.name: found[arm.name] for arm in arms if arm.name in found}
    prompts = load_prompt_set(prompt_set, per_category=experiment.per_category)
    pictures = {(prompt.text, seed) for prompt in prompts for seed in experiment.image_seeds}
    if any(pictures - one["values"].keys() for one in kept.values()):
        raise ValueError(f"packed is {path}, which is of other prompts or image_seeds; leave it out, or name another")
    for arm in (arm for arm in arms if arm.name in kept):
        if differing := differing_arms(kept[arm.name]["settings"], arm.settings()):
            raise ValueError(
                f"packed is {path}, for which {arm.name} was drawn with {', '.join(differing)}; leave it out"
            )
    return {name: of_pictures(one, pictures) for name, one in kept.items()}


def record(args: argparse.Namespace, tables: list[Path], notes: str) -> None:
    """Puts the tables that exist, and notes behind them, into the experiment's section of a page."""
    text = "\n".join(read_text(path) for path in tables if path.exists()) + notes
    name = " ".join(["experiment", args.config.stem, *args.overrides])
    record_section(page_of(args.record, name), name, shlex.join(["python", "evaluate.py", *args.words]), text)


def train(runs: dict[str, Run], experiment: Experiment, *, jobs: int = 1) -> None:
    """Trains the runs `<folder>/<name>-<seed>` that are not finished, a process each, `jobs` at once.

    Raises:
        ValueError: a finished run has other settings, or a run failed; its own message stands above.
    """
    commands = []
    for name, one in runs.items():
        for seed in one.seeds:
            settings = [*run_settings(name, one, experiment, seed), "resume=true"]
            config = load_config(TrainConfig, one.config, settings)
            if is_finished(config):
                continue
            if generate.process_state().num_processes > 1:
                raise ValueError(
                    f"{config.run_name} is not trained yet: train it by the commands that --dry-run prints"
                )
            commands.append([sys.executable, str(plan.SCRIPTS / f"train_{one.stage}.py"), one.config, *settings])
    environment = os.environ.copy()
    if jobs > 1:  # more threads than cores slow each other down many times
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda command: subprocess.run(command, env=environment, check=False).returncode, commands)
        for command, code in zip(commands, done, strict=True):
            if code:
                pool.shutdown(cancel_futures=True)
                raise ValueError(f"a training failed: {shlex.join(command[1:])}")


def measure_checkpoints(experiment: Experiment, output: Path) -> None:
    """Runs `itm` and `rec` on the checkpoints of the experiment."""
    options = plan.measuring("rec", experiment, output) | {"output": output}
    checkpoints, config = [Path(path) for path in options.pop("checkpoints")], Path(options.pop("config"))
    what = Measurement(checkpoints, config, **options)
    measure_itm.measure(what, experiment.measure.negatives, zero_shot=experiment.measure.zero_shot)
    measure_rec.measure(what)


def protocol_table(protocol: dict[str, str]) -> str:
    """The parts of the protocol and their sources, as a Markdown table."""
    return "\n" + markdown_table(["protocol", "source"], protocol.items()) if protocol else ""


def published_table(name: str) -> str:
    """Published figures with their source, as Markdown; arms without figures are named.

    Raises:
        ValueError: no such table.
    """
    if not name:
        return ""
    entry = plan.published(name)
    columns = entry["columns"]
    cells = [
        [arm, *("" if row.get(column) is None else f"{row[column]:g}" for column in columns)]
        for arm, row in entry["rows"].items()
    ]
    missing = [arm for arm, row in entry["rows"].items() if not any(row.get(column) is not None for column in columns)]
    note = f"Not known here, so left empty: {', '.join(missing)}.\n" if missing else ""
    return f"\nPublished ({entry['source']}):\n\n{markdown_table(['arm', *columns], cells)}{note}"
