#!/usr/bin/env python
"""Draws prompts with Stable Diffusion or the embedded `shapes` model.

python txt2img.py --model shapes --prompt "a red circle left of a blue square"
python txt2img.py --gpuid 0 --prompt "a photo of an astronaut riding a horse on mars"
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import dpt
from dpt.adapter import Scorer
from dpt.bounds import ArgumentParser, fail, number
from dpt.checkpoint import DPT_WEIGHTS, load_checkpoint
from dpt.files import check_text, read_text, text_lines
from dpt.hub import is_hub_id
from dpt.images import (
    append_metadata,
    compbench_stem,
    make_grid,
    numbered,
    read_metadata,
    save_new,
    without_glyph,
)
from dpt.lora import load_external_lora
from dpt.sampling import CORRECTION_TARGETS, SEED_LIMIT, CorrectionSettings, draw
from dpt.stable_diffusion import (
    DEFAULT_MODEL,
    DTYPES,
    MAX_SIDE,
    MODELS,
    StableDiffusion,
    architecture,
    check_size,
    grammar_note,
    known_name,
    load_stable_diffusion,
    sampling_defaults,
    usable_device,
    weights_fingerprint,
)
from dpt.traces import image_traces, write_traces

VAE_SCALE_FACTOR = 8  # of all models by name
GRID_ROWS, GRID_COLUMNS = 12, 8
MAX_PICTURES = 10_000_000  # of a run, months on a GPU

IN_THE_CONFIG = {
    "--unet_feature": "feature",
    "--num_queries_matching": "adapter.num_queries_itm",
    "--num_queries_rec": "adapter.num_queries_rec",
    "--contrastive_loss_hdim": "adapter.contrastive_dim",
    "--lora_rank": "lora_rank",
    **{f"--{name}": f"adapter.{name}" for name in ("enc_layers", "dec_layers", "hidden_dim", "dim_feedforward")},
    **{f"--{name}": f"adapter.{name}" for name in ("nheads", "dropout", "pre_norm", "position_embedding")},
}
"""Flags of the reference's model, and which key of the weights' config.yaml says the same."""
ELSEWHERE = {
    "--resolution": "--H and --W, by default the model's own size",
    "--text_encoder_type": "nothing: drawing reads no expressions; for training it is model.rec_text_encoder",
    "--transformer_decoder_only": "nothing: the adapter has an encoder and a decoder",
    "--masks": "nothing: the adapter finds boxes",
    "--no_contrastive_align_loss": "nothing: drawing computes no loss",
    "--mixed_precision": "--dtype",
    "--output_dir": "--outdir",
}
"""Other flags of the reference, and what stands for them."""


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add, count = parser.add_argument, number(int, at_least=1, at_most=1_000_000)
    add("--prompt", action="append", default=[], help="what to draw; may be given several times")
    add("--from-file", type=Path, metavar="FILE", help="a text file, one prompt a line; blank lines are skipped")
    add("--negative_prompt", default="", help="what to keep away from")
    add(
        "--model",
        "--pretrained_model_name_or_path",
        default=DEFAULT_MODEL,
        help=f"{', '.join(MODELS)}, a local folder or a hub id (default: {DEFAULT_MODEL})",
    )
    add("--revision", help="branch, tag or commit on the hub")
    add("--variant", help="of the files of weights, such as fp16 (default: of a local folder, whichever is there)")
    add("--local-files-only", action="store_true", help="never ask the hub")
    add("--n_samples", type=count, default=3, help="pictures a prompt (default: 3)")
    add("--n_iter", type=count, default=1, help="how many times n_samples are drawn, with new seeds (default: 1)")
    add(
        "--batch_size",
        type=number(int, at_least=1, at_most=1024),
        default=4,
        help="pictures drawn at once; does not change them (default: 4)",
    )
    add(
        "--seed",
        type=number(int, at_least=0, below=SEED_LIMIT),
        default=42,
        help="sample k of a prompt uses seed + k (default: 42)",
    )
    add(
        "--scale",
        type=number(float, at_least=0, below=1000),
        help="guidance scale (default: 7.5, of shapes 5)",
    )
    add(
        "--ddim_steps",
        "--num_timesteps",
        dest="steps",
        type=number(int, at_least=1, at_most=500),
        help="sampling steps (default: 50, of shapes 20)",
    )
    side = number(int, at_least=1, at_most=MAX_SIDE)
    add("--H", type=side, help="height in pixels (default: the model's)")
    add("--W", type=side, help="width in pixels (default: the model's)")
    add("--outdir", type=Path, default=Path("outputs/txt2img"), help="default: outputs/txt2img")
    add("--skip_grid", action="store_true", help="write no grid")
    add("--compbench", action="store_true", help="name files as T2I-CompBench expects: <prompt>_<6 digits>.png")
    add("--skip_existing", action="store_true", help="skip what outdir holds already with the same settings")
    add("--dpt", metavar="PATH", help="adapter and LoRA: our folder, the released file or folder, a hub id, or none")
    add("--lora", type=Path, metavar="PATH", help="instead: another method's LoRA (`dpt.lora_files` lists the layouts)")
    add(
        "--correction_factor",
        type=number(float, at_least=0, at_most=1e6),
        help="self-correction's factor (default: 0.5 with --dpt weights, else 0; of shapes see --correction_norm)",
    )
    add(
        "--correction_norm",
        type=number(float, at_least=0, at_most=100),
        help="instead: the correction's length as a share of the latent's norm (default of shapes: 0.012)",
    )
    add(
        "--correction_target",
        choices=CORRECTION_TARGETS,
        help="what goes on from the correction (default: conditional, of shapes latent)",
    )
    share = number(float, at_least=0, at_most=1)
    add("--correction_start", type=share, default=0.0, help="first corrected step, as a fraction of the steps")
    add("--correction_stop", type=share, default=1.0, help="end of the corrected steps, as a fraction of the steps")
    add(
        "--on_nan", choices=("raise", "skip"), default="raise", help="a non-finite score: stop, or leave it uncorrected"
    )
    add("--parity", action="store_true", help="end the sampling as the reference does")
    add("--trace", action="store_true", help="write score against step, with and without correction")
    add("--dtype", choices=DTYPES, help="default: float16 on CUDA, else float32")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the first GPU, else the CPU)")
    add(
        "-g",
        "--gpuid",
        "--gpu",
        type=number(int, at_least=0, at_most=1023),
        metavar="N",
        help="draw on GPU N; without CUDA the CPU is used",
    )
    add("--dry-run", action="store_true", help="say what would be drawn, load nothing")
    return parser


def refuse_reference_flags(parser: ArgumentParser, argv: list[str]) -> None:
    """Ends the program at the first flag of the reference whose setting is elsewhere now, saying where."""
    for word in argv:
        flag = word.split("=")[0]
        if key := IN_THE_CONFIG.get(flag):
            where = f"config.yaml of the weights says it ({key}); a released file gets one by dpt.checkpoint convert"
            parser.error(f"{flag} is a flag of the reference; here {where}")
        if flag in ELSEWHERE:
            parser.error(f"{flag} is a flag of the reference; here it is {ELSEWHERE[flag]}")


def check_arguments(args: argparse.Namespace) -> None:
    """Fills in the model's defaults. Raises ValueError for values that cannot work whatever the model."""
    defaults = sampling_defaults(args.model)
    args.scale = defaults.guidance_scale if args.scale is None else args.scale
    args.steps = defaults.num_inference_steps if args.steps is None else args.steps
    if args.correction_norm is not None and args.correction_factor is not None:
        raise ValueError("--correction_factor and --correction_norm exclude each other: pass one of them")
    target = args.correction_target or "conditional"
    plain = (args.correction_norm, target, args.correction_start, args.correction_stop)
    if args.parity and plain != (None, "conditional", 0.0, 1.0):
        raise ValueError(
            "--parity is the reference's sampling, which has no --correction_norm, --correction_target latent, "
            "--correction_start or --correction_stop: leave them out"
        )
    for name in ("model", "revision", "variant", "negative_prompt"):
        check_text(f"--{name}", getattr(args, name) or "")


