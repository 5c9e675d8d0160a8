"""A folder of pictures that txt2img.py draws: files with their records in them, what is there already, grids."""

import argparse
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

import dpt
from dpt.checkpoint import load_checkpoint
from dpt.drawing import Artist, Drawing
from dpt.images import append_metadata, compbench_stem, make_grid, numbered, read_metadata, save_new
from dpt.lora import load_external_lora
from dpt.settings import Sampling
from dpt.stable_diffusion import DTYPES, load_stable_diffusion, weights_fingerprint


def open_artist(
    args: argparse.Namespace, weights: Path | None, sampling: Sampling, device, dtype: str
) -> tuple[Artist, dict]:
    """The artist that txt2img.py's arguments name, and what every picture's record says of models and sampling.

    Raises:
        ValueError: weights that cannot be used, or a size that the model cannot draw.
    """
    sd = load_stable_diffusion(
        args.model,
        revision=args.revision,
        variant=args.variant,
        local_files_only=args.local_files_only,
        dtype=DTYPES[dtype],
        device=device,
    )
    _, h, w = sd.latent_shape(sampling.height, sampling.width)
    checkpoint = load_checkpoint(weights, local_files_only=args.local_files_only) if weights else None
    scorer = checkpoint.attach(sd) if checkpoint else None
    if args.lora:
        load_external_lora(sd, args.lora)
    settings = {
        "model": args.model,
        "weights": weights_fingerprint(sd.text_encoder, sd.vae, sd.unet),
        "dpt": weights_fingerprint(checkpoint.adapter) if checkpoint else None,
        "dtype": dtype,
        **asdict(sampling),
        "height": h * sd.vae_scale_factor,
        "width": w * sd.vae_scale_factor,
    }
    sources = {"dpt_source": checkpoint.source if checkpoint else None, "lora": str(args.lora) if args.lora else None}
    return Artist(sd, scorer), {"settings": settings} | sources


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
        """What must agree for two pictures to be the same drawing."""
        settings = asdict(Sampling()) | record["settings"]  # a setting that is new has its default in older records
        return json.dumps([record["prompt"], record["seed"], settings], sort_keys=True)

    def keys(self) -> set[str]:
        """The keys of what is there. Raises ValueError naming a line of the metadata file that is damaged."""
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
