"""Commands for data: verify a folder, cache latents, mine hard negatives.

    python -m dpt.data check ROOT [--decode] [--leak_free FILE]
    python -m dpt.data cache-latents --model sd21-base --images ROOT/train2014 --output ROOT/train2014_SD2-1
    python -m dpt.data mine-negatives --captions ROOT/annotations/captions_train2014.json --images ROOT/train2014 \\
        --output ROOT/itm/train
    python -m dpt.data trajectories configs/shapes/trajectories.yaml [key=value ...]
"""

import argparse
import re
import sys
from pathlib import Path

from dpt.base_models import DTYPE_NAMES
from dpt.command_line import ArgumentParser, number, one_line_errors
from dpt.data.needed_files import needed_files
from dpt.data.settings import DataSettings


def run_check(args: argparse.Namespace) -> int:
    """Prints a table; the exit code is 1 where there are errors, or nothing of what training needs."""
    root = Path(args.root)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; docs/data.md shows what it should hold")
    from dpt.data.check import SHOWN, check_tree, find, leakage, write_leak_free

    lists = check_tree(root, decode=args.decode)
    for findings in lists:
        total = sum(map(len, findings.errors.values()))
        print(f"{findings.name:40}  {findings.holds:45}  {total or 'no'} errors")
        for kind, places in findings.errors.items():
            more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            print(f"    {kind}: {len(places)}: {'; '.join(places[:SHOWN])}{more}")
    needed = needed_files(DataSettings(kind="coco", root=str(root)))
    missing = [path for path in needed if not path.exists()]
    if missing:
        print("not there under the names that training expects (docs/data.md; data.* settings name others):")
        print("\n".join(f"    {path}" for path in missing))
    for training, evaluation, both, of in leakage(lists):
        print(f"leakage: {both or 'none'} of the {of} images of {evaluation} are in {training}")
    if args.leak_free:
        training = find(root, args.leak_free_of)
        if len(training) != 1:
            raise ValueError(
                f"--leak_free_of is {args.leak_free_of!r}; {len(training)} files under {root} are named so"
            )
        evaluation = [p for p in find(root, "finetune_*.json") if "train" not in p.name]
        kept, out = write_leak_free(training[0], evaluation, Path(args.leak_free))
        print(f"{args.leak_free}: {kept} expressions of {training[0].name} kept, {out} left out")
    return int(any(findings.errors for findings in lists) or len(missing) == len(needed))


def run_cache_latents(args: argparse.Namespace) -> int:
    """Encodes a folder of images; go on after a kill with the same command."""
    from dpt.device import DTYPES, usable_device

    device = usable_device(args.device)
    if not Path(args.images).is_dir():
        raise ValueError(f"{args.images} holds no images: it is no folder")
    from dpt.backbones.loading import load_stable_diffusion
    from dpt.data.latents import cache_folder

    dtype = DTYPES[args.dtype]
    sd = load_stable_diffusion(args.model, local_files_only=args.local_files_only, dtype=dtype, device=device)
    size = args.size or sd.default_size
    count = cache_folder(
        sd, Path(args.images), Path(args.output), size=size, batch_size=args.batch_size, shard=args.shard
    )
    print(f"{args.output}: {count} new latents")
    return 0


def run_mine_negatives(args: argparse.Namespace) -> int:
    """Writes hard negatives as a folder of items, or as a table where --output ends in .tsv."""
    from dpt.device import usable_device

    output, device = Path(args.output), usable_device(args.device)
    from dpt.data.coco import load_captions
    from dpt.data.hard_negative_files import write_items, write_tsv
    from dpt.data.hard_negatives import mine
    from dpt.data.open_clip_embedder import load_embedders

    captions = load_captions(Path(args.captions), Path(args.images))
    if not captions:
        raise ValueError(f"--captions {args.captions} holds no caption of an image in {args.images}")
    embed_texts, embed_images = load_embedders(args.clip, args.pretrained, device=device)
    items = mine(
        captions,
        embed_texts,
        embed_images,
        Path(args.work or output.parent / f".{output.name}.embeddings"),
        key=f"{args.clip} {args.pretrained}",
        num_texts=args.num_texts,
        num_images=args.num_images,
        batch_size=args.batch_size,
        block=args.block,
        device=device,
    )
    (write_tsv if output.suffix == ".tsv" else write_items)(output, items)
    print(f"{output}: hard negatives of {len(items)} captions")
    return 0


