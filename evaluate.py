#!/usr/bin/env python
"""Every number from one command: pictures of arms, their scores, tables.

python evaluate.py generate --arms configs/shapes/arms.yaml:base --prompts shapes:val --outdir outputs/evaluation
python evaluate.py align outputs/evaluation/base --metrics oracle
python evaluate.py table outputs/evaluation/base --output outputs/evaluation/tables

`evaluate.py SUBCOMMAND --help` has the flags and an example of each.
"""

import importlib
import json
import sys

from dpt.command_line import ArgumentParser, docstring_of, heavy_imports, one_line_errors
from dpt.evaluation.flags import FLAGS

LIGHT_CHECKS = {"generate": "arms", "experiment": "plan"}
"""subcommand -> the module of `dpt.evaluation` whose `check` sees bad files before anything heavy is imported"""
PRINTED = ("generate", "align", "quality", "pack", "report", "pareto", "worth", "overoptimization")
"""subcommands whose result is printed as JSON"""


def make_parser() -> ArgumentParser:
    """The flags of all subcommands."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="SUBCOMMAND")
    for name, (module, add_flags) in FLAGS.items():
        text = docstring_of(f"dpt.evaluation.{module}")
        command = commands.add_parser(name, description=text, help=text.splitlines()[0].split("`: ")[-1].rstrip("."))
        add_flags(command.add_argument)
    return parser


@one_line_errors(
    "what is finished is kept: give the same command again",
    out_of_memory="lower --batch_size (of itm, rec and probe-map optim.batch_size)",
)
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    light = LIGHT_CHECKS.get(args.command)
    if light and not importlib.import_module(f"dpt.evaluation.{light}").check(args):
        return 0
    with heavy_imports():
        module = importlib.import_module(f"dpt.evaluation.{FLAGS[args.command][0]}")
        from dpt.peak_memory import keep_freed_memory

    if argv is None:  # a process of its own
        keep_freed_memory()
    result = module.run(args)
    if args.command in PRINTED:
        print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
