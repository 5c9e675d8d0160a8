"""Pictures to label by eye, against which the oracle is checked.

    python -m dpt.shapes.label collect outputs/shapes-pretrain/samples/step_* --count 300
    python -m dpt.shapes.label sheets outputs/labelling          # numbered pictures with their prompts, no verdicts
    (write the labels into dpt/shapes/labelled/labels.jsonl; --folder names another set)
    python -m dpt.shapes.quality oracle                          # compares

`collect` draws the same number at random from each folder that `dpt.shapes.quality_tables.judge_prompts` filled, and
leaves the oracle's verdicts out.
"""

import sys
from pathlib import Path

from dpt.command_line import ArgumentParser, heavy_imports, number, one_line_errors
from dpt.shapes.settings import LABELLED_FOLDER


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("collect", help="choose pictures")
    command.add_argument("folders", nargs="+", type=Path)
    command.add_argument("--count", type=number(int, at_least=1), default=300)
    command = commands.add_parser("sheets", help="show the chosen pictures")
    command.add_argument("output", type=Path)
    for command in commands.choices.values():
        command.add_argument("--folder", type=Path, default=LABELLED_FOLDER, help="where the set lies")
    args = parser.parse_args(argv)
    with heavy_imports():
        from dpt.shapes.labelled_pictures import collect_pictures, sheets

    if args.command == "collect":
        collect_pictures(args.folders, args.count, args.folder)
    else:
        sheets(args.output, args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