def read_prompts(args: argparse.Namespace) -> list[str]:
    """All prompts, those of --prompt first."""
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


def choose_device(args: argparse.Namespace) -> torch.device:
    """The device that --device or --gpuid names, else the first accelerator, else the CPU."""
    if args.gpuid is not None and args.device is not None:
        raise ValueError("--gpuid and --device exclude each other: pass one of them")
    if args.gpuid is not None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        if not 0 <= args.gpuid < torch.cuda.device_count():
            raise ValueError(f"--gpuid is {args.gpuid}; this machine has {torch.cuda.device_count()} CUDA device(s)")
        return torch.device("cuda", args.gpuid)
    if args.device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    return usable_device(args.device)


def choose_correction(args: argparse.Namespace) -> tuple[Path | None, CorrectionSettings]:
    """The weights that --dpt names, by default those of the base model where they are, and how they correct."""
    weights = Path(args.dpt) if args.dpt not in (None, "none") else None
    name = known_name(args.model)
    if args.lora and weights:
        raise ValueError("--dpt and --lora exclude each other: pass one of them")
    if args.dpt is None and not args.lora and name in DPT_WEIGHTS and DPT_WEIGHTS[name].exists():
        weights = DPT_WEIGHTS[name]
    if weights is not None and not weights.exists() and not is_hub_id(weights):
        raise ValueError(f"--dpt {weights} is not there; pass our folder, the released checkpoint, a hub id, or none")
    factor = args.correction_factor
    if weights is None and (factor or args.correction_norm or args.trace):
        raise ValueError("self-correction and --trace need an adapter: pass --dpt PATH")
    defaults, norm, target = sampling_defaults(args.model), args.correction_norm, "conditional"
    if weights and factor is None and not args.parity:  # a length, with the target that it was chosen with
        norm = defaults.correction_norm if norm is None else norm
        target = defaults.correction_target
    return weights, CorrectionSettings(
        factor=(0.5 if weights else 0.0) if factor is None else factor,
        norm=norm,
        target=args.correction_target or target,
        start=args.correction_start,
        stop=args.correction_stop,
        on_nan=args.on_nan,
    )


