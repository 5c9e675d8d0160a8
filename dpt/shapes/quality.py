"""Quality of the `shapes` world's own parts: the oracle, the small CLIP, the base model.

    python -m dpt.shapes.quality oracle|clip|base|curve

Each prints a Markdown section; with --record it takes the place of the section of that name in a page.
"""

import shlex
import sys
from pathlib import Path

from dpt.command_line import ArgumentParser, heavy_imports, number, one_line_errors
from dpt.results import LOG, page_of, record_section
from dpt.shapes.settings import SEEDS_APART


@one_line_errors()
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    count, seeds = number(int, at_least=1, at_most=1_000_000), number(int, at_least=1, at_most=SEEDS_APART)
    scales = {"type": number(float, at_least=0, below=1000), "nargs": "+", "default": [2, 3, 4, 5, 7.5]}
    run = Path("outputs/shapes-pretrain")
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("section", choices=("oracle", "clip", "base", "curve"))
    page = {"nargs": "?", "const": LOG, "type": Path, "metavar": "FILE"}
    add("--record", **page, help="put the section into a Markdown file too (default: the page of docs/log that has it)")
    add("--renders", type=count, default=5000, help="oracle: fresh renders")
    add("--round_trips", type=count, default=5000, help="oracle: of these, sent through the VAE")
    add("--guidance", **scales, help="base: scales to try")
    add("--prompts_for_guidance", type=count, default=20, help="base: prompts a category for that")
    add("--seeds", type=seeds, default=1, help="base: image seeds a prompt")
    add("--run", type=Path, default=run, help="curve: the folder of the pretraining")
    args = parser.parse_args(argv)
    args.record = args.record and page_of(args.record, args.section)
    with heavy_imports():
        from dpt.shapes.quality_tables import SECTIONS

    text = SECTIONS[args.section](args)
    print(text)
    if args.record:
        record_section(args.record, args.section, f"python -m dpt.shapes.quality {shlex.join(argv)}", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
