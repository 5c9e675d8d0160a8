"""The command line of `dpt.shapes.label`."""

from pathlib import Path

from dpt.bounds import ArgumentParser, fail, number
from dpt.docstrings import docstring_of
from dpt.imports import heavy_imports
from dpt.shapes.settings import LABELLED_FOLDER


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(description=docstring_of("dpt.shapes.label"))
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("collect", help="choose pictures")
    command.add_argument("folders", nargs="+", type=Path)
    command.add_argument("--count", type=number(int, at_least=1), default=300)
    command = commands.add_parser("sheets", help="show the chosen pictures")
    command.add_argument("output", type=Path)
    for command in commands.choices.values():
        command.add_argument("--folder", type=Path, default=LABELLED_FOLDER, help="where the set lies")
    args = parser.parse_args(argv)
    try:
        with heavy_imports():
            from dpt.shapes.label import collect, sheets

        if args.command == "collect":
            collect(args.folders, args.count, args.folder)
        else:
            sheets(args.output, args.folder)
    except (ValueError, OSError) as error:
        return fail(error)
    return 0