def run_trajectories(args: argparse.Namespace) -> int:
    """Draws and judges half-drawn pictures to learn from; go on after a kill with the same command."""
    from dpt.config import load_config
    from dpt.data.draw_trajectories import TrajectorySettings, make
    from dpt.device import usable_device
    from dpt.peak_memory import keep_freed_memory

    settings = load_config(TrajectorySettings, args.config, args.overrides)
    keep_freed_memory()
    drawn, judged = make(settings, device=usable_device(args.device))
    print(f"{settings.output}: {drawn} new prompts, {judged} new values by {settings.scorer}")
    return 0


def shard(text: str) -> tuple[int, int]:
    """An argparse type: K/N, the K-th of N shares."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be K/N with 0 <= K < N, such as 0/4")
    return int(match[1]), int(match[2])


def make_parser() -> ArgumentParser:
    """The flags of all subcommands."""
    parser = ArgumentParser("python -m dpt.data", description=__doc__)
    commands = parser.add_subparsers(required=True)
    check = commands.add_parser("check", help="verify a data folder")
    check.add_argument("root")
    check.add_argument("--decode", action="store_true", help="read every pixel, not only headers and last bytes")
    check.add_argument("--leak_free", metavar="FILE", help="write the training list without images of evaluation lists")
    check.add_argument("--leak_free_of", default="finetune_refall_train.json", metavar="NAME", help="which list")
    check.set_defaults(run=run_check)

    cache = commands.add_parser("cache-latents", help="encode a folder of images")
    cache.add_argument("--model", default="sd21-base")
    cache.add_argument("--local_files_only", "--local-files-only", action="store_true")
    cache.add_argument(
        "--size", type=number(int, at_least=8, at_most=4096), help="height and width in pixels; default: the model's"
    )
    cache.add_argument("--shard", type=shard, default=(0, 1), metavar="K/N", help="one of several processes' share")
    cache.add_argument("--dtype", choices=DTYPE_NAMES, default="float32")
    cache.set_defaults(run=run_cache_latents)

    mining = commands.add_parser("mine-negatives", help="find similar captions and images")
    mining.add_argument("--captions", required=True, help="a COCO caption file")
    mining.add_argument("--clip", default="ViT-H-14", help="a model of open_clip, or the JSON file of one's config")
    mining.add_argument("--pretrained", default="laion2b_s32b_b79k", help="open_clip's tag, or a file of weights")
    mining.add_argument("--num_texts", type=number(int, at_least=1, at_most=1000), default=20)
    mining.add_argument("--num_images", type=number(int, at_least=1, at_most=1000), default=4)
    mining.add_argument(
        "--block", type=number(int, at_least=1, at_most=65_536), default=4096, help="rows compared at once"
    )
    mining.add_argument("--work", help="folder for embeddings; default: beside the output")
    mining.set_defaults(run=run_mine_negatives)

    drawing = commands.add_parser("trajectories", help="draw half-drawn pictures to learn from, and judge them")
    drawing.add_argument(
        "config", help="a YAML file: what differs from `dpt.data.draw_trajectories.TrajectorySettings`"
    )
    drawing.add_argument("overrides", nargs="*", metavar="key=value")
    drawing.add_argument("--device", help="default: the first GPU, else the CPU")
    drawing.set_defaults(run=run_trajectories)

    for command in (cache, mining):
        command.add_argument("--images", required=True, help="folder of image files")
        command.add_argument("--output", required=True)
        size = number(int, at_least=1, at_most=4096)
        command.add_argument("--batch_size", type=size, default=8 if command is cache else 64)
        command.add_argument("--device", help="default: the first GPU, else the CPU")
    return parser


@one_line_errors("what is finished is kept: give the same command again")
def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = make_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