def describe_correction(weights: Path | None, correction: CorrectionSettings, lora: Path | None) -> str:
    """In words: which adapter and LoRA, and how far they correct."""
    if weights is None:
        return f"LoRA {lora}, without DPT weights" if lora else "without DPT weights"
    if not correction.active:
        return f"DPT weights {weights}, no self-correction"
    length = f"factor {correction.factor:g}" if correction.norm is None else f"norm {correction.norm:g}"
    return f"DPT weights {weights}, self-correction {length} ({correction.target})"


def describe_size(args: argparse.Namespace) -> str:
    """In words: how large pictures would be. Raises ValueError for a size or folder that cannot be drawn with."""
    try:
        config, _, _ = architecture(args.model)
    except ValueError as error:
        if Path(args.model).exists():
            raise
        return str(error)
    size = config.sample_size * VAE_SCALE_FACTOR
    height, width = (check_size(name, getattr(args, name) or size, VAE_SCALE_FACTOR) for name in ("H", "W"))
    return f"{height} x {width} pixels"


def job_key(record: dict) -> str:
    """What must agree for two pictures to be the same drawing."""
    return json.dumps([record[name] for name in ("prompt", "seed", "settings")], sort_keys=True)


def announce_limits(sd: StableDiffusion, prompts: list[str], negative_prompt: str) -> None:
    """Says what of the prompts the model will not understand."""
    for prompt in dict.fromkeys([*prompts, negative_prompt]):
        cut = sd.truncated_part(prompt)
        if cut:
            limit = sd.tokenizer.model_max_length
            print(f"note: {sd.name} reads {limit} tokens a prompt; not read of {prompt[:40]!r}...: {cut[:60]!r}...")
    if note := grammar_note(sd, prompts):
        print(f"note: {note}")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser, argv = make_parser(), sys.argv[1:] if argv is None else argv
    refuse_reference_flags(parser, argv)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, FloatingPointError) as error:
        return fail(error)
    except (torch.OutOfMemoryError, MemoryError):
        return fail(
            f"out of memory: lower --batch_size (now {args.batch_size}), --H and --W, or use --dtype float16; "
            f"finished pictures are in {args.outdir / 'samples'}"
        )
    except OSError as error:  # such as a full disk
        return fail(f"{error}; finished pictures are in {args.outdir / 'samples'}")
    except KeyboardInterrupt:
        print(f"\ninterrupted; finished pictures are in {args.outdir / 'samples'}", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    """Draws what the arguments ask for. Raises ValueError for bad input."""
    check_arguments(args)
    prompts = read_prompts(args)
    device = choose_device(args)
    dtype = args.dtype or ("float16" if device.type == "cuda" else "float32")
    per_prompt = args.n_samples * args.n_iter
    total = len(prompts) * per_prompt
    weights, correction = choose_correction(args)
    print(f"{args.model} on {device} in {dtype}, {describe_correction(weights, correction, args.lora)}")
    if args.gpuid is not None and device.type == "cpu":
        print("no CUDA device here: drawing on the CPU")
    print(f"{len(prompts)} prompt(s) x {per_prompt} = {total} picture(s)")
    if args.dry_run:
        print(f"{args.steps} DDIM steps, guidance scale {args.scale}, seeds from {args.seed}, into {args.outdir}")
        print(describe_size(args))
        return 0
    samples = args.outdir / "samples"
    try:
        samples.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=samples).close()
    except OSError as error:
        raise ValueError(f"--outdir {args.outdir} cannot be written: {error.strerror}") from error

    sd, scorer, common = load_models(args, weights, correction, device, dtype)
    announce_limits(sd, prompts, args.negative_prompt)
    if args.negative_prompt and args.scale <= 1:
        print("note: --negative_prompt has no effect at a --scale of 1 or less")
    if (args.trace or not args.skip_grid) and (lacking := without_glyph("".join(prompts[:GRID_ROWS]))):
        print(f"note: the labels' font has no {ascii(lacking)[:80]}, which are written so")
    jobs, count = all_jobs(prompts, args, common), total
    if args.skip_existing:
        there = {job_key(record) for record in read_metadata(args.outdir)}
        count = sum(job_key(job) not in there for job in jobs)
        jobs = (job for job in all_jobs(prompts, args, common) if job_key(job) not in there)
        print(f"{total - count} picture(s) are there already")
    rows = draw_jobs(sd, jobs, count, args, scorer=scorer, correction=correction)
    if rows and not args.skip_grid:
        labelled = [(prompts[row], images) for row, images in sorted(rows.items())]
        path = save_new(make_grid(labelled), numbered(args.outdir, "grid-{:04d}.png"))
        print(f"grid of the first {len(labelled)} prompt(s): {path}")
    print(f"{count} picture(s) in {samples}")
    return 0


