"""The output folder of txt2img.py: pictures with their records in them, jobs already done, grids."""

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import dpt
from dpt.backbones.stable_diffusion import weights_fingerprint
from dpt.choosing_rules import rounds, with_numbers
from dpt.device import DTYPES
from dpt.drawing import Artist, Drawing
from dpt.images import append_metadata, compbench_stem, make_grid, numbered, read_metadata, save_new
from dpt.sampling_settings import Sampling
from dpt.score_traces import trace_of, write_traces

GRID_ROWS, GRID_COLUMNS = 12, 8


def open_artist(
    args: argparse.Namespace, weights: Path | None, sampling: Sampling, device, dtype: str
) -> tuple[Artist, dict]:
    """The artist that txt2img.py's arguments name, and the part of records that is common.

    Raises:
        ValueError: weights that cannot be used, or a size that the model cannot draw.
    """
    artist = Artist.load(
        args.model,
        weights,
        lora=args.lora,
        device="cpu" if args.offload else device,
        no_t5=args.no_t5,
        local_files_only=args.local_files_only,
        revision=args.revision,
        variant=args.variant,
        dtype=DTYPES[dtype],
    )
    sd, checkpoint = artist.sd, artist.checkpoint
    _, h, w = sd.latent_shape(sampling.height, sampling.width)
    settings = {
        "model": args.model,
        "weights": weights_fingerprint(*sd.parts.values()),
        "dpt": weights_fingerprint(checkpoint.adapter) if checkpoint else None,
        "dtype": dtype,
        **asdict(sampling),
        **sd.effective(sampling),
        "height": h * sd.vae_scale_factor,
        "width": w * sd.vae_scale_factor,
    }
    if args.offload:
        artist.offload(args.offload, device)
    sources = {"dpt_source": checkpoint.source if checkpoint else None, "lora": str(args.lora) if args.lora else None}
    return artist, {"settings": settings} | sources


class Gallery:
    """A folder of pictures.

    Args:
        compbench: name files as T2I-CompBench does.
    """

    def __init__(self, folder: Path, *, compbench: bool = False):
        self.folder, self.compbench = folder, compbench
        self.versions = {name: version(name) for name in ("torch", "diffusers", "transformers")}
        self.versions["dpt"] = dpt.__version__

    def key(self, record: dict) -> str:
        """A text that is equal for records of the same drawing."""
        settings = asdict(Sampling()) | record["settings"]  # a setting that is new has its default in older records
        return json.dumps([record["prompt"], record["seed"], settings], sort_keys=True)

    def keys(self) -> set[str]:
        """The keys of the pictures that are there. Raises ValueError naming a damaged line of the metadata file."""
        return {self.key(record) for record in read_metadata(self.folder)}

    def save(self, job: dict, drawing: Drawing) -> None:
        """Writes a picture with its record in it, and adds the record to the metadata file."""
        record = {name: job[name] for name in ("prompt", "seed", "settings", "dpt_source", "lora")}
        if drawing.candidates:
            record |= {"kept_seed": drawing.seed, "corrected_from": drawing.corrected_from}
            record |= {"candidates": drawing.candidates}
        record |= {"cost": drawing.cost, "versions": self.versions}
        pattern = compbench_stem(job["prompt"]) + ".png" if self.compbench else "{:05d}.png"
        candidates = numbered(self.folder / "samples", pattern, job["number"])
        chunks = record | {name: job["settings"][name] for name in ("model", "weights")}
        chunks |= {"seed": str(job["seed"])} | {name: job[name] or "none" for name in ("dpt_source", "lora")}
        path = save_new(Image.fromarray(drawing.image), candidates, chunks)
        append_metadata(self.folder, {"file": str(path.relative_to(self.folder))} | record)

    def save_grid(self, rows: list[tuple[str, list[np.ndarray]]]) -> Path:
        """A labelled grid of prompts and their pictures; its path."""
        return save_new(make_grid(rows), numbered(self.folder, "grid-{:04d}.png"))


def all_jobs(prompts: list[str], seed: int, per_prompt: int, common: dict) -> Iterator[dict]:
    """The pictures to draw, in order: prompt, seed, row of the grid, the file's number, and what all share."""
    for row, prompt in enumerate(prompts):
        for k in range(per_prompt):
            yield {"prompt": prompt, "seed": seed + k, "row": row, "number": row * per_prompt + k} | common


def draw_all(
    artist: Artist,
    gallery: Gallery,
    jobs: Iterator[dict],
    count: int,
    sampling: Sampling,
    *,
    batch_size: int,
    trace: bool = False,
) -> dict[int, list[np.ndarray]]:
    """Draws and saves all jobs, `count` of them, batch by batch, and returns the pictures of the grid's rows.

    Args:
        trace: write the score against the step too, beside that without correction.
    """
    arms = {"corrected" if sampling.corrects else "uncorrected": sampling}
    if trace and sampling.corrects:
        arms["uncorrected"] = sampling.without_correction()
    rows, traces = {}, []
    batches = iter(lambda: list(itertools.islice(jobs, batch_size)), [])
    schedule = rounds(sampling.num_inference_steps, sampling.candidates, sampling.choose_at)
    sizes = [min(batch_size, count - first) for first in range(0, count, batch_size)]
    total = len(arms) * sum(
        math.ceil(size * number / batch_size) * (part.stop - part.first)
        for size in sizes
        for part, number in with_numbers(schedule, sampling.candidates)
    )
    with tqdm(total=total, unit="step", desc="drawing", disable=not count) as bar:
        for batch in batches:
            texts, seeds = [job["prompt"] for job in batch], [job["seed"] for job in batch]
            options = {"batch_size": batch_size, "trace": trace, "on_step": lambda step, record: bar.update()}
            drawn = {arm: artist.draw(texts, seeds, settings, **options) for arm, settings in arms.items()}
            if trace:
                traces += [trace_of(job, {arm: drawn[arm][b] for arm in arms}) for b, job in enumerate(batch)]
            for job, drawing in zip(batch, next(iter(drawn.values())), strict=True):
                gallery.save(job, drawing)
                row = rows.setdefault(job["row"], []) if job["row"] < GRID_ROWS else []
                if len(row) < GRID_COLUMNS:
                    row.append(drawing.image)
    if traces:
        write_traces(gallery.folder, traces)
    return rows
