#!/usr/bin/env python
"""Every number from one command: pictures of arms, their scores, tables.

python evaluate.py generate --arms configs/shapes/arms/base.yaml --prompts shapes:val --outdir outputs/evaluation
python evaluate.py align outputs/evaluation/base --metrics oracle
python evaluate.py table outputs/evaluation/base --output outputs/evaluation/tables
python evaluate.py experiment configs/shapes/experiment.yaml
python evaluate.py itm outputs/shapes-probe --config configs/shapes/probe.yaml --output outputs/evaluation/itm
python evaluate.py rec outputs/shapes-probe --config configs/shapes/probe.yaml --output outputs/evaluation/rec
python evaluate.py probe-map configs/shapes/probe_map.yaml --output outputs/probe-map
python evaluate.py pack outputs/evaluation/base --output outputs/evaluation/figures.json
python evaluate.py pareto outputs/evaluation/base --output pareto.png
python evaluate.py report outputs/evaluation/base --tables outputs/evaluation/tables/table.json --output report.html
"""

import json
import sys

import torch

from dpt.bounds import ArgumentParser, fail
from dpt.evaluation import align, experiment, figures, generate, itm, pareto, probe_map, quality, rec, report, table
from dpt.memory import keep_freed_memory

COMMANDS = {
    "generate": generate,
    "align": align,
    "quality": quality,
    "table": table,
    "itm": itm,
    "rec": rec,
    "probe-map": probe_map,
    "experiment": experiment,
    "pack": figures,
    "report": report,
    "pareto": pareto,
}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, description=module.__doc__))
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    try:
        result = COMMANDS[args.command].run(args)
        if args.command in ("generate", "align", "quality", "pack", "report", "pareto"):
            print(json.dumps(result, indent=1))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        return fail(error)
    except torch.OutOfMemoryError:
        return fail("out of memory: lower --batch_size (of itm, rec and probe-map optim.batch_size)")
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
