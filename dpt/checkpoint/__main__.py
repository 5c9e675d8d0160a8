"""Inference weights: our folder, or the released checkpoint, and the way from one to the other.

    python -m dpt.checkpoint inspect PATH
    python -m dpt.checkpoint convert IN OUT

Our folder: `adapter.safetensors`, `config.yaml`, and `lora/pytorch_lora_weights.safetensors`, which any diffusers user
loads with `pipe.load_lora_weights(FOLDER + "/lora")`.
"""

import sys
from pathlib import Path

from dpt.command_line import ArgumentParser, heavy_imports, number, one_line_errors
from dpt.hub import check_there


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="say what is in a checkpoint")
    inspect.add_argument("path", help="a folder, a file or a hub id")
    convert = commands.add_parser("convert", help="write any readable checkpoint as our folder")
    convert.add_argument("input", help="a folder, a file or a hub id")
    convert.add_argument("output", type=Path)
    for command in (inspect, convert):
        add, count = command.add_argument, number(int, at_least=1, at_most=10_000)
        add("--feature", default="up1", help="released files: the probed block (default: up1)")
        add("--base_model", default="sd21-base", help="released files: what they were trained on")
        add("--num_queries_itm", type=count, default=10, help="released files: ITM queries (default: 10)")
        add("--fusion_size", type=count, default=16, help="released files with `all`: map size (16)")
        add("--nheads", type=count, default=8, help="released files: attention heads (default: 8)")
        add("--local-files-only", action="store_true", help="never ask the hub")
    args = parser.parse_args(argv)
    names = ("feature", "base_model", "num_queries_itm", "nheads", "fusion_size", "local_files_only")
    settings = {name: getattr(args, name) for name in names}
    check_there(path := args.path if args.command == "inspect" else args.input)
    with heavy_imports():
        from dpt.checkpoint.checkpoint import describe, load_checkpoint, save_checkpoint

    checkpoint = load_checkpoint(path, **settings)
    print(describe(checkpoint))
    if args.command == "convert":
        save_checkpoint(checkpoint, args.output)
        print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