def load_models(
    args: argparse.Namespace, weights: Path | None, correction: CorrectionSettings, device: torch.device, dtype: str
) -> tuple[StableDiffusion, Scorer | None, dict]:
    """The base model with its LoRA, the adapter, and what every picture's record says of them and of the sampling."""
    sd = load_stable_diffusion(
        args.model,
        revision=args.revision,
        variant=args.variant,
        local_files_only=args.local_files_only,
        dtype=DTYPES[dtype],
        device=device,
    )
    _, h, w = sd.latent_shape(args.H, args.W)
    checkpoint = load_checkpoint(weights, local_files_only=args.local_files_only) if weights else None
    scorer = checkpoint.attach(sd) if checkpoint else None
    if args.lora:
        load_external_lora(sd, args.lora)
    settings = {
        "model": args.model,
        "weights": weights_fingerprint(sd.text_encoder, sd.vae, sd.unet),
        "dpt": weights_fingerprint(checkpoint.adapter) if checkpoint else None,
        "correction": asdict(correction) if correction.active else None,
        "parity": args.parity,
        "negative_prompt": args.negative_prompt,
        "scale": args.scale,
        "steps": args.steps,
        "sampler": type(sd.scheduler).__name__,
        "height": h * sd.vae_scale_factor,
        "width": w * sd.vae_scale_factor,
        "dtype": dtype,
    }
    sources = {"dpt_source": checkpoint.source if checkpoint else None, "lora": str(args.lora) if args.lora else None}
    return sd, scorer, {"settings": settings} | sources


