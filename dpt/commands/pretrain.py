"""The command line of `dpt.shapes.pretrain`."""

from pathlib import Path

from safetensors import SafetensorError

from dpt.bounds import ArgumentParser, fail
from dpt.config import load_config
from dpt.docstrings import docstring_of
from dpt.imports import heavy_imports
from dpt.shapes.settings import STAGE_NAMES, PretrainConfig


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(description=docstring_of("dpt.shapes.pretrain"))
    parser.add_argument("config", help="a YAML file: what differs from the defaults of `PretrainConfig`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    try:
        config = load_config(PretrainConfig, args.config, args.overrides)
        unknown = [stage for stage in config.stages if stage not in STAGE_NAMES]
        if unknown:
            raise ValueError(f"stages names {unknown[0]!r}; the stages are {', '.join(STAGE_NAMES)}")
        if config.init_from and not Path(config.init_from).is_dir():
            raise ValueError(f"init_from is {config.init_from!r}, which is no folder")
        with heavy_imports():
            from dpt.shapes.pretrain import run

        run(config)
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        return fail(error)
    return 0
