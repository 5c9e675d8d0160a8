#!/usr/bin/env python
"""Draws prompts with Stable Diffusion or the embedded `shapes` model.

python txt2img.py --model shapes --prompt "a red circle left of a blue square"
python txt2img.py --gpuid 0 --prompt "a photo of an astronaut riding a horse on mars"
"""

import argparse
import sys
import tempfile
from pathlib import Path

from dpt.base_models import (
    DEFAULT_MODEL,
    DPT_WEIGHTS,
    DTYPE_NAMES,
    MODELS,
    OFFLOADS,
    TRANSFORMERS,
    check_family,
    check_made_for,
    check_one_lora,
    check_versions,
    config_beside,
    default_dtype,
    describe_size,
    known_name,
    pipeline_of,
    recommended,
)
from dpt.choosing_rules import CANDIDATES_APART
from dpt.command_line import ArgumentParser, heavy_imports, number, one_line_errors
from dpt.files import check_text, read_text, text_lines
from dpt.hub import fetch_weights, is_hub_id
from dpt.sampling_flags import add_sampling_flags, refuse_reference_flags, sampling_of
from dpt.sampling_settings import SEED_LIMIT, Sampling

MAX_PICTURES = 10_000_000  # of a run, months on a GPU


def make_parser() -> ArgumentParser:
    """The flags."""
    parser = ArgumentParser(description=__doc__)
    add, count = parser.add_argument, number(int, at_least=1, at_most=1_000_000)
    add("--prompt", action="append", default=[], help="what to draw; may be given several times")
    add("--from-file", type=Path, metavar="FILE", help="a text file, one prompt a line; blank lines are skipped")
    places = f"{', '.join(MODELS)}, a local folder, a single file or a hub id (default: {DEFAULT_MODEL})"
    add("--model", "--pretrained_model_name_or_path", default=DEFAULT_MODEL, help=places)
    add("--revision", help="branch, tag or commit on the hub")
    add("--variant", help="of the files of weights, such as fp16 (default: of a local folder, whichever is there)")
    add("--no_t5", action="store_true", help="leave out the T5 of Stable Diffusion 3, two thirds of its memory")
    add("--offload", choices=OFFLOADS, help="keep on the CPU what does not compute: whole networks, or every layer")
    add("--local-files-only", action="store_true", help="never ask the hub")
    add("--dpt", metavar="PATH", help="adapter and LoRA: our folder, the released file or folder, a hub id, or none")
    add("--lora", type=Path, metavar="PATH", help="another method's LoRA; without --dpt no adapter reads along")
    add("--n_samples", type=count, default=3, help="pictures a prompt (default: 3)")
    add("--n_iter", type=count, default=1, help="how many times n_samples are drawn, with new seeds (default: 1)")
    add("--batch_size", type=number(int, at_least=1, at_most=1024), default=4, help="drawn at once (default: 4)")
    seed = number(int, at_least=0, below=SEED_LIMIT)
    add("--seed", type=seed, default=42, help="sample k of a prompt uses seed + k (default: 42)")
    add_sampling_flags(parser)
    add("--outdir", type=Path, default=Path("outputs/txt2img"), help="default: outputs/txt2img")
    add("--skip_grid", action="store_true", help="write no grid")
    add("--compbench", action="store_true", help="name files as T2I-CompBench expects: <prompt>_<6 digits>.png")
    add("--skip_existing", action="store_true", help="skip what outdir holds already with the same settings")
    add("--trace", action="store_true", help="write score against step, with and without correction")
    add("--dtype", choices=DTYPE_NAMES, help="default: float16 on CUDA (SD 3, FLUX: bfloat16), else float32")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the first GPU, else the CPU)")
    gpu = {"type": number(int, at_least=0, at_most=1023), "metavar": "N"}
    add("-g", "--gpuid", "--gpu", **gpu, help="draw on GPU N; without CUDA the CPU is used")
    add("--dry-run", action="store_true", help="say what would be drawn, load nothing")
    return parser


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All prompts, those of --prompt first. Raises ValueError naming the flag where there is none, or no text."""
    prompts = [check_text("--prompt", prompt) for prompt in args.prompt]
    if args.from_file is not None:
        try:
            lines = text_lines(read_text(args.from_file))
        except ValueError as error:
            raise ValueError(f"--from-file {error}") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"--from-file {args.from_file} holds no prompt")
        prompts += found
    if not prompts:
        raise ValueError('nothing to draw: pass --prompt "..." or --from-file FILE')
    if (total := len(prompts) * args.n_samples * args.n_iter) > MAX_PICTURES:
        raise ValueError(f"prompts x --n_samples x --n_iter are {total:,} pictures; at most {MAX_PICTURES:,} are a run")
    return prompts


def choose_device(args: argparse.Namespace):
    """The device that --device or --gpuid names, else the first accelerator, else the CPU."""
    with heavy_imports():
        from dpt.device import gpu, usable_device

    if args.gpuid is None:
        return usable_device(args.device)
    if args.device is not None:
        raise ValueError("--gpuid and --device exclude each other: pass one of them")
    return gpu(args.gpuid)


def choose_weights(args: argparse.Namespace) -> Path | None:
    """The weights that --dpt names, by default those of the base model where they are."""
    weights = Path(args.dpt) if args.dpt not in (None, "none") else None
    if args.lora and not args.lora.exists():
        raise ValueError(f"--lora {args.lora} is not there; pass a file or a folder of a LoRA")
    known = DPT_WEIGHTS.get(known_name(args.model))
    if args.dpt is None and not args.lora and known and known.exists():
        weights = known
    if weights is not None and not weights.exists() and not is_hub_id(weights):
        raise ValueError(f"--dpt {weights} is not there; pass our folder, the released checkpoint, a hub id, or none")
    return weights


def choose_sampling(args: argparse.Namespace, weights: Path | None) -> Sampling:
    """What the flags say, and for the rest what the weights or the base model recommend."""
    for name in ("model", "revision", "variant", "negative_prompt"):
        check_text(f"--{name}", getattr(args, name) or "")
    config = config_beside(weights) if weights else None
    sampling = sampling_of(args, recommended(args.model, config))
    check_versions(args.model, revision=args.revision, variant=args.variant)
    if weights is None and (sampling.needs_adapter or args.trace):
        raise ValueError("self-correction, --candidates and --trace need an adapter: pass --dpt PATH")
    check_family(args.model, sampling, no_t5=args.no_t5)
    if weights:
        check_made_for(config, args.model, weights)
        check_one_lora(config, weights, args.lora)
    if known_name(args.model):  # others are looked through when they are loaded
        describe_size(args.model, sampling.height, sampling.width)
    last = args.seed + args.n_samples * args.n_iter + CANDIDATES_APART * (sampling.candidates - 1)
    if sampling.candidates > 1 and last >= SEED_LIMIT:
        raise ValueError(f"--seed is {args.seed}; with {sampling.candidates} candidates seeds would go beyond 2**62")
    return sampling


def describe(weights: Path | None, sampling: Sampling, lora: Path | None) -> str:
    """In words: which adapter and LoRA, and what they do."""
    if weights is None:
        return f"LoRA {lora}, without DPT weights" if lora else "without DPT weights"
    does = []
    if sampling.candidates > 1:
        shares = ", ".join(f"{share:g}" for share in sampling.choose_at)
        does.append(f"the best of {sampling.candidates} noises, chosen at {shares} of the steps")
    if sampling.corrects:
        factor, norm = sampling.correction_factor, sampling.correction_norm
        length = f"factor {factor:g}" if norm is None else f"norm {norm:g}"
        does.append(f"self-correction {length} ({sampling.correction_target})")
    if sampling.attend_and_excite:
        does.append("Attend-and-Excite")
    beside = f" with LoRA {lora}" if lora else ""
    return f"DPT weights {weights}{beside}, {' and '.join(does) or 'no self-correction'}"


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser, argv = make_parser(), sys.argv[1:] if argv is None else argv
    refuse_reference_flags(parser, argv)
    args = parser.parse_args(argv)
    finished = f"finished pictures are in {args.outdir / 'samples'}"
    less = f"lower --batch_size (now {args.batch_size}), --H and --W, or use --dtype float16"
    return one_line_errors(finished, out_of_memory=less, kept=finished)(run)(args)


def run(args: argparse.Namespace) -> int:
    """Draws what the arguments ask for. Raises ValueError for bad input."""
    weights, prompts = choose_weights(args), read_prompts(args)
    if weights and is_hub_id(weights) and not args.dry_run:
        weights = fetch_weights(weights, local_files_only=args.local_files_only)
    sampling, per_prompt = choose_sampling(args, weights), args.n_samples * args.n_iter
    total = len(prompts) * per_prompt
    print(f"{len(prompts)} prompt(s) x {per_prompt} = {total} picture(s)", flush=True)  # the next line takes seconds
    device = choose_device(args)
    dtype = args.dtype or default_dtype(args.model, device.type)
    print(f"{args.model} on {device} in {dtype}, {describe(weights, sampling, args.lora)}", flush=True)
    if args.parity and weights and recommended(args.model, config_beside(weights)).candidates > 1:
        print("note: --parity draws as the reference: it chooses nothing and corrects by the paper's factor")
    if args.offload and device.type == "cpu":
        print("note: --offload has no effect: there is no accelerator here")
    if args.gpuid is not None and device.type == "cpu":
        print("no CUDA device here: drawing on the CPU")
    if args.dry_run:
        scheduler = "flow Euler" if pipeline_of(args.model) in TRANSFORMERS else sampling.scheduler.upper()
        steps = f"{sampling.num_inference_steps} {scheduler} steps"
        print(f"{steps}, guidance scale {sampling.guidance_scale}, seeds from {args.seed}, into {args.outdir}")
        print(describe_size(args.model, sampling.height, sampling.width))
        return 0
    samples = args.outdir / "samples"
    try:
        samples.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=samples).close()
    except OSError as error:
        raise ValueError(f"--outdir {args.outdir} cannot be written: {error.strerror}") from error
    with heavy_imports():
        from dpt.gallery import Gallery, all_jobs, draw_all, open_artist

    gallery = Gallery(args.outdir, compbench=args.compbench)
    there = gallery.keys()  # before anything is drawn: nothing is added to somebody else's file
    artist, common = open_artist(args, weights, sampling, device, dtype)
    announce(artist.sd, prompts, args, sampling)
    jobs, count = all_jobs(prompts, args.seed, per_prompt, common), total
    if args.skip_existing:
        count = sum(gallery.key(job) not in there for job in jobs)
        jobs = (job for job in all_jobs(prompts, args.seed, per_prompt, common) if gallery.key(job) not in there)
        print(f"{total - count} picture(s) are there already")
    rows = draw_all(artist, gallery, jobs, count, sampling, batch_size=args.batch_size, trace=args.trace)
    if rows and not args.skip_grid:
        path = gallery.save_grid([(prompts[row], images) for row, images in sorted(rows.items())])
        print(f"grid of the first {len(rows)} prompt(s): {path}")
    print(f"{count} picture(s) in {samples}")
    return 0


def announce(sd, prompts: list[str], args: argparse.Namespace, sampling: Sampling) -> None:
    """Says what of the prompts and settings will not be understood or have no effect."""
    from dpt.gallery import GRID_ROWS
    from dpt.images import without_glyph
    from dpt.worlds import grammar_note

    for prompt in dict.fromkeys([*prompts, sampling.negative_prompt]):
        if cut := sd.truncated_part(prompt):
            end = f"not read of {prompt[:40]!r}...: {cut[:60]!r}..."
            print(f"note: {sd.name} reads {sd.longest_reader[1]} tokens a prompt; {end}")
    if note := grammar_note(sd.name, prompts):
        print(f"note: {note}")
    if sampling.negative_prompt and sampling.guidance_scale <= 1:
        print("note: --negative_prompt has no effect at a --scale of 1 or less")
    if (args.trace or not args.skip_grid) and (lacking := without_glyph("".join(prompts[:GRID_ROWS]))):
        print(f"note: the labels' font has no {ascii(lacking)[:80]}, which are written so")


if __name__ == "__main__":
    sys.exit(main())
