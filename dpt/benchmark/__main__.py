"""Seconds and memory of a step, beside its expected cost.

    python -m dpt.benchmark sampling [--json] [--model MODEL] [--batch_size N]
    python -m dpt.benchmark training [--json] [--model MODEL] [--batch_size N]
    python -m dpt.benchmark startup [--json]

`sampling` times a plain guided step and ones corrected by each target, interleaved, and the share f of a U-Net pass
that (U-Net up to the block + adapter) takes. A step corrected by a pass of its own should cost at most 1.10 x (1 + f)
plain ones; the target `noise`, which has none, about 1 + f / 2. Where a plain step is one pass, as FLUX.1-dev's, it is
2 f and f. Models but `shapes` have random weights: four of some 100 million, one for each family, and `random-sd21`,
`random-sdxl`, `random-sd35` of full size in bfloat16.

`training` times a probe step with its six passes as one batch and one after the other, interleaved, and measures the
peak memory of a tune step with and without gradient checkpointing.

`startup` measures how long commands take to answer, and their peak memory.
"""

import json
import shlex
import sys

from dpt.benchmark import BATCH_SIZES, CORRECTED, TRAINING_KINDS
from dpt.benchmark.startup import measure_startup
from dpt.command_line import ArgumentParser, fail, heavy_imports, number, one_line_errors
from dpt.results import LOG, markdown_table, page_of, record_section

KINDS = {"sampling": ("plain", *CORRECTED, "whole", "feature"), "training": TRAINING_KINDS}


@one_line_errors(out_of_memory="lower --batch_size")
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("what", choices=(*KINDS, "startup"))
    add("--model", choices=tuple(BATCH_SIZES), help="default: shapes for sampling, random-145m for training")
    add(
        "--batch_size",
        type=number(int, at_least=1, at_most=1024),
        help="default: 8 for shapes, 1 for full-size models, else 2",
    )
    repeats = number(int, at_least=1, at_most=10_000)
    add("--repeats", type=repeats, help="runs of each kind, of sampling at least 5 (default: 7, of startup 5)")
    add("--threads", type=number(int, at_least=1, at_most=1024), default=1, help="default: 1")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON instead of words")
    output.add_argument("--record", action="store_true", help="put the words into the page of docs/log that has them")
    add("--peak_of", metavar="KIND", help="print one kind of step's peak memory in MB alone (Linux)")
    args = parser.parse_args(argv)
    if args.what == "startup":
        if args.model or args.batch_size or args.peak_of:
            return fail("startup is of no model: leave out --model, --batch_size and --peak_of")
        measured = measure_startup(args.repeats or 5)
        result, section = {"repeats": args.repeats or 5, "commands": measured}, "startup"
        rows = [(f"`{name}`", f"{one['seconds']:.2f}", f"{one['peak_mb']:.0f}") for name, one in measured.items()]
        text = markdown_table(["command", "seconds", "peak memory, MB"], rows)
    else:
        args.model = args.model or {"sampling": "shapes", "training": "random-145m"}[args.what]
        args.repeats = args.repeats or 7
        if args.what == "sampling" and args.repeats < 5:
            return fail(f"--repeats is {args.repeats}; it must be at least 5")
        if args.peak_of and args.peak_of not in KINDS[args.what]:
            return fail(f"--peak_of is {args.peak_of!r}; of {args.what} there are {', '.join(KINDS[args.what])}")
        with heavy_imports():
            import torch

            from dpt.benchmark.steps import print_peak, sentence_of, time_sampling, time_training, training_peaks

        torch.set_num_threads(args.threads)
        batch_size = args.batch_size or BATCH_SIZES[args.model][0]
        if args.peak_of:
            print_peak(args.what, args.model, batch_size, args.peak_of)
            return 0
        if args.what == "sampling":
            result = time_sampling(args.model, batch_size, args.repeats)
        else:
            result = time_training(args.model, batch_size, args.repeats) | training_peaks(args.model)
        text, section = sentence_of(args.what, result, args.threads), f"{args.what} {args.model}"
    print(json.dumps(result, indent=1) if args.json else text)
    if args.record:
        command = f"python -m dpt.benchmark {shlex.join(sys.argv[1:] if argv is None else argv)}"
        record_section(page_of(LOG, section), section, command, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
