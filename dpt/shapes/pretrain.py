"""Makes the embedded model from nothing: CLIP, autoencoder, cached latents, U-Net, and the diffusers folder.

    python -m dpt.shapes.pretrain configs/shapes/pretrain.yaml [key=value ...]

Every stage can be killed at any moment; the same command goes on where it stopped.
"""

import sys
from pathlib import Path

from safetensors import SafetensorError

from dpt.command_line import ArgumentParser, heavy_imports, one_line_errors
from dpt.config import load_config
from dpt.shapes.settings import STAGE_NAMES, PretrainConfig


@one_line_errors("the same command goes on from the last saved step")
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a YAML file: what differs from the defaults of `PretrainConfig`")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args(argv)
    try:
        config = load_config(PretrainConfig, args.config, args.overrides)
        if unknown := [stage for stage in config.stages if stage not in STAGE_NAMES]:
            raise ValueError(f"stages names {unknown[0]!r}; the stages are {', '.join(STAGE_NAMES)}")
        if config.init_from and not Path(config.init_from).is_dir():
            raise ValueError(f"init_from is {config.init_from!r}, which is no folder")
        with heavy_imports():
            from dpt.shapes.pretraining_stages import run

        run(config)
    except SafetensorError as error:
        raise ValueError(error) from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
