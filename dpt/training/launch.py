"""The command line of the training scripts, with errors in one line. Imports nothing heavy before it must."""

import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from dpt.base_models import checkpoints
from dpt.command_line import ArgumentParser, fail, heavy_imports, one_line_errors
from dpt.config import load_config
from dpt.data.needed_files import needed_files
from dpt.hub import check_there
from dpt.training.settings import TrainConfig, check_stage


@one_line_errors(
    "the same command with resume=true goes on from the last checkpoint",
    out_of_memory="lower optim.batch_size (and raise optim.gradient_accumulation_steps), set "
    "optim.mixed_precision=bf16, or in tune model.gradient_checkpointing=true",
)
def run_stage(stage: str, argv: list[str] | None, description: str) -> int:
    """Runs a training script: config file and overrides in, exit code out."""
    parser = ArgumentParser(description=description)
    parser.add_argument("config", help="a YAML file: what differs from `dpt.training.settings.TrainConfig`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved config, what it would train, memory and data found"
    )
    words = sys.argv[1:] if argv is None else argv
    if flags := [word for word in words if word.startswith("--") and word not in ("--dry-run", "--help")]:
        return fail(
            f"{flags[0]} is no flag: settings are key=value behind a config file, such as train_{stage}.py "
            f"configs/sd21/{stage}.yaml data.root=DATA; docs/fidelity.md says which setting a flag of the reference's "
            "train_stage1.py and train_stage2.py is"
        )
    args = parser.parse_args(words)
    config = load_config(TrainConfig, args.config, args.overrides)
    goes_on = config.resume and bool(checkpoints(Path(config.output_folder) / config.run_name))
    check_stage(config, stage, sys.maxsize, goes_on=goes_on)  # the model's timesteps are checked once it is there
    if config.init_from not in (None, "new") and not goes_on:
        check_there(config.init_from)
    if args.dry_run:
        print(yaml.safe_dump(asdict(config), sort_keys=False), flush=True)
        with heavy_imports():
            from dpt.training.dry_run import describe_run
        print(describe_run(config, stage))
        paths = needed_files(config.data)
        lines = [f"{'found  ' if path.exists() else 'MISSING'}  {path}" for path in paths]
        print("\n".join(lines or ["data: the shapes world, made on the fly"]))
        missing = sum(not path.exists() for path in paths)
        if missing:
            raise ValueError(f"{missing} of these are missing; docs/data.md says where they come from")
    else:
        with heavy_imports():
            from dpt.peak_memory import keep_freed_memory
            from dpt.training.trainer import Trainer

        if argv is None:  # a process of its own
            keep_freed_memory()
        Trainer(config, stage).train()
    return 0