def all_jobs(prompts: list[str], args: argparse.Namespace, common: dict) -> Iterator[dict]:
    """What is to be drawn, in order: prompt, seed, row of the grid, the file's number, and what all share."""
    per_prompt = args.n_samples * args.n_iter
    for row, prompt in enumerate(prompts):
        for k in range(per_prompt):
            yield {"prompt": prompt, "seed": args.seed + k, "row": row, "number": row * per_prompt + k} | common


def draw_jobs(
    sd: StableDiffusion,
    jobs: Iterator[dict],
    count: int,
    args: argparse.Namespace,
    *,
    scorer: Scorer | None,
    correction: CorrectionSettings,
) -> dict[int, list]:
    """Draws and saves all jobs, `count` of them, batch by batch, and returns the pictures of the grid's rows."""
    versions = {name: version(name) for name in ("torch", "diffusers", "transformers")} | {"dpt": dpt.__version__}
    rows: dict[int, list] = {}
    batches = iter(lambda: list(itertools.islice(jobs, args.batch_size)), [])
    num_batches = math.ceil(count / args.batch_size)
    arms = {"corrected": correction} | ({"uncorrected": CorrectionSettings(factor=0.0)} if args.trace else {})
    traces = []
    with tqdm(total=num_batches * args.steps * len(arms), unit="step", desc="drawing", disable=not count) as bar:
        for batch in batches:
            arm_traces = {arm: [] for arm in arms}
            images, *_ = [
                draw(
                    sd,
                    [job["prompt"] for job in batch],
                    [job["seed"] for job in batch],
                    negative_prompts=[args.negative_prompt] * len(batch),
                    guidance_scale=args.scale,
                    num_inference_steps=args.steps,
                    height=args.H,
                    width=args.W,
                    scorer=scorer,
                    correction=settings,
                    parity=args.parity,
                    trace=arm_traces[arm] if args.trace else None,
                    on_step=lambda step, latents: bar.update(),
                )
                for arm, settings in arms.items()
            ]
            traces += image_traces(batch, arm_traces)
            for job, image in zip(batch, images, strict=True):
                save_picture(job, image, args, versions)
                row = rows.setdefault(job["row"], []) if job["row"] < GRID_ROWS else []
                if len(row) < GRID_COLUMNS:
                    row.append(image)
    if args.trace and traces:
        write_traces(args.outdir, traces)
    return rows


def save_picture(job: dict, image: np.ndarray, args: argparse.Namespace, versions: dict[str, str]) -> None:
    """Writes a picture with its record in it, and adds the record to the metadata file."""
    record = {name: job[name] for name in ("prompt", "seed", "settings", "dpt_source", "lora")}
    record |= {"versions": versions}
    pattern = compbench_stem(job["prompt"]) + ".png" if args.compbench else "{:05d}.png"
    candidates = numbered(args.outdir / "samples", pattern, job["number"])
    chunks = record | {name: job["settings"][name] for name in ("model", "weights")}
    chunks |= {"seed": str(job["seed"])} | {name: job[name] or "none" for name in ("dpt_source", "lora")}
    path = save_new(Image.fromarray(image), candidates, chunks)
    append_metadata(args.outdir, {"file": str(path.relative_to(args.outdir))} | record)


if __name__ == "__main__":
    sys.exit(main())
