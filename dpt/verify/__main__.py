"""Checks a base model and weights on the user's own machine, such as those that this project never ran.

    python -m dpt.verify --model sd21-base --dpt ckpt/dpt-v2.1 [--coco ROOT] [--outdir outputs/verify]

Writes `report.json` and `pictures.png` to attach to a report; exit code 1 where a check fails. ROOT holds
`annotations/captions_val2014.json`, `val2014/`, and for REC `annotations/finetune_refcoco_val.json`, `train2014/`.
"""

import sys
from pathlib import Path

from dpt.base_models import check_versions
from dpt.command_line import ArgumentParser, heavy_imports, number, one_line_errors
from dpt.files import check_text
from dpt.hub import check_there


@one_line_errors(out_of_memory="lower --num_pairs, or name another --device")
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--model", default="sd21-base")
    add("--variant", help="of the files of weights, such as fp16")
    add("--dpt", type=Path, required=True, help="adapter and LoRA: a path or a hub id")
    add("--coco", type=Path, help="folder with COCO and REC annotations; without it ITM and REC are left out")
    add("--device", help="default: the first GPU, else the CPU")
    pairs = number(int, at_least=2, at_most=100_000)
    add("--num_pairs", type=pairs, default=400, help="images for ITM and for REC (default: 400)")
    steps = number(int, at_least=1, at_most=500)
    add("--steps", type=steps, default=20, help="steps of the pictures (default: 20)")
    add("--local_files_only", "--local-files-only", action="store_true", help="never ask the hub")
    add("--outdir", type=Path, default=Path("outputs/verify"))
    args = parser.parse_args(argv)
    if args.coco is not None and not args.coco.is_dir():
        raise ValueError(f"--coco {args.coco} is no folder; docs/data.md shows what it should hold")
    check_text("--model", args.model)
    check_there(args.dpt)
    check_versions(args.model, revision=None, variant=args.variant)
    with heavy_imports():
        from dpt.verify.checks import run_checks

    checks = run_checks(args)
    print(f"report: {args.outdir / 'report.json'}, {args.outdir / 'pictures.png'}")
    return 1 if any(check["passed"] is False for check in checks.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
